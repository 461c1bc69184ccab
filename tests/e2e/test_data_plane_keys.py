"""`picker proxy --data-plane envoy`: whose key an endpoint is shown, on every try, and where keys do not show."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import generate_latest

from e2e.gateway import envoy_missing
from e2e.test_data_plane import BODY, CHAT, World, config, gateway
from e2e.test_data_plane_whole import altered
from picker.commands.proxy_control import ProxyControl
from picker.config import Config, EndpointSpec, KeysConfig, ScrapeConfig, UpstreamConfig
from picker.frontends.proxy import Proxy

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing())]

CLIENTS = {"authorization": "Bearer client", "x-api-key": "client-too"}
OWN, OTHER, COMMON = "sk-own", "sk-other", "sk-all"
RESET = 0
Shown = tuple[list[str], list[str]]
NOTHING: Shown = ([], [])
ITS_CLIENTS: Shown = (["Bearer client"], ["client-too"])


@dataclass(slots=True)
class Engine:
    """status: of its answers to chats; shown: what they came with, `authorization` and `x-api-key`."""

    address: str = ""
    status: int = 200
    shown: list[Shown] = field(default_factory=list)


@asynccontextmanager
async def engine() -> AsyncIterator[Engine]:
    made = Engine()

    async def answer(request: web.Request) -> web.Response:
        if request.path != CHAT:
            return web.Response()
        found = (request.headers.getall(name, []) for name in CLIENTS)
        made.shown.append((next(found), next(found)))
        if made.status == RESET:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({}, status=made.status or 200)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    made.address = f"{host}:{port}"
    try:
        yield made
    finally:
        await runner.cleanup()


def keyed(key: str) -> Shown:
    return ([f"Bearer {key}"], [])


def listed(of: Engine, key: str | None = None, **more: Any) -> EndpointSpec:
    return EndpointSpec(address=of.address, api_key=key, **more)


def settled(*endpoints: EndpointSpec, **values: Any) -> Config:
    return altered(
        config(data_plane="envoy"), endpoints=list(endpoints), scrape=ScrapeConfig(interval_s=60.0), **values
    )


async def ask_until(world: World, reached: Callable[[], object], **options: Any) -> None:
    """Ask until something is so, with no request that fails."""
    async with asyncio.timeout(60):
        while not reached():
            assert (await world.ask(**{"headers": CLIENTS, **options}))[0] == 200


def was_asked(each: Engine) -> bool:
    return bool(each.shown)


ELSE: dict[str, tuple[dict[str, Any], Shown]] = {
    "passed on": ({}, ITS_CLIENTS),
    "common": ({"upstream": UpstreamConfig(api_key=COMMON)}, keyed(COMMON)),
    "held back": ({"keys": KeysConfig(pass_on=False)}, NOTHING),
}
KEYS = {"own, then none": (OWN, None), "none, then own": (None, OWN), "own, then another's": (OWN, OTHER)}
FAILURES = (503, RESET)


@pytest.mark.parametrize("how", ELSE)
async def test_each_try_bears_the_key_of_the_endpoint_it_goes_to(tmp_path: Path, how: str) -> None:
    """Pairs of endpoints, each with a model of its own, so that it is known which one fails and which one is next."""
    values, others = ELSE[how]
    async with AsyncExitStack() as stack:
        pairs = {}
        for model, keys in ((f"{keys} {status}", keys) for keys in KEYS for status in FAILURES):
            failing, other = [await stack.enter_async_context(engine()) for _ in range(2)]
            failing.status = int(model.rpartition(" ")[2])
            pairs[model] = tuple(zip((failing, other), KEYS[keys], strict=True))
        endpoints = [listed(each, key, models=[model]) for model, pair in pairs.items() for each, key in pair]
        world = await stack.enter_async_context(gateway(tmp_path, settled(*endpoints, **values)))
        for model, ((failing, first), (other, second)) in pairs.items():
            await ask_until(world, partial(was_asked, failing), json=BODY | {"model": model})
            assert failing.shown == [others if first is None else keyed(first)], model
            assert other.shown[-1] == (others if second is None else keyed(second)), model


@pytest.mark.parametrize("how", ELSE)
async def test_an_endpoint_gets_its_own_key_and_others_what_they_get_without_any(tmp_path: Path, how: str) -> None:
    values, others = ELSE[how]
    async with engine() as a, engine() as b:  # noqa: SIM117
        async with gateway(tmp_path, settled(listed(a, OWN), listed(b), **values)) as world:
            await ask_until(world, lambda: len(a.shown) > 1 and len(b.shown) > 1)

            async def pieces() -> AsyncIterator[bytes]:
                yield json.dumps(BODY).encode()

            for each in (a, b):  # its head is shown first
                before = len(each.shown)
                while len(each.shown) == before:
                    assert (await world.ask(data=pieces(), headers=CLIENTS))[0] == 200
            assert {*map(str, a.shown)} == {str(keyed(OWN))}
            assert {*map(str, b.shown)} == {str(others)}
            a.shown.clear()
            b.shown.clear()
            await ask_until(world, lambda: a.shown and b.shown, headers={})
            assert (a.shown[0], b.shown[0]) == (keyed(OWN), NOTHING if others == ITS_CLIENTS else others)


def put(path: Path, text: str) -> None:
    beside = path.with_name("beside")
    beside.write_text(text)
    os.replace(beside, path)


NUMBERS = ("one", """%REQ(x-api-key)%%"'\\{}/+=~""", "three")


async def test_keys_that_files_say_change_while_requests_run(tmp_path: Path) -> None:
    listing, secret, common = (tmp_path / name for name in ("pool", "key", "common"))
    async with engine() as a, engine() as b, engine() as c:

        def write(key: str) -> None:
            entries = [{"address": a.address, "api_key": key}, {"address": b.address, "api_key_file": str(secret)}]
            put(listing, json.dumps({"endpoints": entries}))

        engines = {"a": a, "b": b, "c": c}

        def all_said(number: str) -> bool:
            return all(each.shown[-1:] == [keyed(f"{name}-{number}")] for name, each in engines.items())

        put(secret, "b-one\n")
        put(common, "c-one\n")
        write("a-one")
        settings = settled(listed(c), endpoints_file=str(listing), upstream=UpstreamConfig(api_key_file=str(common)))
        async with gateway(tmp_path, settings) as world:
            control = ProxyControl(world.app, Proxy(world.app.runtime), world.doors)
            world.app.endpoints_file._interval = 0.01
            for number in NUMBERS:
                write(f"a-{number}")
                put(secret, f"b-{number}\n")
                put(common, f"c-{number}\n")
                control.reloading.look()
                await ask_until(world, partial(all_said, number))
        for name, each in engines.items():
            assert list(dict.fromkeys(str(shown) for shown in each.shown)) == [
                str(keyed(f"{name}-{number}")) for number in NUMBERS
            ]


async def test_endpoints_with_keys_are_added_by_hand_and_by_a_reload_as_is_a_common_key(tmp_path: Path) -> None:
    async with engine() as a, engine() as b, engine() as c:
        settings = settled(listed(a))
        wanted = altered(settings, endpoints=[listed(a), listed(c, OTHER)])
        async with gateway(tmp_path, settings) as world:
            control = ProxyControl(world.app, Proxy(world.app.runtime), world.doors, lambda: wanted)
            control.add({"address": b.address, "api_key": OWN})
            await ask_until(world, lambda: len(b.shown) > 1)
            assert control.reload()["applied"] == ["endpoints"]
            await ask_until(world, lambda: len(c.shown) > 1)
            control.remove(b.address)
            control.add({"address": b.address})
            await ask_until(world, lambda: b.shown[-1:] == [ITS_CLIENTS])
            assert {*map(str, a.shown)} == {str(ITS_CLIENTS)}
            wanted = altered(wanted, upstream=UpstreamConfig(api_key=COMMON, insecure=True))
            told = control.reload()
            assert (told["applied"], told["needs_restart"]) == (["upstream.api_key"], ["upstream.insecure"])
            await ask_until(world, lambda: a.shown[-1:] == b.shown[-1:] == [keyed(COMMON)])
        assert {*map(str, c.shown)} == {str(keyed(OTHER))}
        assert b.shown[0] == keyed(OWN)


def files_with(text: str, folder: Path) -> list[tuple[str, int]]:
    """Names and modes of the files that hold it."""
    found = [path for path in folder.iterdir() if path.is_file() and text in path.read_text()]
    return [(path.name, path.stat().st_mode & 0o777) for path in found]


async def test_keys_are_in_no_log_and_no_figure_and_in_no_file_that_others_may_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    log = tmp_path / "log"
    async with engine() as a, engine() as b:
        settings = settled(listed(a, OWN), listed(b), upstream=UpstreamConfig(api_key=COMMON))
        async with gateway(tmp_path, settings, log=log) as world:
            await ask_until(world, lambda: bool(a.shown and b.shown))
            envoy = world.plane.envoy
            pages = [await envoy.admin(page) for page in ("/config_dump", "/clusters?format=json", "/stats", "/certs")]
            holding = files_with(OWN, tmp_path)
            figures = generate_latest(world.app.telemetry.registry).decode()
        assert holding == [("pool.json", 0o600)]
        told = [*pages, figures, caplog.text, log.read_text(), (tmp_path / "envoy.log").read_text()]
        assert "pool" in pages[0]
        assert a.address in told[-2]
        for key in (OWN, COMMON, "client"):
            secret = key if key != "client" else CLIENTS["authorization"]
            assert not [text for text in told if secret in text], key
