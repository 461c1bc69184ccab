"""One of several replicas leads, whatever fails; against an API server that knows conflicts, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kubernetes.api_server import ApiServer, serving, status
from kubernetes.manifests import LEASES
from kubernetes.stage import access_to, until
from kubernetes.virtual_time import in_virtual_time
from picker.errors import ConfigError
from picker.sources.kubernetes.client import ApiError, Client
from picker.sources.kubernetes.election import Election, Timing

NAME = "epp-default-pool.llm-d.ai"


class Way:
    """A way to the API server that can be cut, or fall silent in the middle of an answer."""

    def __init__(self, server: ApiServer) -> None:
        self._client = Client(access_to(server), timeout=5.0)
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
    """changes: (second, whether it leads) as they came."""

    def __init__(self, server: ApiServer, name: str, seed: int = 1) -> None:
        self.loop = asyncio.get_running_loop()
        self.way = Way(server)
        self.election = Election(lambda: self.way, "default", NAME, name, clock=self.loop.time, rng=random.Random(seed))
        self.changes: list[tuple[float, bool]] = []
        self.election.on_change = lambda leading: self.changes.append((self.loop.time(), leading))
        self.task: asyncio.Task[None] | None = None

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
async def replicas(server: ApiServer, *names: str) -> AsyncIterator[list[Replica]]:
    """Candidates, the first of which leads; at no time do two."""
    made = [Replica(server, name, seed) for seed, name in enumerate(names)]

    async def watch() -> None:
        while True:
            assert sum(each.leading for each in made) <= 1
            await asyncio.sleep(0.05)

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


def spec(server: ApiServer) -> dict[str, Any]:
    found: dict[str, Any] = server.get(*LEASES, NAME)["spec"]
    return found


@in_virtual_time
async def test_one_of_two_leads_and_renews_every_two_seconds() -> None:
    async with serving() as server, replicas(server, "a", "b") as (a, b):
        before = spec(server)
        server.wrote.clear()
        await asyncio.sleep(60)
        assert (a.leading, b.leading) == (True, False)
        assert 28 <= len(server.wrote) <= 31
        assert {code for _, _, code in server.wrote} == {200}
        after = spec(server)
        assert after["holderIdentity"] == "a"
        assert (after["acquireTime"], after["leaseTransitions"]) == (before["acquireTime"], 0)
        assert after["renewTime"] > before["renewTime"]
        assert (a.election.report()["leader"], b.election.report()["leader"]) == ("a", "a")


@in_virtual_time
async def test_of_two_that_come_at_once_one_makes_the_lease() -> None:
    async with serving() as server:
        candidates = [Replica(server, name) for name in "ab"]
        async with asyncio.TaskGroup() as group:
            for each in candidates:
                each.task = group.create_task(each.election.run())
            await asyncio.sleep(30)
            assert sorted(each.leading for each in candidates) == [False, True]
            for each in candidates:
                assert each.task is not None
                each.task.cancel()
        assert [code for method, _, code in server.wrote if method == "POST"] == [201, 409]


@in_virtual_time
async def test_a_killed_leader_is_followed_when_its_lease_is_over() -> None:
    async with serving() as server, replicas(server, "a", "b") as (a, b):
        await asyncio.sleep(7)
        await a.kill()
        killed = b.loop.time()
        await until(lambda: b.leading, within=60)
        # Renewed up to two seconds before; seen by the other up to 4.4 s after that, and looked at as often.
        assert 13 <= b.changes[0][0] - killed <= 15 + 2 * 4.4
        assert spec(server)["leaseTransitions"] == 1


@in_virtual_time
async def test_who_is_cut_off_gives_up_before_another_leads_and_comes_back_as_a_candidate() -> None:
    async with serving() as server, replicas(server, "a", "b") as (a, b):
        await asyncio.sleep(7)
        a.way.cut, cut = True, a.loop.time()
        await until(lambda: b.leading, within=60)
        gave_up, took = a.changes[-1], b.changes[-1]
        assert (gave_up[1], took[1]) == (False, True)
        assert 8 <= gave_up[0] - cut <= 10
        assert took[0] - gave_up[0] >= 4
        assert "No route to host" in a.election.report()["problem"]
        a.way.cut = False
        await asyncio.sleep(30)
        assert (a.leading, b.leading) == (False, True)
        assert a.election.report()["problem"] is None


@in_virtual_time
async def test_an_answer_that_does_not_come_is_not_waited_for_beyond_the_leaders_time() -> None:
    async with serving() as server, replicas(server, "a", "b") as (a, b):
        a.way.silent, began = True, a.loop.time()
        await until(lambda: b.leading, within=60)
        assert a.changes[-1][0] - began <= 10.1
        assert not a.leading


@in_virtual_time
async def test_who_resigns_is_followed_at_once() -> None:
    async with serving() as server, replicas(server, "a", "b") as (a, b):
        resigned = a.loop.time()
        a.election.resign()
        await a.election.gone.wait()
        assert a.changes[-1] == (resigned, False)
        assert (spec(server)["holderIdentity"], spec(server)["leaseDurationSeconds"]) == ("", 1)
        await until(lambda: b.leading)
        assert b.changes[-1][0] - resigned <= 4.5
        assert spec(server)["holderIdentity"] == "b"
        await asyncio.sleep(30)
        assert not a.leading


@in_virtual_time
async def test_who_resigns_without_leading_leaves_the_lease_alone() -> None:
    async with serving() as server, replicas(server, "a", "b") as (a, b):
        b.election.resign()
        await b.election.gone.wait()
        assert a.leading
        assert spec(server)["holderIdentity"] == "a"


@in_virtual_time
async def test_resigning_takes_two_seconds_at_most() -> None:
    async with serving() as server, replicas(server, "a") as (a,):
        a.way.silent, began = True, a.loop.time()
        a.election.resign()
        await a.election.gone.wait()
        assert a.loop.time() - began <= 2.1


@in_virtual_time
async def test_the_api_server_may_be_gone_for_a_while_and_the_leader_stays() -> None:
    async with serving() as server, replicas(server, "a", "b") as (a, b):
        await server.down()
        await asyncio.sleep(7)
        await server.up()
        await asyncio.sleep(20)
        assert [leading for _, leading in a.changes] == [True]
        assert b.changes == []


@in_virtual_time
async def test_without_the_api_server_nobody_leads_and_then_one_does() -> None:
    async with serving() as server, replicas(server, "a", "b") as made:
        await server.down()
        await asyncio.sleep(30)
        assert not any(each.leading for each in made)
        await server.up()
        await until(lambda: any(each.leading for each in made), within=60)


@in_virtual_time
async def test_a_lease_that_somebody_else_writes_to_is_read_again_and_kept() -> None:
    async with serving() as server, replicas(server, "a") as (a,):
        found = server.get(*LEASES, NAME)
        found["metadata"]["annotations"] = {"note": "mine"}
        server.apply(*LEASES, found)
        await asyncio.sleep(10)
        assert a.leading
        assert [code for _, _, code in server.wrote].count(409) == 1
        assert server.get(*LEASES, NAME)["metadata"]["annotations"] == {"note": "mine"}


@in_virtual_time
async def test_who_finds_another_name_in_its_lease_leads_no_more() -> None:
    async with serving() as server, replicas(server, "a") as (a,):
        found = server.get(*LEASES, NAME)
        found["spec"]["holderIdentity"] = "c"
        server.apply(*LEASES, found)
        await asyncio.sleep(2.1)
        assert not a.leading


@in_virtual_time
async def test_a_lease_that_is_deleted_is_made_anew() -> None:
    async with serving() as server, replicas(server, "a") as (a,):
        server.delete(*LEASES, NAME)
        await asyncio.sleep(10)
        assert [leading for _, leading in a.changes] == [True]
        assert spec(server)["holderIdentity"] == "a"


@pytest.mark.parametrize("year", [2020, 2036])
@in_virtual_time
async def test_clocks_of_machines_do_not_matter(year: int) -> None:
    async with serving() as server:
        held: dict[str, Any] = {"holderIdentity": "gone", "leaseDurationSeconds": 15, "leaseTransitions": 4}
        held |= dict.fromkeys(("acquireTime", "renewTime"), f"{year}-01-01T00:00:00.000000Z")
        server.apply(*LEASES, {"metadata": {"name": NAME}, "spec": held})
        b = Replica(server, "b")
        async with asyncio.TaskGroup() as group:
            task, began = group.create_task(b.election.run()), b.loop.time()
            await until(lambda: b.leading, within=60)
            assert 15 <= b.changes[0][0] - began <= 15 + 4.5
            task.cancel()


@in_virtual_time
async def test_a_process_that_was_stopped_does_not_think_that_it_leads() -> None:
    async with serving() as server:
        now = [0.0]
        way = Way(server)
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
        a, known = Replica(server, "a"), asyncio.Event()
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
        a = Replica(server, "a")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(a.election.run())
            await asyncio.sleep(5)
            assert "leases is forbidden" in a.election.report()["problem"]
            server.forbidden.clear()
            server.failing = [status(500, "InternalError", "etcdserver: request timed out")]
            await until(lambda: a.leading, within=20)
            task.cancel()


@pytest.mark.parametrize("timing", [(15, 15, 2), (15, 2, 2), (15, 10, 0), (5, 10, 2)])
def test_times_that_let_two_lead_are_refused(timing: tuple[int, float, float]) -> None:
    with pytest.raises(ConfigError, match="duration_s must be more than renew_s"):
        Timing(*timing).check()
