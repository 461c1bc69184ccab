"""Thousands of streams at once for a minute: none broken, none starved, every byte the endpoint's and in its order.

    python bench/streams.py --streams 2000 --seconds 60 --json out.json

Client and endpoints share this process; what is measured, picker or one of the peers found here, has a core to itself.
Each stream has a text of its own, of several shapes (plain tokens, escapes and umlauts, long events, two events in a
chunk, one event in two writes, counts with every token), and both ends hash what they see of it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any, cast

import numpy as np
import uvloop

from picker.bench import machine
from picker.bench.cases import ENDPOINTS, cases
from picker.bench.client import response_head
from picker.bench.cputime import cpu_seconds, rss_bytes
from picker.bench.placement import pinned, placement
from picker.bench.proxy import PICKER, start
from picker.bench.upstream import MODEL, Arriving, Upstream
from picker.children import Children, supervised

_NUMBER = re.compile(rb"stream (\d+) ")
_WORDS = (" the", " of", "\n", ' "quoted"', " r\\n", " Grüße", " 水", "x", " word", " and", " some more", ".")
_SHAPES = 5
_OPENED_PER_S = 500
_LONGEST_WAIT = 1.0  # seconds from an endpoint to the client
_PATIENCE = 30.0  # seconds for the last bytes once the last have been sent


# --- the endpoints' end ------------------------------------------------------------------------------------


class Stream:
    """What an endpoint says on one stream, piece by piece. digest: of the body as it was sent, without its framing."""

    def __init__(self, number: int) -> None:
        self.digest = hashlib.blake2b()
        self.sent_at: list[float] = []
        self.bytes_sent: list[int] = []  # by piece, since the beginning
        self._number = number
        self._random = Random(number)
        self._transport: asyncio.WriteTransport | None = None
        self.begun = asyncio.Event()

    def arrive(self, transport: asyncio.WriteTransport) -> None:
        """Begin the answer."""
        self._transport = transport
        self.begun.set()
        transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        self.say(self._event(role="assistant", content=""))

    def say_more(self) -> None:
        """The next token or two."""
        shape, text = self._number % _SHAPES, "".join(self._random.choices(_WORDS, k=self._random.randint(1, 3)))
        if shape == 1:
            text *= 100
        event = self._event(content=text, counted=shape == 2)
        if shape == 3:
            event += self._event(content=text)
        self.say(event, torn=shape == 4)

    def finish(self) -> None:
        """The last token, what was used, and the end."""
        self.say(self._event(content=".", reason="stop") + self._event(counted=True) + b"data: [DONE]\n\n")
        self._write(b"0\r\n\r\n")

    def say(self, data: bytes, *, torn: bool = False) -> None:
        """Send a chunk, and remember when. torn: in two writes."""
        self.digest.update(data)
        self.bytes_sent.append(len(data) + (self.bytes_sent[-1] if self.bytes_sent else 0))
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        at = self._random.randrange(1, len(chunk)) if torn else 0
        if at:
            self._write(chunk[:at])
        self.sent_at.append(perf_counter())
        self._write(chunk[at:])

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _event(self, *, counted: bool = False, reason: str | None = None, **delta: str) -> bytes:
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}] if delta else []
        usage = {"prompt_tokens": 9, "completion_tokens": len(self.sent_at), "total_tokens": 9 + len(self.sent_at)}
        event = {"id": f"chatcmpl-{self._number}", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        told = {**event, "choices": choices, **({"usage": usage} if counted else {})}
        return f"data: {json.dumps(told, separators=(',', ':'), ensure_ascii=False)}\n\n".encode()


class Engines(Upstream):
    """Endpoints whose answers are `Stream`s, by the number that the prompt names."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.streams = [Stream(number) for number in range(count)]

    def take(self, request: bytearray) -> Arriving | None:
        found = _NUMBER.search(request)
        return super().take(request) if found is None else self.streams[int(found[1])]


# --- the clients' end --------------------------------------------------------------------------------------


class Listener(asyncio.Protocol):
    """A client of one stream. heard_at, bytes_heard: of each piece of the body. whole: it has come to its end."""

    def __init__(self, number: int, ended: asyncio.Queue[Listener]) -> None:
        self.digest = hashlib.blake2b()
        self.heard_at: list[float] = []
        self.bytes_heard: list[int] = []
        self.whole = False
        self._number = number
        self._ended = ended
        self._buffer = bytearray()
        self._in_body = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        prompt = f"stream {self._number} " + "tell me a long story " * 20
        body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": True}
        data = json.dumps(body).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        self._transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(data), data))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._in_body:
            end = self._buffer.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            status, length = response_head(bytes(self._buffer[:end]))
            if status != 200 or length is not None:
                self.close()
                return
            del self._buffer[:end]
            self._in_body = True
        heard = 0
        for content in chunks_of(self._buffer):
            if not content:
                self.whole = True
                self.close()
                break
            self.digest.update(content)
            heard += len(content)
        if heard:
            self.heard_at.append(perf_counter())
            self.bytes_heard.append(heard + (self.bytes_heard[-1] if self.bytes_heard else 0))

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.put_nowait(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def chunks_of(buffer: bytearray) -> Iterator[bytes]:
    """The contents of the whole chunks at its beginning, which are taken out of it."""
    while (line := buffer.find(b"\r\n")) >= 0:
        end = line + 2 + int(buffer[:line], 16)
        if len(buffer) < end + 2:
            return
        content = bytes(buffer[line + 2 : end])
        del buffer[: end + 2]
        yield content


# --- the run -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """What was seen of the subject while its streams ran."""

    idle_rss: float = 0.0
    rss: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    seconds: float = 0.0
    chunks: int = 0


async def measure(name: str, *, streams: int, seconds: float, gap: float) -> dict[str, Any]:
    """The figures of one way. gap: seconds between two chunks of a stream."""
    engines = Engines(streams)
    async with _subject(name, engines) as (port, pid):
        run, ended = Run(idle_rss=rss_bytes(pid) / 1e6), asyncio.Queue[Listener]()
        listeners = await _connect(port, streams, ended)
        await _all_arrived(engines)
        await _speak(engines, run, pid, seconds, gap)
        for stream in engines.streams:
            stream.finish()
        await _all_ended(ended, streams)
        for listener in listeners:
            listener.close()
    return {"name": name, **_settings(streams, seconds, gap), **figures(engines.streams, listeners, run)}


@asynccontextmanager
async def _subject(name: str, engines: Engines) -> AsyncIterator[tuple[int, int]]:
    """Port and process of what is measured, once it answers."""
    places = placement()
    first = next(cases((1024,), (1,)))
    async with AsyncExitStack() as stack:
        stack.enter_context(pinned(places.load))
        await stack.enter_async_context(engines.running(ENDPOINTS))
        children: Children = await stack.enter_async_context(supervised())
        way = await start(name, children, engines, first, places.subject)
        assert way.pid is not None
        yield way.ports[0], way.pid


async def _connect(port: int, streams: int, ended: asyncio.Queue[Listener]) -> list[Listener]:
    """Open the streams, at a rate that leaves the first chunks of none waiting long."""
    loop, listeners = asyncio.get_running_loop(), []
    for number in range(streams):
        _, listener = await loop.create_connection(partial(Listener, number, ended), "127.0.0.1", port)
        listeners.append(listener)
        await asyncio.sleep(1 / _OPENED_PER_S)
    return listeners


async def _all_arrived(engines: Engines) -> None:
    """Until the endpoints have every request; one that never comes there counts as broken."""
    try:
        async with asyncio.timeout(_PATIENCE):
            for stream in engines.streams:
                await stream.begun.wait()
    except TimeoutError:
        pass


async def _speak(engines: Engines, run: Run, pid: int, seconds: float, gap: float) -> None:
    """Have each stream say something every `gap` seconds, one after the other."""
    count, said, looked_at = len(engines.streams), 0, 0.0
    before, started = cpu_seconds(pid), perf_counter()
    while (elapsed := perf_counter() - started) < seconds:
        while said * gap <= elapsed * count:
            engines.streams[said % count].say_more()
            said += 1
        if elapsed >= looked_at:
            run.rss.append(rss_bytes(pid) / 1e6)
            looked_at = elapsed + 1.0
        await asyncio.sleep(0.001)
    run.cpu_s, run.seconds, run.chunks = cpu_seconds(pid) - before, elapsed, said


async def _all_ended(ended: asyncio.Queue[Listener], count: int) -> None:
    try:
        async with asyncio.timeout(_PATIENCE):
            for _ in range(count):
                await ended.get()
    except TimeoutError:
        pass  # who has not ended counts as broken


# --- figures -----------------------------------------------------------------------------------------------


def _settings(streams: int, seconds: float, gap: float) -> dict[str, Any]:
    return {"streams": streams, "seconds": seconds, "gap_s": gap}


def figures(streams: list[Stream], listeners: list[Listener], run: Run) -> dict[str, Any]:
    """broken: without an end. different: other bytes, or in another order. starved: a chunk came late or never.

    delay: from an endpoint's write of a chunk to the client that has read all of it, over all chunks; the worst stream
    is the one whose median is highest.
    """
    pairs = list(zip(streams, listeners, strict=True))
    by_stream = [delays_of(stream, listener) for stream, listener in pairs]
    delays = np.concatenate(by_stream)
    return {
        "broken": sum(not listener.whole for listener in listeners),
        "different": sum(stream.digest.digest() != listener.digest.digest() for stream, listener in pairs),
        "starved": sum(starved(stream, delays) for (stream, _), delays in zip(pairs, by_stream, strict=True)),
        **{f"delay_p{percent}_ms": _rounded(1e3 * np.percentile(delays, percent)) for percent in (50, 99, 100)},
        "worst_stream_p50_ms": _rounded(1e3 * max(np.median(each) if each.size else np.inf for each in by_stream)),
        "chunks": run.chunks,
        "chunks_per_s": _rounded(run.chunks / run.seconds),
        "cpu_us_per_chunk": _rounded(run.cpu_s / run.chunks * 1e6),
        "rss_mb": _rounded(max(run.rss)),
        "idle_rss_mb": _rounded(run.idle_rss),
    }


def delays_of(stream: Stream, listener: Listener) -> np.ndarray:
    """(n,) seconds of the pieces that have arrived whole."""
    arrived = np.searchsorted(listener.bytes_heard, stream.bytes_sent)
    there = arrived < len(listener.bytes_heard)
    heard_at = np.array(listener.heard_at)
    delays: np.ndarray = heard_at[arrived[there]] - np.array(stream.sent_at)[there]
    return delays


def starved(stream: Stream, delays: np.ndarray) -> bool:
    """Whether a chunk of it took longer than anybody should wait for it, or never came."""
    return len(delays) < len(stream.sent_at) or bool((delays > _LONGEST_WAIT).any())


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--gap", type=float, default=0.5, help="seconds between two chunks of a stream")
    parser.add_argument("--name", action="append", help="picker or an installed peer; repeat for several  [picker]")
    parser.add_argument("--json", type=Path, help="where the figures go; they are printed, too")
    asked = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    rows = [
        uvloop.run(measure(name, streams=asked.streams, seconds=asked.seconds, gap=asked.gap))
        for name in asked.name or [PICKER]
    ]
    found = {"bench": "streams", "rows": rows, "machine": machine.describe()}
    print(json.dumps(found, indent=2))
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
