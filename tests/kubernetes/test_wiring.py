"""A whole picker whose endpoints come from Kubernetes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from kubernetes.api_server import ApiServer, serving
from kubernetes.manifests import OBJECTIVES, PODS, POOLS, objective, pod, pool
from kubernetes.stage import until
from kubernetes.virtual_time import in_virtual_time
from picker.app import App
from picker.commands.epp_serving import begun, build, serve_once_known
from picker.config import Config, from_values
from picker.errors import ConfigError
from picker.frontends.admin import _readiness
from picker.types import Decision, Finished, Request


def config(server: ApiServer, folder: Path, **more: object) -> Config:
    (folder / "kubeconfig").write_text(
        yaml.safe_dump(
            {
                "current-context": "x",
                "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x", "namespace": "default"}}],
                "clusters": [{"name": "x", "cluster": {"server": server.url}}],
            }
        )
    )
    wanted = {"pools": ["pool"], "kubeconfig": str(folder / "kubeconfig")}
    return from_values({"kubernetes": wanted, "scrape": {"timeout_s": 0.2}, **more})


@asynccontextmanager
async def serve(settings: Config) -> AsyncIterator[App]:
    app, stop = App(settings, clock=asyncio.get_running_loop().time), asyncio.Event()

    async def frontend(stop: asyncio.Event) -> None:
        await stop.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(app.run([frontend], stop))
        try:
            yield app
        finally:
            stop.set()


def picked(app: App) -> str | None:
    """Where a request would go at this moment."""
    outcome = app.runtime.place(Request(id=1, model=None, arrived_at=app.runtime.clock()))
    app.runtime.emit(Finished(1, 200))
    return outcome.endpoint.name if isinstance(outcome, Decision) else None


@in_virtual_time
async def test_pods_of_the_pool_are_routed_to_until_they_are_deleted(tmp_path: Path) -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        async with serve(config(server, tmp_path)) as app:
            await until(lambda: "kubernetes" in _readiness(app.runtime))
            assert picked(app) is None
            server.apply(*PODS, pod("a", "127.0.0.1"))
            await until(lambda: picked(app) == "a-rank-0")
            server.apply(*PODS, pod("a", "127.0.0.1", deleting=True))
            await until(lambda: picked(app) is None)


@in_virtual_time
async def test_readiness_and_metrics_say_how_old_what_is_known_is(tmp_path: Path) -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a", "127.0.0.1"))
        async with serve(config(server, tmp_path)) as app:
            await until(lambda: len(app.runtime.scheduler.pool))
            await until(lambda: server.watches == 6)
            detail = _readiness(app.runtime)
            assert detail["ready"]
            assert detail["kubernetes"]["age_s"] == 0.0
            assert detail["kubernetes"]["watches"]["pool/pool"]["objects"] == 1
            await server.down()
            await asyncio.sleep(45)
            detail = _readiness(app.runtime)
            assert 44 < detail["kubernetes"]["age_s"] < 46
            assert "routing goes on" in json.dumps(detail)
            lines = app.telemetry.text().decode().splitlines()
            (line,) = [line for line in lines if line.startswith("picker_kubernetes")]
            assert 44 < float(line.split()[1]) < 46


@in_virtual_time
async def test_objectives_of_the_cluster_are_priorities_of_requests(tmp_path: Path) -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*OBJECTIVES, objective("batch", -10))
        server.apply(*OBJECTIVES, objective("chat", 1))
        async with serve(config(server, tmp_path, objectives={"chat": 5})) as app:
            await until(lambda: dict(app.runtime.limits.objectives) == {"batch": -10, "chat": 5})


@in_virtual_time
async def test_a_replica_is_ready_to_serve_once_it_knows_the_endpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        settings = config(server, tmp_path)
        await server.down()
        async with serve(settings) as app:
            epp, said = build(app), list[bool]()
            monkeypatch.setattr(epp, "set_serving", said.append)
            begun(app, epp, 9002, 9003)
            assert said == [False]
            async with asyncio.TaskGroup() as group:
                group.create_task(serve_once_known(app, epp, asyncio.Event()))
                await asyncio.sleep(5)
                assert said == [False]
                await server.up()
            assert said == [False, True]
            begun(app, epp, 9002, 9003)
            assert said == [False, True]


async def test_endpoints_that_are_given_win(tmp_path: Path) -> None:
    app = App(from_values({"kubernetes": {"pools": ["pool"]}, "endpoints": ["http://h:1"]}))
    assert app.discovery is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kubernetes": {"pools": ["p"], "kubeconfig": "/none"}}, "/none: is no usable kubeconfig"),
        ({"kubernetes": {"pool": ["p"]}}, "kubernetes.pool: unknown key; did you mean 'pools'"),
        ({"kubernetes": {"silence_s": 0}}, "kubernetes.silence_s: must be greater than 0"),
        ({}, "no endpoints: give --endpoint URL .* --pool-name"),
    ],
)
def test_what_cannot_be_meant_is_told_at_the_start(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        App(from_values(values))
