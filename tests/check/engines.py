"""A small engine with an honest cache and honest KV events, for tests of tier T3; subclasses lie in one way each."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

from picker.check.engine import Engine, Listener
from picker.check.verdict import Trace
from tiny_tokenizers import CHAT_TEMPLATE, spec

Json = dict[str, Any]

SIZE = 16


class HonestEngine:
    """Caches whole blocks of prompts for ever. folder: its tokenizer and chat template, or None: a token a byte."""

    size = SIZE

    def __init__(self, folder: Path | None = None) -> None:
        self._numbers = itertools.count(1000)
        self._batches = itertools.count()
        self.hashes: dict[tuple[int, ...], int] = {}
        self.published: list[tuple[int, bytes]] = []
        self.queries = self.hits = 0
        self._local: Any = None
        if folder is not None:
            from picker.check.local_text import LocalText

            self._local = LocalText(folder)

    # --- what it says ---

    def sources(self, events: str, replay: str) -> Json:
        return {
            "0": {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": events, "replay_endpoint": replay}
        }

    def settings(self) -> Json:
        return {"block_size": str(SIZE), "enable_prefix_caching": "True"}

    def metrics(self) -> dict[str, float]:
        return {
            "vllm:num_requests_waiting": 0.0,
            "vllm:num_requests_running": 0.0,
            "vllm:kv_cache_usage_perc": 0.1,
            "vllm:prefix_cache_queries_total": float(self.queries),
            "vllm:prefix_cache_hits_total": float(self.hits),
        }

    def ids(self, text: str) -> list[int]:
        return list(text.encode()) if self._local is None else self._local.ids(text)

    def chat_ids(self, messages: list[Json]) -> list[int] | None:
        return None if self._local is None else self.ids(self._local.rendered(messages))

    def usage(self, prompt: int, cached: int) -> Json:
        return {"prompt_tokens": prompt, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": cached}}

    # --- what it does ---

    def run(self, ids: list[int]) -> tuple[int, list[Json]]:
        """(cached tokens, events)"""
        blocks = [tuple(ids[: end + SIZE]) for end in range(0, len(ids) - SIZE + 1, SIZE)]
        known = next((at for at, block in enumerate(blocks) if block not in self.hashes), len(blocks))
        cached = min(known * SIZE, (len(ids) - 1) // SIZE * SIZE)
        self.queries += len(ids)
        self.hits += cached
        new = blocks[known:]
        for block in new:
            self.hashes[block] = next(self._numbers)
        if not new:
            return cached, []
        parent = None if not known else self.hashes[blocks[known - 1]]
        return cached, [self.store([self.hashes[each] for each in new], parent, ids[known * SIZE : len(new[-1])])]

    def store(self, hashes: Sequence[int], parent: int | None, ids: list[int]) -> Json:
        return {
            "type": "BlockStored",
            "block_hashes": list(hashes),
            "parent_block_hash": parent,
            "token_ids": ids,
            "block_size": self.size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        }

    def batch(self, events: list[Json]) -> tuple[int, bytes]:
        number = next(self._batches)
        made = number, msgspec.msgpack.encode([float(number), events, 0])
        self.published.append(made)
        return made

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        """What is answered to a request for a replay, the end marker last."""
        return [*((number, payload) for number, payload in self.published if number >= start), (-1, b"")]


class Served:
    """An engine on real sockets."""

    def __init__(self, engine: HonestEngine, context: zmq.asyncio.Context) -> None:
        self.engine = engine
        self.pub, self.router = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
        self.pub.setsockopt(zmq.XPUB_VERBOSER, 1)
        self.subscribed = 0  # times
        self.events, self.replay = (_bound(socket) for socket in (self.pub, self.router))

    def routes(self, app: web.Application) -> None:
        app.router.add_get("/kv_event_sources", self._sources)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._complete)

    async def _sources(self, request: web.Request) -> web.Response:
        return web.json_response(self.engine.sources(self.events, self.replay))

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def _metrics(self, request: web.Request) -> web.Response:
        labels = ",".join(f'{name}="{value}"' for name, value in self.engine.settings().items())
        lines = [f"vllm:cache_config_info{{{labels}}} 1.0"]
        lines += [f'{name}{{engine="0"}} {value}' for name, value in self.engine.metrics().items()]
        return web.Response(text="\n".join(lines) + "\n")

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        found = self.engine.ids(body["prompt"]) if "prompt" in body else self.engine.chat_ids(body["messages"])
        return web.json_response({"tokens": found}) if found is not None else web.json_response({}, status=404)

    async def _complete(self, request: web.Request) -> web.Response:
        ids = self.engine.ids((await request.json())["prompt"])
        cached, events = self.engine.run(ids)
        if events:
            number, payload = self.engine.batch(events)
            await self.pub.send_multipart([b"", number.to_bytes(8, "big"), payload])
        return web.json_response({"choices": [{"text": "x"}], "usage": self.engine.usage(len(ids), cached)})

    async def hear_subscriptions(self) -> None:
        while True:
            self.subscribed += (await self.pub.recv())[:1] == b"\x01"

    async def serve_replays(self) -> None:
        while True:
            client, _, start = await self.router.recv_multipart()
            for number, payload in self.engine.replay(int.from_bytes(start, "big")):
                await self.router.send_multipart([client, b"", b"", number.to_bytes(8, "big", signed=True), payload])


class Subscriber(Engine):
    """The checker's view of an engine that is served here, whose publisher hears of a subscription at no known time."""

    served: Served
    own: str  # its URL here, which a test may change for another engine's

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Listener]:
        before = self.served.subscribed
        async with super().listening() as listener:
            while self.url == self.own and self.served.subscribed == before:  # noqa: ASYNC110 - zmq's thread does it
                await asyncio.sleep(0)
            yield listener


def _bound(socket: zmq.asyncio.Socket) -> str:
    return f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"


@asynccontextmanager
async def under_test(engine: HonestEngine, tokenizer: Path | None = None) -> AsyncIterator[Engine]:
    """The checker's view of an engine."""
    context = zmq.asyncio.Context()
    served, app = Served(engine, context), web.Application()
    served.routes(app)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            tasks = [group.create_task(served.serve_replays()), group.create_task(served.hear_subscriptions())]
            checked = Subscriber(
                f"http://127.0.0.1:{port}",
                session,
                context,
                Trace(),
                tokenizer=tokenizer,
                patience=1.0,
                quiet=0.1,
                settle=0.0,
            )
            checked.served, checked.own = served, checked.url
            yield checked
            for task in tasks:
                task.cancel()
    finally:
        await runner.cleanup()
        context.destroy(linger=0)


def write_model(folder: Path, template: str = CHAT_TEMPLATE, kind: str = "qwen") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec(kind)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    return folder


# --- engines that lie --------------------------------------------------------------------------------------

LIARS: dict[str, tuple[Callable[[Path], HonestEngine], frozenset[str]]] = {}


def caught_by(name: str, *also: str) -> Callable[[type[HonestEngine]], type[HonestEngine]]:
    """also: further checks that cannot but fail with it."""

    def register(liar: type[HonestEngine]) -> type[HonestEngine]:
        assert name not in LIARS, name
        LIARS[name] = liar, frozenset(also)
        return liar

    return register


@caught_by(
    *("KV-1.published", "KV-1.heard", "KV-2.blocks", "KV-2.tokens", "KV-2.chain", "KV-2.same", "KV-3.cached"),
    "KV-4.replay",
)
class EventsOff(HonestEngine):
    def sources(self, events: str, replay: str) -> Json:
        return {}


@caught_by("KV-1.caching", "KV-3.cached")
class CachingOff(HonestEngine):
    """Its events are those of a cache that nobody reads."""

    def settings(self) -> Json:
        return super().settings() | {"enable_prefix_caching": "False"}

    def usage(self, prompt: int, cached: int) -> Json:
        return super().usage(prompt, 0)


@caught_by("KV-1.heard", "KV-2.blocks", "KV-2.tokens", "KV-2.chain", "KV-3.cached", "KV-4.replay")
class Silent(HonestEngine):
    def run(self, ids: list[int]) -> tuple[int, list[Json]]:
        return super().run(ids)[0], []


@caught_by("KV-2.blocks")
class OtherBlockSize(HonestEngine):
    """Says in its metrics what is not so."""

    def settings(self) -> Json:
        return super().settings() | {"block_size": "32"}


@caught_by("KV-2.tokens", "KV-1.heard", "KV-2.chain", "KV-3.cached")
class OtherIds(HonestEngine):
    def store(self, hashes: Sequence[int], parent: int | None, ids: list[int]) -> Json:
        return super().store(hashes, parent, [each + 1 for each in ids])


@caught_by("KV-2.chain")
class BreaksChains(HonestEngine):
    """Tells every prompt from its beginning, under hashes that depend on all of it."""

    def run(self, ids: list[int]) -> tuple[int, list[Json]]:
        cached, events = super().run(ids)
        if not events:
            return cached, []
        whole = ids[: len(ids) // SIZE * SIZE]
        named = [next(self._numbers) for _ in range(len(whole) // SIZE)]
        return cached, [self.store(named, None, whole)]


@caught_by("KV-2.same", "KV-3.cached", "KV-3.witness", "KV-2.chain")
class Forgets(HonestEngine):
    """Its hashes have a seed of every request's own: nothing is found again."""

    def run(self, ids: list[int]) -> tuple[int, list[Json]]:
        self.hashes.clear()
        return super().run(ids)

    def usage(self, prompt: int, cached: int) -> Json:
        return {"prompt_tokens": prompt, "completion_tokens": 1}


@caught_by("KV-3.cached")
class PromisesMore(HonestEngine):
    def usage(self, prompt: int, cached: int) -> Json:
        return super().usage(prompt, cached // 2)


@caught_by("KV-3.witness")
class SaysNothingOfHits(HonestEngine):
    """Answers without details, and a counter that has another name."""

    def usage(self, prompt: int, cached: int) -> Json:
        return {"prompt_tokens": prompt, "completion_tokens": 1}

    def metrics(self) -> dict[str, float]:
        return {name.replace("prefix_cache_hits", "kv_hits"): value for name, value in super().metrics().items()}


@caught_by("KV-3.load")
class Renamed(HonestEngine):
    def metrics(self) -> dict[str, float]:
        return {name.replace("requests_waiting", "waiting_requests"): each for name, each in super().metrics().items()}


@caught_by("KV-4.replay")
class ReplaysSomethingElse(HonestEngine):
    def replay(self, start: int) -> list[tuple[int, bytes]]:
        return [(number, payload[:-1] + b"\x01" if payload else b"") for number, payload in super().replay(start)]


class NeverEnds(HonestEngine):
    """A replay whose end nobody is told."""

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        return super().replay(start)[:-1]


class BadBatches(HonestEngine):
    """Publishes what is no batch."""

    def batch(self, events: list[Json]) -> tuple[int, bytes]:
        return next(self._batches), b"\xc1"


class HalfBlocks(HonestEngine):
    """Blocks that their tokens do not fill."""

    size = SIZE // 2


LIARS["KV-5.tokenizer"] = (
    lambda folder: HonestEngine(write_model(folder / "other", kind="llama3")),
    frozenset({"KV-5.template"}),
)
LIARS["KV-5.template"] = (
    lambda folder: HonestEngine(write_model(folder / "other", template="{{ messages[0].content }}")),
    frozenset(),
)
