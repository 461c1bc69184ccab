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
from kubernetes.manifests import LEASES, OBJECTIVES, PODS, POOLS, objective, pod, pool
from kubernetes.stage import until
from picker.app import App
from picker.commands.epp_serving import begun, build, leave_on, serve_once_known
from picker.config import Config, from_values, override
from picker.errors import ConfigError
from picker.frontends.admin import _readiness
from picker.frontends.extproc import ExtProc
from picker.types import Decision, Finished, Request
from virtual_time import in_virtual_time


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


def of_readiness(epp: ExtProc, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What it says of its readiness, without what it says again."""
    said = list[bool]()

    def say(serving: bool) -> None:
        if said[-1:] != [serving]:
            said.append(serving)

    monkeypatch.setattr(epp, "set_serving", say)
    return said


@in_virtual_time
async def test_of_two_pickers_one_is_ready_until_it_is_told_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a", "127.0.0.1"))
        settings = config(server, tmp_path, epp={"drain_delay_s": 5})
        settings = override(settings, {"kubernetes.leader_election.enabled": True})
        async with serve(settings) as one, serve(settings) as two, asyncio.TaskGroup() as group:
            epps, leaving, stop = [build(one), build(two)], [asyncio.Event(), asyncio.Event()], asyncio.Event()
            said = [of_readiness(epp, monkeypatch) for epp in epps]
            tasks = []
            for app, epp, leave in zip((one, two), epps, leaving, strict=True):
                begun(app, epp, 9002, 9003)
                tasks.append(group.create_task(serve_once_known(app, epp, leave)))
                tasks.append(group.create_task(leave_on(leave, stop, app, epp)))
                await until(lambda: one.leads)
            assert said == [[False, True], [False]]
            assert server.get(*LEASES, "epp-default-pool.llm-d.ai")["spec"]["holderIdentity"].count("_") == 1
            assert "another" not in _readiness(one.runtime)["reason"]
            await until(lambda: two.election is not None and two.election.report()["leader"])
            detail = _readiness(two.runtime)
            assert (detail["ready"], detail["reason"][:21]) == (False, "another replica leads")
            assert detail["leader_election"]["leader"] == _readiness(one.runtime)["leader_election"]["identity"]
            assert list(two.runtime.scheduler.snapshot(two.runtime.clock()))  # it watches, too
            assert b"picker_leader 1.0" in one.telemetry.text()
            assert b"picker_leader 0.0" in two.telemetry.text()
            leaving[0].set()
            await until(lambda: two.leads)
            assert said == [[False, True, False], [False, True]]
            assert "another" not in _readiness(two.runtime)["reason"]
            for task in tasks:
                task.cancel()


def test_without_a_pool_the_lease_needs_a_name(tmp_path: Path) -> None:
    wanted = {"selector": "app=vllm", "target_ports": [8000], "leader_election": {"enabled": True}}
    (tmp_path / "k").write_text(
        "{current-context: x, contexts: [{name: x, context: {cluster: x, user: x}}],"
        " clusters: [{name: x, cluster: {server: 'http://h'}}]}"
    )
    with pytest.raises(ConfigError, match="without a pool the lease needs a name"):
        App(from_values({"kubernetes": wanted | {"kubeconfig": str(tmp_path / "k")}}))


async def test_endpoints_that_are_given_win(tmp_path: Path) -> None:
    app = App(from_values({"kubernetes": {"pools": ["pool"]}, "endpoints": ["http://h:1"]}))
    assert app.discovery is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kubernetes": {"pools": ["p"], "kubeconfig": "/none"}}, "/none: the kubeconfig cannot be read"),
        ({"kubernetes": {"pool": ["p"]}}, "kubernetes.pool: unknown key; did you mean 'pools'"),
        ({"kubernetes": {"silence_s": 0}}, "kubernetes.silence_s: must be greater than 0"),
        ({}, "no endpoints: give --endpoint URL .* --pool-name"),
    ],
)
def test_what_cannot_be_meant_is_told_at_the_start(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        App(from_values(values))
