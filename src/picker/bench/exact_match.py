"""A chat request matched exactly: rendered, hashed, walked, and where its known part ends tokenised.

What endpoints hold was told by KV events, which came the way real ones do: bytes of batches, a stream, the judging of
generated blocks, the index. Beside it the reference: every prompt tokenised (`--exact-by tokens`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from picker.bench.block_index import BUDGET, HOLDERS, SECRET
from picker.bench.chat_model import Conversation, Prose, made_model
from picker.bench.engine_events import BLOCK
from picker.prefix.exact import Exact
from picker.prefix.precise import PreciseIndex
from picker.prefix.spellers import ByBytes, ByTokens, Speller
from picker.prefix.spelling import PrefixHasher
from picker.sources.ingest import Ingest
from picker.sources.kv_stream import Resumed, Stream
from picker.tokenizers.model import LocalModel
from picker.tokenizers.reader import Reader
from picker.types import BlocksRemoved, BlocksStored, CacheCleared, Call, EventsChanged, Reading, Request
from picker.wire.kv_events import Stored, encode_batch

PROMPT_BYTES = {"32k": 32_768, "400k": 400_000}

_CHUNK = 32  # blocks told of at once
_PATIENCE = 60.0  # seconds; nothing is given up here
_REFERENCES = 24  # prompts that the reference reads, at most: one of 400 KB takes it a tenth of a second


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what the endpoint that knows its conversation holds of it: all blocks of the prompt before."""

    call: Call
    ids: list[int]

    @property
    def blocks(self) -> int:
        return len(self.ids) // BLOCK


class Gateway:
    """What reads requests and knows engines' blocks, in one of the two modes."""

    def __init__(self, model: LocalModel, index: PreciseIndex, endpoints: int, *, tokens: bool) -> None:
        hasher = PrefixHasher(SECRET)
        speller: Speller = ByTokens(hasher) if tokens else ByBytes(hasher, lambda name: model.vocabulary)
        whole = model.whole(remembered=0) if tokens else None  # prompts of conversations that are new to it
        self.reader = Reader(hasher, prompts=model.prompts, whole=whole, budget=_PATIENCE)
        self.known = Exact(index, speller, endpoints)
        self._streams = [Stream(f"endpoint-{row}") for row in range(endpoints)]
        self._rows = {stream.name: row for row, stream in enumerate(self._streams)}
        judge = None if tokens else model.canonical.check
        self._ingest = Ingest(lambda name: model.vocabulary, lambda name: judge)
        for stream in self._streams:
            for fact in stream.connected(replay=False, now=0.0):
                self._learn(fact)

    async def hear(self, payloads: Sequence[tuple[int, bytes]]) -> None:
        """Take batches of events. payloads: (row, batch)."""
        async with asyncio.TaskGroup() as group:
            worker = group.create_task(self._ingest.run(self._learn))
            await asyncio.sleep(0)
            for row, payload in payloads:
                stream = self._streams[row]
                for fact in stream.receive(stream.stats.batches, payload, now=0.0):
                    assert not isinstance(fact, Resumed), "nothing was saved"
                    self._ingest.take(fact)
            while not self._ingest.idle:  # noqa: ASYNC110 - it has no event for that
                await asyncio.sleep(0.001)
            worker.cancel()

    def _learn(self, fact: object) -> None:
        assert isinstance(fact, BlocksStored | BlocksRemoved | CacheCleared | EventsChanged)
        self.known.apply(self._rows[fact.name], fact)

    async def time(self, asked: Asked) -> tuple[float, float]:
        """CPU seconds of reading a request and of finding out who holds it. Raises ValueError where that is wrong."""
        begun = time.process_time()
        reading = await self.reader.read(asked.call)
        read = time.process_time()
        found = self.known.match(reading, _REQUEST)
        done = time.process_time()
        if not isinstance(reading, Reading) or found is None or found.cached[0] != asked.blocks * BLOCK:
            raise ValueError("a prompt was not found where all of its blocks but the last are")
        return read - begun, done - read


_REQUEST = Request(0, None, 0.0)


@dataclass(frozen=True, slots=True)
class Chats:
    """A model, and by size what it is asked."""

    model: LocalModel
    asked: dict[str, list[Asked]]

    @classmethod
    def made(cls, count: int = 4) -> Chats:
        """So many of each size. Raises ConfigError without the extra `exact`."""
        model = made_model()
        asked = {name: [_asked(model, size, seed) for seed in range(count)] for name, size in PROMPT_BYTES.items()}
        return cls(model, asked)


def exact_matching(
    chats: Chats, endpoints: int, repeats: int, index: PreciseIndex, rng: np.random.Generator
) -> dict[str, Any]:
    """Medians of CPU time, for each size of a prompt; read: of that, up to the walk. tokens: the reference.

    index: what else the endpoints hold; the reference has one without.
    """
    return asyncio.run(_measured(chats, endpoints, repeats, index, rng))


def nothing_matched() -> dict[str, Any]:
    """The figures where there is nothing to measure with."""
    keys = ("p50_us", "read_p50_us", "tokens_p50_us", "matched_blocks")
    return {f"exact_{name}_{key}": None for name in PROMPT_BYTES for key in keys} | {"judge_p50_us": None}


async def _measured(
    chats: Chats, endpoints: int, repeats: int, index: PreciseIndex, rng: np.random.Generator
) -> dict[str, Any]:
    by_bytes = Gateway(chats.model, index, endpoints, tokens=False)
    by_tokens = Gateway(chats.model, PreciseIndex(BUDGET, endpoints), endpoints, tokens=True)
    figures: dict[str, Any] = {}
    for name, asked in chats.asked.items():
        payloads = [payload for each in asked for payload in told(each, endpoints, rng)]
        for gateway in (by_bytes, by_tokens):
            await gateway.hear(payloads)
        read, walk = await _medians(by_bytes, asked, repeats)
        reference = await _medians(by_tokens, asked, min(repeats, _REFERENCES))
        figures |= {
            f"exact_{name}_p50_us": round(read + walk, 1),
            f"exact_{name}_read_p50_us": round(read, 1),
            f"exact_{name}_tokens_p50_us": round(sum(reference), 1),
            f"exact_{name}_matched_blocks": min(each.blocks for each in asked),
        }
    for gateway in (by_bytes, by_tokens):
        gateway.reader.close()
    return figures | {"judge_p50_us": _judging(chats)}


def _judging(chats: Chats) -> float:
    """Microseconds that a thread takes to judge one block of generated tokens, before the index hears of it."""
    ids = next(iter(chats.asked.values()))[0].ids
    taken = []
    for start in range(4 * BLOCK, len(ids) - BLOCK, BLOCK):
        begun = time.process_time()
        chats.model.canonical.check(ids[start - 4 * BLOCK : start], ids[start : start + BLOCK])
        taken.append(time.process_time() - begun)
    return round(float(np.median(taken)) * 1e6, 1)


async def _medians(gateway: Gateway, asked: Sequence[Asked], repeats: int) -> tuple[float, float]:
    """Microseconds of reading and of matching, in turns of the prompts."""
    await gateway.time(asked[0])
    taken = np.array([await gateway.time(asked[number % len(asked)]) for number in range(max(repeats, 1))])
    whole = taken.sum(axis=1)
    share = float(np.median(taken[:, 0] / whole))
    median = float(np.median(whole)) * 1e6
    return median * share, median * (1 - share)


def _asked(model: LocalModel, size: int, seed: int) -> Asked:
    conversation = Conversation.of(size, Prose(seed=size + seed))
    held = model.prompts.read(conversation.before())
    return Asked(conversation.call(), model.tokenizer.encode(held.data.decode()))


def told(asked: Asked, endpoints: int, rng: np.random.Generator) -> Iterator[tuple[int, bytes]]:
    """By row, that everybody holds the beginning of a prompt, some more of it and one all."""
    hashes = rng.integers(0, 2**63, size=asked.blocks).tolist()
    for row in range(endpoints):
        least = asked.blocks // 8
        held = asked.blocks if not row else int(rng.integers(least, asked.blocks)) if row < HOLDERS else least
        for start in range(0, held, _CHUNK):
            stop = min(start + _CHUNK, held)
            event = Stored(
                tuple(hashes[start:stop]),
                hashes[start - 1] if start else None,
                tuple(asked.ids[start * BLOCK : stop * BLOCK]),
                BLOCK,
                medium="GPU",
                group=0,
                kind="full_attention",
            )
            yield row, encode_batch(0.0, [event], 0)
