from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from picker.errors import ConfigError
from picker.frontends.serving import EXTENSION, Client, listen, port_of, serve


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


def test_port_zero_takes_a_free_port() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert port_of(listener) > 0


def test_an_address_in_use_is_a_configuration_error_that_names_it() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match=f"127.0.0.1:{port_of(taken)}"):
        listen("127.0.0.1", port_of(taken))


def test_an_unknown_host_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid"):
        listen("no.such.host.invalid", 0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_the_ipv6_wildcard_takes_ipv4_too() -> None:
    with listen("::", 0) as listener:
        socket.create_connection(("127.0.0.1", port_of(listener))).close()


async def test_it_answers_until_it_is_stopped_and_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    listener, stop = listen("127.0.0.1", 0), asyncio.Event()
    port = port_of(listener)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(hello, listener, stop, grace=1.0))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
        stop.set()
        assert await reader.read() == b"", "an idle connection is closed at once"
        writer.close()
    listen("127.0.0.1", port).close()


async def test_cancelling_it_frees_the_port_and_its_connections() -> None:
    listener = listen("127.0.0.1", 0)
    port = port_of(listener)
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(serve(hello, listener, asyncio.Event(), grace=1.0))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        await reader.readuntil(b"hi")
        serving.cancel()
        assert await reader.read() == b""
        writer.close()
    listen("127.0.0.1", port).close()


async def test_who_watches_a_client_that_has_left_already_is_told_at_once() -> None:
    told = asyncio.Event()

    async def late(scope: Any, receive: Any, send: Any) -> None:
        client: Client = scope["extensions"][EXTENSION]["client"]
        await receive()
        assert (await receive())["type"] == "http.disconnect"
        client.watch(told.set)

    async with served(late) as (_, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        writer.close()
        await told.wait()


@asynccontextmanager
async def served(app: Any = hello) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server that runs the app."""
    listener, stop = listen("127.0.0.1", 0), asyncio.Event()
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(serve(app, listener, stop, grace=1.0))
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
        yield reader, writer
        writer.close()
        stop.set()


async def test_a_head_without_end_is_refused() -> None:
    async with served() as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: h\r\n")
        assert (await first_line(reader, writer, b"x-filler: " + b"x" * 1000 + b"\r\n")).startswith(b"HTTP/1.1 431 ")


async def first_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, more: bytes) -> bytes:
    """What is answered while `more` is sent again and again."""
    line = b""
    while not line:
        writer.write(more)
        try:
            async with asyncio.timeout(0):
                line = await reader.readline()
        except TimeoutError:
            await asyncio.sleep(0)
    return line


async def test_large_heads_one_after_another_are_fine() -> None:
    head = b"GET / HTTP/1.1\r\nhost: h\r\nx-filler: " + b"x" * 20_000
    async with served() as (reader, writer):
        for _ in range(6):
            writer.write(head)
            for _ in range(5):
                await asyncio.sleep(0)  # the server, on the same loop, reads what is there
            writer.write(b"\r\n\r\n")
            assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: h\r\nx"])
async def test_a_connection_that_never_brings_a_request_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("picker.frontends.serving._KEEPALIVE_SECONDS", 0.01)
    async with served() as (reader, writer):
        writer.write(sent)
        assert await reader.read() == b""


async def test_a_request_that_takes_longer_than_an_idle_connection_lives_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("picker.frontends.serving._KEEPALIVE_SECONDS", 0.05)
    gate = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        asyncio.get_running_loop().call_later(0.1, gate.set)
        await gate.wait()
        await hello(scope, receive, send)

    async with served(slow) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200 ")


async def test_idle_connections_are_closed_while_running_requests_get_their_grace() -> None:
    reached, gate, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def wait_then_hello(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            reached.set()
            await gate.wait()
        await hello(scope, receive, send)

    listener = listen("127.0.0.1", 0)
    port = port_of(listener)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(wait_then_hello, listener, stop, grace=60.0))
        busy_reader, busy = await asyncio.open_connection("127.0.0.1", port)
        busy.write(b"GET /wait HTTP/1.1\r\nhost: h\r\n\r\n")
        idle_reader, idle = await asyncio.open_connection("127.0.0.1", port)
        idle.write(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        await idle_reader.readuntil(b"hi")
        await reached.wait()
        stop.set()
        assert await idle_reader.read() == b""
        gate.set()
        answer = await busy_reader.read()
        assert b"connection: close" in answer
        assert answer.endswith(b"hi")
        busy.close()
        idle.close()
