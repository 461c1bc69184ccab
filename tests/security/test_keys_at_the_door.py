"""Who comes without a key, or with too much, gets a defined answer and reaches no endpoint."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from picker.frontends.keys import Allowance, Keyring, parse_keys
from picker.frontends.trust import Trust
from security.gateway_rig import Gateway, gateway, statuses, until

ALICE, BOB, OFF = "sk-alice-4711", "sk-bob-0815", "sk-off-1234"
KEYS = f"alice:{ALICE} concurrent=2\nbob:{BOB} body=10\noff:{OFF} disabled"


def keyring() -> Keyring:
    return Keyring(parse_keys(KEYS, origin="keys"), allowance=Allowance(max_concurrent=50))


def request(*fields: str, body: bytes = b"{}", path: str = "/x") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: h", *fields, f"content-length: {len(body)}", "connection: close", "", ""]
    return "\r\n".join(lines).encode() + body


def error(received: bytes) -> dict[str, object]:
    told = json.loads(received.partition(b"\r\n\r\n")[2])
    assert set(told) == {"error"}
    assert {"message", "type", "code"} <= set(told["error"])
    details: dict[str, object] = told["error"]
    return details


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([], 401),
        (["authorization: Bearer"], 401),
        (["authorization: Bearer wrong"], 401),
        ([f"authorization: Bearer {ALICE[:-1]}"], 401),
        ([f"authorization: Basic {ALICE}"], 401),
        ([f"authorization: Bearer {ALICE}", "authorization: Bearer wrong"], 401),
        ([f"proxy-authorization: Bearer {ALICE}"], 401),
        ([f"cookie: authorization={ALICE}"], 401),
        ([f"authorization: Bearer {OFF}"], 403),
        ([f"authorization: Bearer {ALICE}"], 200),
        ([f"AUTHORIZATION: bearer {ALICE}"], 200),
        ([f"x-api-key: {ALICE}"], 200),
    ],
)
async def test_every_key_has_its_answer(fields: list[str], status: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with gateway(keys=keyring()) as proxy:
            received = await proxy.say(request(*fields))
    assert statuses(received) == [status]
    assert len(proxy.endpoint.requests) == (status == 200)
    if status != 200:
        assert error(received)["code"] == status
        assert (b"www-authenticate: Bearer" in received) == (status == 401)
    for secret in (ALICE, OFF):
        assert secret not in caplog.text
        assert secret.encode() not in received


async def test_a_key_that_follows_the_body_comes_too_late() -> None:
    head = b"POST /x HTTP/1.1\r\nhost: h\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    trailer = f"0\r\nauthorization: Bearer {ALICE}\r\n\r\n".encode()
    async with gateway(keys=keyring()) as proxy:
        assert statuses(await proxy.say(head + trailer)) == [401]
        assert proxy.endpoint.requests == []


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/health", "/", "//v1/models", "/v1/../x", "/%2e%2e/x"])
async def test_no_path_goes_round_the_key(path: str) -> None:
    async with gateway(keys=keyring()) as proxy:
        assert statuses(await proxy.say(request(path=path))) == [401]
        assert proxy.endpoint.requests == []


async def test_a_key_may_have_smaller_bodies_than_others() -> None:
    async with gateway(keys=keyring()) as proxy:
        too_large = await proxy.say(request(f"authorization: Bearer {BOB}", body=b"x" * 11))
        assert statuses(too_large) == [413]
        assert "10 bytes" in str(error(too_large)["message"])
        assert statuses(await proxy.say(request(f"authorization: Bearer {BOB}", body=b"x" * 10))) == [200]
        assert statuses(await proxy.say(request(f"authorization: Bearer {ALICE}", body=b"x" * 11))) == [200]


async def test_a_key_has_so_many_requests_at_once_and_gets_them_back_when_they_end() -> None:
    async with gateway(keys=keyring(), patience=20.0) as proxy:
        held = [await hold(proxy) for _ in range(2)]
        received = await proxy.say(request(f"authorization: Bearer {ALICE}"))
        assert statuses(received) == [429]
        assert b"retry-after: 1" in received
        assert error(received)["code"] == 429
        assert statuses(await proxy.say(request(f"authorization: Bearer {BOB}"))) == [200]
        for writer in held:
            writer.close()
        await until(lambda: not proxy.proxy.keys.running)
        assert statuses(await proxy.say(request(f"authorization: Bearer {ALICE}"))) == [200]


async def hold(proxy: Gateway) -> asyncio.StreamWriter:
    """A request of Alice's whose body never ends."""
    before = proxy.proxy.keys.running["alice"]
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(request(f"authorization: Bearer {ALICE}")[:-1])
    await until(lambda: proxy.proxy.keys.running["alice"] > before)
    return writer


@pytest.mark.parametrize(
    ("trust", "sent"),
    [
        (Trust(), [f"Bearer {ALICE}".encode()]),
        (Trust(pass_on=False), []),
        (Trust(key="endpoint-key"), [b"Bearer endpoint-key"]),
    ],
)
async def test_what_an_endpoint_is_shown_is_what_it_is_meant_to_see(trust: Trust, sent: list[bytes]) -> None:
    async with gateway(keys=keyring(), trust=trust) as proxy:
        assert statuses(await proxy.say(request(f"authorization: Bearer {ALICE}", "x-api-key: other"))) == [200]
        assert proxy.endpoint.values(b"authorization") == sent
        assert (bool(proxy.endpoint.values(b"x-api-key")) == trust.pass_on and not trust.key) or trust.key is not None


async def test_an_endpoint_with_a_key_of_its_own_gets_that() -> None:
    trust = Trust(key="for the others")
    async with gateway(trust=trust) as proxy:
        trust.learn({proxy.endpoint.address: "its-own"})
        assert statuses(await proxy.say(request("authorization: Bearer client", "x-api-key: client"))) == [200]
        assert proxy.endpoint.values(b"authorization") == [b"Bearer its-own"]
        assert proxy.endpoint.values(b"x-api-key") == []
