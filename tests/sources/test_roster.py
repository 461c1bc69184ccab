from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from fakes import endpoint
from picker.errors import ConfigError
from picker.sources.roster import Roster, UnknownEndpointError
from picker.types import EndpointAdded, EndpointDraining, EndpointRemoved, Fact


class Announcer:
    """A source that says what a test has it say."""

    def __init__(self) -> None:
        self.emit: Callable[[Fact], None] = lambda fact: None

    async def run(self, emit: Callable[[Fact], None]) -> None:
        self.emit = emit
        await asyncio.Event().wait()


class Pool:
    """What is left of facts: who is there, and who drains."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.there: dict[str, str] = {}
        self.draining: set[str] = set()
        self.emptied = 0

    def __call__(self, fact: Fact) -> None:
        self.facts.append(fact)
        match fact:
            case EndpointAdded(endpoint=each):
                if self.there.get(each.name) != each.address:
                    self.draining.discard(each.name)
                self.there[each.name] = each.address
            case EndpointRemoved(name=name):
                del self.there[name]
                self.draining.discard(name)
                self.emptied += not self.there
            case EndpointDraining(name=name, draining=draining):
                (self.draining.add if draining else self.draining.discard)(name)
            case _:
                pass


@asynccontextmanager
async def running(roster: Roster) -> AsyncIterator[Pool]:
    pool = Pool()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(roster.run(pool))
        for _ in range(3):
            await asyncio.sleep(0)
        yield pool
        task.cancel()


async def test_what_is_listed_is_announced_and_changes_are() -> None:
    roster = Roster("configuration")
    roster.assign("configuration", [endpoint("a"), endpoint("b")])
    async with running(roster) as pool:
        assert set(pool.there) == {"a", "b"}
        roster.assign("configuration", [endpoint("c"), endpoint("d")])
        assert set(pool.there) == {"c", "d"}
        assert pool.emptied == 0
        before = len(pool.facts)
        roster.assign("configuration", [endpoint("d"), endpoint("c")])
        assert len(pool.facts) == before


async def test_an_endpoint_added_by_hand_outlives_every_change_of_a_file() -> None:
    roster, file = Roster("configuration", "file"), Announcer()
    roster.follow("file", file)
    async with running(roster) as pool:
        file.emit(EndpointAdded(endpoint("a")))
        roster.add(endpoint("mine"))
        file.emit(EndpointRemoved("a"))
        roster.assign("configuration", [])
        assert set(pool.there) == {"mine"}
        assert roster.standing("mine").owners == ("operator",)


async def test_an_endpoint_removed_by_hand_comes_back_by_hand_or_when_its_list_has_let_it_go() -> None:
    roster, file = Roster("file"), Announcer()
    roster.follow("file", file)
    async with running(roster) as pool:
        for name in ("a", "b"):
            file.emit(EndpointAdded(endpoint(name)))
            roster.remove(name)
        file.emit(EndpointAdded(endpoint("a", address="other:1")))
        assert pool.there == {}
        assert roster.standing("a").removed
        roster.add(endpoint("a"))
        assert pool.there == {"a": "other:1"}, "it is the list's"
        file.emit(EndpointRemoved("b"))
        file.emit(EndpointAdded(endpoint("b")))
        assert set(pool.there) == {"a", "b"}


async def test_what_drains_goes_on_draining_under_another_address() -> None:
    roster = Roster("configuration")
    roster.assign("configuration", [endpoint("a")])
    async with running(roster) as pool:
        roster.drain("a")
        roster.assign("configuration", [endpoint("a", address="other:1")])
        assert pool.draining == {"a"}
        roster.drain("a", draining=False)
        assert pool.draining == set()


async def test_the_first_owner_of_a_name_counts_and_the_next_one_takes_over() -> None:
    roster = Roster("configuration", "file")
    roster.assign("configuration", [endpoint("a", address="one:1")])
    roster.assign("file", [endpoint("a", address="two:2")])
    async with running(roster) as pool:
        assert pool.there == {"a": "one:1"}
        roster.assign("configuration", [])
        assert pool.there == {"a": "two:2"}


async def test_a_name_that_is_taken_cannot_be_added() -> None:
    roster = Roster("configuration")
    roster.assign("configuration", [endpoint("a")])
    async with running(roster) as pool:
        with pytest.raises(ConfigError, match="listed already, by configuration"):
            roster.add(endpoint("a", address="evil:1"))
        assert pool.there == {"a": "a:8000"}


async def test_nobody_drains_weighs_or_removes_what_is_not_there() -> None:
    roster = Roster()
    async with running(roster):
        for ask in (lambda: roster.drain("x"), lambda: roster.weigh("x", 2.0), lambda: roster.remove("x")):
            with pytest.raises(UnknownEndpointError):
                ask()


async def test_what_discovery_finds_can_be_drained_and_not_removed() -> None:
    roster = Roster()
    async with running(roster) as pool:
        pool(EndpointAdded(endpoint("pod")))
        roster.observe(EndpointAdded(endpoint("pod")))
        roster.drain("pod")
        assert pool.draining == {"pod"}
        with pytest.raises(ConfigError, match="comes from discovery"):
            roster.remove("pod")
        roster.observe(EndpointRemoved("pod"))
        with pytest.raises(UnknownEndpointError):
            roster.drain("pod", draining=False)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e9])
async def test_what_is_no_weight_is_refused(weight: float) -> None:
    roster = Roster("configuration")
    roster.assign("configuration", [endpoint("a")])
    async with running(roster):
        with pytest.raises(ConfigError, match="drain it"):
            roster.weigh("a", weight)
        roster.weigh("a", 0.5)
        assert roster.standing("a").weight == 0.5
