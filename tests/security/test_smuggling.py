"""What is not HTTP/1.1 beyond doubt is refused and never repaired: no endpoint sees a request that nobody sent."""

from __future__ import annotations

import asyncio

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from security.attacks import ATTACKS, SMUGGLED, Attack
from security.gateway_rig import gateway, statuses


def by_h11(data: bytes) -> tuple[int, str | None]:
    """How many requests h11 reads to their ends in these bytes, and what it finds wrong after them."""
    parser, whole = h11.Connection(h11.SERVER), 0
    parser.receive_data(data)
    parser.receive_data(b"")
    try:
        while True:
            event = parser.next_event()
            if isinstance(event, h11.EndOfMessage):
                whole += 1
                if parser.their_state is not h11.DONE:
                    return whole, None
                parser.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                parser.send(h11.EndOfMessage())
                if parser.our_state is not h11.DONE:
                    return whole, None
                parser.start_next_cycle()
            elif event is h11.NEED_DATA or event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                return whole, None
    except h11.RemoteProtocolError as error:
        return whole, str(error)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
async def test_an_attack_gets_its_answer_and_smuggles_nothing(attack: Attack) -> None:
    async with gateway() as proxy:
        received = await proxy.say(attack.request)
        found = statuses(received)
        assert found, "nothing was answered"
        assert found[0] in attack.answers, received[:200]
        assert proxy.endpoint.broken == []
        targets = [request.target for request in proxy.endpoint.requests]
        assert b"/smuggled" not in targets
        if not attack.reaches and 200 not in attack.answers:
            assert targets == []
        whole, _ = by_h11(attack.request)
        assert len(targets) <= max(whole, 1)


async def test_attacks_in_pieces_get_the_same_answers() -> None:
    async def answer(attack: Attack) -> tuple[str, int]:
        pieces = [attack.request[n : n + 7] for n in range(0, len(attack.request), 7)]
        return attack.name, statuses(await proxy.say(*pieces))[0]

    async with gateway(patience=1.0) as proxy:
        found = dict(await asyncio.gather(*map(answer, ATTACKS)))
        assert {attack.name: found[attack.name] for attack in ATTACKS if found[attack.name] not in attack.answers} == {}
        assert proxy.endpoint.broken == []
        assert b"/smuggled" not in [request.target for request in proxy.endpoint.requests]


@pytest.mark.parametrize(
    ("trailer", "answer"),
    [
        (b"Authorization: Bearer stolen", 200),
        (b"X-Forwarded-For: stolen", 200),
        (b"Host: stolen", 200),
        (b"X-Session-Id: stolen", 200),
        (b"Content-Length: 5", 400),
        (b"Transfer-Encoding: stolen", 400),
    ],
)
async def test_what_follows_a_body_is_no_head(trailer: bytes, answer: int) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with gateway() as proxy:
        assert statuses(await proxy.say(head + b"0\r\n" + trailer + b"\r\n\r\n")) == [answer]
        assert b"stolen" not in b"".join(bytes(wire) for wire in proxy.endpoint.connections)


async def test_a_body_that_says_to_be_a_request_stays_a_body() -> None:
    head = b"POST /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED)
    async with gateway() as proxy:
        assert statuses(await proxy.say(head + SMUGGLED)) == [200]
        assert [request.target for request in proxy.endpoint.requests] == [b"/x"]
        assert proxy.endpoint.bodies == [SMUGGLED]


async def test_garbage_behind_a_request_waits_for_its_answer() -> None:
    """An error amid the answer before it would be taken for a part of that."""
    async with gateway() as proxy:
        received = await proxy.say(b"GET /first HTTP/1.1\r\nHost: h\r\n\r\n\x00garbage")
        assert statuses(received) == [200]
        assert received.endswith(b"ok")
        assert [request.target for request in proxy.endpoint.requests] == [b"/first"]


async def test_requests_sent_together_are_answered_in_their_order() -> None:
    async with gateway() as proxy:
        request = b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n"
        received = await proxy.say(
            *(request % n for n in range(5)), b"GET /5 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
        )
        assert statuses(received) == [200] * 6
        assert [request.target for request in proxy.endpoint.requests] == [b"/%d" % n for n in range(6)]


async def test_an_offer_of_http_2_is_declined_with_the_body_in_its_place() -> None:
    request = (
        b"POST /x HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED)
    )
    async with gateway() as proxy:
        assert statuses(await proxy.say(request + SMUGGLED)) == [200]
        assert proxy.endpoint.bodies == [SMUGGLED]
        assert proxy.endpoint.values(b"upgrade") == proxy.endpoint.values(b"http2-settings") == []


PIECES = st.sampled_from(
    [
        *(
            b"GET / HTTP/1.1\r\n",
            b"POST /p HTTP/1.1\r\n",
            b"Host: h\r\n",
            b"Host: h\n",
            b"\r\n",
            b"\n",
            b"\r",
            b" ",
            b"\t",
        ),
        *(b"Content-Length: 3\r\n", b"Content-Length: 0\r\n", b"Content-Length : 3\r\n", b"content-length:+3\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding:chunked\n", b"transfer-encoding: x\r\n", b"X: y\r\n"),
        *(
            b"3\r\nabc\r\n",
            b"0\r\n\r\n",
            b"0\r\n",
            b"abc",
            b"3;x\r\nabc\r\n",
            b"\x00",
            SMUGGLED,
            b"Connection: close\r\n",
        ),
    ]
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PIECES, min_size=2, max_size=14))
async def test_no_mixture_reaches_an_endpoint_as_more_requests_than_h11_reads(pieces: list[bytes]) -> None:
    data = b"".join([b"POST /first HTTP/1.1\r\nHost: h\r\n", *pieces])
    whole, _ = by_h11(data)
    async with gateway(patience=0.01) as proxy:
        await proxy.say(data)
        assert proxy.endpoint.broken == []
        assert len(proxy.endpoint.requests) <= whole, (data, proxy.endpoint.requests)
