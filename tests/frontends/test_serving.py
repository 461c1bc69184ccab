from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import pytest

from picker.errors import ConfigError
from picker.frontends.serving import listen, port_of, serve


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
