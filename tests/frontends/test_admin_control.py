from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

import fakes
from picker.errors import ConfigError
from picker.frontends.admin import Admin
from picker.frontends.admin_control import MisunderstoodError, closed_by_default
from picker.frontends.keys import Keyring, parse_keys
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry

KEY = "op-4711"
CHANGES = [
    ("POST", "/endpoints", b'{"address": "c:1"}'),
    ("DELETE", "/endpoints/a:1", b""),
    ("POST", "/endpoints/a:1/drain", b""),
    ("POST", "/endpoints/a:1/undrain", b""),
    ("PUT", "/endpoints/a:1/weight", b'{"weight": 2}'),
    ("POST", "/config/reload", b""),
]
VIEWS = [("GET", "/endpoints", b""), ("GET", "/endpoints/a:1", b""), ("GET", "/config", b"")]


class Notebook:
    """A control that writes down what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.error: str | None = None

    def _noted(self, *what: Any) -> dict[str, Any]:
        if "missing" in what:
            raise KeyError("missing")
        self.asked.append(what)
        return {"asked": list(what), "error": self.error}

    def endpoints(self) -> list[dict[str, Any]]:
        return [self._noted("endpoints")]

    def endpoint(self, name: str) -> dict[str, Any]:
        return self._noted("endpoint", name)

    def add(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if values.get("address") == "taken:1":
            raise ConfigError("endpoint 'taken:1' is listed already")
        if "adress" in values:
            raise MisunderstoodError("adress: unknown key; did you mean 'address'?")
        return self._noted("add", dict(values))

    def remove(self, name: str) -> dict[str, Any]:
        return self._noted("remove", name)

    def drain(self, name: str, *, draining: bool) -> dict[str, Any]:
        return self._noted("drain", name, draining)

    def weigh(self, name: str, weight: float) -> dict[str, Any]:
        return self._noted("weigh", name, weight)

    def config(self) -> dict[str, Any]:
        return self._noted("config")

    def reload(self) -> dict[str, Any]:
        return self._noted("reload")


@asynccontextmanager
async def admin(
    control: Notebook, *, keys: str = "", read_only: bool = False, at: str = "http://127.0.0.1:9090"
) -> AsyncIterator[httpx.AsyncClient]:
    scheduler, telemetry = fakes.scheduler("a"), Telemetry(CollectorRegistry())
    runtime = Runtime(scheduler, BlockHasher(b"secret", fakes.BLOCK_BYTES), telemetry, clock=fakes.ManualClock())
    made = Admin(runtime, keys=Keyring(parse_keys(keys, origin="keys")), control=control, read_only=read_only)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(made.app), base_url=at) as client:
        yield client


# --- who may -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "body"), CHANGES + VIEWS)
@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer", f"Basic {KEY}", KEY])
async def test_without_the_key_nothing_is_shown_and_nothing_done(
    method: str, path: str, body: bytes, given: str | None
) -> None:
    control = Notebook()
    async with admin(control, keys=f"ops:{KEY}") as client:
        headers = {} if given is None else {"authorization": given}
        answer = await client.request(method, path, content=body, headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert control.asked == []


@pytest.mark.parametrize(("method", "path", "body"), CHANGES + VIEWS)
async def test_with_the_key_it_is_from_wherever_it_comes(method: str, path: str, body: bytes) -> None:
    control = Notebook()
    async with admin(control, keys=f"ops:{KEY}", at="http://gateway.example:9090") as client:
        answer = await client.request(method, path, content=body, headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code in (200, 201)
        assert len(control.asked) == 1


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        (
            {},
            "The admin API wants its own key (admin.token_file, PICKER_ADMIN_KEY), which is not the gateway's API key",
        ),
        (
            {"authorization": "Bearer sk-client"},
            "This is no admin key (admin.token_file, PICKER_ADMIN_KEY); the gateway",
        ),
        ({"authorization": f"Bearer {KEY}x"}, "This is no admin key"),
    ],
)
@pytest.mark.parametrize("path", ["/endpoints", "/debug/endpoints"])
async def test_who_is_refused_reads_which_key_is_meant(path: str, headers: dict[str, str], words: str) -> None:
    async with admin(Notebook(), keys=f"ops:{KEY}") as client:
        assert (await client.get(path, headers=headers)).json()["detail"].startswith(words)


async def test_a_key_that_is_switched_off_is_forbidden() -> None:
    async with admin(Notebook(), keys=f"ops:{KEY} disabled") as client:
        assert (await client.get("/endpoints", headers={"authorization": f"Bearer {KEY}"})).status_code == 403
        assert (await client.get("/debug/endpoints", headers={"authorization": f"Bearer {KEY}"})).status_code == 403


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_read_only_has_no_route_that_changes_anything(method: str, path: str, body: bytes) -> None:
    control = Notebook()
    async with admin(control, read_only=True) as client:
        assert (await client.request(method, path, content=body)).status_code in (404, 405)
        assert control.asked == []
        assert (await client.get("/endpoints")).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1:9090", "localhost:9090", "localhost", "[::1]:9090", "127.8.8.8:1"])
async def test_without_keys_programs_on_this_machine_may(host: str) -> None:
    async with admin(Notebook(), at=f"http://{host}") as client:
        assert (await client.post("/config/reload")).status_code == 200
        local = {"origin": "http://localhost:3000"}
        assert (await client.post("/config/reload", headers=local)).status_code == 200


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("evil.example:9090", None),
        ("127.0.0.1.evil.example:9090", None),
        ("localhost.evil.example", None),
        ("127.0.0.1:9090", "https://evil.example"),
        ("127.0.0.1:9090", "null"),
        ("127.0.0.1:9090", "http://127.0.0.1.evil.example"),
    ],
)
async def test_without_keys_web_pages_may_not(host: str, origin: str | None) -> None:
    control = Notebook()
    async with admin(control, at=f"http://{host}") as client:
        headers = {} if origin is None else {"origin": origin}
        for method, path, body in CHANGES + VIEWS:
            assert (await client.request(method, path, content=body, headers=headers)).status_code == 403
        assert control.asked == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "gateway.example"])
def test_an_open_admin_api_has_to_be_meant(host: str) -> None:
    with pytest.raises(ConfigError, match=r"admin\.token.*read_only"):
        closed_by_default(host, Keyring(), read_only=False)
    closed_by_default(host, Keyring(), read_only=True)
    closed_by_default(host, Keyring(parse_keys(f"ops:{KEY}", origin="keys")), read_only=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_on_this_machine_alone_it_needs_no_key(host: str) -> None:
    closed_by_default(host, Keyring(), read_only=False)


# --- what is asked -----------------------------------------------------------------------------------------


async def test_every_route_asks_for_what_it_says() -> None:
    control = Notebook()
    async with admin(control) as client:
        for method, path, body in CHANGES:
            assert (await client.request(method, path, content=body)).status_code in (200, 201)
        assert control.asked == [
            ("add", {"address": "c:1"}),
            ("remove", "a:1"),
            ("drain", "a:1", True),
            ("drain", "a:1", False),
            ("weigh", "a:1", 2.0),
            ("reload",),
        ]


async def test_a_name_may_have_slashes() -> None:
    control = Notebook()
    async with admin(control) as client:
        await client.post("/endpoints/team/a:1/drain")
        await client.get("/endpoints/team/a:1")
        assert control.asked == [("drain", "team/a:1", True), ("endpoint", "team/a:1")]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("DELETE", "/endpoints/missing", b"", 404),
        ("POST", "/endpoints/missing/drain", b"", 404),
        ("PUT", "/endpoints/missing/weight", b'{"weight": 1}', 404),
        ("POST", "/endpoints", b'{"address": "taken:1"}', 409),
        ("POST", "/endpoints", b'{"adress": "b:1"}', 422),
        ("POST", "/endpoints", b"", 422),
        ("POST", "/endpoints", b"[1]", 422),
        ("POST", "/endpoints", b"[" * 60_000, 422),
        ("POST", "/endpoints", b"\xff", 422),
        ("POST", "/endpoints", b" " * 70_000, 413),
        ("PUT", "/endpoints/a:1/weight", b'{"weight": "2"}', 422),
        ("PUT", "/endpoints/a:1/weight", b'{"weight": true}', 422),
        ("PUT", "/endpoints/a:1/weight", b'{"weight": 1, "x": 1}', 422),
        ("PUT", "/endpoints/a:1/weight", b"2", 422),
    ],
)
async def test_what_cannot_be_done_is_told(method: str, path: str, body: bytes, status: int) -> None:
    control = Notebook()
    async with admin(control) as client:
        answer = await client.request(method, path, content=body)
        assert answer.status_code == status
        assert answer.json()["detail"]
        assert control.asked == []


async def test_a_configuration_that_does_not_do_is_an_error_of_the_request() -> None:
    control = Notebook()
    control.error = "limts: unknown key"
    async with admin(control) as client:
        answer = await client.post("/config/reload")
        assert (answer.status_code, answer.json()["error"]) == (422, "limts: unknown key")


async def test_the_start_page_lists_what_can_be_changed() -> None:
    async with admin(Notebook()) as client:
        page = (await client.get("/")).text
        assert "POST /config/reload" in page
        assert "DELETE /endpoints/{name:path}" in page
    async with admin(Notebook(), read_only=True) as client:
        assert "POST" not in (await client.get("/")).text
