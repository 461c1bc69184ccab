"""How much load `picker load` can put on a server from this machine, and what a request and a streamed token cost it.

A server with exactly known delays runs in a process of its own: each answer begins after `--first` seconds and its
tokens come `--gap` seconds apart, so every figure that is measured has a true value beside it.

    python bench/generator.py                 # 2,000 requests a second, then 1,000 streams at once
    python bench/generator.py --rate 500 --seconds 5
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import click
import numpy as np

from picker.load.arrivals import Arrivals, Process
from picker.load.client import Target
from picker.load.processes import Job, drive_job
from picker.load.schedule import Pace, Run
from picker.load.text import PLAIN, Piece
from picker.load.workload import Plan, Planned, Turn

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_TOKEN = b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
_TICK = 0.001


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _end(tokens: int) -> bytes:
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 0}}
    last = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"
    return _chunk(last) + b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Delays:
    """first: seconds from a request to its first token. gap: seconds from each token to the next."""

    first: float
    gap: float
    tokens: int


class _Server(asyncio.Protocol):
    """Answers each request as `Delays` say; the cheapest thing that is still an OpenAI-compatible stream."""

    def __init__(self, delays: Delays) -> None:
        self._delays = delays
        self._buffer = b""
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            if len(self._buffer) < end + 4 + length:
                return
            self._buffer = self._buffer[end + 4 + length :]
            asked = self._loop.time()
            self._loop.call_at(asked + self._delays.first, self._begin, asked + self._delays.first)

    def _begin(self, due: float) -> None:
        self._transport.write(_HEAD + _chunk(_TOKEN))
        self._go_on(1, due)

    def _go_on(self, sent: int, due: float) -> None:
        if sent == self._delays.tokens:
            self._transport.write(_end(sent))
        else:
            self._loop.call_at(due + self._delays.gap, self._next, sent, due + self._delays.gap)

    def _next(self, sent: int, due: float) -> None:
        self._transport.write(_chunk(_TOKEN))
        self._go_on(sent + 1, due)


def _serve(pipe: Connection, delays: Delays) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Server(delays), "127.0.0.1", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def measure(delays: Delays, rate: float, seconds: float, processes: int) -> Run:
    """A run of constant arrivals against the server with those delays."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, delays), daemon=True)
    server.start()
    try:
        target = Target(f"http://127.0.0.1:{ours.recv()}", model="m")
        arrivals = Arrivals(rate, Process.CONSTANT)
        times = arrivals.times(arrivals.count_within(seconds), np.random.default_rng(0))
        turn = Turn((Piece(1, 64),), max_tokens=delays.tokens)
        plan = Plan("generator", tuple(Planned(float(at), (turn,)) for at in times))
        return _run(Job(plan, Pace(), target, PLAIN), processes)
    finally:
        server.kill()


def _run(job: Job, processes: int) -> Run:
    import uvloop

    async def main() -> Run:
        return await drive_job(job, processes, stop=asyncio.Event())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def figures(run: Run, delays: Delays) -> dict[str, Any]:
    """What was measured, with its truth."""
    good = [record for record in run.records if record.error is None]
    gaps = np.concatenate([np.frombuffer(record.gaps, dtype=np.float32) for record in good])
    ttft = np.array([record.ttft for record in good], dtype=float)
    sent = np.array([(record.sent_at, record.ended_at) for record in good])
    edges = np.concatenate([np.ones(len(sent)), -np.ones(len(sent))])
    in_flight = np.cumsum(edges[np.argsort(sent.T.reshape(-1), kind="stable")])
    chunks = sum(len(record.gaps) + 1 for record in good)
    return {
        "processes": run.processes,
        "requests": len(run.records),
        "failed": run.failed,
        "achieved_rate": round(run.achieved_rate or 0.0, 1),
        "streams_at_once": int(in_flight.max(initial=0)),
        "on_schedule": run.on_schedule,
        "schedule_delay_p99_ms": round((run.schedule_delay_p99 or 0.0) * 1e3, 2),
        "ttft_ms_true": delays.first * 1e3,
        "ttft_ms_p50": round(float(np.percentile(ttft, 50)) * 1e3, 2),
        "ttft_ms_p99": round(float(np.percentile(ttft, 99)) * 1e3, 2),
        "gap_ms_true": delays.gap * 1e3,
        "gap_ms_mean": round(float(gaps.mean()) * 1e3, 3) if gaps.size else None,
        "cpu_us_per_request": round(run.cpu_s / len(run.records) * 1e6, 1),
        "cpu_us_per_chunk": round(run.cpu_s / chunks * 1e6, 1),
        "cores": round(run.cpu_s / (run.ended_at - run.started_at), 2),
    }


@click.command()
@click.option("--rate", type=float, default=2000.0, show_default=True, help="Short requests a second.")
@click.option("--streams", type=int, default=1000, show_default=True, help="Long answers at once.")
@click.option("--seconds", type=float, default=5.0, show_default=True)
@click.option("--processes", type=int, default=2, show_default=True)
@click.option("--only", type=click.Choice(["requests", "streams"]))
def command(rate: float, streams: int, seconds: float, processes: int, only: str | None) -> None:
    """Short requests at a rate, then many streams at once; a JSON line each."""
    cases: dict[str, Callable[[], tuple[Delays, float, float]]] = {
        "requests": lambda: (Delays(first=0.02, gap=0.0, tokens=1), rate, seconds),
        # 200 tokens 50 ms apart take 10 s: a tenth of them begin every second until all run.
        "streams": lambda: (Delays(first=0.05, gap=0.05, tokens=200), streams / 10.0, seconds + 10.0),
    }
    for name, case in cases.items():
        if only in (None, name):
            delays, at_rate, lasts = case()
            print(json.dumps({"case": name, **figures(measure(delays, at_rate, lasts, processes), delays)}))


if __name__ == "__main__":
    command()
