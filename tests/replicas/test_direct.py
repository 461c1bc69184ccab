"""Replicas that call each other, over real sockets."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fakes import ManualClock, blocks
from picker.replicas.circle import LEASE
from picker.replicas.direct import Address, Direct
from picker.wire.als import Ended
from replicas.company import SECRET, Replica, port, until

PROMPT = blocks(system=40)


class Called:
    """A replica that listens. others: who is under the name that it looks for."""

    def __init__(
        self, name: str, clock: ManualClock, others: list[Address], secret: bytes = SECRET, **more: int
    ) -> None:
        self.replica = Replica(name, clock, **more)
        self.listener = port()
        self.address: Address = self.listener.getsockname()
        peers, rng = [("peers", 1)], random.Random(1)
        self.bus = Direct(self.replica.circle, self.listener, peers, secret, rng=rng, resolve=self._resolve, every=0.1)
        self._others = others

    async def _resolve(self, name: str, number: int) -> list[Address]:
        return list(self._others)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Replica]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.bus.run())
            try:
                yield self.replica
            finally:
                task.cancel()


def called(*names: str) -> tuple[ManualClock, list[Address], list[Called]]:
    clock, addresses = ManualClock(), list[Address]()
    made = [Called(name, clock, addresses) for name in names]
    addresses += [each.address for each in made]
    return clock, addresses, made


async def test_replicas_find_each_other_and_not_themselves() -> None:
    _, _, (one, two, three) = called("one", "two", "three")
    async with one.running() as first, two.running() as second, three.running() as third:
        await until(lambda: all(each.circle.connected == 2 for each in (first, second, third)))
        where = first.route(1, PROMPT)
        await until(lambda: second.inflight(where) == third.inflight(where) == 1)
        assert second.believes(where, PROMPT) == 40
        first.finish(1)
        await until(lambda: second.all_inflight == third.all_inflight == 0)
        assert first.circle.problem is None


async def test_who_comes_late_is_told_what_is_known() -> None:
    _, _, (one, two) = called("one", "two")
    async with one.running() as first:
        places = [first.route(number, blocks(system=5, **{f"p{number}": 20})) for number in range(1, 301)]
        for number in range(1, 298):
            first.finish(number)
        async with two.running() as second:
            await until(second.circle.settled.is_set)
            for number, where in enumerate(places, 1):
                assert second.believes(where, blocks(system=5, **{f"p{number}": 20})) == 25
            assert second.all_inflight == first.all_inflight == 3


async def test_what_a_replica_leaves_behind_is_released_when_its_lease_is_over() -> None:
    clock, _, (one, two) = called("one", "two")
    async with one.running() as first:
        async with two.running() as second:
            await until(lambda: first.circle.connected == second.circle.connected == 1)
            second.route(1, PROMPT)
            await until(lambda: first.all_inflight == 1)
        await until(lambda: first.circle.problem is not None)
        assert first.all_inflight == 1
        assert "1 of 1 replicas cannot be heard" in str(first.circle.report()["problem"])
        clock.advance(LEASE + 0.1)
        await until(lambda: first.all_inflight == 0)
        assert first.route(2, PROMPT)  # on its own


async def test_who_is_back_within_its_lease_has_kept_what_it_had() -> None:
    _, _, (one, two) = called("one", "two")
    async with one.running() as first, two.running() as second:
        await until(lambda: first.circle.connected == second.circle.connected == 1)
        second.route(1, PROMPT)
        second.route(2, PROMPT)
        await until(lambda: first.all_inflight == 2)
        for line in list(two.bus._lines):
            line.abort()
        second.finish(1)
        await until(lambda: first.all_inflight == 1)


async def test_who_has_another_secret_learns_and_teaches_nothing() -> None:
    clock, addresses = ManualClock(), list[Address]()
    one, two = Called("one", clock, addresses), Called("two", clock, addresses, b"a secret of somebody else")
    addresses += [one.address, two.address]
    async with one.running() as first, two.running() as second:
        await until(lambda: "its secret may be another" in str(first.circle.problem))
        second.route(1, PROMPT)
        assert first.circle.connected == second.circle.connected == 0
        assert first.circle.refused > 0


async def test_who_hashes_other_blocks_is_refused_in_words() -> None:
    clock, addresses = ManualClock(), list[Address]()
    one, two = Called("one", clock, addresses), Called("two", clock, addresses, block_bytes=512)
    addresses += [one.address, two.address]
    async with one.running() as first, two.running():
        await until(lambda: "index.block_bytes must be the same everywhere" in str(first.circle.problem))


async def test_a_stranger_is_shown_out() -> None:
    _, addresses, (one,) = called("one")
    async with one.running() as first:
        reader, writer = await asyncio.open_connection(*one.address)
        writer.write(b"GET / HTTP/1.1\r\nhost: picker\r\n\r\n" + bytes(100))
        assert b"HTTP" not in await reader.read()  # it hangs up
        writer.close()
        assert first.circle.refused == 1
        assert first.circle.connected == 0
    assert addresses


async def test_a_stranger_is_not_listened_to_for_long() -> None:
    _, _, (one,) = called("one")
    async with one.running() as first:
        reader, writer = await asyncio.open_connection(*one.address)
        hello = await reader.readexactly(40)
        writer.write(hello[:16] + bytes(24) + (1 << 24).to_bytes(4, "big"))
        assert await reader.read() == b""  # it does not wait for so much
        writer.close()
        assert first.circle.refused == 1


async def test_who_leaves_the_name_is_not_called_any_more() -> None:
    _, addresses, (one, two) = called("one", "two")
    async with one.running() as first:
        async with two.running():
            await until(lambda: first.circle.connected == 1)
        await until(lambda: first.circle.problem is not None)
        addresses.remove(two.address)
        await until(lambda: first.circle.problem is None)


async def test_nobody_there_is_a_problem_in_words() -> None:
    _, addresses, (one,) = called("one")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        addresses.append(closed.getsockname())
        async with one.running() as first:
            await until(lambda: first.circle.problem is not None)
            assert first.route(1)


async def test_an_access_log_entry_finds_its_owner() -> None:
    _, _, (one, two, three) = called("one", "two", "three")
    async with one.running() as first, two.running() as second, three.running() as third:
        lean = [each.lean() for each in (first, second, third)]
        await until(lambda: all(each.circle.connected == 2 for each in (first, second, third)))
        mark = second.hand_on(lean[1], 1)
        await until(lambda: first.all_inflight == third.all_inflight == 1)
        lean[0].opened()
        await until(lambda: lean[1]._logs_elsewhere == lean[2]._logs_elsewhere == 1)
        lean[0].hear(Ended(mark, "", 200, None, None, None, None))
        await until(lambda: len(lean[1]) == first.all_inflight == third.all_inflight == 0)
        assert third.metric("picker_replicas_entries_taken_total") == 0
