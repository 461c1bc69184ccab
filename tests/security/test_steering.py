"""Nothing that a client says chooses where its request goes, or whom an engine or its sidecar connects to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from security.gateway_rig import gateway, statuses

# What gateways tell engines and their sidecars, and what gateways are told by other gateways.
STEERING = [
    *(
        "x-gateway-destination-endpoint",
        "x-gateway-destination-endpoint-subset",
        "x-gateway-destination-endpoint-served",
    ),
    *("x-picker-endpoint", "x-picker-request-id", "x-picker-anything"),
    *("x-prefiller-host-port", "x-data-parallel-host-port", "x-data-parallel-rank", "x-encoder-hosts-ports"),
    "x-kv-cache-source-host-port",
]
HARMLESS = [
    *("x-forwarded-host", "x-host", "x-original-url", "x-rewrite-url", "x-forwarded-server", "forwarded", "x-real-ip"),
    *("x-envoy-original-dst-host", "x-upstream", "destination"),
]


class Forbidden:
    """An address inside that no request may reach."""

    def __init__(self) -> None:
        self.address = ""
        self.reached = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reached += 1
        writer.close()


@asynccontextmanager
async def forbidden() -> AsyncIterator[Forbidden]:
    made = Forbidden()
    async with await asyncio.start_server(made.accept, "127.0.0.1", 0) as server:
        made.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield made


def head(line: bytes, *fields: bytes, host: bytes = b"gateway") -> bytes:
    return b"\r\n".join([line, b"host: " + host, *fields, b"connection: close", b"", b""])


@pytest.mark.parametrize("name", STEERING)
async def test_a_header_that_steers_neither_steers_nor_passes(name: str) -> None:
    async with forbidden() as inside, gateway() as proxy:
        spellings = [name, name.upper(), name.title()]
        for spelling in spellings:
            field = f"{spelling}: {inside.address}".encode()
            assert statuses(await proxy.say(head(b"GET /x HTTP/1.1", field))) == [200]
        assert inside.reached == 0
        assert len(proxy.endpoint.requests) == len(spellings)
        assert proxy.endpoint.values(name.encode()) == []
        assert inside.address.encode() not in b"".join(bytes(wire) for wire in proxy.endpoint.connections)


@pytest.mark.parametrize("name", HARMLESS)
async def test_a_header_that_steers_other_proxies_steers_none_here(name: str) -> None:
    async with forbidden() as inside, gateway() as proxy:
        assert statuses(await proxy.say(head(b"GET /x HTTP/1.1", f"{name}: {inside.address}".encode()))) == [200]
        assert (inside.reached, len(proxy.endpoint.requests)) == (0, 1)


@pytest.mark.parametrize(
    "target",
    ["http://{}/x", "http://user@{}/x", "https://{}/x", "http://{}", "//{}/x", "/x?url=http://{}/", "/http://{}/x"],
)
async def test_a_target_with_an_authority_steers_nothing(target: str) -> None:
    async with forbidden() as inside, gateway() as proxy:
        line = f"GET {target.format(inside.address)} HTTP/1.1".encode()
        received = statuses(await proxy.say(head(line)))
        assert received in ([200], [400])
        assert inside.reached == 0
        assert all(request.target.startswith(b"/") for request in proxy.endpoint.requests)
        if received == [200]:
            assert proxy.endpoint.values(b"host") == [proxy.endpoint.address.encode()]


@pytest.mark.parametrize("host", ["{}", "{}:80", "localhost", "169.254.169.254", "[::1]:80", "a b", "x@{}", ""])
async def test_a_host_steers_nothing_and_is_not_the_endpoints(host: str) -> None:
    async with forbidden() as inside, gateway() as proxy:
        await proxy.say(head(b"GET /x HTTP/1.1", host=host.format(inside.address).encode()))
        assert inside.reached == 0
        assert proxy.endpoint.values(b"host") == [proxy.endpoint.address.encode()]


async def test_a_connect_opens_no_tunnel() -> None:
    async with forbidden() as inside, gateway() as proxy:
        line = f"CONNECT {inside.address} HTTP/1.1".encode()
        assert statuses(await proxy.say(head(line, host=inside.address.encode()))) == [501]
        assert (inside.reached, proxy.endpoint.requests) == (0, [])


@pytest.mark.parametrize("listed", [b"x-kept", b"authorization", b"X-KEPT , close", b"content-length", b"host"])
async def test_what_connection_lists_stays_behind_and_nothing_breaks(listed: bytes) -> None:
    request = b"\r\n".join(
        [
            *(b"POST /x HTTP/1.1", b"host: h", b"connection: " + listed, b"x-kept: 1", b"authorization: Bearer k"),
            *(b"content-length: 2", b"connection: close", b"", b"{}"),
        ]
    )
    async with gateway() as proxy:
        assert statuses(await proxy.say(request)) == [200]
        assert proxy.endpoint.values(b"content-length") == [b"2"]
        assert proxy.endpoint.values(b"host") == [proxy.endpoint.address.encode()]
        assert proxy.endpoint.bodies == [b"{}"]
        named = listed.lower().partition(b",")[0].strip()
        if named not in (b"content-length", b"host"):
            assert proxy.endpoint.values(named) == []
