"""One connection to an endpoint: HTTP/1.1 responses off the wire, one request at a time.

Owns parsing (httptools), the end of a body however it is framed, and back-pressure towards the endpoint. Lenient in
nothing: a response that is not well-formed, or more bytes than were asked for, end the connection. Decides nothing
about reuse or retries; `Upstream` does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from picker.types import FailureReason

_MAX_HEAD_BYTES = 64 * 1024  # as our own server allows
_HIGH_WATER = 256 * 1024  # unread bytes of a body beyond which the endpoint has to wait

RawHeaders = list[tuple[bytes, bytes]]

Sink = Callable[[bytes, bool], bool]
"""Takes the next bytes of a body, and whether they are the last; returns whether it wants more."""

Shortcut = Callable[[bytes, int, int], bool]
"""Takes a chunk of a body with the framing it came in, and where its content begins and ends in that; or leaves it."""

_chunk_size = re.compile(rb"0{0,4}[1-9a-fA-F][0-9a-fA-F]{0,5}").fullmatch
_SIZES: dict[bytes, int] = {}  # of chunks, by how they are written: streams repeat a few
_MOST_SIZES = 4096


class Reply:
    """One endpoint's response. Pour it to its end, or close it: closing aborts the request at the endpoint.

    status: 0 until the head is there. raw_headers: names in lower case, in the order and number they came.
    """

    __slots__ = ("_connection", "_pieces", "_size", "broken", "complete", "raw_headers", "status")

    def __init__(self, connection: UpstreamConnection) -> None:
        self.status = 0
        self.raw_headers: RawHeaders = []
        self.complete = False  # all of it has come
        self.broken = False  # no more of it will come
        self._connection = connection
        self._pieces: list[bytes] = []
        self._size = 0

    @property
    def headers(self) -> dict[str, str]:
        """By name in lower case; of repeated fields the last."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self.raw_headers}

    @property
    def waiting(self) -> bool:
        """Whether there is something to pour at once."""
        return bool(self._pieces) or self.complete

    @property
    def ended(self) -> bool:
        """Everything has been poured, and all of it was there."""
        return self.complete and not self._pieces

    async def pour(self, into: Sink, shortcut: Shortcut | None = None) -> FailureReason | None:
        """Give `into` the body as it comes, until its end or until `into` wants no more; else why there is no more.

        Called again, it goes on where it stopped. What comes while nobody pours is kept, up to a limit beyond which the
        endpoint has to wait. `into` is called from the event loop's reading: a task that had to wake for each token
        would cost as much as all that is done with it. What it raises is raised here. shortcut: asked first where a
        whole chunk has come by itself.
        """
        while True:
            if self._pieces or self.complete:
                if not into(self.take(), self.complete) or self.complete:
                    return None
            elif self.broken:
                return FailureReason.RESET
            elif not await self._connection.progress(into, shortcut):
                return None

    def take(self) -> bytes:
        """What has come of the body since the last time."""
        pieces, self._pieces, self._size = self._pieces, [], 0
        self._connection.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Harmless after the end; before it, the connection is closed, which an engine takes as an abort."""
        if not self.complete:
            self.broken = True
            self._connection.abort()

    def add(self, data: bytes) -> bool:
        """More of the body; returns whether there is more of it unread than should be."""
        self._pieces.append(data)
        self._size += len(data)
        return self._size > _HIGH_WATER


class Owner(Protocol):
    """Whom a connection tells that it is there, that it may carry another request, and that it is gone."""

    def made(self, connection: UpstreamConnection) -> None: ...

    def rested(self, connection: UpstreamConnection) -> None: ...

    def lost(self, connection: UpstreamConnection) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """Sends a request and takes its response in, then rests, if another request may follow on it.

    open: it can take a request. silent: nothing has come for the last request. place, idle_since: for its owner's use.
    """

    __slots__ = (
        "_between",
        "_head_only",
        "_headers",
        "_in_head",
        "_keep",
        "_loop",
        "_owner",
        "_parser",
        "_paused",
        "_reply",
        "_shortcut",
        "_sink",
        "_transport",
        "_until_close",
        "_waiter",
        "idle_since",
        "open",
        "place",
        "silent",
    )

    _transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop, owner: Owner, place: tuple[str, str]) -> None:
        self.open = False
        self.silent = True
        self.place = place
        self.idle_since = 0.0
        self._loop = loop
        self._owner = owner
        self._parser = httptools.HttpResponseParser(self)
        self._reply: Reply | None = None
        self._sink: Sink | None = None  # while somebody pours and waits
        self._shortcut: Shortcut | None = None  # while somebody pours and waits, too
        self._between = False  # the parser has seen a chunk's end, and nothing of the next
        self._waiter: asyncio.Future[bool] | None = None
        self._headers: RawHeaders = []
        self._in_head = 0  # bytes of it that have come
        self._keep = False
        self._paused = False
        self._until_close = False
        self._head_only = False

    # what the owner calls

    async def ask(self, request: bytes, body: bytes, *, head_only: bool) -> Reply | None:
        """Send a request and wait for the response head; None when the connection ends before.

        request: its head. head_only: the method is HEAD, whose response has no body whatever it says of one.
        """
        if not self.open:
            return None
        reply = self._reply = Reply(self)
        self.silent, self._in_head, self._headers = True, 0, []
        self._keep = self._until_close = self._between = False
        self._head_only = head_only
        if body:
            self._transport.writelines((request, body))  # in one system call
        else:
            self._transport.write(request)
        while not reply.status and not reply.broken:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                if self._reply is reply:
                    self.abort()
                raise
        return reply if reply.status else None

    async def progress(self, into: Sink | None = None, shortcut: Shortcut | None = None) -> bool:
        """Wait until more of the response is there, or pour it into a sink meanwhile; False: the sink wants no more.

        Whoever is cancelled here gives the response up.
        """
        reply, self._sink, self._shortcut = self._reply, into, shortcut
        self._waiter = self._loop.create_future()
        try:
            return await self._waiter
        except asyncio.CancelledError:
            if self._reply is reply:  # else the response is complete, and the connection may be another's by now
                self.abort()
            raise
        finally:
            if self._sink is into:
                self._sink = self._shortcut = None

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            if self.open:
                self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once, whatever is still to be sent or read."""
        self.open = False
        self._end_reply()
        self._transport.abort()

    # what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.open = True
        self._owner.made(self)

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:
            return self.abort()  # nobody has asked
        if self._between and self._shortcut is not None and _take_shortcut(data, self._shortcut):
            return None  # the parser has missed a whole chunk, and stands where it would stand behind it
        self.silent = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return self.abort()
        # Only a chunk's end ends with a line end while no other chunk has begun.
        self._between = self._between and data.endswith(b"\r\n")
        if reply.complete:
            self._settle()
        elif not reply.status:
            self._in_head += len(data)
            if self._in_head > _MAX_HEAD_BYTES:
                self.abort()
            return None
        return self._wake() if self._sink is None else self._pour(reply, self._sink)

    def eof_received(self) -> None:
        self.open = False
        if self._reply is not None and self._until_close:
            self._reply.complete = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._end_reply()
        self._parser = None  # they refer to each other
        self._owner.lost(self)

    # what the parser calls

    def on_message_begin(self) -> None:
        if self._reply is not None and self._reply.complete:
            self._keep = False  # a response that nobody has asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status, reply = self._parser.get_status_code(), self._reply
        headers, self._headers = self._headers, []  # what comes later are trailers, which nobody waits for
        if status < 200 or reply is None or reply.complete:
            return  # an interim response, or one that nobody has asked for
        reply.status, reply.raw_headers = status, headers
        # The parser knows that a 204 and a 304 have no body, but not that a response to HEAD has none.
        reply.complete = self._head_only
        self._until_close = not _framed(headers)

    def on_body(self, data: bytes) -> None:
        reply = self._reply
        if reply is not None and not reply.complete and reply.add(data) and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def on_chunk_header(self) -> None:
        self._between = False

    def on_chunk_complete(self) -> None:
        self._between = True

    def on_message_complete(self) -> None:
        reply = self._reply
        if reply is not None and reply.status and not reply.complete:
            self._keep = self._parser.should_keep_alive()
            reply.complete = True

    # endings

    def _settle(self) -> None:
        """The response is complete: rest until the next request, or close."""
        self._reply = None
        if self._keep and self.open and not self._transport.get_write_buffer_size():
            self.resume_reading()
            self._owner.rested(self)
        else:
            # Where not even the request has gone out whole, its rest is of no use to anyone.
            self.open = False
            self._transport.abort()

    def _end_reply(self) -> None:
        reply, self._reply = self._reply, None
        if reply is not None and not reply.complete:
            reply.broken = True
        self._wake()

    def _pour(self, reply: Reply, into: Sink) -> None:
        if not reply.waiting:
            return
        try:
            if into(reply.take(), reply.complete) and not reply.complete:
                return
        except Exception as error:
            # Whoever waits for the body is the one to hear of it, not the transport that brought it.
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(error)
        self._sink = self._shortcut = None
        self._wake(more=False)

    def _wake(self, *, more: bool = True) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(more)


def _take_shortcut(data: bytes, shortcut: Shortcut) -> bool:
    """Offer data if it is one whole chunk, as the parser would read it too."""
    line = data[: data.find(b"\r\n", 0, 12)]
    begin = len(line) + 2
    end = begin + (_SIZES.get(line) or _size(line))
    return len(data) == end + 2 and end > begin and data.endswith(b"\r\n") and shortcut(data, begin, end)


def _size(line: bytes) -> int:
    """The size of a chunk from how it is written; 0 for the last one, and what the parser had better see."""
    if _chunk_size(line) is None:
        return 0
    size = int(line, 16)
    if len(_SIZES) < _MOST_SIZES:
        _SIZES[line] = size
    return size


def _framed(headers: RawHeaders) -> bool:
    """Whether a body says where it ends; else it ends with the connection (RFC 9112 section 6.3)."""
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings:
        return codings[-1].rstrip().lower().endswith(b"chunked")
    return any(name == b"content-length" for name, _ in headers)
