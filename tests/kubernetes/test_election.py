"""One of several replicas leads, whatever fails; against API servers that know conflicts.

Times are in seconds of the stage: against a real API server a Lease is 3 s long instead of 15.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kubernetes.answers import status
from kubernetes.api_server import serving
from kubernetes.manifests import LEASES
from kubernetes.stage import InTest, Stage, on_every_stage, until
from picker.errors import ConfigError
from picker.sources.kubernetes.client import ApiError, Client
from picker.sources.kubernetes.credentials import Access
from picker.sources.kubernetes.election import Election, Timing
from virtual_time import in_virtual_time

NAME = "epp-default-pool.llm-d.ai"


class Way:
    """A way to the API server that can be cut, or fall silent in the middle of an answer."""

    def __init__(self, access: Access) -> None:
        self._client = Client(access, timeout=5.0)
        self.cut = False
        self.silent = False
        self.held = asyncio.Event()

    async def __aenter__(self) -> Way:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._client.__aexit__(None, None, None)

    async def get(self, path: str, query: Mapping[str, str]) -> bytes:
        await self._pass()
        return await self._client.get(path, query)

    async def write(self, method: str, path: str, body: bytes) -> bytes:
        await self._pass()
        return await self._client.write(method, path, body)

    async def _pass(self) -> None:
        if self.silent:
            await self.held.wait()
        if self.cut:
            raise ApiError("the API server cannot be reached: No route to host")


class Replica:
    """changes: (second of the stage, whether it leads) as they came."""

    def __init__(self, stage: Stage, name: str, seed: int = 1) -> None:
        self.loop, self.second = asyncio.get_running_loop(), stage.second
        self.way = Way(stage.access)
        self.election = Election(
            lambda: self.way,
            stage.namespace,
            NAME,
            name,
            clock=self.loop.time,
            rng=random.Random(seed),
            timing=Timing(round(15 * self.second), 10 * self.second, 2 * self.second),
        )
        self.changes: list[tuple[float, bool]] = []
        self.election.on_change = lambda leading: self.changes.append((self.now, leading))
        self.task: asyncio.Task[None] | None = None

    @property
    def now(self) -> float:
        return self.loop.time() / self.second

    @property
    def leading(self) -> bool:
        return self.election.leading

    async def kill(self) -> None:
        """As SIGKILL: nothing is said any more."""
        assert self.task is not None
        self.election.on_change = lambda leading: None
        self.task.cancel()
        await asyncio.wait([self.task])


@asynccontextmanager
async def replicas(stage: Stage, *names: str) -> AsyncIterator[list[Replica]]:
    """Candidates, the first of which leads; at no time do two."""
    made = [Replica(stage, name, seed) for seed, name in enumerate(names)]

    async def watch() -> None:
        while True:
            assert sum(each.leading for each in made) <= 1
            await asyncio.sleep(0.05 * stage.second)

    async with asyncio.TaskGroup() as group:
        watcher = group.create_task(watch())
        for each in made:
            each.task = group.create_task(each.election.run())
            await until(lambda: any(each.leading for each in made))
        try:
            yield made
        finally:
            watcher.cancel()
            for each in made:
                assert each.task is not None
                each.task.cancel()


async def spec(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = (await stage.get(LEASES, NAME))["spec"]
    return found


async def pause(stage: Stage, seconds: float) -> None:
    await asyncio.sleep(seconds * stage.second)


@on_every_stage
async def test_one_of_two_leads_and_renews(stage: Stage) -> None:
    async with replicas(stage, "a", "b") as (a, b):
        before = await spec(stage)
        await pause(stage, 60)
        assert (a.leading, b.leading) == (True, False)
        assert [leading for _, leading in a.changes] == [True]
        after = await spec(stage)
        assert after["holderIdentity"] == "a"
        assert (after["acquireTime"], after["leaseTransitions"]) == (before["acquireTime"], 0)
        assert after["renewTime"] > before["renewTime"]
        assert (a.election.report()["leader"], b.election.report()["leader"]) == ("a", "a")


@in_virtual_time
async def test_a_leader_renews_every_two_seconds() -> None:
    async with serving() as server, replicas(InTest(server), "a", "b"):
        server.wrote.clear()
        await asyncio.sleep(60)
        assert 28 <= len(server.wrote) <= 31
        assert {code for _, _, code in server.wrote} == {200}


@on_every_stage
async def test_of_two_that_come_at_once_one_makes_the_lease(stage: Stage) -> None:
    candidates = [Replica(stage, name) for name in "ab"]
    async with asyncio.TaskGroup() as group:
        for each in candidates:
            each.task = group.create_task(each.election.run())
        await pause(stage, 30)
        assert sorted(each.leading for each in candidates) == [False, True]
        for each in candidates:
            assert each.task is not None
            each.task.cancel()
    assert (await spec(stage))["leaseTransitions"] == 0
    if isinstance(stage, InTest):
        assert [code for method, _, code in stage.server.wrote if method == "POST"] == [201, 409]


@on_every_stage
async def test_a_killed_leader_is_followed_when_its_lease_is_over(stage: Stage) -> None:
    async with replicas(stage, "a", "b") as (a, b):
        await pause(stage, 7)
        await a.kill()
        killed = b.now
        await until(lambda: b.leading, within=60)
        # Renewed up to two seconds before; seen by the other up to 4.4 s after that, and looked at as often.
        assert 12 <= b.changes[0][0] - killed <= 15 + 2 * 4.4 + 2
        assert (await spec(stage))["leaseTransitions"] == 1


@on_every_stage
async def test_who_is_cut_off_gives_up_before_another_leads_and_comes_back_as_a_candidate(stage: Stage) -> None:
    async with replicas(stage, "a", "b") as (a, b):
        await pause(stage, 7)
        a.way.cut, cut = True, a.now
        await until(lambda: b.leading, within=60)
        gave_up, took = a.changes[-1], b.changes[-1]
        assert (gave_up[1], took[1]) == (False, True)
        assert 7 <= gave_up[0] - cut <= 11
        assert took[0] - gave_up[0] >= 3
        assert "No route to host" in a.election.report()["problem"]
        a.way.cut = False
        await pause(stage, 30)
        assert (a.leading, b.leading) == (False, True)
        assert a.election.report()["problem"] is None


@on_every_stage
async def test_an_answer_that_does_not_come_is_not_waited_for_beyond_the_leaders_time(stage: Stage) -> None:
    async with replicas(stage, "a", "b") as (a, b):
        a.way.silent, began = True, a.now
        await until(lambda: b.leading, within=60)
        assert a.changes[-1][0] - began <= 11
        assert not a.leading


@on_every_stage
async def test_who_resigns_is_followed_at_once(stage: Stage) -> None:
    async with replicas(stage, "a", "b") as (a, b):
        resigned = a.now
        a.election.resign()
        await a.election.gone.wait()
        assert a.changes[-1][1] is False
        assert a.changes[-1][0] - resigned < 1
        await until(lambda: b.leading)
        assert b.changes[-1][0] - resigned <= 5.5
        assert (await spec(stage))["holderIdentity"] == "b"
        await pause(stage, 30)
        assert not a.leading


@on_every_stage
async def test_who_resigns_leaves_a_lease_that_anybody_may_take(stage: Stage) -> None:
    async with replicas(stage, "a") as (a,):
        a.election.resign()
        await a.election.gone.wait()
        left = await spec(stage)
        assert (left["holderIdentity"], left["leaseDurationSeconds"]) == ("", 1)


@on_every_stage
async def test_who_resigns_without_leading_leaves_the_lease_alone(stage: Stage) -> None:
    async with replicas(stage, "a", "b") as (a, b):
        b.election.resign()
        await b.election.gone.wait()
        assert a.leading
        assert (await spec(stage))["holderIdentity"] == "a"


@in_virtual_time
async def test_resigning_takes_two_seconds_at_most() -> None:
    async with serving() as server, replicas(InTest(server), "a") as (a,):
        a.way.silent, began = True, a.loop.time()
        a.election.resign()
        await a.election.gone.wait()
        assert a.loop.time() - began <= 2.1


@on_every_stage
async def test_the_api_server_may_be_gone_for_a_while_and_the_leader_stays(stage: Stage) -> None:
    async with replicas(stage, "a", "b") as (a, b):
        await stage.down()
        await pause(stage, 7)
        await stage.up()
        await pause(stage, 20)
        assert [leading for _, leading in a.changes] == [True]
        assert b.changes == []


@on_every_stage
async def test_without_the_api_server_nobody_leads_and_then_one_does(stage: Stage) -> None:
    async with replicas(stage, "a", "b") as made:
        await stage.down()
        await pause(stage, 30)
        assert not any(each.leading for each in made)
        await stage.up()
        await until(lambda: any(each.leading for each in made), within=60)


@on_every_stage
async def test_a_lease_that_somebody_else_writes_to_is_read_again_and_kept(stage: Stage) -> None:
    async with replicas(stage, "a") as (a,):
        await stage.patch(LEASES, NAME, {"metadata": {"annotations": {"note": "mine"}}})
        await pause(stage, 10)
        assert [leading for _, leading in a.changes] == [True]
        assert (await stage.get(LEASES, NAME))["metadata"]["annotations"] == {"note": "mine"}
        assert (await spec(stage))["holderIdentity"] == "a"
        if isinstance(stage, InTest):
            assert [code for _, _, code in stage.server.wrote].count(409) == 1


@on_every_stage
async def test_who_finds_another_name_in_its_lease_leads_no_more(stage: Stage) -> None:
    async with replicas(stage, "a") as (a,):
        await stage.patch(LEASES, NAME, {"spec": {"holderIdentity": "c"}})
        await pause(stage, 3)
        assert not a.leading


@on_every_stage
async def test_a_lease_that_is_deleted_is_made_anew(stage: Stage) -> None:
    async with replicas(stage, "a") as (a,):
        await stage.delete(LEASES, NAME)
        await pause(stage, 10)
        assert [leading for _, leading in a.changes] == [True]
        assert (await spec(stage))["holderIdentity"] == "a"


@pytest.mark.parametrize("year", [2020, 2036])
@on_every_stage
async def test_clocks_of_machines_do_not_matter(stage: Stage, year: int) -> None:
    held: dict[str, Any] = {"holderIdentity": "gone", "leaseDurationSeconds": round(15 * stage.second)}
    held |= dict.fromkeys(("acquireTime", "renewTime"), f"{year}-01-01T00:00:00.000000Z")
    await stage.apply(LEASES, {"metadata": {"name": NAME}, "spec": held | {"leaseTransitions": 4}})
    b = Replica(stage, "b")
    async with asyncio.TaskGroup() as group:
        task, began = group.create_task(b.election.run()), b.now
        await until(lambda: b.leading, within=60)
        assert 15 <= b.changes[0][0] - began <= 15 + 4.4 + 1
        task.cancel()


@in_virtual_time
async def test_a_process_that_was_stopped_does_not_think_that_it_leads() -> None:
    async with serving() as server:
        now = [0.0]
        way = Way(InTest(server).access)
        election = Election(lambda: way, "default", NAME, "a", clock=lambda: now[0], rng=random.Random(1))
        async with asyncio.TaskGroup() as group:
            task = group.create_task(election.run())
            await until(lambda: election.leading)
            now[0] += 10.0  # nothing of it has run in between
            assert not election.leading
            task.cancel()


@in_virtual_time
async def test_nobody_leads_before_it_may() -> None:
    async with serving() as server:
        a, known = Replica(InTest(server), "a"), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(a.election.run(known.wait))
            await asyncio.sleep(20)
            assert not server.wrote
            known.set()
            await until(lambda: a.leading)
            task.cancel()


@in_virtual_time
async def test_a_right_that_is_missing_is_said() -> None:
    async with serving() as server:
        server.forbidden.add("leases")
        a = Replica(InTest(server), "a")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(a.election.run())
            await asyncio.sleep(5)
            assert "leases.coordination.k8s.io" in a.election.report()["problem"]
            server.forbidden.clear()
            server.failing = [status(500, "InternalError", "etcdserver: request timed out")]
            await until(lambda: a.leading, within=20)
            task.cancel()


@pytest.mark.parametrize("timing", [(15, 15, 2), (15, 2, 2), (15, 10, 0), (5, 10, 2)])
def test_times_that_let_two_lead_are_refused(timing: tuple[int, float, float]) -> None:
    with pytest.raises(ConfigError, match="duration_s must be more than renew_s"):
        Timing(*timing).check()
