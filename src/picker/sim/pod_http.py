"""HTTP/1.1 for the simulated pod: parsed requests in, response bytes out, one callback per request, no task.

Owns framing, keep-alive and the client's leaving. Knows no route and no model. httptools parses; a pod answers with
many small writes on many connections, and a task or an ASGI message for each would cost more than the engine does.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import cast

import httptools

JSON = "application/json"
EVENT_STREAM = "text/event-stream; charset=utf-8"
KEEP_ALIVE_S = 5.0  # vLLM's VLLM_HTTP_TIMEOUT_KEEP_ALIVE
_MAX_BODY_BYTES = 256 << 20
_LINGER_NOTHING = struct.pack("ii", 1, 0)

Headers = Sequence[tuple[str, str]]


@dataclass(slots=True)
class HttpRequest:
    """A complete request. Header names are lower case; of a repeated header the last counts."""

    method: str = ""
    path: str = ""
    query: str = ""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


class Reply:
    """The answer to one request: `send` once, or `start`, any number of `write`, `end`. Nothing after the client left.

    on_gone is called once if the client leaves, or is cut off, before the answer is complete.
    """

    __slots__ = ("_keep_alive", "connection", "done", "on_gone")

    def __init__(self, connection: Connection, *, keep_alive: bool) -> None:
        self.connection = connection
        self._keep_alive = keep_alive
        self.done = False
        self.on_gone: Callable[[], None] | None = None

    def send(self, status: int, body: bytes, content_type: str = JSON, headers: Headers = ()) -> None:
        if self.done:
            return
        head = _head(status, (("content-length", str(len(body))), ("content-type", content_type), *headers))
        self.connection.put(head + body)
        self._finish()

    def start(self, content_type: str = EVENT_STREAM) -> None:
        if not self.done:
            self.connection.put(_head(200, (("content-type", content_type), ("transfer-encoding", "chunked"))))

    def write(self, chunks: bytes) -> None:
        """Send what `chunk` framed; several chunks in one call are one write to the socket."""
        if not self.done:
            self.connection.put(chunks)

    def end(self, chunks: bytes = b"") -> None:
        """Send the last chunks and the end of the body in one write."""
        if not self.done:
            self.connection.put(chunks + b"0\r\n\r\n")
            self._finish()

    def reset(self) -> None:
        """Break the connection off with a TCP reset, answered or not."""
        self.connection.reset()

    def _finish(self) -> None:
        self.done = True
        self.on_gone = None
        self.connection.answered(keep_alive=self._keep_alive)

    def abandon(self) -> None:
        """The connection is gone."""
        if not self.done:
            self.done = True
            gone, self.on_gone = self.on_gone, None
            if gone is not None:
                gone()


class Refusal(asyncio.Protocol):
    """A connection to a process that has died: reset as soon as it is made."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        _reset(cast(asyncio.Transport, transport))


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """One client's connection. Answers leave in the order of the requests; pipelined ones wait their turn."""

    def __init__(self, handle: Callable[[HttpRequest, Reply], None], connections: set[Connection]) -> None:
        self._handle = handle
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._request = HttpRequest()
        self._body: list[bytes] = []
        self._size = 0
        self._waiting: deque[tuple[HttpRequest, bool]] = deque()
        self._reply: Reply | None = None
        self._idle: asyncio.TimerHandle | None = None

    # --- asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._transport = None
        self._waiting.clear()
        self._stop_idling()
        if self._reply is not None:
            self._reply.abandon()

    def eof_received(self) -> None:
        """A half-closed connection counts as left, as for uvicorn."""

    def data_received(self, data: bytes) -> None:
        self._stop_idling()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered as the plain request that it also is
        except httptools.HttpParserError:
            self._refuse(400, b"Invalid HTTP request received.")

    # --- httptools ---

    def on_message_begin(self) -> None:
        self._request, self._body, self._size = HttpRequest(), [], 0

    def on_url(self, url: bytes) -> None:
        path, _, query = url.decode("latin-1").partition("?")
        self._request.path += path
        self._request.query += query

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._request.method = self._parser.get_method().decode("latin-1")
        if self._request.headers.get(b"expect", b"").lower() == b"100-continue":
            self.put(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > _MAX_BODY_BYTES:
            self._refuse(413, b"Request body too large.")
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        self._request.body = b"".join(self._body)
        self._waiting.append((self._request, self._parser.should_keep_alive()))
        self._serve_next()

    # --- for Reply and the pod ---

    def put(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def answered(self, *, keep_alive: bool) -> None:
        self._reply = None
        if self._transport is None:
            return
        if not keep_alive:
            self._transport.close()
        elif self._waiting:
            asyncio.get_running_loop().call_soon(self._serve_next)
        else:
            self._idle = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._transport.close)

    def reset(self) -> None:
        if self._transport is not None:
            _reset(self._transport)

    def _serve_next(self) -> None:
        if self._reply is None and self._waiting:
            request, keep_alive = self._waiting.popleft()
            reply = self._reply = Reply(self, keep_alive=keep_alive)
            self._handle(request, reply)

    def _refuse(self, status: int, why: bytes) -> None:
        if self._transport is not None:
            length = ("content-length", str(len(why)))
            self.put(_head(status, (length, ("content-type", "text/plain"), ("connection", "close"))) + why)
            self._transport.close()

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None


def _reset(transport: asyncio.Transport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is not None:
        # Without lingering, closing sends RST instead of FIN.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOTHING)
    transport.abort()


def _head(status: int, headers: Headers) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return (_status_line(status) + _server_lines(int(time.time())) + lines + "\r\n").encode("latin-1")


@functools.lru_cache(maxsize=32)
def _status_line(status: int) -> str:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"


@functools.lru_cache(maxsize=1)
def _server_lines(second: int) -> str:
    return f"date: {formatdate(second, usegmt=True)}\r\nserver: uvicorn\r\nvary: Origin\r\n"
