"""When a picker with workers says that it is ready: it knows what there is to know, and is the one that serves."""

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import pytest
from grpc_health.v1 import health_pb2

from picker.commands.epp_workers import say_readiness
from picker.frontends.health import Health
from workers.bus import Bus


@dataclass
class FakeApp:
    informed: bool = True
    leads: bool = True


@pytest.mark.parametrize(
    ("app", "ready"),
    [
        (FakeApp(), True),
        (FakeApp(informed=False), False),  # others have not told yet what is cached where
        (FakeApp(leads=False), False),
    ],
)
async def test_workers_and_probes_say_the_same(bus: Bus, app: FakeApp, ready: bool) -> None:
    told: list[bool] = []
    async with bus.decider() as desk:
        probes = Health()
        say_readiness(cast(Any, app), desk, probes, asyncio.Event())
        assert not serving(probes)  # there is no worker yet
        async with bus.worker() as gate:
            gate.on_serving = told.append
            await bus.until(lambda: desk.workers == 1 and bool(told))
            say_readiness(cast(Any, app), desk, probes, asyncio.Event())
            assert told == [ready]
            assert serving(probes) is ready


async def test_another_that_leads_makes_both_unready_and_workers_part(bus: Bus) -> None:
    app, probes, told, parted = FakeApp(), Health(), list[bool](), list[bool]()
    async with bus.decider() as desk, bus.worker() as gate:
        gate.on_serving, gate.on_part = told.append, lambda: parted.append(True)
        await bus.until(lambda: told == [True])
        app.leads = False
        say_readiness(cast(Any, app), desk, probes, asyncio.Event())
        await bus.until(lambda: told == [True, False])
        assert parted == [True]
        assert not serving(probes)


async def test_who_is_told_to_go_lets_its_workers_serve_on(bus: Bus) -> None:
    app, leaving = FakeApp(leads=False), asyncio.Event()
    leaving.set()
    async with bus.decider() as desk, bus.welcomed():
        say_readiness(cast(Any, app), desk, Health(), leaving)
        assert desk.wants


def serving(probes: Health) -> bool:
    return bool(probes._status("") == health_pb2.HealthCheckResponse.SERVING)
