"""What is checked at tier T3: an engine whose KV events picker is to follow, by its own ports.

Owns connections, waiting and how batches are read; judges nothing. Reads by rules of its own, none of picker's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import zmq
import zmq.asyncio

from picker.check.verdict import Trace

Json = dict[str, Any]

_END = b"\xff" * 8
_LOCAL = ("*", "0.0.0.0", "::", "[::]")
_WORDS = ("river", "stone", "lamp", "cloud", "seven", "under", "paper", "window", "green", "march", "often", "quiet")
_SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Batch:
    """One published batch. problem: why it cannot be read, None where it can."""

    number: int
    payload: bytes = field(repr=False)
    events: tuple[Json, ...] = ()
    problem: str | None = None

    def stored(self) -> Iterator[Json]:
        return (event for event in self.events if event.get("type") == "BlockStored" and event["block_hashes"])


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a metrics page."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine answered to a completion."""

    status: int
    body: Json

    @property
    def cached(self) -> int | None:
        """The prompt tokens it says it had."""
        details = (self.body.get("usage") or {}).get("prompt_tokens_details") or {}
        told = details.get("cached_tokens")
        return told if isinstance(told, int) else None


def unreached(error: aiohttp.ClientError | TimeoutError) -> str:
    """Why there is no answer, for people."""
    match error:
        case TimeoutError():
            return "no answer in time"
        case aiohttp.ClientConnectorDNSError():
            return "there is no such host"
        case aiohttp.ClientSSLError():
            return "no TLS handshake comes about; is it http://, or its certificate not to be trusted?"
        case aiohttp.ClientConnectorError():
            # asyncio's own words repeat the address.
            number = error.os_error.errno
            return "no connection comes about" if number is None else os.strerror(number).lower()
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError():
            return "the connection was broken off"
        case aiohttp.InvalidURL():
            return "that is no URL"
        case _:
            return f"what answers speaks no HTTP ({type(error).__name__})"


@dataclass(slots=True)
class Engine:
    """One engine under test. url: of its HTTP port. events, replay: where it publishes, if it does not tell itself.

    tokenizer: the folder that picker is given for its model. patience: seconds an answer, or a batch, may take; quiet:
    without another batch until no more is expected.
    """

    url: str
    session: aiohttp.ClientSession
    context: zmq.asyncio.Context
    trace: Trace
    seed: int = 1
    events: str | None = None
    replay: str | None = None
    tokenizer: Path | None = None
    patience: float = 5.0
    quiet: float = 1.5
    settle: float = 0.1
    turn: Iterator[int] = field(default_factory=itertools.count)

    # --- HTTP ---

    async def get(self, path: str) -> tuple[int, bytes]:
        """(status, body). Raises OSError where it cannot be reached."""
        self.trace.send(f"GET {path}")
        async with self._said(self.session.get(self.url + path)) as response:
            body = await response.read()
            self.trace.receive(f"{response.status}, {len(body)} bytes")
            return response.status, body

    async def post(self, path: str, body: Json) -> tuple[int, Json]:
        """(status, the answer's JSON, or nothing where it is none)."""
        self.trace.send(f"POST {path}")
        async with self._said(self.session.post(self.url + path, json=body)) as response:
            answer = await response.read()
            self.trace.receive(f"{response.status}, {len(answer)} bytes")
            try:
                found = json.loads(answer)
            except ValueError:
                found = None
            return response.status, found if isinstance(found, dict) else {}

    @asynccontextmanager
    async def _said(self, request: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with asyncio.timeout(self.patience), request as response:
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise OSError(f"{self.url} cannot be reached: {unreached(error)}") from None

    async def model(self) -> str:
        """The first model that it serves. Raises OSError where it names none."""
        _, body = await self.get("/v1/models")
        try:
            return str(json.loads(body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise OSError(f"{self.url} names no model at /v1/models") from None

    async def complete(self, prompt: str) -> Answer:
        """Have it answer a prompt with one token."""
        body = {"model": await self.model(), "prompt": prompt, "max_tokens": 1, "temperature": 0}
        status, answer = await self.post("/v1/completions", body)
        return Answer(status, answer)

    async def ids(self, **asked: Any) -> list[int] | None:
        """What it makes of a prompt or of messages; None where it does not say."""
        status, answer = await self.post("/tokenize", {"model": await self.model(), **asked})
        found = answer.get("tokens")
        return found if status == 200 and isinstance(found, list) else None

    async def metrics(self) -> list[Sample]:
        status, body = await self.get("/metrics")
        return samples(body.decode(errors="replace")) if status == 200 else []

    async def setting(self, name: str) -> str | None:
        """A label of its cache configuration."""
        page = await self.metrics()
        found = (each.labels.get(name) for each in page if each.name.endswith(":cache_config_info"))
        return next((value for value in found if value not in (None, "None")), None)

    def prompt(self, words: int = 400) -> str:
        """One that nobody has sent before."""
        rng = random.Random(f"{self.seed}/{next(self.turn)}/{time.time_ns()}")
        return f"{rng.getrandbits(64):x} " + " ".join(rng.choice(_WORDS) for _ in range(words))

    # --- events ---

    async def places(self) -> tuple[str | None, str | None]:
        """Where to subscribe and where to ask for replays; None: it has no such place."""
        status, body = await self.get("/kv_event_sources")
        told: Any = None
        if status == 200:
            with_ranks = _object(body)
            told = next((each for each in with_ranks.values() if isinstance(each, dict) and each.get("endpoint")), None)
            if told is not None and not told.get("enable_kv_cache_events", True):
                told = None
        events = told.get("endpoint") if told else self.events
        replay = told.get("replay_endpoint") if told else self.replay
        return self._reachable(events), self._reachable(replay)

    def _reachable(self, url: str | None) -> str | None:
        if not url:
            return None
        own = self.url.partition("://")[2].rpartition(":")[0]
        scheme, _, rest = url.replace("{host}", own).partition("://")
        host, _, port = rest.rpartition(":")
        return f"{scheme}://{own if host in _LOCAL else host}:{port}"

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Listener]:
        """Subscribed, and past the moment at which a subscription misses what is published. Raises OSError."""
        events, _ = await self.places()
        if events is None:
            raise OSError(f"{self.url} does not say where it publishes KV events")
        socket, monitor = self.context.socket(zmq.SUB), None
        try:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.setsockopt(zmq.LINGER, 0)
            monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            socket.connect(events)
            self.trace.send(f"SUBSCRIBE {events}")
            if not await monitor.poll(round(self.patience * 1000)):
                raise OSError(f"no publisher answers at {events}")
            await asyncio.sleep(self.settle)  # the publisher hears of a subscription a moment after the handshake
            yield Listener(socket, self.trace, self.patience, self.quiet)
        finally:
            socket.disable_monitor()
            if monitor is not None:
                monitor.close(linger=0)
            socket.close(linger=0)

    async def replayed(self, start: int) -> tuple[list[Batch], bool] | None:
        """(batches from a number on, whether the end marker came); None where no replays are offered."""
        _, replay = await self.places()
        if replay is None:
            return None
        socket = self.context.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(replay)
            self.trace.send(f"REPLAY from {start} of {replay}")
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            batches: list[Batch] = []
            while await socket.poll(round(self.patience * 1000)):
                frames = await socket.recv_multipart()
                if len(frames) >= 3 and frames[-2] == _END and not frames[-1]:
                    return batches, True
                batches.append(read_batch(frames[-2:]))
            return batches, False
        finally:
            socket.close(linger=0)


class Listener:
    """A subscription. heard: all batches so far."""

    def __init__(self, socket: zmq.asyncio.Socket, trace: Trace, patience: float, quiet: float) -> None:
        self._socket, self._trace, self._patience, self._quiet = socket, trace, patience, quiet
        self.heard: list[Batch] = []

    async def told(self, ids: Sequence[int] | None) -> list[Json]:
        """The stores of one prompt, as far as they come; of any prompt where its ids are not known."""
        found: list[Json] = []
        until = time.monotonic() + self._patience
        while (left := until - time.monotonic()) > 0 and await self._socket.poll(round(min(left, self._quiet) * 1000)):
            batch = read_batch((await self._socket.recv_multipart())[-2:])
            self._trace.receive(f"batch {batch.number}: {len(batch.events)} events")
            self.heard.append(batch)
            found += batch.stored()
            if ids is not None and _covers(of_prompt(found, ids), ids):
                break
        return found if ids is None else of_prompt(found, ids)


def of_prompt(stores: Sequence[Json], ids: Sequence[int]) -> list[Json]:
    """Those that hold the ids of a prompt, each the continuation of the one before it."""
    found: list[Json] = []
    at, parent = 0, None
    for store in stores:
        tokens = store["token_ids"]
        if store.get("parent_block_hash") == parent and tokens and tokens == list(ids[at : at + len(tokens)]):
            found.append(store)
            at, parent = at + len(tokens), store["block_hashes"][-1]
    return found


def _covers(stores: Sequence[Json], ids: Sequence[int]) -> bool:
    size = int(stores[0].get("block_size") or 0) if stores else 0
    return bool(size) and sum(len(store["token_ids"]) for store in stores) >= len(ids) // size * size


def read_batch(frames: Sequence[bytes]) -> Batch:
    """The batch in (number, payload); `problem` says what is wrong with it."""
    number = int.from_bytes(frames[0], "big")
    try:
        batch = msgspec.msgpack.decode(frames[1])
        listed = batch["events"] if isinstance(batch, dict) else batch[1]
        events = tuple(_event(each) for each in listed)
    except (msgspec.DecodeError, LookupError, TypeError, ValueError) as error:
        return Batch(number, frames[1], problem=f"batch {number} cannot be read: {type(error).__name__}")
    return Batch(number, frames[1], events)


_FIELDS = ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name")


def _event(told: Any) -> Json:
    """A map, as since vLLM 0.24, or an array before."""
    event = told if isinstance(told, dict) else dict(zip(_FIELDS, told, strict=False))
    if event.get("type") == "BlockStored":
        if not isinstance(event["block_hashes"], list) or not isinstance(event["token_ids"], list):
            raise ValueError("a store without hashes or ids")
        event["block_hashes"] = [_number(each) for each in event["block_hashes"]]
        parent = event.get("parent_block_hash")
        event["parent_block_hash"] = None if parent is None else _number(parent)
    return event


def _number(value: int | bytes) -> int:
    return int.from_bytes(value[-8:], "big") if isinstance(value, bytes) else value & (1 << 64) - 1


def samples(page: str) -> list[Sample]:
    """The lines of a Prometheus text page; those that are none are passed over."""
    found = []
    for line in _SAMPLE.finditer(page):
        try:
            found.append(Sample(line["name"], dict(_LABEL.findall(line["labels"] or "")), float(line["value"])))
        except ValueError:
            continue
    return found


def _object(body: bytes) -> Json:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
