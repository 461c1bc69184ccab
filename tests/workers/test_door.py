"""A doorman and workers' doors, on real sockets in one loop."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from picker.frontends.serving import listen, port_of
from picker.workers import door
from picker.workers.door import Door, Doorman


class House:
    """connections: what each worker's door has let in."""

    def __init__(self) -> None:
        self.listener = listen("127.0.0.1", 0)
        self.port = port_of(self.listener)
        self.doorman = Doorman(self.listener)
        self.clients: list[socket.socket] = []

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[list[socket.socket]]:
        connections: list[socket.socket] = []
        way = Door(
            self.doorman.way("a worker"),
            connections.append,
            lambda: len(connections),
            lambda: connections.pop().close(),
        )
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(way.serve())
            try:
                yield connections
            finally:
                task.cancel()
                for connection in connections:
                    connection.close()

    async def call(self, count: int = 1) -> None:
        """Clients come, one after the other."""
        for _ in range(count):
            client = socket.socket()
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
            self.clients.append(client)


@pytest.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr(door, "_TELL_EVERY", 0.001)
    made = House()
    yield made
    made.doorman.close()
    for client in made.clients:
        client.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_connections_are_shared_out_evenly(house: House) -> None:
    async with house.worker() as one, house.worker() as two, house.worker() as three:
        await house.doorman.ready(3)
        await house.call(6)
        await until(lambda: len(one) + len(two) + len(three) == 6)
        assert (len(one), len(two), len(three)) == (2, 2, 2)


async def test_what_a_worker_gets_is_the_clients_connection(house: House) -> None:
    async with house.worker() as one:
        await house.doorman.ready(1)
        await house.call()
        await until(lambda: len(one) == 1)
        one[0].setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(house.clients[0], b"hello")
        assert await loop.sock_recv(one[0], 10) == b"hello"


async def test_connections_wait_until_a_worker_is_ready(house: House) -> None:
    await house.call(2)
    async with house.worker() as one:
        await until(lambda: len(one) == 2)


async def test_a_worker_whose_connections_end_gets_the_next(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house.worker() as one, house.worker() as two:
        await house.doorman.ready(2)
        await house.call(4)
        await until(lambda: len(one) + len(two) == 4)
        monkeypatch.setattr(house.doorman, "_even_out", lambda: None)
        while one:
            one.pop().close()
        ways = house.doorman._ways
        await until(lambda: sorted(way.load for way in ways) == [0, 2])
        await house.call(2)
        await until(lambda: len(one) == 2)
        assert len(two) == 2


async def test_a_worker_that_goes_is_passed_over_and_its_successor_is_not(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.doorman, "_even_out", lambda: None)
    async with house.worker() as one:
        async with house.worker() as two:
            await house.doorman.ready(2)
            await house.call(2)
            await until(lambda: len(one) + len(two) == 2)
        await house.call()
        await until(lambda: len(one) == 2)
        async with house.worker() as successor:
            await house.doorman.ready(2)
            await house.call()
            await until(lambda: len(successor) == 1)


async def test_uneven_shares_are_evened_out(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_EVEN_OUT_EVERY", 0.0)
    async with house.worker() as one:
        await house.doorman.ready(1)
        await house.call(5)
        await until(lambda: len(one) == 5)
        async with house.worker():  # whom nobody comes to: those who part stay away
            await until(lambda: len(one) == 1)
            for _ in range(100):
                await asyncio.sleep(0)
            assert len(one) == 1


async def test_a_door_sees_its_doorman_go(house: House) -> None:
    way = Door(house.doorman.way("a worker"), lambda connection: None, lambda: 0, lambda: None)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(way.serve())
        await house.doorman.ready(1)
        house.doorman.close()
        await way.gone.wait()


async def test_a_worker_that_does_not_move_is_named(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house.worker():
        assert house.doorman.silent(-1.0) == []  # not ready yet: it may take its time
        await house.doorman.ready(1)
        assert house.doorman.silent(60.0) == []
        monkeypatch.setattr(Door, "_tell", lambda self: None)
        await until(lambda: house.doorman.silent(0.01) == ["a worker"])
