"""A gRPC server on the event loop itself: sockets and tasks around `wire.http2`.

Serves calls of any shape by path; a handler reads and writes serialised messages. In place of `grpc.aio`, whose threads
hand every message over to the loop and back: that costs several times the work of a request (docs/decisions).
"""

from __future__ import annotations

import asyncio
import enum
import logging
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import cast

from picker.wire.header_blocks import HeaderBlocks
from picker.wire.http2 import Connection, Drained, Event, HalfClosed, Http2Error, Message, Opened, Reset

log = logging.getLogger("picker.grpc")

# Seconds that a peer has to close its side of a connection that we have closed.
_LINGER = 1.0
# Seconds without a byte from a peer until it is asked for a sign of life, and again until it is given up; also how long
# it may take to say that it speaks HTTP/2.
_KEEPALIVE = 20.0
_HANDSHAKE = 10.0  # seconds for TLS

_PROBES = "/grpc.health."

Handler = Callable[["Call"], Awaitable[None]]
Early = Callable[["Call", bytes], bool]
"""What may answer a call as soon as its first message is there: True when it has (`answer`) or has given it a task,
False to leave the call to its handler. Must not raise.
"""


class Code(enum.IntEnum):
    """gRPC's status codes, as far as a server of ours ends calls with them."""

    OK = 0
    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Call:
    """One call, for its handler. on_arrival: called when a message or the end of messages has come, if set."""

    __slots__ = (
        "_connection",
        "_ended",
        "_half_closed",
        "_messages",
        "_waiter",
        "_writable",
        "early",
        "id",
        "on_arrival",
        "path",
        "task",
    )

    def __init__(self, connection: _Protocol, stream_id: int, path: str) -> None:
        self.id = stream_id
        self.path = path
        self.on_arrival: Callable[[], None] | None = None
        self.task: asyncio.Task[None] | None = None
        self.early: Early | None = None
        self._connection = connection
        self._messages: deque[bytes] = deque()
        self._half_closed = False
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None

    def peek(self) -> bytes | None:
        """The next message without taking it; None when none has come."""
        return self._messages[0] if self._messages else None

    @property
    def over(self) -> bool:
        """The peer sends no more, and everything it sent has been read."""
        return self._half_closed and not self._messages

    async def read(self) -> bytes | None:
        """The next message, None after the last."""
        while not self._messages:
            if self._half_closed:
                return None
            self._waiter = self._connection.loop.create_future()
            await self._waiter
        message = self._messages.popleft()
        self._connection.consumed(self.id, message)
        return message

    async def write(self, message: bytes) -> None:
        """Send a message; waits while the peer or the socket takes no more."""
        if not self._connection.send(self.id, message):
            self._writable = self._connection.loop.create_future()
            await self._writable
        if (paused := self._connection.paused) is not None:
            await asyncio.shield(paused)  # all calls wait for it: one that is given up must not cancel it

    def end(self, code: Code = Code.OK, message: str = "") -> None:
        """End the call with a status; what follows is dropped."""
        self._ended = True
        self._connection.end(self.id, code, message)

    def answer(self, message: bytes) -> None:
        """The only message of a call that has no task, and its good end."""
        self._connection.answer(self.id, message)

    # for the connection

    def arrived(self, message: bytes | None) -> None:
        if message is None:
            self._half_closed = True
        else:
            self._messages.append(message)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self.on_arrival is not None:
            self.on_arrival()

    def drained(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def close(self) -> None:
        """The handler is done: a call without a status is given up."""
        self._connection.forget(self.id, give_up=not self._ended)


class _Protocol(asyncio.Protocol):
    """One connection. Output of one turn of the loop is written at once, however many calls it belongs to."""

    def __init__(self, server: GrpcServer) -> None:
        self.loop = asyncio.get_running_loop()
        self.calls: dict[int, Call] = {}
        self.paused: asyncio.Future[None] | None = None
        self._server = server
        self._http2 = Connection(max_message_bytes=server.max_message_bytes, headers=server.headers())
        self.closed: asyncio.Future[None] = self.loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._flushing = False
        self._deaf = False
        self.working = False
        self.parting = False
        self._heard = True
        self._asked = False

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but ancestry
        self._server.connections.add(self)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.connections.discard(self)
        self.closed.set_result(None)
        self.resume_writing()
        for call in list(self.calls.values()):
            if call.task is None:
                del self.calls[call.id]
            call.cancel()

    def pause_writing(self) -> None:
        self.paused = self.loop.create_future()

    def resume_writing(self) -> None:
        if self.paused is not None:
            self.paused.set_result(None)
            self.paused = None

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._heard = True
        try:
            events = self._http2.receive(data)
        except Http2Error as error:
            log.warning("a peer broke the HTTP/2 protocol: %s", error)
            self.close()
            return
        for event in events:
            call = self.calls.get(event.stream_id)
            if isinstance(event, Opened):
                call = self.calls[event.stream_id] = Call(self, event.stream_id, event.path)
                self.working = self.working or not event.path.startswith(_PROBES)
                call.early = self._server.early.get(event.path)
                if call.early is None:
                    call.task = self._server.start(call)
            elif call is None:
                pass  # it was over before its peer knew
            elif call.early is not None:
                self._first(call, call.early, event)
            elif isinstance(event, Message):
                call.arrived(event.data)
            elif isinstance(event, HalfClosed):
                call.arrived(None)
            elif isinstance(event, Reset):
                del self.calls[event.stream_id]  # its task may never have begun
                call.cancel()
            elif isinstance(event, Drained):
                call.drained()
        self._flush_soon()

    def _first(self, call: Call, early: Early, event: Event) -> None:
        """Something has come of a call that has no task yet."""
        call.early = None
        if isinstance(event, Reset):
            del self.calls[call.id]
            return
        if isinstance(event, Message):
            if early(call, event.data):
                if call.task is None:
                    del self.calls[call.id]
                return
            call.arrived(event.data)
        elif isinstance(event, HalfClosed):
            call.arrived(None)
        call.task = self._server.start(call)

    # the calls' side

    def answer(self, stream_id: int, message: bytes) -> None:
        self._flush_soon()
        self._http2.answer(stream_id, message)

    def send(self, stream_id: int, message: bytes) -> bool:
        self._flush_soon()
        return self._http2.send(stream_id, message)

    def consumed(self, stream_id: int, message: bytes) -> None:
        self._http2.consumed(stream_id, message)

    def end(self, stream_id: int, code: int, message: str) -> None:
        self._flush_soon()
        self._http2.end(stream_id, code, message)

    def forget(self, stream_id: int, *, give_up: bool) -> None:
        self.calls.pop(stream_id, None)
        if give_up:
            self._http2.cancel(stream_id)
            self._flush_soon()

    # the server's side

    def look(self) -> None:
        """Called every `_KEEPALIVE` seconds: a peer that is gone without a word takes its calls along."""
        if self._transport is None:
            return
        if self._asked and not (self._heard and self._http2.begun):
            self._transport.abort()
            return
        self._asked = not self._heard or not self._http2.begun
        self._heard = False
        if self._asked and self._http2.begun:
            self._http2.ping()
            self._flush()

    def part(self) -> None:
        self.parting = True
        self._http2.part()
        self._flush()

    def go_away(self) -> None:
        self._http2.go_away()
        self._flush()

    def close(self) -> None:
        """Say what is left to say and hang up, once the peer has or `_LINGER` seconds are over.

        A socket closed over bytes that nobody has read is reset, and takes along what its peer has not read yet.
        """
        if self._transport is None or self._deaf:
            return
        self._flush()
        self._deaf = True
        if not self._transport.can_write_eof():
            self._transport.close()
            return
        try:
            self._transport.write_eof()
        except OSError:  # the peer was faster
            self._transport.abort()
        self.loop.call_later(_LINGER, self._transport.abort)

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        out = self._http2.take()
        if out and self._transport is not None and not self._deaf:
            self._transport.write(out)


class GrpcServer:
    """Serves handlers by path ("/package.Service/Method"). tasks: own the calls; a failing handler does not fail them.

    max_message_bytes: of one message; a call that sends a larger one is ended. keepalive: seconds of silence until a
    peer is asked whether it lives, and again until its connection is closed. headers: makes what reads the header
    blocks of a connection. early: see `Early`; by path.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        tasks: asyncio.TaskGroup,
        *,
        max_message_bytes: int = 64 * 1024 * 1024,
        keepalive: float = _KEEPALIVE,
        headers: Callable[[], HeaderBlocks] = HeaderBlocks,
        early: Mapping[str, Early] = MappingProxyType({}),
    ) -> None:
        self.max_message_bytes = max_message_bytes
        self.headers = headers
        self.early = early
        self._keepalive = keepalive
        self._keeper: asyncio.Task[None] | None = None
        self.connections: set[_Protocol] = set()
        self._handlers = handlers
        self._tasks = tasks
        self._listener: asyncio.Server | None = None

    async def serve(self, listener: socket.socket, *, tls: ssl.SSLContext | None = None) -> None:
        """Begin to serve a listening socket, which is closed by `stop`. tls must offer "h2" by ALPN."""
        loop = asyncio.get_running_loop()
        handshake = None if tls is None else _HANDSHAKE
        create = loop.create_unix_server if listener.family == socket.AF_UNIX else loop.create_server
        self._listener = await create(
            lambda: _Protocol(self), sock=listener, ssl=tls, backlog=1024, ssl_handshake_timeout=handshake
        )
        self.keep()

    def keep(self) -> None:
        """Begin to look after connections; for a server that is only given some."""
        self._keeper = self._tasks.create_task(self._keep())

    async def adopt(self, connection: socket.socket, *, tls: ssl.SSLContext | None = None) -> None:
        """Serve a connection that somebody else has accepted. Raises OSError for one that breaks off meanwhile."""
        loop = asyncio.get_running_loop()
        handshake = None if tls is None else _HANDSHAKE
        await loop.connect_accepted_socket(
            lambda: _Protocol(self), connection, ssl=tls, ssl_handshake_timeout=handshake
        )

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._keepalive)
            for connection in list(self.connections):
                connection.look()

    def part(self) -> None:
        """Ask peers to make their next calls on a new connection, which a load balancer may give to somebody else."""
        for connection in self.connections:
            connection.part()

    def part_from_one(self) -> None:
        """The same for one peer."""
        if (one := next((each for each in self.connections if each.working and not each.parting), None)) is not None:
            one.part()

    @property
    def load(self) -> int:
        """Connections that bring work: more than questions after our health, and not about to go."""
        return sum(each.working and not each.parting for each in self.connections)

    def refuse(self) -> None:
        """Take no new connections and calls; open calls go on."""
        if self._listener is not None:
            self._listener.close()
        for connection in self.connections:
            connection.go_away()

    async def stop(self, grace: float | None) -> None:
        """Take no new connections and calls, let open calls end within `grace` seconds, cancel the rest."""
        self.refuse()
        if self._keeper is not None:
            self._keeper.cancel()
        if grace and (running := self._running()):
            await asyncio.wait(running, timeout=grace)
        if running := self._running():
            for task in running:
                task.cancel()
            await asyncio.wait(running)
        if self.connections:
            for connection in self.connections:
                connection.close()
            await asyncio.wait([connection.closed for connection in self.connections])

    def start(self, call: Call, handler: Handler | None = None) -> asyncio.Task[None]:
        """handler: None for that of the call's path."""
        return self._tasks.create_task(self._serve(call, handler or self._handlers.get(call.path)))

    def _running(self) -> set[asyncio.Task[None]]:
        calls = (call for connection in self.connections for call in connection.calls.values())
        return {call.task for call in calls if call.task is not None}

    async def _serve(self, call: Call, handler: Handler | None) -> None:
        try:
            if handler is None:
                call.end(Code.UNIMPLEMENTED, "no such method")
                return
            await handler(call)
            call.end()
        except Exception:
            # Supervision: handlers answer for their own bugs; one that does not ends its call, not the server.
            log.exception("a handler of %s failed", call.path)
            call.end(Code.INTERNAL, "the handler failed")
        finally:
            call.close()
