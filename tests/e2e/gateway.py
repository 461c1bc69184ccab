"""A whole picker in the test's process, behind either front end, in front of simulated pods on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

import fakes
from picker.app import App
from picker.config import Config, ExactConfig, HealthConfig, LimitConfig, ProxyConfig, ScrapeConfig
from picker.envoy import GATEWAY, Json, bootstrap, find_envoy, running_envoy
from picker.errors import ConfigError
from picker.frontends.extproc import ExtProc
from picker.frontends.proxy import Proxy
from picker.frontends.serving import listen, port_of
from picker.types import Fact


def envoy_missing() -> str:
    """Why tests with Envoy cannot run, with how to mend it; empty when they can."""
    try:
        find_envoy()
    except ConfigError as error:
        return str(error)
    return ""


FRONT_ENDS = [
    "proxy",
    pytest.param("envoy", marks=pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing())),
]


@dataclass(slots=True)
class Gateway:
    """url: where clients go. app: the picker inside. facts: everything its scheduler was told."""

    url: str
    app: App
    facts: list[Fact] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that facts bring about, looking again after every fact."""
        while not condition():
            self.news.clear()
            await self.news.wait()

    def heard(self, fact: Fact) -> None:
        self.facts.append(fact)
        self.news.set()

    async def settled(self) -> None:
        """Wait until every request has had its terminal report."""
        await self.until(lambda: len(self.app.runtime.scheduler.charges) == 0)


@asynccontextmanager
async def gateway(
    front_end: str,
    pods: Sequence[str],
    *,
    limits: LimitConfig | None = None,
    first_byte_timeout_s: float = 30.0,
    known: bool = True,
    exact: ExactConfig | None = None,
    health: HealthConfig | None = None,
    change: Callable[[Json], None] = lambda config: None,
) -> AsyncIterator[Gateway]:
    """Picker behind `front_end` ("proxy" or "envoy"), ready: its pods are scraped and their models known.

    known: False where the pods are not expected to answer. change: what to do to Envoy's configuration.
    """
    config = Config(
        endpoints=list(pods) or ["127.0.0.1:1"],
        seed=1,
        scrape=ScrapeConfig(interval_s=0.05, timeout_s=0.5),
        limits=limits or LimitConfig(),
        exact=exact or ExactConfig(),
        health=health or HealthConfig(eject_after=3, eject_s=30.0),
        proxy=ProxyConfig(first_byte_timeout_s=first_byte_timeout_s),
        drain_timeout_s=0.5,
    )
    app, stop = App(config), asyncio.Event()
    front: _Proxied | _BehindEnvoy = _Proxied(app) if front_end == "proxy" else _BehindEnvoy(app, pods, change)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(app.run([front.serve], stop))
        async with front.reachable() as url:
            gate = Gateway(url, app)
            fakes.Ear(app.runtime, gate.heard)
            if known:
                await gate.until(lambda: _known(app, pods))
            yield gate
            stop.set()
            await running


def _known(app: App, pods: Sequence[str]) -> bool:
    states = app.runtime.scheduler.snapshot(0.0)
    return len(states) == len(pods) and all(state.models for state in states)


class _Proxied:
    def __init__(self, app: App) -> None:
        limits = app.config.proxy
        self.socket = listen("127.0.0.1", 0)
        self.proxy = Proxy(
            app.runtime,
            connect_timeout=limits.connect_timeout_s,
            first_byte_timeout=limits.first_byte_timeout_s,
            idle_timeout=limits.idle_timeout_s,
            grace=app.config.drain_timeout_s,
            stall_timeout=app.config.health.stall_s,
            merge_models=True,
        )

    async def serve(self, stop: asyncio.Event) -> None:
        await self.proxy.serve(self.socket, stop)

    @asynccontextmanager
    async def reachable(self) -> AsyncIterator[str]:
        yield f"http://127.0.0.1:{port_of(self.socket)}"


class _BehindEnvoy:
    def __init__(self, app: App, pods: Sequence[str], change: Callable[[Json], None]) -> None:
        self.change = change
        self.epp = ExtProc(app.runtime)
        self.pods = [pod.removeprefix("http://") for pod in pods]
        self.port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def serve(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._shut_down_on(stop))
            await self.epp.serve("127.0.0.1", 0, grace=0.5, ready=lambda port, _: self.port.set_result(port))

    async def _shut_down_on(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.epp.shutdown()

    @asynccontextmanager
    async def reachable(self) -> AsyncIterator[str]:
        config = bootstrap(self.pods, f"127.0.0.1:{await self.port}")
        self.change(config)
        async with running_envoy(config) as envoy:
            yield f"http://127.0.0.1:{envoy.ports[GATEWAY]}"
