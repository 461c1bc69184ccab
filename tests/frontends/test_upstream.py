"""The pool of connections, against endpoints on real sockets that answer byte by byte as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from frontends.fake_upstream import RefusingPort
from picker.frontends import upstream as module
from picker.frontends.upstream import Upstream
from picker.frontends.upstream_connection import Reply
from picker.types import Endpoint, FailureReason
from virtual_time import in_virtual_time

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
Script = Callable[["Peer", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Peer:
    """An endpoint. requests: the heads and bodies that reached it; connections: how many were made."""

    def __init__(self, script: Script) -> None:
        self.endpoint = Endpoint("e", "")
        self.requests: list[bytes] = []
        self.connections = 0
        self.asked = asyncio.Event()
        self.ended = asyncio.Event()
        self._script = script

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._script(self, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.ended.set()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        _, _, length = head.lower().partition(b"content-length: ")
        body = await reader.readexactly(int(length.split(b"\r\n")[0] or b"0")) if length else b""
        self.requests.append(head + body)
        self.asked.set()
        return head


async def answer_for_ever(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await peer.request(reader)
        writer.write(OK)


async def answer_once(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Keep the connection alive, and close it when the next request comes."""
    await peer.request(reader)
    writer.write(OK)
    await reader.readexactly(1)


@asynccontextmanager
async def peer(script: Script = answer_for_ever) -> AsyncIterator[Peer]:
    made = Peer(script)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, limit=1 << 24)
    made.endpoint = Endpoint("e", f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        async with asyncio.timeout(60):
            yield made
    finally:
        server.close()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    made = Upstream(connect_timeout=60.0)
    yield made
    await made.close()


async def asked(
    upstream: Upstream, of: Peer, method: str = "POST", body: bytes | None = b"{}", target: bytes = b"/v1"
) -> Reply:
    """A whole response."""
    reply = await upstream.send(of.endpoint, method, target, [(b"x-a", b"1")], body)
    assert isinstance(reply, Reply)
    assert await reply.pour(lambda data, last: True) is None
    return reply


async def test_a_request_is_written_as_it_was_given(upstream: Upstream) -> None:
    async with peer() as to:
        await asked(upstream, to, target=b"/v1/x?a=%20\xff")
        head = b"POST /v1/x?a=%%20\xff HTTP/1.1\r\nhost: %b\r\nx-a: 1\r\ncontent-length: 2\r\n\r\n{}"
        assert to.requests == [head % to.endpoint.address.encode()]


@pytest.mark.parametrize(("method", "says"), [("GET", False), ("HEAD", False), ("POST", True), ("DELETE", True)])
async def test_only_methods_that_may_have_a_body_say_that_there_is_none(
    upstream: Upstream, method: str, says: bool
) -> None:
    async def bodyless(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.request(reader)
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with peer(bodyless) as to:
        await asked(upstream, to, method, None)
        assert (b"content-length: 0" in to.requests[0]) is says


async def test_a_large_body_arrives_whole(upstream: Upstream) -> None:
    body = bytes(range(256)) * 20_000
    async with peer() as to:
        await asked(upstream, to, body=body)
        assert to.requests[0].endswith(b"\r\n\r\n" + body)


@pytest.mark.parametrize(
    ("scheme", "address", "host"),
    [("http", "h:80", b"h"), ("https", "h:443", b"h"), ("http", "h:443", b"h:443"), ("http", "[::1]:80", b"[::1]")],
)
def test_the_port_that_a_scheme_implies_is_not_said(scheme: str, address: str, host: bytes) -> None:
    head, _ = module._request(Endpoint("e", address, scheme=scheme), "GET", b"/", [], None)
    assert head == b"GET / HTTP/1.1\r\nhost: %b\r\n\r\n" % host


async def test_requests_that_follow_each_other_share_a_connection(upstream: Upstream) -> None:
    async with peer() as to:
        for _ in range(3):
            await asked(upstream, to)
        assert (to.connections, len(to.requests)) == (1, 3)


async def test_requests_at_the_same_time_have_connections_of_their_own(upstream: Upstream) -> None:
    async with peer() as to:
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(asked(upstream, to))
        assert to.connections == 3


@in_virtual_time
async def test_endpoints_of_one_address_share_connections_and_schemes_do_not() -> None:
    upstream = Upstream(connect_timeout=2.0)
    async with peer() as to:
        await asked(upstream, to)
        address = to.endpoint.address
        to.endpoint = Endpoint("other", address, rank=1)
        await asked(upstream, to)
        assert to.connections == 1
        secure = Endpoint("e", address, scheme="https")
        assert await upstream.send(secure, "GET", b"/", [], None) is FailureReason.CONNECT, "it speaks no TLS"
        await upstream.close()


async def test_a_connection_that_ended_while_idle_is_replaced_once(upstream: Upstream) -> None:
    async with peer(answer_once) as to:
        for _ in range(3):
            await asked(upstream, to)
        assert (to.connections, len(to.requests)) == (3, 3)


async def test_an_end_that_was_seen_while_idle_costs_no_attempt(upstream: Upstream) -> None:
    async def close_after_answer(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.request(reader)
        writer.write(OK)

    async with peer(close_after_answer) as to:
        for _ in range(3):
            await asked(upstream, to)
            await to.ended.wait()
        assert to.connections == 3


async def test_a_reused_connection_that_ends_within_the_head_is_a_reset(upstream: Upstream) -> None:
    async def half(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.request(reader)
        writer.write(OK)
        await peer.request(reader)
        writer.write(b"HTTP/1.1 20")

    async with peer(half) as to:
        await asked(upstream, to)
        assert await upstream.send(to.endpoint, "POST", b"/", [], b"{}") is FailureReason.RESET
        assert to.connections == 1, "the endpoint has begun to answer: asking again might do the work twice"


async def test_a_new_connection_that_ends_before_its_response_is_a_reset(upstream: Upstream) -> None:
    async def drop(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.request(reader)

    async with peer(drop) as to:
        assert await upstream.send(to.endpoint, "POST", b"/", [], b"{}") is FailureReason.RESET
        assert to.connections == 1


async def test_an_endpoint_that_refuses_or_cannot_be_named_cannot_be_connected_to(upstream: Upstream) -> None:
    refusing = RefusingPort()
    for address in (refusing.address, f"{'x' * 70}.invalid:80"):
        assert await upstream.send(Endpoint("e", address), "GET", b"/", [], None) is FailureReason.CONNECT
    refusing.close()


async def test_an_endpoint_that_does_not_accept_in_time_cannot_be_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(*args: object, **options: object) -> None:
        await asyncio.Event().wait()

    upstream = Upstream(connect_timeout=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "create_connection", never)
        assert await upstream.send(Endpoint("e", "h:1"), "GET", b"/", [], None) is FailureReason.CONNECT
    await upstream.close()


async def test_what_has_been_idle_for_long_is_closed(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEPALIVE_SECONDS", 0.02)
    async with peer() as to:
        await asked(upstream, to)
        await to.ended.wait()
        await asked(upstream, to)
        assert to.connections == 2


async def test_a_reply_that_is_closed_early_ends_its_connection(upstream: Upstream) -> None:
    async def endless(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nmore")
        await reader.readexactly(1)

    async with peer(endless) as to:
        reply = await upstream.send(to.endpoint, "GET", b"/", [], None)
        assert isinstance(reply, Reply)
        reply.close()
        await to.ended.wait()


async def test_closing_the_upstream_closes_what_is_idle_and_what_is_not() -> None:
    async def hang(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await peer.request(reader)
        await reader.readexactly(1)

    upstream = Upstream(connect_timeout=60.0)
    async with peer() as idle, peer(hang) as busy, asyncio.TaskGroup() as group:
        await asked(upstream, idle)
        waiting = group.create_task(upstream.send(busy.endpoint, "GET", b"/", [], None))
        await busy.asked.wait()
        await upstream.close()
        assert await waiting is FailureReason.RESET
        await idle.ended.wait()
        await busy.ended.wait()
