"""The source of KV events on a real vLLM server: what it tells of the cache is what is in it, whatever happens."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import msgspec

from picker.sources.kv_events import KvEventSource
from picker.sources.scrape import AiohttpFetch
from picker.types import BlocksRemoved, BlocksStored, CacheCleared, Endpoint, EventsChanged, EventState, Fact
from real_vllm.listener import replay
from real_vllm.pod import Pod
from real_vllm.relay import event_relay
from real_vllm.script import COMPLETIONS, RESET, completion, ids

_PATIENCE = 30.0  # seconds


@dataclass(slots=True)
class Belief:
    """What a server's cache holds, by the facts about it: hash -> copies."""

    source: KvEventSource
    copies: Counter[int] = field(default_factory=Counter)
    states: list[EventState] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, fact: Fact) -> None:
        match fact:
            case EventsChanged(state=state):
                self.states.append(state)
                self.copies.clear()
            case CacheCleared():
                self.copies.clear()
            case BlocksStored(hashes=hashes):
                self.copies.update(hashes)
            case BlocksRemoved(hashes=hashes):
                self.copies.subtract(hashes)
        self.news.set()

    async def settled(self, pod: Pod) -> None:
        """Wait until this is what the server itself says it has published. Raises TimeoutError."""
        truth = await asyncio.to_thread(published, pod)
        async with asyncio.timeout(_PATIENCE):
            while +self.copies != truth:
                self.news.clear()
                await self.news.wait()


def published(pod: Pod) -> Counter[int]:
    """The cache by all the events since the server's start, plainly read."""
    copies: Counter[int] = Counter()
    for frame in replay(pod)[0]:
        for event in msgspec.msgpack.decode(frame.payload)[1]:
            match event["type"]:
                case "AllBlocksCleared":
                    copies.clear()
                case "BlockStored":
                    copies.update(event["block_hashes"])
                case "BlockRemoved":
                    copies.subtract(event["block_hashes"])
    return +copies


@asynccontextmanager
async def following(pod: Pod) -> AsyncIterator[Belief]:
    async with AiohttpFetch(timeout=2.0) as fetch, asyncio.TaskGroup() as group:
        source = KvEventSource(fetch, clock=time.monotonic, rng=random.Random(1), retry=0.1, max_retry=0.5)
        belief = Belief(source)
        source.add(Endpoint(pod.address, pod.address))
        running = group.create_task(source.run(belief.hear))
        try:
            yield belief
        finally:
            running.cancel()


async def ask(pod: Pod, *prompts: list[int]) -> None:
    async with httpx.AsyncClient(base_url=pod.url, timeout=60.0) as client:
        for prompt in prompts:
            (await client.post(COMPLETIONS, json=completion("", prompt).body)).raise_for_status()


async def test_what_was_before_is_learned_from_the_replay_and_what_follows_as_it_comes(pod: Pod) -> None:
    await ask(pod, ids(1, 300))
    async with following(pod) as belief:
        await belief.settled(pod)
        await ask(pod, *(ids(start, 900) for start in range(2, 9)), ids(2, 32), ids(2, 32))
        await belief.settled(pod)
    assert belief.states == [EventState.WHOLE]
    assert sum(belief.copies.values()) > 100


async def test_lost_batches_are_asked_for_again(pod: Pod) -> None:
    async with event_relay(pod) as wire, following(pod) as belief:
        await ask(pod, ids(1, 300))
        await belief.settled(pod)
        wire.losing = True
        async with httpx.AsyncClient(base_url=pod.url) as client:
            (await client.post(RESET)).raise_for_status()
        await ask(pod, ids(2, 300), ids(3, 700))
        await asyncio.to_thread(replay, pod)  # answered after everything before it has been published
        wire.losing = False
        await ask(pod, ids(4, 300))
        await belief.settled(pod)
        assert wire.lost == 3
        assert belief.source.stats[pod.address].gaps == 1
    assert belief.states == [EventState.WHOLE]


async def test_a_restarted_server_is_followed_from_its_start(pod: Pod) -> None:
    async with following(pod) as belief:
        await ask(pod, ids(1, 300))
        await belief.settled(pod)
        await asyncio.to_thread(pod.stop, kill=True)
        pod.start()
        await asyncio.to_thread(pod.wait)
        await ask(pod, ids(2, 100))
        await belief.settled(pod)
    assert len(+belief.copies) == 3
    assert belief.states[-1] is EventState.WHOLE
