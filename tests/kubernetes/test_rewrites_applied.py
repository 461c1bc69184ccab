"""From an InferenceModelRewrite in the API server to the body that an endpoint gets."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from kubernetes.api_server import ApiServer, serving
from kubernetes.manifests import PODS, POOLS, REWRITES, pod, pool, rewrite, rule
from kubernetes.stage import until
from picker.app import App
from picker.config import Config, from_values
from picker.exchange import Forward, RequestBody, RequestHead
from virtual_time import in_virtual_time

OLD_REWRITES = ("/apis/inference.networking.x-k8s.io/v1alpha2", "inferencemodelrewrites")


def config(server: ApiServer, folder: Path, **models: Any) -> Config:
    context = {"name": "x", "context": {"cluster": "x", "user": "x", "namespace": "default"}}
    cluster = {"name": "x", "cluster": {"server": server.url}}
    (folder / "kubeconfig").write_text(
        yaml.safe_dump({"current-context": "x", "contexts": [context], "clusters": [cluster]})
    )
    wanted = {"pools": ["pool"], "kubeconfig": str(folder / "kubeconfig")}
    return from_values({"kubernetes": wanted, "scrape": {"timeout_s": 0.2}, "seed": 1, "models": models})


@asynccontextmanager
async def serve(settings: Config) -> AsyncIterator[App]:
    app, stop = App(settings, clock=asyncio.get_running_loop().time), asyncio.Event()

    async def frontend(stop: asyncio.Event) -> None:
        await stop.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(app.run([frontend], stop))
        try:
            await until(lambda: len(app.runtime.scheduler.pool) == 1)
            yield app
        finally:
            stop.set()


async def got(app: App, model: str = "chat", headers: dict[str, str] | None = None) -> str:
    """The model that an endpoint is asked for."""
    exchange = app.runtime.open()
    await app.runtime.receive(exchange, RequestHead("POST", "/v1/completions", headers or {}))
    body = json.dumps({"model": model, "prompt": "Once"}).encode()
    (forward,) = await app.runtime.receive(exchange, RequestBody(body, end=True))
    assert isinstance(forward, Forward)
    app.runtime.close(exchange)
    asked = json.loads(forward.body)
    assert asked["prompt"] == "Once"
    return str(asked["model"])


def known(app: App) -> int:
    assert app.discovery is not None
    return len(app.discovery.catalogue.rewrites.rules)


def in_force(app: App, weight: int) -> bool:
    """Whether the first target of the one rule has this weight."""
    assert app.discovery is not None
    return [each.until[0] for each in app.discovery.catalogue.rewrites.rules] == [weight]


@in_virtual_time
async def test_a_rewrite_is_applied_from_its_coming_to_its_going(tmp_path: Path) -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a", "127.0.0.1"))
        async with serve(config(server, tmp_path)) as app:
            assert await got(app) == "chat"
            server.apply(*REWRITES, rewrite("canary", rule("chat", v1=1)))
            await until(lambda: known(app) == 1)
            assert [await got(app), await got(app, "other")] == ["v1", "other"]
            server.delete(*REWRITES, "canary")
            await until(lambda: known(app) == 0)
            assert await got(app) == "chat"


@in_virtual_time
async def test_weights_that_are_moved_step_by_step_apply_at_once_and_lose_no_request(tmp_path: Path) -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a", "127.0.0.1"))
        async with serve(config(server, tmp_path)) as app:
            for old, new in ((90, 10), (50, 50), (10, 90)):
                server.apply(*REWRITES, rewrite("canary", rule("chat", v1=old, v2=new)))
                await until(partial(in_force, app, old))
                found = Counter([await got(app) for _ in range(400)])
                assert set(found) <= {"v1", "v2"}
                assert abs(found["v1"] - 4 * old) <= 3 * (400 * old / 100 * new / 100) ** 0.5
            server.apply(*REWRITES, rewrite("canary", rule("chat", v2=1)))
            await until(partial(in_force, app, 1))
            assert {await got(app) for _ in range(50)} == {"v2"}


@in_virtual_time
async def test_an_invalid_rewrite_is_a_condition_and_the_others_are_applied(tmp_path: Path) -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a", "127.0.0.1"))
        server.apply(*REWRITES, rewrite("bad", rule("chat", x=0)))
        server.apply(*OLD_REWRITES, rewrite("good", rule("chat", v1=1)))
        async with serve(config(server, tmp_path)) as app:
            await until(lambda: known(app) == 1)
            assert await got(app) == "v1"
            assert app.discovery is not None
            assert [key for key in app.discovery.catalogue.conditions if key.startswith("rewrite")] == ["rewrite/bad"]


@in_virtual_time
async def test_those_of_the_cluster_come_before_the_configurations(tmp_path: Path) -> None:
    ours = {"matches": [{"model": {"value": "chat"}}], "targets": [{"modelRewrite": "ours"}]}
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a", "127.0.0.1"))
        async with serve(config(server, tmp_path, rewrites=[ours])) as app:
            assert await got(app) == "ours"
            server.apply(*REWRITES, rewrite("theirs", rule("chat", theirs=1)))
            await until(lambda: known(app) == 1)
            assert await got(app) == "theirs"
            app.runtime.limits = app.limits_of(app.config)  # a reload forgets none of them
            assert await got(app) == "theirs"


@in_virtual_time
async def test_what_a_gateway_says_in_the_header_wins(tmp_path: Path) -> None:
    said = {"x-gateway-model-name-rewrite": "said"}
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a", "127.0.0.1"))
        server.apply(*REWRITES, rewrite("canary", rule("chat", v1=1)))
        async with serve(config(server, tmp_path)) as app:
            await until(lambda: known(app) == 1)
            assert await got(app, headers=said) == "said"
        async with serve(config(server, tmp_path, rewrite_header=False)) as app:
            await until(lambda: known(app) == 1)
            assert await got(app, headers=said) == "v1"
