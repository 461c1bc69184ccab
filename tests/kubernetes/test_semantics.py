"""What discovery makes of a cluster's changes, on every stage."""

from __future__ import annotations

import asyncio

from kubernetes.manifests import PODS, POOLS, SLICES, address, endpoint_slice, pod, pool
from kubernetes.stage import Stage, Told, on_every_stage, running, source, until
from picker.sources.kubernetes.scope import Scope


@on_every_stage
async def test_a_pool_is_created_changed_and_deleted(stage: Stage) -> None:
    await stage.apply(PODS, pod("a", "10.0.0.1"))
    await stage.apply(PODS, pod("b", "10.0.0.2", labels={"app": "other"}))
    found, told = source(stage.access, Scope(stage.namespace, ("pool",))), Told()
    async with running(found, told):
        async with asyncio.timeout(30):
            await found.synced.wait()
        assert told.endpoints == {}
        await stage.apply(POOLS, pool())
        await until(lambda: told.routable == {"a-rank-0": "10.0.0.1:8000"})
        await stage.apply(POOLS, pool(ports=(8000, 8001)))
        await until(lambda: told.routable == {"a-rank-0": "10.0.0.1:8000", "a-rank-1": "10.0.0.1:8001"})
        await stage.apply(POOLS, pool(labels={"app": "other"}, ports=(8000,)))
        await until(lambda: told.routable == {"b-rank-0": "10.0.0.2:8000"})
        await stage.delete(POOLS, "pool")
        await until(lambda: told.endpoints == {})


@on_every_stage
async def test_a_pod_comes_serves_terminates_and_goes(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    found, told = source(stage.access, Scope(stage.namespace, ("pool",))), Told()
    async with running(found, told):
        async with asyncio.timeout(30):
            await found.synced.wait()
        await stage.apply(PODS, pod("a", ip="", ready=False, phase="Pending"))
        await stage.apply(PODS, pod("a", ready=False))
        await stage.apply(PODS, pod("a"))
        await until(lambda: told.routable == {"a-rank-0": "10.0.0.1:8000"})
        await stage.terminate("a")
        await until(lambda: told.routable == {})
        assert set(told.endpoints) == {"a-rank-0"}
        await stage.delete(PODS, "a")
        await until(lambda: told.endpoints == {})


@on_every_stage
async def test_a_pod_that_leaves_the_selector_is_gone(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    await stage.apply(PODS, pod("a"))
    found, told = source(stage.access, Scope(stage.namespace, ("pool",))), Told()
    async with running(found, told):
        await until(lambda: told.routable)
        await stage.apply(PODS, pod("a", labels={"app": "quarantine"}))
        await until(lambda: told.endpoints == {})
        await stage.apply(PODS, pod("a"))
        await until(lambda: told.routable)


@on_every_stage
async def test_pods_are_found_without_a_pool(stage: Stage) -> None:
    await stage.apply(PODS, pod("a"))
    await stage.apply(PODS, pod("b", "10.0.0.2", labels={"tier": "gold"}))
    found, told = (
        source(stage.access, Scope(stage.namespace, selector="app in (vllm),tier=gold", ports=(9000,))),
        Told(),
    )
    async with running(found, told):
        await until(lambda: told.routable == {"b-rank-0": "10.0.0.2:9000"})


@on_every_stage
async def test_endpoints_are_found_by_a_services_slices(stage: Stage) -> None:
    await stage.apply(SLICES, endpoint_slice("vllm-x", address("10.0.0.1", "a", ready=True)))
    found, told = source(stage.access, Scope(stage.namespace, services=("vllm",))), Told()
    async with running(found, told):
        await until(lambda: told.routable == {"a-rank-0": "10.0.0.1:8000"})
        going = address("10.0.0.1", "a", ready=False, serving=True, terminating=True)
        await stage.apply(SLICES, endpoint_slice("vllm-x", going, address("10.0.0.2", "b", ready=True)))
        await until(lambda: told.routable == {"b-rank-0": "10.0.0.2:8000"})
        assert set(told.endpoints) == {"a-rank-0", "b-rank-0"}
        await stage.delete(SLICES, "vllm-x")
        await until(lambda: told.endpoints == {})
