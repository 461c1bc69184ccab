"""HTTP/1.1 as a load generator needs it: one connection, one request at a time, every piece stamped on arrival.

Raw asyncio protocols and llhttp, because a comfortable HTTP client costs several times what reading an answer does.
Owns connections and their reuse; knows nothing of what is asked. A failed exchange is an `ExchangeError`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import httptools

# Below uvicorn's keep-alive of 5 s (vLLM's server): a connection that the server closes just as it is used again
# would count as a failed request.
_KEEPALIVE = 2.0


class ExchangeError(RuntimeError):
    """An exchange broke. began: bytes of the answer's body had come."""

    def __init__(self, words: str, *, began: bool) -> None:
        super().__init__(words)
        self.began = began


class Exchange:
    """One request and its answer. take: what becomes of the body's bytes, with the time at which they came.

    status: 0 until the head has come. headers: in lower case.
    """

    __slots__ = ("began", "done", "headers", "status", "take")

    def __init__(self, take: Callable[[bytes, float], None]) -> None:
        self.take = take
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.began = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Connection(asyncio.Protocol):
    """A connection to one server. idle_since: when its last answer ended."""

    __slots__ = ("_clock", "_exchange", "_now", "_parser", "_transport", "closed", "idle_since")

    _transport: asyncio.Transport

    def __init__(self, clock: Callable[[], float]) -> None:
        self.closed = False
        self.idle_since = 0.0
        self._clock = clock
        self._now = 0.0
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)

    async def ask(self, request: bytes, exchange: Exchange) -> None:
        """Send a request and wait for the end of its answer. Raises ExchangeError."""
        self._exchange = exchange
        self._transport.write(request)
        await exchange.done

    def abort(self) -> None:
        self._exchange = None
        self.closed = True
        self._transport.abort()

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = self._clock()
        if self._exchange is None:
            self.abort()  # bytes that nobody had asked for
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the answer is not HTTP: {error}")
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        exchange = self._exchange
        if exchange is not None and exc is None and _ends_with_connection(exchange):
            self._end()
        else:
            self._fail(str(exc) if exc else "the server closed the connection")

    def _fail(self, words: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None and not exchange.done.done():
            exchange.done.set_exception(ExchangeError(words, began=exchange.began))

    def _end(self) -> None:
        exchange, self._exchange = self._exchange, None
        self.idle_since = self._now
        if exchange is not None and not exchange.done.done():
            exchange.done.set_result(None)

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange is not None:
            self._exchange.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is not None:
            exchange.began = True
            exchange.take(body, self._now)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.closed = True
            self._transport.close()
        self._end()


def _ends_with_connection(exchange: Exchange) -> bool:
    """Whether the head announced neither a length nor chunks, so that the end of the connection ends the body."""
    headers = exchange.headers
    return exchange.status > 0 and b"content-length" not in headers and b"transfer-encoding" not in headers


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int
    tls: bool = False


class Connections:
    """Idle connections to one server; how many are in use is never bounded here."""

    def __init__(self, address: Address, clock: Callable[[], float]) -> None:
        self._address = address
        self._clock = clock
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if address.tls else None

    async def get(self) -> Connection:
        """The connection used last, if it is fresh, or a new one. Raises OSError."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and self._clock() - connection.idle_since < _KEEPALIVE:
                return connection
            connection.abort()
        loop, address = asyncio.get_running_loop(), self._address
        _, connection = await loop.create_connection(
            lambda: Connection(self._clock), address.host, address.port, ssl=self._tls
        )
        return connection

    def put_back(self, connection: Connection) -> None:
        if not connection.closed:
            self._idle.append(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
