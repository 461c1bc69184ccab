"""`picker proxy --data-plane envoy`: picker, its own Envoy and endpoints, all real."""

import asyncio
import io
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from e2e.gateway import envoy_missing
from echo_upstream import EchoUpstream
from picker.access_log import RequestLog
from picker.app import App
from picker.commands import proxy_envoy
from picker.commands.proxy_control import Doors
from picker.commands.proxy_envoy import Plane
from picker.config import Config, LimitConfig, ProxyConfig, ScrapeConfig
from picker.envoy_process import Running
from picker.errors import ConfigError

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing())]

CHAT = "/v1/chat/completions"
KEY = "sesame-sesame-sesame"
BODY = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}


def config(*endpoints: str, **proxy: Any) -> Config:
    return Config(
        endpoints=list(endpoints),
        seed=1,
        scrape=ScrapeConfig(interval_s=0.05, timeout_s=0.5),
        limits=LimitConfig(max_body_bytes=100_000),
        proxy=ProxyConfig(**({"port": 0, "envoy_threads": 1} | proxy)),
        drain_timeout_s=5.0,
    )


@dataclass(slots=True)
class World:
    plane: Plane
    url: str
    client: aiohttp.ClientSession
    leave: asyncio.Event
    doors: Doors
    app: App

    async def ask(self, path: str = CHAT, **options: Any) -> tuple[int, Any, bytes]:
        options = options if "data" in options else {"json": BODY, **options}
        async with self.client.post(self.url + path, **options) as response:
            return response.status, response.headers, await response.read()


@asynccontextmanager
async def gateway(
    tmp_path: Path,
    config: Config,
    *,
    key: str | None = None,
    log: Path | None = None,
) -> AsyncIterator[World]:
    app = App(config)
    journal = None if log is None else RequestLog(str(log), clock=app.runtime.clock)
    if journal is not None:
        app.telemetry.watch(journal)
    doors = Doors(config, key)
    doors.export(app)
    plane = proxy_envoy.build(app, tmp_path, doors, journal)
    leave, stop = asyncio.Event(), asyncio.Event()
    begun: asyncio.Future[Running] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group, aiohttp.ClientSession() as client:
        running = group.create_task(app.run([lambda stop: plane.serve(leave, stop, begun.set_result)], stop))
        yield World(plane, f"http://127.0.0.1:{(await begun).port}", client, leave, doors, app)
        leave.set()
        await running
    if journal is not None:
        journal.close()


async def test_requests_pass_with_the_name_of_their_endpoint_and_a_line_each(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with EchoUpstream("a").running() as a, gateway(tmp_path, config(a.address), log=log) as world:
        status, headers, _ = await world.ask(headers={"x-request-id": "mine", "x-envoy-max-retries": "9"})
        assert (status, headers["x-picker-endpoint"], headers["x-picker-request-id"]) == (200, a.address, "1")
        assert not [name for name in headers if name.lower().startswith("x-envoy")]
        assert (await world.ask("/echo", data=b"x" * 90_000))[2] == b"x" * 90_000
        asked = next(seen for seen in a.seen if seen.path == CHAT)
        assert "x-envoy-max-retries" not in asked.headers
        assert asked.headers["x-request-id"] == "mine"
    first, second = sorted(map(json.loads, log.read_text().splitlines()), key=lambda line: line["id"])
    assert (first["status"], first["model"], first["endpoint"], first["attempts"]) == (200, "demo", a.address, 1)
    assert first["request_id"] == "mine"
    assert 0 < first["ttft_s"] <= first["duration_s"]
    assert (second["path"], second["error"]) == ("/echo", None)


async def test_who_has_no_key_and_what_is_too_large_is_refused_in_the_form_of_openai(tmp_path: Path) -> None:
    good = {"authorization": "Bearer sesame-sesame-sesame"}
    async with (
        EchoUpstream("a").running() as a,
        gateway(tmp_path, config(a.address), key=good["authorization"][7:]) as world,
    ):
        status, headers, body = await world.ask()
        assert (status, headers["www-authenticate"], json.loads(body)["error"]["code"]) == (401, "Bearer", 401)
        status, _, body = await world.ask(data=b" " * 100_001, headers=good)
        assert not world.doors.keys.running
        assert (status, json.loads(body)["error"]["code"]) == (413, 413)
        assert (await world.ask(headers=good))[0] == 200
        assert len([seen for seen in a.seen if seen.path == CHAT]) == 1


async def test_bodies_of_megabytes_pass_and_are_tried_again_elsewhere(tmp_path: Path) -> None:
    body = json.dumps(BODY | {"messages": [{"role": "user", "content": "x" * 3_000_000}]}).encode()
    async with EchoUpstream("b").running() as b:
        async with EchoUpstream("a").running() as a:
            settings = config(a.address, b.address)
        values = {name: getattr(settings, name) for name in settings.__struct_fields__}
        large = Config(
            **values | {"limits": LimitConfig(max_body_bytes=4_000_000), "scrape": ScrapeConfig(interval_s=60.0)}
        )
        async with gateway(tmp_path, large) as world:
            for _ in range(6):
                status, headers, found = await world.ask(data=io.BytesIO(body))
                assert (status, headers["x-picker-endpoint"]) == (200, b.address), found
        assert {seen.body for seen in b.seen if seen.path == CHAT} == {body}


async def test_no_request_fails_when_an_endpoint_dies(tmp_path: Path) -> None:
    """Connections are refused from one moment to the next, and nobody has told picker."""
    async with EchoUpstream("b").running() as b:
        async with EchoUpstream("a").running() as a:
            dying = a.address
            settings = config(a.address, b.address)
            with_scrapes_off = Config(
                **{name: getattr(settings, name) for name in settings.__struct_fields__}
                | {"scrape": ScrapeConfig(interval_s=60.0)}
            )
            world_of = gateway(tmp_path, with_scrapes_off)
            world = await world_of.__aenter__()
        try:
            answers = await asyncio.gather(*(world.ask() for _ in range(20)))
            assert {status for status, _, _ in answers} == {200}
            assert {headers["x-picker-endpoint"] for _, headers, _ in answers} == {b.address}
            assert dying != b.address
        finally:
            await world_of.__aexit__(None, None, None)


async def test_nobody_left_is_told_in_the_form_of_openai(tmp_path: Path) -> None:
    async with EchoUpstream("a").running() as a:
        gone = a.address
    async with gateway(tmp_path, config(gone)) as world:
        status, _, body = await world.ask()
        assert status == 503
        assert json.loads(body)["error"]["code"] == 503


async def test_endpoints_known_by_name_are_reached_and_named(tmp_path: Path) -> None:
    async with EchoUpstream("a").running() as a:
        name = a.address.replace("127.0.0.1", "localhost")
        async with gateway(tmp_path, config(name)) as world:
            status, headers, _ = await world.ask()
            assert (status, headers["x-picker-endpoint"]) == (200, name)


async def test_an_envoy_that_dies_is_started_again_on_the_same_port(tmp_path: Path) -> None:
    async with EchoUpstream("a").running() as a, gateway(tmp_path, config(a.address)) as world:
        running = world.plane.envoy.running
        assert running is not None
        os.kill(running.pid, signal.SIGKILL)
        async with asyncio.timeout(10.0):
            while (again := world.plane.envoy.running) is running:  # noqa: ASYNC110 it tells only who keeps it
                await asyncio.sleep(0.01)
        assert again is not None
        assert again.port == running.port
        assert (await world.ask())[0] == 200
        assert world.plane.envoy.restarts == 1


async def test_what_runs_may_end_and_nothing_new_comes_in(tmp_path: Path) -> None:
    async with (
        EchoUpstream("a").running() as a,
        gateway(tmp_path, config(a.address)) as world,
        world.client.post(world.url + CHAT, json={**BODY, "stream": True}) as response,
    ):
        a.step(1)
        await response.content.readline()
        world.leave.set()
        async with asyncio.timeout(5.0):
            while await _connects(world.url):
                pass
        a.step(10)
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def _connects(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: "):
            proxy_envoy.build(App(config("127.0.0.1:1", port=port)), tmp_path, Doors(Config()), None)


async def test_an_envoy_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    binary = tmp_path / "envoy"
    binary.write_text("#!/bin/sh\necho '[critical] I do not like this' >&2\nexit 1\n")
    binary.chmod(0o755)
    with pytest.raises(ExceptionGroup) as raised:
        async with gateway(tmp_path, config("127.0.0.1:1", envoy_binary=str(binary))):
            pass
    (found,) = _leaves(raised.value)
    assert isinstance(found, ConfigError)
    assert "I do not like this" in str(found)


def _leaves(error: BaseException) -> list[BaseException]:
    return (
        [leaf for each in error.exceptions for leaf in _leaves(each)]
        if isinstance(error, BaseExceptionGroup)
        else [error]
    )


def test_a_binary_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--envoy-binary: /none/envoy is no program"):
        proxy_envoy.build(App(config("127.0.0.1:1", envoy_binary="/none/envoy")), tmp_path, Doors(Config()), None)


@pytest.mark.parametrize("plane", ["python", "envoy"])
async def test_the_process_drains_on_sigterm_and_leaves_nothing_behind(tmp_path: Path, plane: str) -> None:
    async with EchoUpstream("a").running() as a:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "picker", "proxy", "--data-plane", plane, "--endpoint", a.address),
            *("--port", "0", "--admin-port", "0", "--envoy-threads", "1", "--access-log", "-", "--api-key", KEY),
            env=os.environ | {"TMPDIR": str(tmp_path)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        url = ""
        async with asyncio.timeout(30.0):
            while not url:
                said = re.search(rb"picker proxy on (http://\S+)/v1", await process.stderr.readline())
                url = said[1].decode() if said else ""
            asked = {"model": "demo", "prompt": "Hello", "stream": True}
            options: dict[str, Any] = {"json": asked, "headers": {"authorization": f"Bearer {KEY}"}}
            async with aiohttp.ClientSession() as client:
                async with client.post(url + CHAT, json=BODY) as refused:
                    assert refused.status == 401
                a.step(1)
                async with client.post(url + "/v1/completions", **options) as response:
                    await response.content.readline()
                    process.terminate()
                    a.step(10)
                    whole = await response.read()
                out, errors = await process.communicate()
            assert whole.endswith(b"data: [DONE]\n\n"), errors.decode()
        assert process.returncode == 0, errors.decode()
        lines = [json.loads(line) for line in out.splitlines()]
        assert [(line["status"], line["key"], line["endpoint"]) for line in lines] == [
            (401, None, None),
            (200, "default", a.address),
        ]
        assert os.listdir(tmp_path) == []
