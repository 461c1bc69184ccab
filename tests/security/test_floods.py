"""Too much, too long, too slow, too many: each has a bound and an answer, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import socket
import tracemalloc

import pytest

from picker.exchange import Limits
from picker.frontends.limits import ConnectionLimits, Door
from security.gateway_rig import Gateway, gateway, statuses, until

GET = b"GET /x HTTP/1.1\r\nhost: h\r\n"
POST = b"POST /x HTTP/1.1\r\nhost: h\r\n"
CLOSE = b"connection: close\r\n\r\n"


async def works(proxy: Gateway) -> bool:
    return statuses(await proxy.say(GET + CLOSE)) == [200]


# --- heads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /" + b"a" * 8200 + b" HTTP/1.1\r\nhost: h\r\n\r\n", 414),
        (b"GET /?" + b"a" * 8200 + b" HTTP/1.1\r\nhost: h\r\n\r\n", 414),
        (b"GET /" + b"a" * 100_000, 414),
        (GET + b"x: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (GET + b"x" * 70_000 + b": a\r\n\r\n", 431),
        (GET + b"x: a\r\n" * 100 + b"\r\n", 431),
        (GET + b"x: a\r\n" * 20_000, 431),
    ],
    ids=["target", "query", "endless target", "value", "name", "fields", "endless fields"],
)
async def test_a_head_has_its_bounds(request_bytes: bytes, status: int) -> None:
    async with gateway(patience=20.0) as proxy:
        assert statuses(await proxy.say(request_bytes)) == [status]
        assert proxy.endpoint.requests == []
        assert await works(proxy)


@pytest.mark.parametrize("begun", [GET, GET + b"x: a", b"G"], ids=["fields", "field", "line"])
async def test_a_head_that_does_not_end_is_given_up(begun: bytes) -> None:
    door = Door(ConnectionLimits(head_timeout=0.05))
    async with gateway(door=door) as proxy:
        assert statuses(await proxy.say(begun)) == [408]
        assert proxy.endpoint.requests == []
        door.limits = ConnectionLimits()
        assert await works(proxy)


@pytest.mark.parametrize(
    "request_bytes",
    [b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nhost: h\r\n" + CLOSE, GET + b"x: a\r\n" * 98 + CLOSE],
    ids=["target", "fields"],
)
async def test_what_is_within_them_passes(request_bytes: bytes) -> None:
    async with gateway() as proxy:
        assert statuses(await proxy.say(request_bytes)) == [200]


async def test_a_connection_on_which_nothing_comes_is_closed_without_a_word() -> None:
    async with gateway(patience=0.05) as proxy:
        assert await proxy.say(b"") == b""


# --- bodies ------------------------------------------------------------------------------------------------

LIMITS = Limits(max_body_bytes=100_000)


async def pump(proxy: Gateway, start: bytes, more: bytes) -> bytes:
    """What is answered to a request whose body goes on for ever, while it goes on."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(start)
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(reader.readuntil(b"\r\n"))
        while not answer.done():
            with contextlib.suppress(ConnectionError):
                writer.write(more)
                await writer.drain()
            await asyncio.sleep(0)
    writer.close()
    return answer.result()


async def test_a_body_that_is_announced_too_large_is_refused_unread() -> None:
    async with gateway(limits=LIMITS) as proxy:
        assert statuses(await proxy.say(POST + b"content-length: 100001\r\n" + CLOSE)) == [413]
        assert proxy.endpoint.requests == []


async def test_a_body_without_end_is_refused_where_the_limit_is() -> None:
    async with gateway(limits=LIMITS) as proxy:
        start = POST + b"transfer-encoding: chunked\r\n\r\n"
        line = await pump(proxy, start, b"1000\r\n" + b"a" * 4096 + b"\r\n")
        assert line.startswith(b"HTTP/1.1 413 ")
        assert proxy.endpoint.requests == []
        assert await works(proxy)


@pytest.mark.parametrize("more", [b"1\r\na\r\n", b"1;" + b"x" * 4000 + b"\r\na\r\n"], ids=["tiny chunks", "extensions"])
async def test_a_body_in_crumbs_costs_no_more_memory_than_it_may(more: bytes) -> None:
    async with gateway(limits=Limits(max_body_bytes=3000), patience=20.0) as proxy:
        await works(proxy)
        gc.collect()
        tracemalloc.start()
        try:
            line = await pump(proxy, POST + b"transfer-encoding: chunked\r\n\r\n", more * 20)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert line.startswith(b"HTTP/1.1 413 ")
        assert peak < 20_000_000


@pytest.mark.parametrize("body", [b"content-length: 9\r\n\r\n1234", b"transfer-encoding: chunked\r\n\r\n5\r\n12"])
async def test_a_body_that_stops_is_given_up(body: bytes) -> None:
    async with gateway(patience=20.0, body_timeout=0.05) as proxy:
        assert statuses(await proxy.say(POST + body)) == [408]
        assert proxy.endpoint.requests == []


async def test_a_body_that_drips_is_given_up_though_it_never_stops() -> None:
    async with gateway(patience=20.0, body_timeout=0.1) as proxy:
        start = POST + b"content-length: 1000000\r\n\r\n"
        line = await pump(proxy, start, b"a")
        assert line.startswith(b"HTTP/1.1 408 ")


# --- connections -------------------------------------------------------------------------------------------


async def test_the_longest_idle_connections_make_room_for_new_ones() -> None:
    door = Door(ConnectionLimits(max_connections=20))
    async with gateway(door=door) as proxy:
        crowd = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(60)]
        assert await works(proxy)
        assert door.open <= 21
        assert door.refused["idle"] > 0
        for _, writer in crowd:
            writer.close()


async def test_who_is_busy_does_not_make_room() -> None:
    door = Door(ConnectionLimits(max_connections=3))
    async with gateway(door=door, body_timeout=20.0) as proxy:
        busy = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(3)]
        for _, writer in busy:
            writer.write(POST + b"content-length: 9\r\n\r\n1")
        await until(lambda: proxy.reading >= 3)
        assert statuses(await proxy.say(b"")) == [503]
        for reader, writer in busy:
            writer.write(b"23456789")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            writer.close()


async def test_thousands_of_idle_connections_and_it_still_serves() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = min(3000, (soft - 500) // 2)
    door = Door(ConnectionLimits(max_connections=many + 100))
    async with gateway(door=door) as proxy:
        crowd = []
        for number in range(1, many + 1):
            crowd.append(socket.create_connection(("127.0.0.1", proxy.port)))
            if number % 500 == 0:  # as many as the kernel keeps for us meanwhile
                await until(lambda number=number: door.open >= number)  # type: ignore[misc]
        assert await works(proxy)
        assert door.open >= many
        assert door.refused["idle"] == 0
        for each in crowd:
            each.close()
