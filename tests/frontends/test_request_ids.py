from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from aiohttp import web

from frontends.fake_upstream import served_proxy, upstream
from picker.access_log import RequestLog
from picker.frontends.request_ids import RequestIds, told_in_body

PATH = "/v1/chat/completions"
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
FIT = [
    "3f0c3b0e-8a1c-4c53-9d64-0d9c6ea1a6a1",
    "01JD8Z4M4S6Q3V2H0W1X9Y7Z5K",
    "Root=1-67891233-abcdef012345678912345678",
    "req_011CSHoEeqs5C35K2UUqR7Fy",
    "x",
    "a" * 128,
]
UNFIT = ["", "a" * 129, "two words", 'quo"te', "<b>", "back\\slash", "new%0aline'", "caf\xe9", "$(reboot)", "a{b}"]


def identified(given: str | None, *more: str) -> tuple[str, bool]:
    values = [] if given is None else [given, *more]
    raw = [(b"host", b"h"), *((b"x-request-id", value.encode("latin-1")) for value in values)]
    headers = {name.decode(): value.decode("latin-1") for name, value in raw}
    return RequestIds("p-").of(headers, raw, 31)


@pytest.mark.parametrize("given", FIT)
def test_a_clients_id_is_kept(given: str) -> None:
    assert identified(given) == (given, True)


@pytest.mark.parametrize("given", [None, *UNFIT])
def test_without_one_that_is_fit_it_gets_one_of_ours(given: str | None) -> None:
    assert identified(given) == ("p-1f", False)


def test_of_two_ids_neither_is_believed() -> None:
    assert identified("one", "two") == ("p-1f", False)
    assert identified("one", "one") == ("p-1f", False)


def test_another_field_may_come_twice() -> None:
    raw = [(b"x-request-id", b"one"), (b"cookie", b"a"), (b"cookie", b"b")]
    assert RequestIds("p-").of({"x-request-id": "one", "cookie": "b"}, raw, 1) == ("one", True)


def test_ours_differ_by_request_and_by_process_and_are_fit_themselves() -> None:
    one, two = RequestIds(), RequestIds()
    ids = {maker.of({}, (), number)[0] for maker in (one, two) for number in range(100)}
    assert len(ids) == 200
    assert all(identified(each) == (each, True) for each in ids)


def test_only_errors_of_anthropics_form_have_a_place_for_it() -> None:
    error = b'{"type":"error","error":{"type":"api_error","message":"m"}}'
    told = json.loads(told_in_body("/v1/messages", "an-id", 500, error))
    assert told == json.loads(error) | {"request_id": "an-id"}
    assert told_in_body("/v1/messages", "an-id", 200, error) == error
    assert told_in_body(PATH, "an-id", 500, error) == error
    assert told_in_body("/v1/messages", "an-id", 500, b"no JSON") == b"no JSON"


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60) as client:
        yield client


async def test_an_id_goes_to_the_endpoint_to_the_client_and_into_the_log(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    journal = RequestLog(str(tmp_path / "log"))
    async with upstream() as endpoint, served_proxy(endpoint.address, journal=journal) as proxy:
        kept = await client.post(proxy.url + PATH, json=ASK, headers={"x-request-id": "mine-1"})
        made = await client.post(proxy.url + PATH, json=ASK)
        unfit = await client.post(proxy.url + PATH, json=ASK, headers={"x-request-id": "not mine"})
    answered = [answer.headers.get_list("x-request-id") for answer in (kept, made, unfit)]
    assert answered == [seen.values("x-request-id") for seen in endpoint.seen]
    assert answered[0] == ["mine-1"]
    assert len({ids[0] for ids in answered}) == 3
    assert all(len(ids) == 1 for ids in answered)
    journal.close()
    logged = [json.loads(line)["request_id"] for line in (tmp_path / "log").read_text().splitlines()]
    assert logged == [ids[0] for ids in answered]


async def test_an_engines_own_id_does_not_take_its_place(client: httpx.AsyncClient) -> None:
    async def script(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(body=b"{}", headers={"x-request-id": "the engine's"})

    async with upstream(script) as endpoint, served_proxy(endpoint.address) as proxy:
        answer = await client.post(proxy.url + PATH, json=ASK, headers={"x-request-id": "mine"})
        assert answer.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize(
    ("path", "names"), [(PATH, ["x-request-id"]), ("/v1/messages", ["x-request-id", "request-id"])]
)
async def test_pickers_own_answers_have_it_too(client: httpx.AsyncClient, path: str, names: list[str]) -> None:
    async with upstream() as endpoint, served_proxy(endpoint.address, api_key="key") as proxy:
        answer = await client.post(proxy.url + path, json=ASK, headers={"x-request-id": "mine"})
        assert answer.status_code == 401
        assert [answer.headers[name] for name in names] == ["mine"] * len(names)
        assert answer.json().get("request_id") == ("mine" if path == "/v1/messages" else None)
