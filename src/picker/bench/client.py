"""The near end of a benchmark: kept-alive connections to one gateway, in a closed loop or at a fixed rate.

Raw asyncio protocols, because a comfortable HTTP client costs more than the gateways it would measure. Anything but a
complete answer with status 200 is an error that ends the measurement. Owns no process and no figure beyond what one
run of requests showed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import MappingProxyType
from typing import cast

import numpy as np

from picker.bench.cputime import cpu_seconds
from picker.bench.prompts import Prompts
from picker.bench.upstream import Ask, Response, Upstream

CONNECTIONS = 32
# Closed loop before its window: connections open, pools and caches fill, streams spread over their length.
_RAMP = 0.3
# Paced streams send a chunk this often: short, so that a stream ends within its measurement; above a loop's resolution.
_GAP = 0.001
# A gateway that does six long streams a second would otherwise be judged by one.
_FEWEST = 3
# Beyond these seconds without an answer a gateway is not slow but stuck.
_PATIENCE = 20.0


class AnswerError(RuntimeError):
    """A gateway did not answer as it should; the message says what came instead."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is asked, of whom. ports: of one gateway (or of the upstream itself), on loopback; used in turn."""

    upstream: Upstream
    ports: Sequence[int]
    prompts: Prompts
    response: Response

    @property
    def stream(self) -> bool:
        return bool(self.response.head)


@dataclass(frozen=True, slots=True)
class Throughput:
    """A window of a closed loop. cpu_us: CPU time per request by process name; cores: the same per second."""

    requests_per_s: float
    cpu_us: Mapping[str, float]
    cores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Latency:
    """(n,) seconds by request until the first byte, and of each chunk from upstream to client.

    cpu_us: CPU time of a request by process, all that it used meanwhile included.
    """

    first_byte: np.ndarray
    chunk: np.ndarray
    cpu_us: Mapping[str, float] = field(default_factory=dict)


async def answers(traffic: Traffic) -> bool:
    """Whether one request gets its answer."""
    try:
        async with _running(traffic, 1) as load:
            load.ask(load.idle.pop())
            await load.until(lambda: load.ended > 0, timeout=1.0)
    except (AnswerError, OSError):
        return False
    return True


async def closed_loop(traffic: Traffic, *, seconds: float, processes: Mapping[str, int]) -> Throughput:
    """Keep `CONNECTIONS` requests under way for a window of `seconds`. processes: pids by name, for their CPU time.

    Chunks go in lock-step. A request that the window cuts counts by the share of its chunks.
    """
    async with _running(traffic, CONNECTIONS) as load:
        load.again = True
        for number in range(1, CONNECTIONS + 1):
            # Streams of unequal length first: begun together, they would all end together for ever.
            load.ask(load.idle.pop(), chunks=-(-traffic.response.chunks * number // CONNECTIONS))
        await load.until(lambda: load.ended >= 1 and load.seconds >= _RAMP, timeout=_PATIENCE)
        with _without_gc():
            before, done, started = _cpu(processes), load.done, perf_counter()
            await load.pause(seconds)
            elapsed, done = perf_counter() - started, load.done - done
            after = _cpu(processes)
    if not done:
        raise AnswerError(f"not one chunk came in {seconds:g} s")
    used = {name: after[name] - before[name] for name in before}
    return Throughput(
        requests_per_s=done / elapsed,
        cpu_us={name: cpu / done * 1e6 for name, cpu in used.items()},
        cores={name: cpu / elapsed for name, cpu in used.items()},
    )


async def open_loop(
    traffic: Traffic, *, seconds: float, rate: float, processes: Mapping[str, int] = MappingProxyType({})
) -> Latency:
    """Send `rate` requests a second for `seconds`, at least `_FEWEST`, whatever comes back; wait for all answers.

    processes: pids by name, for their CPU time. Time counts from when a request is sent: nothing that is sent waits
    for an answer. Chunks go at a fixed pace.
    """
    count = max(_FEWEST, round(seconds * rate))
    async with _running(traffic, 4, gap=_GAP) as load:
        with _without_gc():
            before, started = _cpu(processes), perf_counter()
            for number in range(count):
                await load.pause(started + number / rate - perf_counter())
                load.ask(load.idle.pop() if load.idle else await load.connect())
            await load.until(lambda: load.ended >= count, timeout=_PATIENCE + traffic.response.chunks * _GAP)
            cpu_us = {name: (after - before[name]) / count * 1e6 for name, after in _cpu(processes).items()}
    first_bytes = [ask.first_byte for ask in load.answered]
    chunks = [delay for ask in load.answered for delay in ask.delays]
    return Latency(np.array(first_bytes), np.array(chunks), cpu_us)


def _cpu(processes: Mapping[str, int]) -> dict[str, float]:
    return {name: cpu_seconds(pid) for name, pid in processes.items()}


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """A collection pauses both ends for milliseconds, which would be the gateway's in the figures."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- connections -------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _running(traffic: Traffic, connections: int, *, gap: float | None = None) -> AsyncIterator[_Load]:
    load = _Load(traffic, gap)
    try:
        for _ in range(connections):
            load.idle.append(await load.connect())
        yield load
    finally:
        load.close()
        # The gateway sees its connections end before anything else is measured.
        await asyncio.sleep(0.05)


class _Load:
    """The connections of one run. done: requests, by share of their chunks. again: ask anew when one has ended."""

    def __init__(self, traffic: Traffic, gap: float | None) -> None:
        self.traffic = traffic
        self.idle: list[_Connection] = []
        self.answered: list[Ask] = []
        self.again = False
        self.done = 0.0
        self.ended = 0
        self.started_at = perf_counter()
        self._gap = gap
        self._all: list[_Connection] = []
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def seconds(self) -> float:
        return perf_counter() - self.started_at

    async def connect(self) -> _Connection:
        port = self.traffic.ports[len(self._all) % len(self.traffic.ports)]
        _, connection = await asyncio.get_running_loop().create_connection(lambda: _Connection(self), "127.0.0.1", port)
        self._all.append(connection)
        return connection

    def ask(self, connection: _Connection, *, chunks: int | None = None) -> None:
        """Send the next request."""
        traffic = self.traffic
        ask = traffic.upstream.expect(traffic.response, chunks=chunks or traffic.response.chunks, gap=self._gap)
        connection.send(ask, request(traffic.prompts.body(ask, stream=traffic.stream)))

    def progress(self, chunks: int) -> None:
        self.done += chunks / self.traffic.response.chunks

    def end(self, connection: _Connection, ask: Ask) -> None:
        self.ended += 1
        if self.again:
            self.ask(connection)
        else:
            self.answered.append(ask)
            self.idle.append(connection)

    def fail(self, reason: str) -> None:
        if not self._failed.done():
            self._failed.set_exception(AnswerError(reason))

    async def pause(self, seconds: float) -> None:
        """Let requests go on; raises AnswerError when one fails."""
        if seconds > 0 or self._failed.done():
            await asyncio.wait((self._failed,), timeout=seconds)
        if self._failed.done():
            self._failed.result()

    async def until(self, reached: Callable[[], bool], *, timeout: float) -> None:
        """Let requests go on until `reached`; raises AnswerError when one fails or it takes too long."""
        give_up_at = perf_counter() + timeout
        while not reached():
            await self.pause(0.01)
            if perf_counter() > give_up_at:
                raise AnswerError(f"no answer for {timeout:g} s")

    def close(self) -> None:
        self._failed.cancel()
        for connection in self._all:
            connection.close()


class _Connection(asyncio.Protocol):
    """One connection, one request at a time. left: bytes to come of a body with a length, None for a chunked one."""

    __slots__ = ("_ask", "_buffer", "_in_body", "_left", "_load", "_transport")

    _transport: asyncio.Transport

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._ask: Ask | None = None
        self._buffer = b""
        self._in_body = False
        self._left: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, ask: Ask, data: bytes) -> None:
        self._ask = ask
        ask.asked_at = perf_counter()
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        ask = self._ask
        if ask is None:
            self._load.fail("bytes came that nobody had asked for")
            return
        data = self._buffer + data if self._buffer else data
        if not self._in_body:
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                self._buffer = data
                return
            if not self._begin(data[:end], data[end:]):
                return
            data = data[end:]
        self._body(ask, data)

    def _begin(self, head: bytes, body: bytes) -> bool:
        status, self._left = response_head(head)
        self._in_body = status == 200
        if not self._in_body:
            self._load.fail(f"a request was answered {status}: {body[:200].decode(errors='replace').strip()}")
        return self._in_body

    def _body(self, ask: Ask, data: bytes) -> None:
        if self._left is None:
            size, self._buffer, ended = dechunk(data)
        else:
            size, self._buffer = len(data), b""
            self._left -= size
            ended = self._left <= 0
        if size:
            self._load.progress(ask.received(size))
        if ended:
            self._finish(ask)

    def _finish(self, ask: Ask) -> None:
        self._ask, self._in_body = None, False
        if len(ask.delays) == ask.chunks:
            self._load.end(self, ask)
        else:
            self._load.fail(f"an answer ended after {len(ask.delays)} of {ask.chunks} chunks")

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.fail("the connection was closed amid an answer" if self._ask else "an idle connection was closed")

    def close(self) -> None:
        if self._ask is not None:
            self._load.traffic.upstream.forget(self._ask)
        self._transport.abort()


def request(body: bytes) -> bytes:
    """A POST as an OpenAI client sends it."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nuser-agent: picker-bench\r\naccept: */*\r\n"
        b"authorization: Bearer none\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
    ) % (len(body), body)


def response_head(head: bytes) -> tuple[int, int | None]:
    """Status and content-length, None for a chunked body."""
    fields = head.lower()
    _, found, length = fields.partition(b"\r\ncontent-length:")
    return int(fields[9:12]), int(length.split(b"\r\n", 1)[0]) if found else None


def dechunk(data: bytes) -> tuple[int, bytes, bool]:
    """Bytes of body in the complete chunks at the beginning, the rest of the data, and whether the body has ended."""
    at = size = 0
    while (line := data.find(b"\r\n", at)) >= 0:
        length = int(data[at:line], 16)
        end = line + 4 + length
        if len(data) < end:
            break
        if length == 0:
            return size, data[end:], True
        at = end
        size += length
    return size, data[at:], False
