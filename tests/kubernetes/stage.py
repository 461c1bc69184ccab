"""Where discovery is tested: the in-test API server in virtual time, and a real kube-apiserver where one is named.

`PICKER_TEST_KUBECONFIG` names a kubeconfig; `docs/kubernetes.md` says what its user must be allowed to do. Every test
has a namespace of its own there, which is deleted.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import pytest

from kubernetes.api_server import ApiServer, serving
from kubernetes.asking import Answer, Asking
from kubernetes.manifests import PODS, Json, Kind
from kubernetes.real_cluster import KUBECONFIG, real_cluster
from picker.sources.kubernetes.credentials import Access, FixedTokens
from picker.sources.kubernetes.scope import Scope
from picker.sources.kubernetes.source import KubernetesSource
from picker.types import CacheCleared, Endpoint, EndpointAdded, EndpointDraining, EndpointRemoved, Fact
from virtual_time import VirtualLoop


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


async def at_once(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do many things, some at a time."""
    left = iter(work)

    async def hand() -> None:
        for each in left:
            await each

    await asyncio.gather(*(hand() for _ in range(8)))


def watching(found: KubernetesSource) -> bool:
    """Whether all that there is to watch is watched."""
    return all(each["watching"] or each["problem"] for each in found.report()["watches"].values())


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
    where: ApiServer | Stage, scope: Scope | None = None, **more: Any
) -> AsyncIterator[tuple[KubernetesSource, Told]]:
    """A source that has seen all there is. scope: by default the pool `pool` of the stage's namespace."""
    stage = InTest(where) if isinstance(where, ApiServer) else where
    found, told = source(stage.access, scope or Scope(stage.namespace, ("pool",)), **more), Told()
    async with running(found, told):
        async with asyncio.timeout(30):
            await found.synced.wait()
        yield found, told


def access_to(server: ApiServer) -> Access:
    return Access(server.url, FixedTokens(server.token))


# --- stages ------------------------------------------------------------------------------------------------


class Stage(Protocol):
    """A cluster that a test may change. access: the way that picker takes, which can be broken. second: of its time,
    in seconds: what takes minutes in virtual time may be asked for in less of real time. stranger: the way of somebody
    whom nobody knows.
    """

    access: Access
    namespace: str
    second: float
    stranger: Access

    def path(self, kind: Kind) -> str:
        """Of the namespace's collection."""
        ...

    async def apply(self, kind: Kind, value: Json) -> None:
        """Create an object or change it; also what its status says."""
        ...

    async def patch(self, kind: Kind, name: str, change: Json) -> None:
        """Merge what is said into an object that is there."""
        ...

    async def get(self, kind: Kind, name: str) -> Json:
        """An object as it is kept."""
        ...

    async def delete(self, kind: Kind, name: str) -> None:
        """Away with it, at once."""
        ...

    async def terminate(self, pod: str) -> None:
        """Ask a pod to go; it stays for its grace period."""
        ...

    async def resize(self, pod: str, resources: Json) -> None:
        """Ask for other resources of a pod's engine in place; whoever runs it says in its status what came of it."""
        ...

    async def account(self, *roles: Json) -> Access:
        """The way of a service account of the namespace that has these Roles and nothing else."""
        ...

    async def ask(
        self,
        method: str,
        path: str,
        value: Json | None = None,
        query: Mapping[str, str] | None = None,
        *,
        access: Access | None = None,
    ) -> Answer:
        """A request of one's own, by whoever may do everything, or by `access`."""
        ...

    async def events(self, path: str, query: Mapping[str, str]) -> list[Json]:
        """What a watch tells until it ends."""
        ...

    def cut(self) -> None:
        """picker's connections break."""
        ...

    def stall(self) -> None:
        """Nothing comes any more on picker's connections, those that come included."""
        ...

    def flow_for_new(self) -> None:
        """On connections from here on all comes again."""
        ...

    async def down(self) -> None:
        """picker cannot reach the API server."""
        ...

    async def up(self) -> None: ...


class InTest:
    namespace = "default"
    second = 1.0

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.access = access_to(server)
        self.stranger = Access(server.url, FixedTokens("nobody's"))
        self.cut, self.stall, self.flow_for_new = server.cut_watches, server.stall, server.flow_for_new_watches
        self.down, self.up = server.down, server.up

    def path(self, kind: Kind) -> str:
        return f"{kind[0]}/namespaces/{self.namespace}/{kind[1]}"

    async def apply(self, kind: Kind, value: Json) -> None:
        self.server.patch(*kind, value)

    async def patch(self, kind: Kind, name: str, change: Json) -> None:
        named = {"name": name} | change.get("metadata", {})
        self.server.patch(*kind, change | {"metadata": named})

    async def get(self, kind: Kind, name: str) -> Json:
        return self.server.get(*kind, name)

    async def delete(self, kind: Kind, name: str) -> None:
        self.server.delete(*kind, name)

    async def terminate(self, pod: str) -> None:
        self.server.terminate(*PODS, pod)

    async def resize(self, pod: str, resources: Json) -> None:
        value = self.server.get(*PODS, pod)
        value["spec"]["containers"][0]["resources"] = resources
        self.server.apply(*PODS, value)

    async def account(self, *roles: Json) -> Access:
        rules = [rule for role in roles for rule in role["rules"]]
        return Access(self.server.url, FixedTokens(self.server.account("picker", self.namespace, rules)))

    async def ask(
        self,
        method: str,
        path: str,
        value: Json | None = None,
        query: Mapping[str, str] | None = None,
        *,
        access: Access | None = None,
    ) -> Answer:
        async with Asking() as asking:
            return await asking.ask(access or self.access, method, path, value, query)

    async def events(self, path: str, query: Mapping[str, str]) -> list[Json]:
        async with Asking() as asking:
            return await asking.events(self.access, path, query)


@asynccontextmanager
async def _in_test() -> AsyncIterator[Stage]:
    async with serving() as server:
        yield InTest(server)


_STAGES: dict[str, tuple[Callable[[], AbstractAsyncContextManager[Stage]], Any]] = {
    "in-test": (_in_test, VirtualLoop),
    "real": (real_cluster, None),
}
_NO_CLUSTER = pytest.mark.skipif(not KUBECONFIG, reason="PICKER_TEST_KUBECONFIG names no kubeconfig")


def on_every_stage(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in virtual time against the in-test API server, and against a real one where there is one.

    The test's first parameter is the stage; others are fixtures.
    """
    return _on(test, "in-test", pytest.param("real", marks=_NO_CLUSTER))


def on_a_real_one(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test against a real API server where there is one: it is about what that knows and no double does."""
    return _on(test, pytest.param("real", marks=_NO_CLUSTER))


def _on(test: Callable[..., Coroutine[Any, Any, None]], *stages: Any) -> Callable[..., None]:
    def run(where: str, **fixtures: Any) -> None:
        stage, loop = _STAGES[where]

        async def main() -> None:
            async with stage() as found:
                await test(found, **fixtures)

        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(main())

    functools.update_wrapper(run, test)
    # pytest-asyncio would look through the wrapper and take the test for one of its own.
    del run.__wrapped__  # type: ignore[attr-defined]
    where = inspect.Parameter("where", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    fixtures = list(inspect.signature(test).parameters.values())[1:]
    run.__signature__ = inspect.Signature([where, *fixtures])  # type: ignore[attr-defined]
    parametrized: Callable[..., None] = pytest.mark.parametrize("where", stages)(run)
    return parametrized
