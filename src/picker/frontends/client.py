"""One request of a client over HTTP/1.1, and its answer: what the ASGI interface lacks.

To be told when the client leaves without asking, to break a response off so that its end is seen to be missing, and to
answer in fewer steps. Knows nothing of what requests are about.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

_BODYLESS = frozenset((204, 304))


class Connection(Protocol):
    """What a request needs of the connection that it came on.

    tasks: of the requests that are being answered. lost: it has ended. leave: who is to be told when it does.
    """

    transport: asyncio.Transport
    flow: FlowControl
    tasks: set[asyncio.Task[None]]
    lost: bool
    leave: Callable[[], None] | None

    def on_response_complete(self) -> None:
        """A response has gone out."""

    def part_with(self, client: Client) -> None:
        """Its application has done with it."""


class Client(RequestResponseCycle):
    """The client of one request: told of when it leaves, can be cut off, and takes a response with fewer steps.

    `start`, `write` and `flush` are what ASGI's `send` does, without its awaits, checks and separate writes of head
    and body; a request is answered by either. They take header fields as they are: names in lower case, no control
    characters, no `connection`, `transfer-encoding` nor wrong `content-length` among them.

    It is uvicorn's cycle too, which is the ASGI side of it; what few requests change of that is not set for each.
    """

    logger = access_logger = logging.getLogger("uvicorn.error")
    access_log = False
    default_headers: list[tuple[bytes, bytes]] = []  # noqa: RUF012 - nobody adds to it
    disconnected = False
    more_body = True
    response_started = False
    response_complete = False
    chunked_encoding: bool | None = None
    expected_content_length = 0
    _head = b""  # not sent yet
    _chunked = False
    _silent = False  # the response has no body, whatever its head says
    _news = False  # something has come that nobody has taken, or nothing more will come
    _told: asyncio.Event | None = None  # where somebody waits for that
    task: asyncio.Task[None] | None = None  # while the application answers

    def __init__(self, connection: Connection, scope: dict[str, Any], *, keep_alive: bool, expects_100: bool) -> None:
        self.scope = scope  # type: ignore[assignment]
        self.transport = connection.transport
        self.flow = connection.flow
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = expects_100
        self._connection = connection
        self._pieces: list[bytes] = []  # of the body
        self._size = 0

    def on_response(self) -> None:
        """The response has gone out."""
        self._connection.on_response_complete()

    @property
    def has_sent_all(self) -> bool:
        """The request's body is here to its end."""
        return not self.more_body

    def take(self) -> bytes:
        """What has come of the request's body since the last time."""
        pieces, self._pieces, self._size = self._pieces, [], 0
        self._news = False
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def add(self, data: bytes) -> None:
        """More of the request's body."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.set()

    @property
    def message_event(self) -> Client:  # type: ignore[override]
        """What uvicorn sets of an event, which is made only where somebody waits."""
        return self

    def set(self) -> None:
        """There is news."""
        self._news = True
        if self._told is not None:
            self._told.set()

    async def run_asgi(self, app: Any) -> None:
        """Have the application answer.

        Afterwards nothing leads back here: what refers to itself stays until Python looks for garbage, which with
        thousands of requests in it takes tens of milliseconds, in which everybody waits.
        """
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:
            self.logger.error("Exception in ASGI application\n", exc_info=error)
            await self._give_up()
        else:
            if not self.response_complete and not self.disconnected:
                self.logger.error("ASGI callable returned without completing response.")
                await self._give_up()
        finally:
            self.scope.pop("extensions", None)
            self._connection.tasks.discard(cast("asyncio.Task[None]", self.task))
            self.task = None
            self._connection.part_with(self)

    async def _give_up(self) -> None:
        if self.response_started:
            self.transport.close()
        else:
            await self.send_500_response()

    async def receive(self) -> Any:
        """As ASGI has it."""
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            if not self._news:
                told = self._told = self._told or asyncio.Event()
                await told.wait()
            self._news, self._told = False, None
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": self.take(), "more_body": self.more_body}

    def start(self, status: int, headers: Iterable[tuple[bytes, bytes]], *, close: bool = False) -> None:
        """Begin the response; its head goes out with the first `write`, or by `flush`. close: the connection ends."""
        self.response_started = True
        self.waiting_for_100_continue = False
        self.keep_alive = self.keep_alive and not close
        self._silent = self.scope["method"] == "HEAD" or status in _BODYLESS
        # To a client that knows no chunks, the end of the connection is the end of the body (RFC 9112 section 6.3).
        self._chunked = not self._silent and self.scope["http_version"] != "1.0"
        lines = []
        for field in headers:
            if field[0] == b"content-length":
                self._chunked = False
            lines.append(b": ".join(field))
        if not self.keep_alive:
            lines.append(b"connection: close")
        lines.append(b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        self._head = (STATUS_LINE.get(status) or b"HTTP/1.1 %d \r\n" % status) + b"\r\n".join(lines)

    def write(self, data: bytes, *, end: bool) -> None:
        """The next bytes of the response's body; nothing happens when the client has gone. See `has_room`."""
        if self.disconnected:
            return
        head, self._head = self._head, b""
        if self._silent:
            data = head
        elif not self._chunked:
            data = head + data if head else data
        elif data:
            data = b"%b%x\r\n%b\r\n%b" % (head, len(data), data, b"0\r\n\r\n" if end else b"")
        else:
            data = head + b"0\r\n\r\n" if end else head
        if data:
            self.transport.write(data)
        if end:
            self.response_complete = True
            self.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()

    def pass_on(self, chunk: bytes) -> bool:
        """Send a chunk of the body as an endpoint has framed it; False: it has to be written."""
        if self._head or not self._chunked or self.disconnected or self._connection.flow.write_paused:
            return False
        self.transport.write(chunk)
        return True

    def flush(self) -> None:
        """Send the head if it has not gone out yet."""
        if self._head and not self.disconnected:
            head, self._head = self._head, b""
            self.transport.write(head)

    @property
    def has_room(self) -> bool:
        """Whether the client keeps up with what is written, or has gone; else wait in `drain`."""
        return not self._connection.flow.write_paused or self.disconnected

    async def drain(self) -> None:
        await self._connection.flow.drain()

    def watch(self, leave: Callable[[], None]) -> None:
        """Call `leave` when the connection is lost, also after the response, or at once when it has been lost already.

        To be called when the request has been read to its end; before, `receive()` tells. A task that waits in
        `receive()` would do the same, at the price of a task for every request.
        """
        if self._connection.lost:
            return leave()
        self._connection.leave = leave
        # uvicorn stops reading at 64 KiB of unread body, and a socket that is not read never reports its end.
        return self._connection.flow.resume_reading()

    def cut_off(self) -> None:
        """End the connection in the middle of a response, so that the client sees a truncated one.

        What was sent is still delivered, unless the client has stopped reading: then waiting would have no end.
        """
        self.flush()
        # Has uvicorn expect nothing more of the application. By itself it does so only for the latest of several
        # requests that were sent without waiting for answers, and would log the others' end as a fault.
        self.disconnected = True
        if self._connection.flow.write_paused:
            self._connection.transport.abort()
        else:
            self._connection.transport.close()
