"""A way to an API server that can be cut, closed and held up; what goes through it, TLS above all, is not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from picker.children import free_ports

_CHUNK = 1 << 16


class Relay:
    """Listens on a port of its own at 127.0.0.1. host, port: where the API server is."""

    def __init__(self, host: str, port: int) -> None:
        (self.port,) = free_ports(1)
        self._to = (host, port)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def up(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def down(self) -> None:
        """Nobody listens, and all connections are broken."""
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        """All connections break, in the middle of an answer."""
        for writer in self._open:
            writer.transport.abort()

    def stall(self) -> None:
        """Connections stay, and nothing comes any more on any of them, those that come included."""
        self._flowing.clear()

    def flow_for_new(self) -> None:
        """Those that are stalled stay so."""
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        flowing = self._flowing
        try:
            other_reader, other = await asyncio.open_connection(*self._to)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, other}
        self._open |= ends
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, other, None))
                group.create_task(_pump(other_reader, writer, flowing))
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flowing: asyncio.Event | None) -> None:
    with suppress(OSError):
        while data := await reader.read(_CHUNK):
            if flowing is not None:
                await flowing.wait()
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


@asynccontextmanager
async def relaying(host: str, port: int) -> AsyncIterator[Relay]:
    relay = Relay(host, port)
    await relay.up()
    try:
        yield relay
    finally:
        relay.flow_for_new()
        await relay.down()
