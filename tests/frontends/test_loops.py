from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from frontends.fake_upstream import served_proxy, upstream
from picker.frontends.loops import Via
from picker.types import Endpoint

PATH = "/v1/chat/completions"
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_a_request_that_bears_our_mark_has_been_here() -> None:
    via, other = Via(), Via()
    assert via.has_passed([(b"host", b"h"), via.mark])
    assert via.has_passed([(b"via", b"1.1 nginx"), (b"via", via.mark[1] + b", 1.1 nginx")])
    assert not via.has_passed([other.mark, (b"x-note", via.mark[1])])


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60) as client:
        yield client


async def test_an_endpoint_that_leads_back_here_is_told_and_asked_once(client: httpx.AsyncClient) -> None:
    async with served_proxy() as proxy:
        proxy.scheduler.endpoints.append(Endpoint("itself", f"127.0.0.1:{proxy.port}"))
        answer = await client.post(proxy.url + PATH, json=ASK)
        assert answer.status_code == 508
        assert "leads back to this gateway" in answer.json()["error"]["message"]
        assert len(proxy.scheduler.requests) == 1


async def test_gateways_in_a_row_are_no_loop(client: httpx.AsyncClient) -> None:
    async with upstream() as engine, served_proxy(engine.address) as inner:
        async with served_proxy(f"127.0.0.1:{inner.port}") as outer:
            answer = await client.post(outer.url + PATH, json=ASK, headers={"via": "1.0 squid"})
            assert answer.status_code == 200
        (seen,) = engine.seen
        assert len(seen.values("via")) == 3
        assert seen.values("via")[0] == "1.0 squid"
