"""Replicas that speak through a real Redis, where there is one."""

import asyncio
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fakes import ManualClock, blocks
from picker.replicas.circle import LEASE
from picker.replicas.redis_bus import RedisBus
from picker.wire.als import Ended
from replicas.company import SECRET, Replica, until

redis = pytest.importorskip("redis", reason="the library `redis` is not installed")
SERVER = shutil.which("redis-server") or shutil.which("valkey-server")
pytestmark = pytest.mark.skipif(SERVER is None, reason="there is no redis-server or valkey-server on PATH")

PROMPT = blocks(system=40)


class Server:
    """A Redis of the test's own, on a socket in a folder."""

    def __init__(self, folder: Path) -> None:
        self.url = f"unix://{folder}/redis.sock"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert SERVER is not None
        own = ("--port", "0", "--unixsocket", f"{self._folder}/redis.sock", "--save", "", "--dir", str(self._folder))
        self._process = subprocess.Popen([SERVER, *own], stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    made.start()
    yield made
    made.stop()


@asynccontextmanager
async def running(name: str, server: Server, clock: ManualClock, secret: bytes = SECRET) -> AsyncIterator[Replica]:
    replica = Replica(name, clock)
    bus = RedisBus(replica.circle, server.url, "test", secret, rng=random.Random(1))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(bus.run())
        try:
            yield replica
        finally:
            task.cancel()


async def test_what_one_books_the_other_has_booked(server: Server) -> None:
    clock = ManualClock()
    async with running("one", server, clock) as one, running("two", server, clock) as two:
        await until(lambda: one.circle.connected == two.circle.connected == 1)
        where = one.route(1, PROMPT)
        await until(lambda: two.inflight(where) == 1)
        assert two.believes(where, PROMPT) == 40
        one.finish(1)
        await until(lambda: two.all_inflight == 0)


async def test_who_comes_late_is_told_what_is_known(server: Server) -> None:
    clock = ManualClock()
    async with running("one", server, clock) as one:
        places = [one.route(number, blocks(system=5, **{f"p{number}": 20})) for number in range(1, 301)]
        for number in range(1, 298):
            one.finish(number)
        async with running("two", server, clock) as two:
            await until(two.circle.settled.is_set)
            for number, where in enumerate(places, 1):
                assert two.believes(where, blocks(system=5, **{f"p{number}": 20})) == 25
            assert two.all_inflight == 3


async def test_a_redis_that_goes_away_is_said_and_found_again(server: Server) -> None:
    clock = ManualClock()
    async with running("one", server, clock) as one, running("two", server, clock) as two:
        await until(lambda: one.circle.connected == two.circle.connected == 1)
        one.route(1, PROMPT)
        await until(lambda: two.all_inflight == 1)
        server.stop()
        await until(lambda: one.circle.problem is not None and two.circle.problem is not None)
        assert "Redis cannot be used" in str(one.circle.report()["problem"])
        clock.advance(LEASE + 0.1)
        await until(lambda: two.all_inflight == 0)
        where = one.route(2, PROMPT)  # on its own
        server.start()
        await until(lambda: two.inflight(where) >= 1 and two.all_inflight == 2)
        assert one.circle.problem is None


async def test_what_a_replica_leaves_behind_is_released(server: Server) -> None:
    clock = ManualClock()
    async with running("one", server, clock) as one:
        async with running("two", server, clock) as two:
            await until(lambda: one.circle.connected == two.circle.connected == 1)
            two.route(1, PROMPT)
            await until(lambda: one.all_inflight == 1)
        clock.advance(LEASE + 0.1)
        await until(lambda: one.all_inflight == 0)


async def test_who_has_another_secret_is_not_heard(server: Server) -> None:
    clock = ManualClock()
    async with running("one", server, clock) as one, running("two", server, clock, b"somebody else's secret"):
        await until(lambda: one.circle.refused > 0)
        assert one.circle.connected == 0


async def test_an_access_log_entry_finds_its_owner(server: Server) -> None:
    clock = ManualClock()
    async with running("one", server, clock) as one, running("two", server, clock) as two:
        lean = one.lean(), two.lean()
        await until(lambda: one.circle.connected == two.circle.connected == 1)
        marks = [two.hand_on(lean[1], number) for number in range(1, 200)]
        await until(lambda: one.all_inflight == 199)
        lean[0].opened()
        await until(lambda: lean[1]._logs_elsewhere == 1)
        for mark in marks:
            lean[0].hear(Ended(mark, "", 200, None, None, None, None))
        await until(lambda: len(lean[1]) == one.all_inflight == 0)
