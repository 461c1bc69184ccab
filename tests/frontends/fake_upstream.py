"""Endpoints that behave as a test tells them to, on real loopback sockets, and a scheduler that only remembers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from aiohttp import web
from prometheus_client import CollectorRegistry

from picker.core.scheduler import Scheduler
from picker.exchange import Limits
from picker.frontends.proxy import Proxy
from picker.frontends.serving import listen, port_of
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import Decision, Endpoint, Fact, Queued, Reading, Rejection, RejectReason, Request

F = TypeVar("F")
Script = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]

COMPLETION = b'{"choices":[{"index":0,"text":"ok"}],"usage":{"prompt_tokens":3,"completion_tokens":1}}'
EVENT = b'data: {"choices":[{"index":0,"text":" a"}]}\n\n'
DONE = b"data: [DONE]\n\n"
ASK = {"model": "m", "prompt": "hello"}


@dataclass
class Seen:
    """A request as it reached an endpoint."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for field_name, value in self.headers if field_name.lower() == name]


@dataclass
class FakeUpstream:
    address: str
    script: Script
    seen: list[Seen] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = [(name.decode(), value.decode()) for name, value in request.raw_headers]
        self.seen.append(Seen(request.method, request.raw_path, headers, body))
        return await self.script(request, body)


async def answer_ok(request: web.Request, body: bytes) -> web.StreamResponse:
    return web.Response(body=COMPLETION, content_type="application/json")


@asynccontextmanager
async def upstream(script: Script = answer_ok) -> AsyncIterator[FakeUpstream]:
    """An endpoint that answers by `script`; its handler is cancelled when its client closes the connection."""
    listener = listen("127.0.0.1", 0)
    made = FakeUpstream(f"127.0.0.1:{port_of(listener)}", script)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    try:
        yield made
    finally:
        await runner.cleanup()


class RefusingPort:
    """An address where every connection is refused: bound, so that nobody else gets it, and not listening."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{port_of(self._socket)}"

    def close(self) -> None:
        self._socket.close()


class FirstChoice:
    """A scheduler that picks the first endpoint that was not tried, and keeps every fact."""

    def __init__(self, endpoints: list[Endpoint]) -> None:
        self.endpoints = endpoints
        self.requests: list[Request] = []
        self.facts: list[Fact] = []
        self.busy = False  # queue instead of picking
        self.notices: list[str] = []
        self._told = asyncio.Event()

    def submit(self, request: Request, now: float, reading: Reading | None = None) -> Decision | Rejection | Queued:
        self.requests.append(request)
        self._told.set()
        return Queued(request.id) if self.busy else self.fallback(request)

    def fallback(self, request: Request) -> Decision | Rejection:
        for endpoint in self.endpoints:
            if endpoint.name not in request.exclude:
                return Decision(request.id, endpoint)
        return Rejection(request.id, RejectReason.NO_ENDPOINTS, 503, "No endpoint is known.", retry_after=2.0)

    def apply(self, fact: Fact, now: float) -> None:
        self.facts.append(fact)
        self._told.set()

    def poll(self, now: float) -> list[Decision | Rejection]:
        return []

    def next_wakeup(self) -> float | None:
        return None

    async def asked(self) -> Request:
        """The first request, as soon as there is one."""
        while not self.requests:
            self._told.clear()
            await self._told.wait()
        return self.requests[0]

    async def told(self, kind: type[F]) -> F:
        """The first fact of a kind, as soon as there is one."""
        while True:
            for fact in self.facts:
                if isinstance(fact, kind):
                    return fact
            self._told.clear()
            await self._told.wait()


@dataclass
class Served:
    """A running proxy. stop: set to shut it down. ended: set when it has."""

    url: str
    port: int
    scheduler: FirstChoice
    runtime: Runtime
    stop: asyncio.Event
    ended: asyncio.Event


@asynccontextmanager
async def served_proxy(*addresses: str, limits: Limits | None = None, **options: Any) -> AsyncIterator[Served]:
    """A proxy in front of these addresses, on a port of its own. options: of `Proxy`."""
    scheduler = FirstChoice([Endpoint(address, address) for address in addresses])
    runtime = Runtime(
        cast(Scheduler, scheduler),
        BlockHasher(b"secret"),
        Telemetry(CollectorRegistry()),
        clock=asyncio.get_running_loop().time,
        limits=limits,
    )
    listener = listen("127.0.0.1", 0)
    port = port_of(listener)
    served = Served(f"http://127.0.0.1:{port}", port, scheduler, runtime, asyncio.Event(), asyncio.Event())

    async def serve() -> None:
        await Proxy(runtime, **({"grace": 0.2} | options)).serve(listener, served.stop)
        served.ended.set()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(serve())
        try:
            yield served
        finally:
            served.stop.set()
