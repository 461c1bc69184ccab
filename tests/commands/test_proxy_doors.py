"""What picker itself asks of endpoints is asked as requests are sent there: keys, certificates and names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from picker.app import App
from picker.commands.proxy_doors import Doors
from picker.config import from_values
from picker.engine_survey import survey
from picker.frontends.certificates import Certificates, Pair, self_signed
from picker.frontends.trust import Trust, TrustFiles
from picker.frontends.upstream import Upstream
from picker.frontends.upstream_connection import Reply
from picker.sources.scrape import AiohttpFetch, FetchFailure, root_of
from picker.sources.static import parse_endpoint
from picker.types import Endpoint, EndpointAdded, EndpointRemoved

NAME = "engine.internal"


class Engine:
    """An https server with a certificate for a name that no DNS knows. keys: it was shown, by path."""

    def __init__(self, endpoint: Endpoint, ca: Path) -> None:
        self.endpoint = endpoint
        self.ca = ca
        self.keys: dict[str, str | None] = {}


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    pytest.importorskip("cryptography")
    for path, data in zip((tmp_path / "crt", tmp_path / "key"), self_signed((NAME,)), strict=True):
        path.write_bytes(data)
    context = Certificates(None, pair=Pair(tmp_path / "crt", tmp_path / "key"), protocol="http/1.1").context

    async def answer(request: web.Request) -> web.Response:
        made.keys[request.path] = request.headers.get("authorization")
        return web.json_response({"object": "list", "data": [{"id": "tiny", "owned_by": "vllm"}]})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    port = runner.addresses[0][1]
    made = Engine(Endpoint("e", f"127.0.0.1:{port}", scheme="https"), tmp_path / "crt")
    yield made
    await runner.cleanup()


def doors_of(values: dict[str, Any], *endpoints: Endpoint, api_key: str | None = None) -> Doors:
    config = from_values(values | {"endpoints": values.get("endpoints", ["a:1"])})
    app, doors = App(config), Doors(config, api_key)
    doors.export(app)
    for endpoint in endpoints:
        app.runtime.emit(EndpointAdded(endpoint))
    return doors


async def sends(doors: Doors, engine: Engine) -> bool:
    """Whether the proxy's own side gets there."""
    upstream = Upstream(connect_timeout=5.0, trust=doors.trust)
    reply = await upstream.send(engine.endpoint, "GET", b"/traffic", [], None)
    await upstream.close()
    return isinstance(reply, Reply)


async def scrapes(doors: Doors, engine: Engine) -> FetchFailure | None:
    async with AiohttpFetch(timeout=5.0, manners=doors.manners) as fetch:
        return (await fetch(f"{root_of(engine.endpoint)}/metrics")).failure


async def surveys(doors: Doors, engine: Engine) -> str | None:
    async with survey(timeout=5.0, manners=doors.manners) as surveyor:
        return (await surveyor.ask(engine.endpoint)).problem


@pytest.mark.parametrize("how", ["by its name", "by nobody", "by any"])
async def test_scrapes_and_the_survey_trust_whom_requests_trust(engine: Engine, how: str) -> None:
    named = {"ca": str(engine.ca), "server_name": NAME}
    told: dict[str, dict[str, Any]] = {
        "by its name": named,
        "by nobody": {"ca": str(engine.ca)},
        "by any": {"insecure": True},
    }
    doors = doors_of({"upstream": told[how]}, engine.endpoint)
    if how == "by nobody":
        assert not await sends(doors, engine)
        assert await scrapes(doors, engine) is FetchFailure.TLS
        assert "certificate" in (await surveys(doors, engine) or "")
    else:
        assert await sends(doors, engine)
        assert await scrapes(doors, engine) is None
        assert await surveys(doors, engine) is None


async def test_an_endpoint_whose_certificate_is_not_trusted_is_lost_to_requests_and_scrapes_alike(
    engine: Engine,
) -> None:
    doors = doors_of({}, engine.endpoint)
    assert not await sends(doors, engine)
    async with AiohttpFetch(timeout=5.0, manners=doors.manners) as fetch:
        result = await fetch(f"{root_of(engine.endpoint)}/metrics")
    assert result.lost
    assert "--endpoint-ca" in result.problem


async def test_a_reload_of_certificates_holds_for_scrapes_as_well(engine: Engine) -> None:
    doors = doors_of({}, engine.endpoint)
    async with AiohttpFetch(timeout=5.0, manners=doors.manners) as fetch:
        assert (await fetch(f"{root_of(engine.endpoint)}/metrics")).failure is FetchFailure.TLS
        doors.trust.change(TrustFiles(engine.ca, server_name=NAME))
        assert (await fetch(f"{root_of(engine.endpoint)}/metrics")).status == 200


async def test_an_endpoints_own_key_is_shown_by_picker_too(engine: Engine) -> None:
    listed = {"address": f"https://{engine.endpoint.address}", "name": "e", "api_key": "sk-own"}
    doors = doors_of({"upstream": {"insecure": True, "api_key": "sk-all"}, "endpoints": [listed]}, engine.endpoint)
    assert await scrapes(doors, engine) is None
    assert await surveys(doors, engine) is None
    assert set(engine.keys.values()) == {"Bearer sk-own"}
    assert engine.keys.keys() >= {"/metrics", "/v1/models", "/v1/completions"}


def test_whose_key_an_endpoint_is_shown() -> None:
    a, b = Endpoint("one", "10.0.0.1:8000"), Endpoint("two", "10.0.0.2:8000")
    keyed = {"address": "10.0.0.1:8000", "name": "one", "api_key": "sk-own"}
    doors = doors_of({"endpoints": [keyed], "upstream": {"api_key": "sk-all"}}, a, b)
    assert [doors.manners(root_of(each)).key for each in (a, b)] == ["sk-own", "sk-all"]
    passing = doors_of({}, a, api_key="sk-client")
    assert passing.manners(root_of(a)).key == "sk-client", "as it would be passed on"
    held = doors_of({"keys": {"pass_on": False}}, a, api_key="sk-client")
    assert held.manners(root_of(a)).key is None
    assert "sk-" not in repr(doors.manners(root_of(a)))


def test_an_endpoint_that_moves_takes_its_key_along() -> None:
    doors = doors_of({"endpoints": [{"address": "10.0.0.1:1", "name": "one", "api_key": "sk"}]}, parse("10.0.0.1:1"))
    doors.manners.observe(EndpointAdded(parse("10.0.0.9:1")))
    assert [doors.manners(f"http://10.0.0.{host}:1").key for host in (1, 9)] == [None, "sk"]
    doors.manners.observe(EndpointRemoved("one"))
    assert doors.manners("http://10.0.0.9:1").key is None


def parse(address: str) -> Endpoint:
    return Endpoint("one", parse_endpoint(address).address)


def test_plain_http_never_reads_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    doors = doors_of({})
    monkeypatch.setattr(Trust, "context", property(lambda self: pytest.fail("read")))
    assert doors.manners("http://10.0.0.1:1").arguments("http://10.0.0.1:1") == {}
    with pytest.raises(pytest.fail.Exception):
        doors.manners("https://10.0.0.1:1")
