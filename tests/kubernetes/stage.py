"""Where discovery is tested: the in-test API server in virtual time, and a real kube-apiserver where one is named.

`PICKER_TEST_KUBECONFIG` names a kubeconfig whose user may create namespaces, pods, endpoint slices and, where their
CRDs are installed, pools, objectives and rewrites. Every test has a namespace of its own there, which is deleted.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import aiohttp
import pytest

from kubernetes.api_server import ApiServer, serving
from kubernetes.manifests import PODS, Json
from kubernetes.virtual_time import VirtualLoop
from picker.sources.kubernetes.credentials import Access, FixedTokens, find_access
from picker.sources.kubernetes.scope import Scope
from picker.sources.kubernetes.source import KubernetesSource
from picker.types import CacheCleared, Endpoint, EndpointAdded, EndpointDraining, EndpointRemoved, Fact

KUBECONFIG = os.environ.get("PICKER_TEST_KUBECONFIG")
Kind = tuple[str, str]


class Told:
    """What a scheduler that is told the facts knows: endpoints by name, those that are draining, those cleared."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.endpoints: dict[str, Endpoint] = {}
        self.draining: set[str] = set()
        self.cleared: list[str] = []

    def __call__(self, fact: Fact) -> None:
        self.facts.append(fact)
        match fact:
            case EndpointAdded(endpoint):
                self.endpoints[endpoint.name] = endpoint
            case EndpointRemoved(name):
                del self.endpoints[name]
                self.draining.discard(name)
            case EndpointDraining(name, draining):
                assert name in self.endpoints
                (self.draining.add if draining else self.draining.discard)(name)
            case CacheCleared(name):
                self.cleared.append(name)
            case _:
                raise AssertionError(f"a {type(fact).__name__} from discovery")

    @property
    def routable(self) -> dict[str, str]:
        """Name -> address of those that may be given requests."""
        return {name: each.address for name, each in self.endpoints.items() if name not in self.draining}


async def until(check: Callable[[], object], within: float = 10.0) -> None:
    """Wait for something to become true, looking ever less often."""
    pause = 0.02
    async with asyncio.timeout(within):
        while not check():
            await asyncio.sleep(pause)
            pause = min(0.5, pause * 1.2)


def source(access: Access, scope: Scope, **more: Any) -> KubernetesSource:
    return KubernetesSource(access, scope, clock=asyncio.get_running_loop().time, rng=random.Random(1), **more)


@asynccontextmanager
async def running(found: KubernetesSource, told: Told) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(found.run(told))
        try:
            yield
        finally:
            task.cancel()


@asynccontextmanager
async def following(
    server: ApiServer, scope: Scope | None = None, **more: Any
) -> AsyncIterator[tuple[KubernetesSource, Told]]:
    """A source that has seen all there is. scope: by default the pool `pool` of namespace `default`."""
    found, told = source(access_to(server), scope or Scope("default", ("pool",)), **more), Told()
    async with running(found, told):
        async with asyncio.timeout(30):
            await found.synced.wait()
        yield found, told


def access_to(server: ApiServer) -> Access:
    return Access(server.url, FixedTokens(server.token))


# --- stages ------------------------------------------------------------------------------------------------


class Stage(Protocol):
    """A cluster that a test may change."""

    access: Access
    namespace: str

    async def apply(self, kind: Kind, value: Json) -> None:
        """Create an object or change it; also what its status says."""
        ...

    async def delete(self, kind: Kind, name: str) -> None:
        """Away with it, at once."""
        ...

    async def terminate(self, pod: str) -> None:
        """Ask a pod to go; it stays for its grace period."""
        ...


class InTest:
    namespace = "default"

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.access = access_to(server)

    async def apply(self, kind: Kind, value: Json) -> None:
        self.server.apply(*kind, value)

    async def delete(self, kind: Kind, name: str) -> None:
        self.server.delete(*kind, name)

    async def terminate(self, pod: str) -> None:
        value = self.server.get(*PODS, pod)
        value["metadata"]["deletionTimestamp"] = "2026-11-21T11:00:00Z"
        self.server.apply(*PODS, value)


class Real:
    """Pods have a node that does not exist, so that nobody runs them and their status is what the test says."""

    def __init__(self, access: Access, session: aiohttp.ClientSession, namespace: str) -> None:
        self.access = access
        self.namespace = namespace
        self._session = session

    async def apply(self, kind: Kind, value: Json) -> None:
        version = kind[0].removeprefix("/apis/").removeprefix("/api/")
        whole = {"apiVersion": version, "kind": _KIND_NAMES[kind[1]], **value}
        if kind == PODS:
            whole["spec"] = whole["spec"] | {"nodeName": "picker-test", "terminationGracePeriodSeconds": 30}
            whole["spec"]["automountServiceAccountToken"] = False
        path, name = f"{kind[0]}/namespaces/{self.namespace}/{kind[1]}", value["metadata"]["name"]
        if await self._create(path, whole) == 409:
            await self._send("PATCH", f"{path}/{name}", {"metadata": value["metadata"]} if kind == PODS else whole)
        if "status" in value:
            await self._send("PATCH", f"{path}/{name}/status", {"status": value["status"]})

    async def _create(self, path: str, value: Json) -> int:
        """A namespace that is new refuses pods until somebody has given it its service account."""
        for _ in range(20):
            status = await self._send("POST", path, value, fine=(201, 403, 409))
            if status != 403:
                return status
            await asyncio.sleep(0.5)
        return await self._send("POST", path, value)

    async def delete(self, kind: Kind, name: str) -> None:
        options = {"gracePeriodSeconds": 0}
        await self._send("DELETE", f"{kind[0]}/namespaces/{self.namespace}/{kind[1]}/{name}", options)

    async def terminate(self, pod: str) -> None:
        await self._send("DELETE", f"{PODS[0]}/namespaces/{self.namespace}/pods/{pod}", {})

    async def _send(self, method: str, path: str, value: Json, fine: tuple[int, ...] = (200, 201, 202)) -> int:
        token = await self.access.tokens.token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        url = self.access.url + path
        async with self._session.request(method, url, json=value, headers=headers, ssl=self.access.tls) as response:
            assert response.status in fine, f"{method} {path}: {response.status} {await response.text()}"
            return response.status


_KIND_NAMES = {
    "pods": "Pod",
    "endpointslices": "EndpointSlice",
    "inferencepools": "InferencePool",
    "inferenceobjectives": "InferenceObjective",
    "inferencemodelrewrites": "InferenceModelRewrite",
}


@asynccontextmanager
async def _in_test() -> AsyncIterator[Stage]:
    async with serving() as server:
        yield InTest(server)


@asynccontextmanager
async def _real() -> AsyncIterator[Stage]:
    access, namespace = find_access(KUBECONFIG), f"picker-test-{secrets.token_hex(4)}"
    async with aiohttp.ClientSession() as session:
        stage = Real(access, session, namespace)
        made = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        await stage._send("POST", "/api/v1/namespaces", made)
        try:
            yield stage
        finally:
            await stage._send("DELETE", f"/api/v1/namespaces/{namespace}", {})


_STAGES: dict[str, tuple[Callable[[], AbstractAsyncContextManager[Stage]], Any]] = {
    "in-test": (_in_test, VirtualLoop),
    "real": (_real, None),
}
_NO_CLUSTER = pytest.mark.skipif(not KUBECONFIG, reason="PICKER_TEST_KUBECONFIG names no kubeconfig")


def on_every_stage(test: Callable[[Stage], Coroutine[Any, Any, None]]) -> Callable[[str], None]:
    """Run a test in virtual time against the in-test API server, and against a real one where there is one."""

    def run(where: str) -> None:
        stage, loop = _STAGES[where]

        async def main() -> None:
            async with stage() as found:
                await test(found)

        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(main())

    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    return pytest.mark.parametrize("where", ["in-test", pytest.param("real", marks=_NO_CLUSTER)])(run)
