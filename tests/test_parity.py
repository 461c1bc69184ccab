"""One trace, three bodies: virtual time, ext-proc and the proxy decide alike.

The trace is recorded in virtual time, with engines that answer according to what was decided. Its facts are then played
to the two front ends over real sockets, each at the instant it had, and every decision is compared.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import aiohttp
import grpc.aio
import numpy as np
from aiohttp import web
from envoy.service.ext_proc.v3 import external_processor_pb2, external_processor_pb2_grpc
from prometheus_client import CollectorRegistry

from picker.core.scheduler import Scheduler, Settings
from picker.frontends.extproc import ExtProc
from picker.frontends.proxy import Proxy
from picker.frontends.serving import listen, port_of
from picker.prefix.approximate import ApproximateIndex
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.sim.cluster import Arrival, Cluster, Timing
from picker.sim.engine import Engine
from picker.sim.latency import profile
from picker.telemetry import Telemetry
from picker.types import (
    Decision,
    Endpoint,
    EndpointAdded,
    Fact,
    Finished,
    FirstToken,
    LoadObserved,
    Queued,
    Rejection,
    Request,
    Usage,
)
from picker.wire import openai

PODS = ("pod-0", "pod-1", "pod-2")
MODEL = "model"
REQUESTS = 60
SECRET = b"parity"
BLOCK_BYTES = 64
HASHER = BlockHasher(SECRET, BLOCK_BYTES)


def scheduler() -> Scheduler:
    return Scheduler(Settings(block_bytes=BLOCK_BYTES, seed=7), ApproximateIndex(64 * 2**20))


# --- the recording ---


@dataclass(slots=True)
class Recorder:
    """A router that notes every verb it passes on."""

    inner: Scheduler
    steps: list[tuple[float, Request | Fact]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def submit(self, request: Request, now: float) -> Decision | Rejection | Queued:
        outcome = self.inner.submit(request, now)
        assert isinstance(outcome, Decision)
        self.steps.append((now, request))
        self.decisions.append(outcome)
        return outcome

    def apply(self, fact: Fact, now: float) -> None:
        self.inner.apply(fact, now)
        self.steps.append((now, fact))

    def poll(self, now: float) -> list[Decision | Rejection]:
        return self.inner.poll(now)

    def next_wakeup(self) -> float | None:
        return self.inner.next_wakeup()


def bodies() -> list[bytes]:
    """Chats of five groups, each with a system prompt of its own and questions that begin alike."""
    rng = np.random.default_rng(5)
    systems = [" ".join(f"rule{group}-{n}" for n in range(400)) for group in range(5)]
    chats = []
    for number in range(REQUESTS):
        question = " ".join(f"word{n}" for n in range(int(rng.integers(5, 300)))) + f" number {number}"
        messages = [{"role": "system", "content": systems[int(rng.integers(5))]}, {"role": "user", "content": question}]
        chats.append(json.dumps({"model": MODEL, "messages": messages, "stream": True, "max_tokens": 30}).encode())
    return chats


def record(chats: Sequence[bytes]) -> Recorder:
    rng = np.random.default_rng(6)
    recorder = Recorder(scheduler())
    engines = [Engine(replace(profile("llama-3.1-8b-h100"), kv_tokens=12_000), name=name) for name in PODS]
    cluster = Cluster(recorder, engines, timing=Timing(scrape_interval=0.2), model=MODEL)
    times = np.cumsum(rng.exponential(0.03, size=len(chats)))
    cluster.run(arrival(chat, float(times[n]), session=f"s{n % 7}") for n, chat in enumerate(chats))
    return recorder


def arrival(chat: bytes, at: float, session: str) -> Arrival:
    call = openai.parse_call("/v1/chat/completions", chat)
    hashes = HASHER.hash(call.prompt, root=HASHER.root(call.model, None))
    return Arrival(
        at=at,
        prompt_tokens=len(call.prompt) // 4 + 1,
        output_tokens=30,
        block_hashes=hashes,
        session=session,
        prompt_bytes=len(call.prompt),
    )


# --- the playing ---


@dataclass(slots=True)
class ManualClock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def runtime(clock: ManualClock) -> Runtime:
    return Runtime(scheduler(), HASHER, Telemetry(CollectorRegistry()), clock=clock)


FIRST = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'


def ending(usage: Usage) -> bytes:
    counts = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\ndata: [DONE]\n\n"


class ProxyWorld:
    """Requests over HTTP through the proxy to pods that answer when the trace says so."""

    def __init__(
        self,
        base: str,
        session: aiohttp.ClientSession,
        reached: asyncio.Queue[tuple[str, web.StreamResponse]],
        group: asyncio.TaskGroup,
    ):
        self.base, self.session, self.reached = base, session, reached
        self.group = group
        self.asked: dict[int, tuple[str, asyncio.Task[aiohttp.ClientResponse], web.StreamResponse]] = {}
        self.open: dict[int, tuple[aiohttp.ClientResponse, web.StreamResponse]] = {}

    async def submit(self, number: int, chat: bytes, session: str) -> str:
        headers = {"content-type": "application/json", "x-session-id": session}
        url = f"{self.base}/v1/chat/completions"
        response = self.group.create_task(_posted(self.session, url, chat, headers))
        pod, upstream = await self.reached.get()
        self.asked[number] = pod, response, upstream
        return pod

    async def first_token(self, number: int) -> None:
        pod, response_to_come, upstream = self.asked.pop(number)
        await upstream.write(FIRST)
        response = await response_to_come  # its head comes with the first event
        assert response.headers["x-picker-endpoint"] == pod
        self.open[number] = response, upstream
        assert await response.content.readexactly(len(FIRST)) == FIRST

    async def finish(self, number: int, usage: Usage) -> None:
        response, upstream = self.open.pop(number)
        await upstream.write(ending(usage))
        await upstream.write_eof()
        assert (await response.read()).endswith(b"data: [DONE]\n\n")
        upstream.ended.set()  # type: ignore[attr-defined]


async def _posted(
    session: aiohttp.ClientSession, url: str, chat: bytes, headers: dict[str, str]
) -> aiohttp.ClientResponse:
    return await session.post(url, data=chat, headers=headers)


class _Held(web.StreamResponse):
    """A response whose end the test decides."""

    def __init__(self) -> None:
        super().__init__(headers={"content-type": "text/event-stream"})
        self.ended = asyncio.Event()


@asynccontextmanager
async def proxy_world(clock: ManualClock) -> AsyncIterator[tuple[Runtime, dict[str, str], ProxyWorld]]:
    reached: asyncio.Queue[tuple[str, web.StreamResponse]] = asyncio.Queue()
    stop = asyncio.Event()
    run = runtime(clock)
    runners, addresses = [], {}
    for name in PODS:
        runner = web.AppRunner(_pod(name, reached))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        runners.append(runner)
        addresses[name] = "{}:{}".format(*runner.addresses[0][:2])
    traffic = listen("127.0.0.1", 0)
    base = f"http://127.0.0.1:{port_of(traffic)}"
    async with asyncio.TaskGroup() as group, aiohttp.ClientSession() as session:
        group.create_task(Proxy(run, grace=0.1).serve(traffic, stop))
        yield run, addresses, ProxyWorld(base, session, reached, group)
        stop.set()
    for runner in runners:
        await runner.cleanup()


def _pod(name: str, reached: asyncio.Queue[tuple[str, web.StreamResponse]]) -> web.Application:
    async def chat(request: web.Request) -> web.StreamResponse:
        await request.read()
        held = _Held()
        await held.prepare(request)
        await reached.put((name, held))
        await held.ended.wait()
        return held

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    return app


class ExtProcWorld:
    """Requests as a data plane's messages, one gRPC stream each."""

    def __init__(self, channel: grpc.aio.Channel, addresses: dict[str, str]) -> None:
        self.stub = external_processor_pb2_grpc.ExternalProcessorStub(channel)
        self.names = {address: name for name, address in addresses.items()}
        self.open: dict[int, grpc.aio.StreamStreamCall] = {}

    async def submit(self, number: int, chat: bytes, session: str) -> str:
        stream = self.open[number] = self.stub.Process()
        head = external_processor_pb2.ProcessingRequest()
        fields = {":method": "POST", ":path": "/v1/chat/completions", "x-session-id": session}
        for key, value in fields.items():
            head.request_headers.headers.headers.add(key=key, raw_value=value.encode())
        await stream.write(head)
        body = external_processor_pb2.ProcessingRequest()
        body.request_body.body, body.request_body.end_of_stream = chat, True
        await stream.write(body)
        reply = await stream.read()
        await stream.read()  # the body comes back
        mutation = reply.request_headers.response.header_mutation
        destination = next(
            option.header.raw_value.decode()
            for option in mutation.set_headers
            if option.header.key == "x-gateway-destination-endpoint"
        )
        response = external_processor_pb2.ProcessingRequest()
        for key, value in {":status": "200", "content-type": "text/event-stream"}.items():
            response.response_headers.headers.headers.add(key=key, raw_value=value.encode())
        await stream.write(response)
        await stream.read()
        return self.names[destination.partition(",")[0]]

    async def first_token(self, number: int) -> None:
        await self._chunk(number, FIRST, end=False)

    async def finish(self, number: int, usage: Usage) -> None:
        await self._chunk(number, ending(usage), end=True)
        await self.open.pop(number).done_writing()

    async def _chunk(self, number: int, data: bytes, *, end: bool) -> None:
        message = external_processor_pb2.ProcessingRequest()
        message.response_body.body, message.response_body.end_of_stream = data, end
        await self.open[number].write(message)
        reply = await self.open[number].read()
        assert reply.response_body.response.body_mutation.streamed_response.body == data


@asynccontextmanager
async def extproc_world(clock: ManualClock) -> AsyncIterator[tuple[Runtime, dict[str, str], ExtProcWorld]]:
    run = runtime(clock)
    addresses = {name: f"10.0.0.{number}:8000" for number, name in enumerate(PODS)}
    ports: asyncio.Queue[int] = asyncio.Queue()
    service = ExtProc(run)
    async with asyncio.TaskGroup() as group:
        group.create_task(service.serve("127.0.0.1", 0, grace=0.1, ready=lambda port, _: ports.put_nowait(port)))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{await ports.get()}") as channel:
            yield run, addresses, ExtProcWorld(channel, addresses)
        service.shutdown()


async def play(
    recorder: Recorder,
    chats: Sequence[bytes],
    clock: ManualClock,
    run: Runtime,
    addresses: dict[str, str],
    world: ProxyWorld | ExtProcWorld,
) -> list[str]:
    """Play the recording to a front end, each step when it was, and return the endpoints that were picked."""
    picked = []
    for at, step in recorder.steps:
        clock.now = at
        match step:
            case Request():
                picked.append(await world.submit(step.id, chats[step.id - 1], step.session or ""))
            case FirstToken(number):
                await world.first_token(number)
            case Finished(number, usage=usage):
                assert usage is not None
                await world.finish(number, usage)
            case EndpointAdded(endpoint):
                run.emit(EndpointAdded(Endpoint(endpoint.name, addresses[endpoint.name], endpoint.models)))
            case LoadObserved():
                run.emit(step)
            case _:
                raise AssertionError(f"the recording has a {type(step).__name__}")
    return picked


def picks(recorder: Recorder) -> list[str]:
    return [decision.endpoint.name for decision in recorder.decisions]


def test_the_recording_is_worth_comparing() -> None:
    recorder = record(bodies())
    counts = {name: picks(recorder).count(name) for name in PODS}
    assert min(counts.values()) > REQUESTS // 10
    assert sum(decision.matched_blocks > 0 for decision in recorder.decisions) > REQUESTS // 2
    assert any(isinstance(step, LoadObserved) for _, step in recorder.steps)


async def test_the_proxy_decides_as_in_virtual_time() -> None:
    chats, clock = bodies(), ManualClock()
    recorder = record(chats)
    async with proxy_world(clock) as (run, addresses, world):
        assert await play(recorder, chats, clock, run, addresses, world) == picks(recorder)
        assert len(run.scheduler.charges) == 0


async def test_ext_proc_decides_as_in_virtual_time() -> None:
    chats, clock = bodies(), ManualClock()
    recorder = record(chats)
    async with extproc_world(clock) as (run, addresses, world):
        assert await play(recorder, chats, clock, run, addresses, world) == picks(recorder)
        assert len(run.scheduler.charges) == 0
