from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from picker.load.connection import Address, Connections, Exchange, ExchangeError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Raw:
    """A server that answers every request with the same bytes. opened: connections so far."""

    def __init__(self, answer: bytes, *, close: bool) -> None:
        self.opened = 0
        self._answer = answer
        self._close = close

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            while await reader.readline():
                await reader.readline()
                writer.write(self._answer)
                if self._close:
                    return
        finally:
            writer.close()


@asynccontextmanager
async def raw(answer: bytes, *, close: bool = False) -> AsyncIterator[tuple[Raw, Connections, Clock]]:
    behind, clock = Raw(answer, close=close), Clock()
    server = await asyncio.start_server(behind.serve, "127.0.0.1", 0)
    connections = Connections(Address("127.0.0.1", server.sockets[0].getsockname()[1]), clock)
    try:
        yield behind, connections, clock
    finally:
        connections.close()
        server.close()


async def ask(connections: Connections) -> tuple[Exchange, bytes]:
    parts: list[bytes] = []
    exchange, connection = Exchange(lambda data, _: parts.append(data)), await connections.get()
    await connection.ask(b"GET / HTTP/1.1\r\n\r\n", exchange)
    connections.put_back(connection)
    return exchange, b"".join(parts)


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Some: thing\r\n\r\nhi"


async def test_an_answer_with_a_length_is_read_and_the_connection_used_again() -> None:
    async with raw(WHOLE) as (server, connections, _):
        for _ in range(3):
            exchange, body = await ask(connections)
        assert (exchange.status, exchange.headers[b"x-some"], body) == (200, b"thing", b"hi")
        assert server.opened == 1


async def test_a_connection_that_has_been_idle_too_long_is_not_used_again() -> None:
    async with raw(WHOLE) as (server, connections, clock):
        await ask(connections)
        clock.now += 3.0
        await ask(connections)
        assert server.opened == 2


async def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    closing = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
    async with raw(closing, close=True) as (server, connections, _):
        assert [(await ask(connections))[1] for _ in range(2)] == [b"hi", b"hi"]
        assert server.opened == 2


async def test_a_body_without_a_length_ends_with_the_connection() -> None:
    async with raw(b"HTTP/1.1 200 OK\r\n\r\nall of it", close=True) as (_, connections, _clock):
        assert (await ask(connections))[1] == b"all of it"


@pytest.mark.parametrize(
    ("answer", "began", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", True, "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n", True, "closed the connection"),
        (b"", False, "closed the connection"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", False, "not HTTP"),
    ],
)
async def test_what_breaks_off_or_is_not_http_is_an_error(answer: bytes, began: bool, words: str) -> None:
    async with raw(answer, close=True) as (_, connections, _clock):
        with pytest.raises(ExchangeError, match=words) as raised:
            await ask(connections)
        assert raised.value.began is began
