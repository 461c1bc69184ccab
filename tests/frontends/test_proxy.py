from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import uvloop
from aiohttp import web

from frontends.fake_upstream import (
    ASK,
    COMPLETION,
    DONE,
    EVENT,
    RefusingPort,
    answer_ok,
    served_proxy,
    upstream,
)
from picker.exchange import Limits
from picker.frontends.proxy import Proxy
from picker.frontends.serving import listen, port_of
from picker.types import Endpoint, Failed, FailureReason, Finished, FirstToken, ResponseStarted
from virtual_time import in_virtual_time

PATH = "/v1/completions"


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60) as made:
        yield made


class Gate:
    """A streaming script that waits to be let on, and knows when its client has gone."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self.aborted = asyncio.Event()

    async def wait(self) -> None:
        self.reached.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.aborted.set()
            raise


async def start_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    await response.write(EVENT)
    return response


async def raw_exchange(port: int, request: bytes) -> bytes:
    """Everything the proxy sends on one connection, up to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    received = await reader.read()
    writer.close()
    return received


# --- passing through ---------------------------------------------------------------------------------------


async def test_a_completion_reaches_the_endpoint_unchanged_and_comes_back_unchanged(client: httpx.AsyncClient) -> None:
    body = b'{"model":"m",  "prompt":"caf\xc3\xa9", "unknown":[1,2]}'
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        answer = await client.post(f"{proxy.url}{PATH}?a=%20b", content=body)
        assert (answer.status_code, answer.content) == (200, COMPLETION)
        (seen,) = endpoint.seen
        assert (seen.method, seen.target, seen.body) == ("POST", f"{PATH}?a=%20b", body)
        assert seen.values("content-length") == [str(len(body))]
        assert await proxy.scheduler.told(Finished)


async def test_chunks_arrive_before_the_endpoint_has_finished(client: httpx.AsyncClient) -> None:
    gate = Gate()

    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await gate.wait()
        await response.write(DONE)
        return response

    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        async with client.stream("POST", proxy.url + PATH, json=ASK | {"stream": True}) as answer:
            chunks = answer.aiter_raw()
            assert await anext(chunks) == EVENT
            await proxy.scheduler.told(FirstToken)
            gate.open.set()
            assert [chunk async for chunk in chunks] == [DONE]
        kinds = [type(fact) for fact in proxy.scheduler.facts]
        assert kinds == [ResponseStarted, FirstToken, Finished]


async def test_an_error_of_the_endpoint_passes_unchanged(client: httpx.AsyncClient) -> None:
    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(status=500, body=b'{"error":"boom"}', headers={"x-kind": "engine"})

    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        answer = await client.post(proxy.url + PATH, json=ASK)
        assert (answer.status_code, answer.content) == (500, b'{"error":"boom"}')
        assert answer.headers["x-kind"] == "engine"
        assert (await proxy.scheduler.told(Finished)).status == 500


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "OPTIONS", "PATCH"])
async def test_every_method_and_path_is_forwarded(client: httpx.AsyncClient, method: str) -> None:
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        answer = await client.request(method, f"{proxy.url}/any//path/%2F?x=1&x=2")
        assert answer.content == COMPLETION
        (seen,) = endpoint.seen
        assert (seen.method, seen.target) == (method, "/any//path/%2F?x=1&x=2")


async def test_a_client_that_knows_no_chunks_gets_none() -> None:
    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await response.write(DONE)
        return response

    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        head, _, body = (await raw_exchange(proxy.port, b"GET /v1/x HTTP/1.0\r\n\r\n")).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert body == EVENT + DONE


async def test_a_long_stream_of_tokens_arrives_byte_for_byte(client: httpx.AsyncClient) -> None:
    words = ["a", "caf\u00e9", 'qu"ote', "back\\slash", "line\n", "", "x" * 5000, "b"]
    events = [EVENT.replace(b'" a"', json.dumps(word, ensure_ascii=False).encode()) for word in words * 5]

    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        for event in events:
            await response.write(event)
            await asyncio.sleep(0)  # a chunk by itself, mostly
        await response.write(DONE)
        return response

    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        answer = await client.post(proxy.url + PATH, json=ASK | {"stream": True})
        assert answer.content == b"".join((EVENT, *events, DONE))
        assert (await proxy.scheduler.told(Finished)).status == 200


async def test_the_target_keeps_its_spelling() -> None:
    target = b"/v1/%7emodels/../x?q=%41%20b+c&empty="
    request = b"GET %s HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n" % target
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        assert (await raw_exchange(proxy.port, request)).startswith(b"HTTP/1.1 200 ")
        assert endpoint.seen[0].target == target.decode()


async def test_the_answer_to_head_keeps_its_length_and_has_no_body(client: httpx.AsyncClient) -> None:
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        answer = await client.head(f"{proxy.url}/v1/models")
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-length"] == str(len(COMPLETION))


async def test_a_304_has_no_body(client: httpx.AsyncClient) -> None:
    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(status=304, headers={"etag": "x"})

    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        answer = await client.get(f"{proxy.url}/v1/models")
        assert (answer.status_code, answer.headers["etag"], answer.content) == (304, "x", b"")


async def test_a_chunked_request_body_arrives_whole_with_a_length(client: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b'{"model":"m",', b'"prompt":', b'"hello"}'):
            yield piece

    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        answer = await client.post(proxy.url + PATH, content=pieces())
        assert answer.status_code == 200
        (seen,) = endpoint.seen
        assert json.loads(seen.body) == {"model": "m", "prompt": "hello"}
        assert seen.values("content-length") == [str(len(seen.body))]
        assert seen.values("transfer-encoding") == []


async def test_bodies_of_megabytes_pass_both_ways(client: httpx.AsyncClient) -> None:
    large = json.dumps({"model": "m", "prompt": "x" * 3_000_000}).encode()

    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(body=body)

    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        answer = await client.post(proxy.url + PATH, content=large)
        assert answer.content == large


async def test_a_compressed_response_is_not_decoded(client: httpx.AsyncClient) -> None:
    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.Response(body=COMPLETION)
        response.enable_compression(web.ContentCoding.gzip)
        return response

    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        async with client.stream("POST", proxy.url + PATH, json=ASK) as answer:
            raw = b"".join([chunk async for chunk in answer.aiter_raw()])
        assert answer.headers["content-encoding"] == "gzip"
        assert raw.startswith(b"\x1f\x8b")


async def test_a_connection_serves_one_request_after_another() -> None:
    request = (
        b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 26\r\n\r\n" % PATH.encode() + b'{"prompt":"hello","n":  1}'
    )
    last = request.replace(b"host: x", b"host: x\r\nconnection: close")
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        received = await raw_exchange(proxy.port, request + request + last)
        assert received.count(b"HTTP/1.1 200 OK") == 3
        assert received.count(COMPLETION) == 3


# --- headers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [ASK, ASK | {"stream": True}], ids=["json", "stream"])
async def test_what_a_request_leaves_behind_waits_for_no_collection(client: httpx.AsyncClient, ask: Any) -> None:
    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        if "stream" not in ask:
            return await answer_ok(request, body)
        response = await start_stream(request)
        await response.write(DONE)
        return response

    kinds = ("_Passage", "Exchange", "Leash", "Reply", "Client")
    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        await client.post(proxy.url + PATH, json=ask)
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                assert (await client.post(proxy.url + PATH, json=ask)).status_code == 200
            alive = Counter(kind.__name__ for kind in map(type, gc.get_objects()) if kind.__name__ in kinds)
        finally:
            gc.enable()
    assert max(alive.values()) == 1, f"a connection remembers its last request: {alive}"


async def test_hop_by_hop_and_control_headers_stay_behind(client: httpx.AsyncClient) -> None:
    kept = {"authorization": "Bearer k", "x-custom": "1", "accept-encoding": "br", "x-gateway-inference-objective": "o"}
    dropped = {
        "connection": "keep-alive, X-Mine",
        "x-mine": "1",
        "te": "trailers",
        "proxy-authorization": "Basic x",
        "x-gateway-destination-endpoint": "10.0.0.1:1",
        "x-gateway-destination-endpoint-subset": "10.0.0.1:1",
        "x-data-parallel-rank": "3",
        "x-prefiller-host-port": "10.0.0.1:1",
        "x-picker-endpoint": "evil",
    }
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        await client.post(proxy.url + PATH, json=ASK, headers=kept | dropped)
        (seen,) = endpoint.seen
        assert {name: seen.values(name) for name in kept} == {name: [value] for name, value in kept.items()}
        assert {name: seen.values(name) for name in dropped} == {name: [] for name in dropped}
        assert seen.values("host") == [endpoint.address]


async def test_nothing_is_said_that_the_client_did_not_say() -> None:
    request = (
        b'POST /v1/completions HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: 14\r\n\r\n{"prompt":"a"}'
    )
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        await raw_exchange(proxy.port, request)
        (seen,) = endpoint.seen
        names = {name.lower() for name, _ in seen.headers}
        forwarding = {"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"}
        assert names == {"host", "content-length", "x-request-id", "via"} | forwarding


async def test_forwarding_is_told_and_what_an_outer_proxy_said_is_kept(client: httpx.AsyncClient) -> None:
    outer = {"x-forwarded-for": "203.0.113.9", "x-forwarded-proto": "https", "host": "llm.example"}
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        await client.post(proxy.url + PATH, json=ASK, headers=outer)
        (seen,) = endpoint.seen
        assert seen.values("x-forwarded-for") == ["203.0.113.9, 127.0.0.1"]
        assert seen.values("x-forwarded-proto") == ["https"]
        assert seen.values("x-forwarded-host") == ["llm.example"]


async def test_a_data_parallel_rank_is_pinned(client: httpx.AsyncClient) -> None:
    async with upstream() as endpoint, served_proxy() as proxy:
        proxy.scheduler.endpoints.append(Endpoint("dp", endpoint.address, rank=2))
        await client.post(proxy.url + PATH, json=ASK, headers={"x-data-parallel-rank": "7"})
        assert endpoint.seen[0].values("x-data-parallel-rank") == ["2"]


async def test_response_headers_keep_their_values_and_name_the_endpoint(client: httpx.AsyncClient) -> None:
    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.Response(body=b"{}", headers={"x-picker-endpoint": "forged", "keep-alive": "timeout=9"})
        response.headers.add("set-cookie", "a=1")
        response.headers.add("set-cookie", "b=2")
        return response

    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        answer = await client.post(proxy.url + PATH, json=ASK)
        assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
        assert answer.headers.get_list("x-picker-endpoint") == [endpoint.address]
        assert answer.headers["x-picker-request-id"] == "1"
        assert "keep-alive" not in answer.headers
        assert len(answer.headers.get_list("date")) == 1
        again = await client.post(proxy.url + PATH, json=ASK)
        assert endpoint.seen[1].values("cookie") == ["a=1; b=2"], "the client's own cookies only"
        assert again.status_code == 200


async def test_cookies_of_one_client_never_reach_another() -> None:
    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(headers={"set-cookie": "session=secret"})

    async with upstream(script) as endpoint, served_proxy(endpoint.address.replace("127.0.0.1", "localhost")) as proxy:
        for _ in range(2):
            async with httpx.AsyncClient() as stranger:
                await stranger.post(proxy.url + PATH, json=ASK)
        assert endpoint.seen[1].values("cookie") == []


# --- failures of endpoints ---------------------------------------------------------------------------------


async def test_another_endpoint_serves_when_the_first_refuses(client: httpx.AsyncClient) -> None:
    refusing = RefusingPort()
    async with upstream() as endpoint, served_proxy(refusing.address, endpoint.address) as proxy:
        answer = await client.post(proxy.url + PATH, json=ASK)
        assert (answer.status_code, answer.headers["x-picker-endpoint"]) == (200, endpoint.address)
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.CONNECT
        assert await proxy.scheduler.told(Finished)
        assert endpoint.seen[0].body == json.dumps(ASK, separators=(",", ":")).encode()
    refusing.close()


async def test_another_endpoint_serves_when_the_first_resets_before_its_head(client: httpx.AsyncClient) -> None:
    async def reset(request: web.Request, body: bytes) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with upstream(reset) as bad, upstream() as good, served_proxy(bad.address, good.address) as proxy:
        answer = await client.post(proxy.url + PATH, json=ASK)
        assert (answer.status_code, answer.headers["x-picker-endpoint"]) == (200, good.address)
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.RESET
        assert len(bad.seen) == 1, "a fresh connection that is reset is the endpoint's fault"


async def test_a_kept_alive_connection_that_ran_out_blames_no_endpoint(client: httpx.AsyncClient) -> None:
    served: set[Any] = set()

    async def once_a_connection(request: web.Request, body: bytes) -> web.StreamResponse:
        assert request.transport is not None
        if request.transport in served:
            request.transport.abort()
        served.add(request.transport)
        return web.Response(body=COMPLETION)

    async with upstream(once_a_connection) as endpoint, served_proxy(endpoint.address) as proxy:
        for _ in range(2):
            answer = await client.post(proxy.url + PATH, json=ASK)
            assert answer.status_code == 200
        assert len(endpoint.seen) == 3
        assert not [fact for fact in proxy.scheduler.facts if isinstance(fact, Failed)]


async def test_when_every_endpoint_refuses_the_client_gets_an_error_object(client: httpx.AsyncClient) -> None:
    ports = [RefusingPort() for _ in range(3)]
    async with served_proxy(*[port.address for port in ports]) as proxy:
        answer = await client.post(proxy.url + PATH, json=ASK)
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == 502
        assert len(proxy.scheduler.facts) == 3
    for port in ports:
        port.close()


async def test_an_endpoint_that_hangs_gives_504_and_is_aborted(client: httpx.AsyncClient) -> None:
    gate = Gate()

    async def hang(request: web.Request, body: bytes) -> web.StreamResponse:
        await gate.wait()
        return web.Response()

    async with upstream(hang) as endpoint, served_proxy(endpoint.address, first_byte_timeout=0.25) as proxy:
        answer = await client.post(proxy.url + PATH, json=ASK)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, 504)
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.TIMEOUT
        await gate.aborted.wait()
        again = await client.get(f"{proxy.url}/v1/models")
        assert again.status_code == 504, "the connection to the client goes on"


@in_virtual_time
async def test_another_endpoint_serves_when_the_first_hangs() -> None:
    """What is known to take no longer is not waited for until the end of all patience."""
    gate, head = Gate(), asyncio.Event()

    async def hang(request: web.Request, body: bytes) -> web.StreamResponse:
        await web.StreamResponse(headers={"content-type": "text/event-stream"}).prepare(request)
        head.set()
        await gate.wait()
        raise AssertionError

    async with (
        upstream(hang) as first,
        upstream() as second,
        served_proxy(first.address, second.address) as proxy,
        httpx.AsyncClient() as client,
    ):
        proxy.runtime.patience = 0.05
        proxy.scheduler.patience = lambda request_id, now: 0.0  # type: ignore[attr-defined]
        answer = await client.post(proxy.url + PATH, json=ASK | {"stream": True})
        assert (answer.status_code, answer.content) == (200, COMPLETION)
        assert head.is_set()
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.TIMEOUT
        await gate.aborted.wait()


async def test_an_endpoint_that_is_only_slow_is_waited_for(client: httpx.AsyncClient) -> None:
    gate = Gate()
    asked: list[float] = []

    async def late(request: web.Request, body: bytes) -> web.StreamResponse:
        await gate.wait()
        return web.Response(body=COMPLETION, content_type="application/json")

    def patience(request_id: int, now: float) -> float:
        asked.append(now)
        if len(asked) == 3:
            gate.open.set()
        return 0.01

    async with upstream(late) as endpoint, served_proxy(endpoint.address) as proxy:
        proxy.runtime.patience = 0.01
        proxy.scheduler.patience = patience  # type: ignore[attr-defined]
        answer = await client.post(proxy.url + PATH, json=ASK)
        assert (answer.status_code, answer.content) == (200, COMPLETION)
        assert len(asked) >= 3


async def test_another_endpoint_serves_when_the_first_is_full_or_gives_up(client: httpx.AsyncClient) -> None:
    async def full(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"error": {"message": "busy", "code": 503}}, status=503)

    async def drains(request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(DONE)
        return response

    async with upstream(full) as a, upstream(drains) as b, upstream() as c:
        async with served_proxy(a.address, b.address, c.address) as proxy:
            answer = await client.post(proxy.url + PATH, json=ASK | {"stream": True})
            assert (answer.status_code, answer.content) == (200, COMPLETION)
            assert answer.headers["x-picker-endpoint"] == c.address
            assert [len(each.seen) for each in (a, b, c)] == [1, 1, 1]
        async with served_proxy(a.address) as proxy:
            answer = await client.post(proxy.url + PATH, json=ASK)
            assert (answer.status_code, answer.json()["error"]["message"]) == (503, "busy")


async def test_a_proxy_that_is_about_to_leave_serves_and_has_its_clients_let_go(client: httpx.AsyncClient) -> None:
    listener, leaving, stop = listen("127.0.0.1", 0), asyncio.Event(), asyncio.Event()
    async with upstream() as endpoint, served_proxy(endpoint.address) as other, asyncio.TaskGroup() as group:
        proxy, url = Proxy(other.runtime), f"http://127.0.0.1:{port_of(listener)}{PATH}"
        group.create_task(proxy.serve(listener, stop))
        parting = group.create_task(proxy.part(leaving, stop, 3600.0))
        assert "connection" not in (await client.post(url, json=ASK)).headers
        leaving.set()
        await asyncio.sleep(0)
        answer = await client.post(url, json=ASK)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert other.runtime.leaving
        parting.cancel()
        stop.set()


async def test_a_stream_that_stalls_is_cut(client: httpx.AsyncClient) -> None:
    gate = Gate()

    async def stall(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await gate.wait()
        return response

    async with upstream(stall) as endpoint, served_proxy(endpoint.address, idle_timeout=0.2) as proxy:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(proxy.url + PATH, json=ASK | {"stream": True})
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.TIMEOUT
        await gate.aborted.wait()


@pytest.mark.parametrize("length", [None, "1000"], ids=["chunked", "content-length"])
async def test_a_reset_in_the_middle_is_seen_by_the_client_as_a_truncation(
    client: httpx.AsyncClient, length: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"content-type": "text/event-stream"} | ({"content-length": length} if length else {})
    gate = Gate()

    async def break_down(request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await response.write(EVENT)
        await gate.wait()
        assert request.transport is not None
        request.transport.abort()
        return response

    async with upstream(break_down) as endpoint, served_proxy(endpoint.address) as proxy:
        async with client.stream("POST", proxy.url + PATH, json=ASK | {"stream": True}) as answer:
            chunks = answer.aiter_raw()
            assert await anext(chunks) == EVENT
            gate.open.set()
            with pytest.raises(httpx.RemoteProtocolError, match="peer closed connection"):
                await anext(chunks)
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.RESET
    assert caplog.messages == [], "a broken endpoint is no error of ours"


async def test_without_endpoints_the_answer_is_503_with_a_time_to_retry(client: httpx.AsyncClient) -> None:
    async with served_proxy() as proxy:
        answer = await client.post(proxy.url + PATH, json=ASK)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert answer.json()["error"] == {
            "message": "No endpoint is known.",
            "type": "Service Unavailable",
            "param": None,
            "code": 503,
        }
        assert (await client.get(f"{proxy.url}/health")).status_code == 503


# --- clients that leave ------------------------------------------------------------------------------------


async def test_a_client_that_leaves_before_the_first_byte_aborts_the_endpoint(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()

    async def hang(request: web.Request, body: bytes) -> web.StreamResponse:
        await gate.wait()
        return web.Response()

    async with upstream(hang) as endpoint, served_proxy(endpoint.address) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b'POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 14\r\n\r\n{"prompt":"a"}')
        await gate.reached.wait()
        writer.close()
        await gate.aborted.wait()
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.CLIENT_GONE
    assert caplog.messages == []


async def test_a_client_that_leaves_after_a_large_prompt_is_noticed_too(client: httpx.AsyncClient) -> None:
    gate = Gate()

    async def hang(request: web.Request, body: bytes) -> web.StreamResponse:
        await gate.wait()
        return web.Response()

    prompt = json.dumps({"prompt": "x" * 1_000_000}).encode()
    async with upstream(hang) as endpoint, served_proxy(endpoint.address) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(prompt) + prompt)
        await gate.reached.wait()
        writer.close()
        await gate.aborted.wait()


async def test_a_client_that_leaves_in_the_middle_of_a_stream_aborts_the_endpoint(client: httpx.AsyncClient) -> None:
    gate = Gate()

    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await gate.wait()
        return response

    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        async with client.stream("POST", proxy.url + PATH, json=ASK | {"stream": True}) as answer:
            assert await anext(answer.aiter_raw()) == EVENT
        await gate.aborted.wait()
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.CLIENT_GONE
        assert len(proxy.scheduler.facts) == 3


async def test_a_client_that_stops_reading_is_given_up_and_holds_the_endpoint_back(client: httpx.AsyncClient) -> None:
    sent = 0
    gate = Gate()

    async def flood(request: web.Request, body: bytes) -> web.StreamResponse:
        nonlocal sent
        response = await start_stream(request)
        try:
            while True:
                await response.write(b"x" * 65536)
                sent += 65536
        except (asyncio.CancelledError, ConnectionError):
            gate.aborted.set()
            raise

    async with upstream(flood) as endpoint, served_proxy(endpoint.address, idle_timeout=0.3) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as lazy:
            lazy.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 14\r\n\r\n{"prompt":"a"}')
            await gate.aborted.wait()
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.CLIENT_GONE
        assert sent < 64 << 20, "what the client does not take stays in the sockets' buffers"


async def test_a_client_that_leaves_the_queue_is_taken_out_of_it() -> None:
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        proxy.scheduler.busy = True
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b'POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 14\r\n\r\n{"prompt":"a"}')
        await proxy.scheduler.asked()
        writer.close()
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.CLIENT_GONE
        assert endpoint.seen == []


async def test_clients_that_send_ahead_and_leave_are_no_error(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()

    async def stream(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        gate.reached.set()
        while True:
            await response.write(EVENT)
            await asyncio.sleep(0)

    async with upstream(stream) as endpoint, served_proxy(endpoint.address) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n" * 3)
        await gate.reached.wait()
        writer.transport.abort()
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.CLIENT_GONE
        assert len(proxy.scheduler.requests) == 1
    assert [record for record in caplog.records if record.name.startswith(("picker", "uvicorn"))] == []


async def test_a_client_that_leaves_inside_its_body_is_no_request(client: httpx.AsyncClient) -> None:
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b'POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 99\r\n\r\n{"prompt"')
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await client.get(proxy.url)).status_code == 200
        assert len(proxy.scheduler.requests) == 1


# --- what the proxy answers by itself ----------------------------------------------------------------------


async def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent() -> None:
    request = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 2000\r\n\r\n"
    async with upstream() as endpoint, served_proxy(endpoint.address, limits=Limits(max_body_bytes=1000)) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in head
        writer.close()
        assert endpoint.seen == []


async def test_a_client_that_sends_its_whole_body_first_still_reads_the_413(client: httpx.AsyncClient) -> None:
    body = b"x" * 8_000_000
    request = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    async with upstream() as endpoint, served_proxy(endpoint.address, limits=Limits(max_body_bytes=1000)) as proxy:
        received = await raw_exchange(proxy.port, request)
        assert received.startswith(b"HTTP/1.1 413 ")
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == 413
        assert endpoint.seen == []


async def test_a_chunked_body_is_refused_when_it_grows_too_large(client: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    async with upstream() as endpoint, served_proxy(endpoint.address, limits=Limits(max_body_bytes=1000)) as proxy:
        answer = await client.post(proxy.url + PATH, content=pieces())
        assert answer.status_code == 413
        assert endpoint.seen == []


async def test_a_body_that_cannot_be_routed_is_refused_and_the_connection_goes_on() -> None:
    bad = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\n\r\n{]}"
    good = b"GET /v1/models HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        received = await raw_exchange(proxy.port, bad + good)
        assert received.startswith(b"HTTP/1.1 400 ")
        assert b"HTTP/1.1 200 " in received
        assert [seen.method for seen in endpoint.seen] == ["GET"]


async def test_only_the_api_key_opens_the_gateway(client: httpx.AsyncClient) -> None:
    async with upstream() as endpoint, served_proxy(endpoint.address, api_key="s3cret") as proxy:
        answers = {}
        for given in (None, "Bearer wrong", "Bearer s3cret2", "Basic s3cret", "Bearer s3cret", "bearer s3cret"):
            headers = {} if given is None else {"authorization": given}
            answers[given] = (await client.post(proxy.url + PATH, json=ASK, headers=headers)).status_code
        assert [given for given, status in answers.items() if status == 200] == ["Bearer s3cret", "bearer s3cret"]
        assert {status for status in answers.values() if status != 200} == {401}
        assert endpoint.seen[0].values("authorization") == ["Bearer s3cret"]


async def test_a_refused_key_is_explained_in_the_shape_of_the_api(client: httpx.AsyncClient) -> None:
    async with served_proxy(api_key="k") as proxy:
        answer = await client.post(proxy.url + PATH, json=ASK, headers={b"authorization": "Bearer \u00e9".encode()})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["error"]["type"] == "AuthenticationError"
        assert proxy.scheduler.requests == []


async def test_a_websocket_handshake_gets_501() -> None:
    request = (
        b"GET /v1/realtime HTTP/1.1\r\nhost: h\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(request)
        assert (await reader.readline()).startswith(b"HTTP/1.1 501 ")
        writer.close()
        assert endpoint.seen == []


async def test_an_offer_of_another_protocol_is_declined_by_serving_the_request() -> None:
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\n" + offer
    body = b'{"prompt":"a"}'
    sized = head + b"content-length: 14\r\n\r\n" + body
    chunked = head + b"transfer-encoding: chunked\r\n\r\ne\r\n" + body + b"\r\n0\r\n\r\n"
    last = b"GET /v1/models HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        received = await raw_exchange(proxy.port, sized + chunked + last)
        assert received.count(b"HTTP/1.1 200 ") == 3
        assert [seen.body for seen in endpoint.seen] == [body, body, b""]
        names = {name.lower() for name, _ in endpoint.seen[0].headers}
        assert not names & {"upgrade", "connection", "http2-settings"}


async def test_a_target_that_is_no_path_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        received = await raw_exchange(proxy.port, b"OPTIONS * HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 400 ")
        assert endpoint.seen == []
    assert caplog.messages == []


async def test_bytes_that_are_not_http_get_400_and_the_end_of_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with served_proxy() as proxy:
        for nonsense, status in (
            (b"hello\r\n\r\n", b"400"),
            (b"CONNECT example.com:443 HTTP/1.1\r\nhost: h\r\n\r\n", b"501"),
        ):
            assert (await raw_exchange(proxy.port, nonsense)).startswith(b"HTTP/1.1 %b " % status)
    assert caplog.messages == []


async def test_a_bug_of_ours_is_a_500_and_is_logged_and_counted_once(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    async with upstream() as endpoint, served_proxy(endpoint.address) as proxy:
        with monkeypatch.context() as patch:
            patch.setattr("picker.frontends.proxy.upstream_headers", broken)
            answer = await client.post(proxy.url + PATH, json=ASK)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "ZeroDivisionError" in caplog.text
        assert b'picker_internal_errors_total{where="proxy"} 1.0' in proxy.runtime.telemetry.text()
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.SHUTDOWN, "nobody else is to blame"
        assert (await client.post(proxy.url + PATH, json=ASK)).status_code == 200


async def test_a_bug_of_ours_in_the_middle_breaks_the_response_off(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    gate = Gate()

    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await gate.wait()
        await response.write(DONE)
        return response

    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        async with client.stream("POST", proxy.url + PATH, json=ASK | {"stream": True}) as answer:
            chunks = answer.aiter_raw()
            await anext(chunks)
            monkeypatch.setattr("picker.exchange.Exchange._response_body", broken)
            gate.open.set()
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(chunks)
        assert len(caplog.records) == 1


# --- stopping ----------------------------------------------------------------------------------------------


async def test_running_streams_end_before_the_proxy_does(client: httpx.AsyncClient) -> None:
    gate = Gate()

    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await gate.wait()
        await response.write(DONE)
        return response

    async with upstream(script) as endpoint, served_proxy(endpoint.address, grace=10.0) as proxy:
        async with client.stream("POST", proxy.url + PATH, json=ASK | {"stream": True}) as answer:
            chunks = answer.aiter_raw()
            await anext(chunks)
            proxy.stop.set()
            await refused(proxy.port)
            gate.open.set()
            assert [chunk async for chunk in chunks] == [DONE]
        await proxy.ended.wait()
        assert await proxy.scheduler.told(Finished)


async def test_a_stream_that_outlasts_the_grace_is_cut(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()

    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await gate.wait()
        return response

    async with upstream(script) as endpoint, served_proxy(endpoint.address, grace=0.01) as proxy:
        async with client.stream("POST", proxy.url + PATH, json=ASK | {"stream": True}) as answer:
            chunks = answer.aiter_raw()
            await anext(chunks)
            proxy.stop.set()
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(chunks)
        await gate.aborted.wait()
        assert (await proxy.scheduler.told(Failed)).reason is FailureReason.SHUTDOWN
        await proxy.ended.wait()
    assert caplog.messages == []


async def refused(port: int) -> None:
    """Returns once nobody listens on the port."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionError:
            return
        writer.close()
        await asyncio.sleep(0)


# --- the loop that serves in earnest -----------------------------------------------------------------------

RULES_ABOUT_CONNECTIONS: list[Callable[[httpx.AsyncClient], Awaitable[None]]] = [
    test_a_completion_reaches_the_endpoint_unchanged_and_comes_back_unchanged,
    test_chunks_arrive_before_the_endpoint_has_finished,
    test_bodies_of_megabytes_pass_both_ways,
    test_another_endpoint_serves_when_the_first_refuses,
    test_another_endpoint_serves_when_the_first_resets_before_its_head,
    test_a_kept_alive_connection_that_ran_out_blames_no_endpoint,
    test_an_endpoint_that_hangs_gives_504_and_is_aborted,
    test_a_stream_that_stalls_is_cut,
    test_a_client_that_leaves_in_the_middle_of_a_stream_aborts_the_endpoint,
    test_a_client_that_leaves_after_a_large_prompt_is_noticed_too,
    test_a_client_that_stops_reading_is_given_up_and_holds_the_endpoint_back,
    test_a_client_that_sends_its_whole_body_first_still_reads_the_413,
    test_running_streams_end_before_the_proxy_does,
]


@pytest.mark.parametrize("rule", RULES_ABOUT_CONNECTIONS, ids=lambda rule: rule.__name__)
def test_under_uvloop(rule: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            await rule(client)

    uvloop.run(run())


@pytest.mark.parametrize("length", [None, "1000"], ids=["chunked", "content-length"])
def test_truncation_is_visible_under_uvloop(length: str | None, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            await test_a_reset_in_the_middle_is_seen_by_the_client_as_a_truncation(client, length, caplog)

    uvloop.run(run())
