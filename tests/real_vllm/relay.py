"""A lossy wire between a server's events and who subscribes to them: passes ZeroMQ messages on, or loses them.

Owns the connections it has made, and of ZMTP 3 only where a frame ends (https://rfc.zeromq.org/spec/23/). The server
names the relay as the source of its events, see `in_pod`; replays are asked of the server itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from real_vllm.pod import Pod

_GREETING = 64  # bytes
_MORE, _LONG, _COMMAND = 1, 2, 4  # flags of a frame


@dataclass(slots=True)
class Relay:
    """Before the port `target` of this machine. lost: messages that did not pass while `losing` was set."""

    target: int
    losing: bool = False
    lost: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One subscriber, until either side ends the connection."""
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._join(reader, writer)
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        beyond, back = await asyncio.open_connection("127.0.0.1", self.target)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_until_the_end(reader, back))
                group.create_task(self._messages(beyond, writer))
        except* (OSError, asyncio.IncompleteReadError):
            pass  # one side has gone; the other follows
        finally:
            back.transport.abort()

    async def _messages(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What the server publishes, message by message."""
        await _greeting(reader, writer)
        while True:
            message, losable = await _message(reader)
            if losable and self.losing:
                self.lost += 1
            else:
                writer.write(message)
                await writer.drain()

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


async def _until_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError


async def _greeting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Piece by piece: either side sends the rest of its greeting only when it has seen the beginning of the other's."""
    missing = _GREETING
    while missing:
        if not (piece := await reader.read(missing)):
            raise ConnectionResetError
        writer.write(piece)
        missing -= len(piece)


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """All frames of one message, or one command; whether it is a message."""
    frames = b""
    while True:
        head = await reader.readexactly(1)
        size = await reader.readexactly(8 if head[0] & _LONG else 1)
        frames += head + size + await reader.readexactly(int.from_bytes(size, "big"))
        if not head[0] & _MORE:
            return frames, not head[0] & _COMMAND


@asynccontextmanager
async def event_relay(pod: Pod) -> AsyncIterator[Relay]:
    """A relay before the pod's events, which the pod says are there."""
    relay = Relay(pod.events_port)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    pod.told.write_text(_sources(pod, server.sockets[0].getsockname()[1]))
    try:
        yield relay
    finally:
        pod.told.unlink()
        server.close()
        relay.close()


def _sources(pod: Pod, port: int) -> str:
    """What a server answers at /kv_event_sources."""
    sizes = {"buffer_steps": 10000, "hwm": 100000, "max_queue_size": 100000}
    places = {"endpoint": f"tcp://*:{port}", "replay_endpoint": f"tcp://*:{pod.replay_port}"}
    return json.dumps({"0": {"enable_kv_cache_events": True, "publisher": "zmq", **places, **sizes, "topic": ""}})
