"""A whole proxy with a real scheduler in front of an endpoint that keeps the very bytes that reach it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import h11
from prometheus_client import CollectorRegistry

import fakes
from picker.exchange import Exchange, Limits
from picker.frontends.limits import ConnectionLimits, Door
from picker.frontends.proxy import Proxy
from picker.frontends.serving import listen, port_of
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import Endpoint

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@dataclass
class Witness:
    """An endpoint that reads requests with h11 and remembers what it was sent, byte for byte."""

    address: str = ""
    connections: list[bytearray] = field(default_factory=list)
    requests: list[h11.Request] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = bytearray()
        self.connections.append(wire)
        connection = h11.Connection(h11.SERVER)
        try:
            await self._answer_all(connection, reader, writer, wire)
        except h11.RemoteProtocolError as error:
            self.broken.append(str(error))
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _answer_all(
        self, parser: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wire: bytearray
    ) -> None:
        body = b""
        while True:
            match parser.next_event():
                case h11.NEED_DATA:
                    data = await reader.read(65536)
                    wire += data
                    parser.receive_data(data)
                    if not data:
                        return
                case h11.Request() as request:
                    self.requests.append(request)
                    body = b""
                case h11.Data(data=data):
                    body += bytes(data)
                case h11.EndOfMessage():
                    self.bodies.append(body)
                    writer.write(OK)
                    parser.send(h11.Response(status_code=200, headers=[("content-length", "2")]))
                    parser.send(h11.Data(b"ok"))
                    parser.send(h11.EndOfMessage())
                    parser.start_next_cycle()
                case _:
                    return

    def values(self, name: bytes, request: int = -1) -> list[bytes]:
        return [bytes(value) for field_name, value in self.requests[request].headers if field_name == name]


class Counting(Runtime):
    opened = 0

    def open(self) -> Exchange:
        self.opened += 1
        return super().open()


@dataclass
class Gateway:
    port: int
    endpoint: Witness
    proxy: Proxy
    runtime: Counting

    @property
    def reading(self) -> int:
        """Requests whose heads are here and whose bodies are not."""
        return self.runtime.opened

    async def say(self, *parts: bytes) -> bytes:
        """All that comes back for these bytes, which go out one part after another, up to the connection's end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
        try:
            return await _all_of(reader)
        finally:
            writer.close()


async def _all_of(reader: asyncio.StreamReader) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            received += data
    return received


async def until(holds: Callable[[], bool]) -> None:
    """Let the loop go on until something is so."""
    for _ in range(1_000_000):
        if holds():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to be")


def statuses(received: bytes) -> list[int]:
    """The statuses of the responses on one connection, by h11; an end amid a response is an error."""
    found, rest = [], received
    while rest:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
        client.send(h11.EndOfMessage())
        client.receive_data(rest)
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            assert event is not h11.NEED_DATA, f"the response ends too early: {rest[-100:]!r}"
            if isinstance(event, h11.Response):
                found.append(event.status_code)
        rest = client.trailing_data[0]
    return found


@asynccontextmanager
async def gateway(*, limits: Limits | None = None, patience: float = 1.0, **options: Any) -> AsyncIterator[Gateway]:
    """A proxy in front of one witness. patience: seconds it waits for clients to go on. options: of `Proxy`."""
    endpoint = Witness()
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0)
    endpoint.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    runtime = Counting(
        fakes.scheduler(Endpoint(endpoint.address, endpoint.address)),
        BlockHasher(b"secret", fakes.BLOCK_BYTES),
        Telemetry(CollectorRegistry()),
        clock=asyncio.get_running_loop().time,
        limits=limits,
    )
    door = Door(ConnectionLimits(head_timeout=patience, idle_timeout=patience))
    own: dict[str, Any] = {"grace": 0.2, "door": door, "body_timeout": patience}
    proxy = Proxy(runtime, **(own | options))
    listener, stop = listen("127.0.0.1", 0), asyncio.Event()
    made = Gateway(port_of(listener), endpoint, proxy, runtime)
    async with asyncio.timeout(60), server, asyncio.TaskGroup() as group:
        group.create_task(proxy.serve(listener, stop))
        try:
            yield made
        finally:
            stop.set()
