from __future__ import annotations

import asyncio
import gc
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from picker.errors import ConfigError
from picker.frontends.client import Client
from picker.frontends.client_connection import EXTENSION, ClientConnection
from picker.frontends.serving import listen, port_of, serve
from virtual_time import in_virtual_time


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


async def test_who_runs_when_it_stops_gets_the_time_that_is_said_by_then() -> None:
    begun, seconds = asyncio.Event(), [3600.0]

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    listener, stop = listen("127.0.0.1", 0), asyncio.Event()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(serve(endless, listener, stop, grace=lambda: seconds[0]))
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
        writer.write(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        await begun.wait()
        seconds[0] = 0.0
        stop.set()
        await reader.read()
        writer.close()


@pytest.mark.parametrize("accepted", [True, False])
@in_virtual_time
async def test_who_has_just_come_when_it_stops_is_served(accepted: bool) -> None:
    listener, stop = listen("127.0.0.1", 0), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(hello, listener, stop, grace=1.0))
        client = socket.create_connection(("127.0.0.1", port_of(listener)))  # by the kernel; the loop has not looked
        client.setblocking(False)
        if accepted:
            for _ in range(5):
                await asyncio.sleep(0)
        stop.set()
        for _ in range(8):
            await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (await loop.sock_recv(client, 1000)).endswith(b"hi")
        client.close()


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
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(serve(app, listener, stop, grace=1.0))
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(listener))
        yield reader, writer
        writer.close()
        stop.set()


async def until_it_leaves(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    assert (await receive())["type"] == "http.disconnect"


@pytest.mark.parametrize("app", [hello, until_it_leaves], ids=["idle", "asking"])
async def test_a_connection_that_has_ended_waits_for_no_collection(app: Any) -> None:
    def alive() -> int:
        return sum(type(each) is ClientConnection for each in gc.get_objects())

    gc.collect()
    before = alive()
    gc.disable()
    try:
        for _ in range(3):
            async with served(app) as (reader, writer):
                writer.write(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
                if app is hello:
                    await reader.readuntil(b"hi")
        for _ in range(5):
            await asyncio.sleep(0)
        assert alive() == before
    finally:
        gc.enable()


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


@pytest.mark.parametrize(
    ("sent", "line"),
    [
        (b"", b""),
        (b"GET / HT", b"HTTP/1.1 408 Request Timeout"),
        (b"GET / HTTP/1.1\r\nhost: h\r\nx", b"HTTP/1.1 408 Request Timeout"),
    ],
)
@in_virtual_time
async def test_a_connection_that_never_brings_a_request_is_closed(
    sent: bytes, line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("picker.frontends.serving._KEEPALIVE_SECONDS", 0.01)
    async with served() as (reader, writer):
        writer.write(sent)
        assert (await reader.read()).partition(b"\r\n")[0] == line


@in_virtual_time
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


# --- answering through `Client` ----------------------------------------------------------------------------

KEPT = b" HTTP/1.1\r\nhost: h\r\n\r\n"
LAST = b" HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"


class Writes:
    """An app that answers through `Client`, as its script says."""

    def __init__(
        self, *script: tuple[str, Any], status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        self._script = script
        self._status = status
        self._headers = headers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        client: Client = scope["extensions"][EXTENSION]["client"]
        client.start(self._status, self._headers)
        for verb, data in self._script:
            if verb == "flush":
                client.flush()
            else:
                client.write(data, end=verb == "end")


async def received(app: Any, request: bytes) -> bytes:
    """Everything that comes back on one connection, up to its end."""
    async with served(app) as (reader, writer):
        writer.write(request)
        return await reader.read()


async def test_a_body_without_a_length_is_chunked() -> None:
    app = Writes(("more", b"one"), ("more", b""), ("end", b"two"), headers=((b"x", b"1"),))
    head = b"HTTP/1.1 200 OK\r\nx: 1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    assert await received(app, b"GET /" + LAST) == head + b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"


async def test_a_body_may_end_without_further_bytes_and_its_head_may_go_first() -> None:
    for script in (("flush", b""), ("more", b"ab"), ("end", b"")), (("more", b"ab"), ("flush", b""), ("end", b"")):
        answer = await received(Writes(*script), b"GET /" + LAST)
        assert answer.partition(b"\r\n\r\n")[2] == b"2\r\nab\r\n0\r\n\r\n"


async def test_a_body_with_a_length_is_sent_as_it_is() -> None:
    app = Writes(("more", b"o"), ("end", b"k"), headers=((b"content-length", b"2"),))
    answer = await received(app, b"GET /" + KEPT + b"GET /" + LAST)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"connection: close\r\n\r\nok")


@pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"GET", 204), (b"GET", 304)])
async def test_a_response_without_a_body_has_neither_bytes_nor_chunks(method: bytes, status: int) -> None:
    answer = await received(Writes(("end", b"no"), status=status), method + b" /" + LAST)
    assert answer.endswith(b"connection: close\r\n\r\n")
    assert b"chunked" not in answer


async def test_an_unknown_status_is_passed_on() -> None:
    assert (await received(Writes(("end", b""), status=799), b"GET /" + LAST)).startswith(b"HTTP/1.1 799 \r\n")


async def test_head_and_body_go_out_in_one_write() -> None:
    written: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        client: Client = scope["extensions"][EXTENSION]["client"]
        transport = client.transport
        client.transport = Recorder(transport, written)  # type: ignore[assignment]
        client.start(200, [(b"content-length", b"2")])
        client.write(b"ok", end=True)

    await received(app, b"GET /" + LAST)
    assert len(written) == 1


class Recorder:
    def __init__(self, transport: asyncio.Transport, written: list[bytes]) -> None:
        self._transport = transport
        self._written = written

    def write(self, data: bytes) -> None:
        self._written.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def test_a_small_body_that_came_with_its_head_can_be_taken_at_once() -> None:
    taken: list[tuple[bool, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        client: Client = scope["extensions"][EXTENSION]["client"]
        taken.append((client.has_sent_all, client.take()))
        await hello(scope, receive, send)

    await received(app, b"POST / HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: 3\r\n\r\nabc")
    async with served(app) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\n\r\nab")
        await reader.readuntil(b"hi")
    assert taken == [(True, b"abc"), (False, b"ab")]


@in_virtual_time
async def test_an_idle_connection_is_closed_after_its_last_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("picker.frontends.serving._KEEPALIVE_SECONDS", 0.02)
    async with served() as (reader, writer):
        for _ in range(2):
            writer.write(b"GET /" + KEPT)
            await reader.readuntil(b"hi")
        assert await reader.read() == b""
