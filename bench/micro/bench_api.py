"""What a `Pick` of the gRPC API costs picker: CPU of the serving process, beside a bare call of the same size.

    nice -n 10 python bench/micro/bench_api.py [--endpoints N] [--picks N] [--repeats N]

The caller is a process of its own with `grpc.aio`, sixteen calls at a time. Prompts share their first half with others;
every pick is reported (started, first token, finished with usage), which is measured apart. The best of
several repeats is shown: what another process does to this one only adds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
from prometheus_client import CollectorRegistry

from picker.api_service import build_api
from picker.bench.cputime import cpu_seconds
from picker.commands.options import run
from picker.config import ApiConfig, Config
from picker.deciders import build_scheduler
from picker.frontends.grpc_server import Call, GrpcServer
from picker.frontends.serving import listen, port_of
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import Endpoint, EndpointAdded
from picker.wire.api import PICK, REPORT
from picker.wire.pb import picker_pb2 as pb

_AT_ONCE = 16
_CHUNK = 250  # picks until they are reported
_HEADS = 32


# --- the serving process -----------------------------------------------------------------------------------


async def serve(endpoints: int, what: str) -> None:
    listener = listen("127.0.0.1", 0)
    print(port_of(listener), flush=True)
    if what == "bare":
        async with asyncio.TaskGroup() as tasks:
            await GrpcServer({PICK: _bare}, tasks).serve(listener)
            await asyncio.Event().wait()
    runtime = _runtime(endpoints)
    await build_api(Config(seed=1, api=ApiConfig(key=os.environ.get("KEY"))), runtime).serve(listener, asyncio.Event())


def _runtime(endpoints: int) -> Runtime:
    telemetry = Telemetry(CollectorRegistry())
    runtime = Runtime(build_scheduler(Config(seed=1)), BlockHasher(b"key"), telemetry, clock=time.monotonic)
    for number in range(endpoints):
        runtime.emit(EndpointAdded(Endpoint(f"e{number}", f"10.0.0.{number}:8000")))
    return runtime


_ANSWER = pb.PickResponse(picked=pb.Picked(id="1-0123456789abcdef")).SerializeToString()


async def _bare(call: Call) -> None:
    await call.read()
    await call.write(_ANSWER)


# --- the calling process -----------------------------------------------------------------------------------


def raw(count: int) -> Iterator[bytes]:
    """`PickRequest`s with a body of about 1 KB."""
    for number in range(count):
        prompt = f"Head {number % _HEADS}. ".ljust(512, "x") + f"Tail {number}. ".ljust(400, "y")
        body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": 100, "stream": True}).encode()
        http = pb.HttpRequest(path="/v1/completions", body=body)
        yield pb.PickRequest(http=http, reports_first_token=True, reporter="bench").SerializeToString()


def blocks(count: int) -> Iterator[bytes]:
    """`PickRequest`s with 128 block hashes: 1 KB."""
    for number in range(count):
        hashes = [
            *range(number % _HEADS << 32, (number % _HEADS << 32) + 64),
            *range(number << 40, (number << 40) + 64),
        ]
        features = pb.Features(
            model="m", blocks=pb.BlockHashes(hashes=hashes, block_tokens=16), prompt_tokens=2050, max_tokens=100
        )
        yield pb.PickRequest(features=features, reports_first_token=True, reporter="bench").SerializeToString()


async def measure(pid: int, port: int, messages: list[bytes], *, report: bool) -> tuple[float, float]:
    """(microseconds of server CPU a pick, a pick's reports)."""
    metadata = (("authorization", f"Bearer {os.environ['KEY']}"),) if "KEY" in os.environ else ()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(PICK)

        async def pick(message: bytes) -> str:
            answer: str = pb.PickResponse.FromString(await call(message, metadata=metadata)).picked.id
            return answer

        picking = reporting = 0.0
        for at in range(-_CHUNK, len(messages), _CHUNK):  # the first is to warm up
            ids: list[str] = []
            before = cpu_seconds(pid)
            await _all(messages[max(at, 0) : max(at, 0) + _CHUNK], pick, ids)
            between = cpu_seconds(pid)
            if report:
                await channel.stream_unary(REPORT)(_outcomes(ids), metadata=metadata)
            if at >= 0:
                picking, reporting = picking + between - before, reporting + cpu_seconds(pid) - between
    return picking / len(messages) * 1e6, reporting / len(messages) * 1e6


def _outcomes(ids: list[str]) -> Iterator[bytes]:
    usage = pb.Usage(prompt_tokens=250, completion_tokens=50, cached_tokens=128)
    yield pb.Outcome(hello=pb.Hello(reporter="bench")).SerializeToString()
    for each in ids:
        yield pb.Outcome(pick_id=each, started=pb.Started(status=200)).SerializeToString()
        yield pb.Outcome(pick_id=each, first_token=pb.FirstToken()).SerializeToString()
        yield pb.Outcome(pick_id=each, finished=pb.Finished(usage=usage)).SerializeToString()


async def _all(messages: list[bytes], act: Callable[[bytes], Awaitable[str]], into: list[str]) -> None:
    todo = iter(messages)

    async def work() -> None:
        for message in todo:
            into.append(await act(message))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(_AT_ONCE):
            tasks.create_task(work())


def once(what: str, messages: list[bytes], endpoints: int) -> tuple[float, float]:
    argv = (sys.executable, __file__, "--serve", what, "--endpoints", str(endpoints))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline())
            return run(measure(server.pid, port, messages, report=what != "bare"))
        finally:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoints", type=int, default=10)
    parser.add_argument("--picks", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    if given.serve:
        run(serve(given.endpoints, given.serve))
        return
    kinds: dict[str, tuple[str, Callable[[int], Iterator[bytes]]]] = {
        "bare call, 1 KB": ("bare", raw),
        "Pick, body of 1 KB": ("api", raw),
        "Pick, features of 1 KB": ("api", blocks),
    }
    best: dict[str, tuple[float, float]] = {}
    for _ in range(given.repeats):
        for name, (what, make) in kinds.items():
            found = once(what, list(make(given.picks)), given.endpoints)
            best[name] = min(best.get(name, found), found)
    print(f"{given.endpoints} endpoints; us of server CPU, best of {given.repeats}")
    for name, (pick, reports) in best.items():
        print(f"{name:24} {pick:6.0f}" + (f"   its three reports {reports:5.0f}" if "Pick" in name else ""))


if __name__ == "__main__":
    main()
