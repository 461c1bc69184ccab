"""`picker epp --workers N`: what each of its processes runs.

The parent listens, hands connections on and keeps the others running; the decider is the whole picker but for its front
end; workers are the front end. They are started as `python -m picker.commands.epp_workers` and told on stdin who they
are: the configuration may hold secrets, which command lines do not keep.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from picker.app import App, Serve
from picker.commands.epp_serving import announce, build_certificates, build_extproc, build_feedback, follow
from picker.commands.options import first_error, run, start_logging
from picker.config import Config
from picker.errors import ConfigError
from picker.frontends import collector
from picker.frontends.admin import Admin
from picker.frontends.extproc import ExtProc, Mode
from picker.frontends.grpc_server import GrpcServer
from picker.frontends.health import Health
from picker.frontends.serving import listen, port_of
from picker.request_limits import build_limits
from picker.signals import stopping_on_signals
from picker.workers.desk import Desk, Terms
from picker.workers.door import Door, Doorman
from picker.workers.processes import Launch, Part, Processes, StartError
from picker.workers.remote import RemoteGate, RemoteLog

log = logging.getLogger("picker.epp")

_DECIDER = "decider"
_START_TIMEOUT = 60.0
_HANGING, _LOOK_EVERY = 20.0, 1.0  # seconds
_GOING = 10.0  # seconds beyond what draining may take


class Orders(msgspec.Struct, frozen=True):
    """What a process is told. life: how often it has been started before. bus: path of the local socket.

    secret: of prefix hashes, mark: of lean mode's marks: what workers were told by one decider is good for the next.
    descriptors: what it inherits: of the decider the bus, health and admin ports (-1: none), of a worker its door.
    """

    name: str
    index: int
    life: int
    bus: str
    secret: bytes
    mark: str
    descriptors: list[int]
    log_level: str
    config: Config


# --- the parent --------------------------------------------------------------------------------------------


async def serve_with_workers(config: Config) -> None:
    """Run until told to stop. Raises ConfigError for ports in use; ends the program when a process does not start."""
    leaving = asyncio.Event()
    try:
        with tempfile.TemporaryDirectory(prefix="picker-") as folder, stopping_on_signals(leaving):
            await _Parent(config, Path(folder) / "bus").run(leaving)
    except BaseExceptionGroup as group:
        error = first_error(group)
        if isinstance(error, StartError) and error.status > 0:
            raise click.exceptions.Exit(error.status) from None  # it has said why
        raise error from None


class _Parent:
    """bus: the path that the decider's socket gets."""

    def __init__(self, config: Config, bus: Path) -> None:
        self.config = config
        self.traffic = listen(config.epp.host, config.epp.grpc_port)
        self.health = listen(config.epp.host, config.epp.grpc_health_port)
        self.admin = None if config.admin.port is None else listen(config.admin.host, config.admin.port)
        self.bus = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.bus.bind(str(bus))
        self.bus.listen()
        self.path = bus
        self.secret, self.mark = secrets.token_bytes(32), secrets.token_hex(8)
        self.doorman = Doorman(self.traffic)
        self.workers = [f"worker {index}" for index in range(config.epp.workers)]

    async def run(self, leaving: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            processes = Processes(tasks)
            processes.start(Part(_DECIDER, self._decider))
            for index, name in enumerate(self.workers):
                processes.start(Part(name, partial(self._worker, index)))
            if await self._ready(leaving):
                processes.begun()
                self._announce(processes)
                watch = tasks.create_task(self._watch(processes))
                await leaving.wait()
                watch.cancel()
            await self._stop(processes)

    async def _ready(self, leaving: asyncio.Event) -> bool:
        """Wait until all serve; False when told to leave before."""
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                await _either(self.doorman.ready(len(self.workers)), leaving.wait())
        except TimeoutError:
            raise RuntimeError(f"the workers were not ready after {_START_TIMEOUT:g} s") from None
        return not leaving.is_set()

    async def _watch(self, processes: Processes) -> None:
        """A worker that hangs is none: nobody but us would notice while others answer."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            for name in self.doorman.silent(_HANGING):
                log.error("%s has not moved for %g s and is killed", name, _HANGING)
                processes.kill(name)

    def _announce(self, processes: Processes) -> None:
        if self.admin is not None:
            url = f"http://{self.config.admin.host}:{port_of(self.admin)}"
            click.echo(f"metrics, health and debug on {url}", err=True)
        click.echo(f"picker epp: {len(self.workers)} workers, decider is process {processes.pid(_DECIDER)}", err=True)
        announce(self.config, port_of(self.traffic), port_of(self.health))

    async def _stop(self, processes: Processes) -> None:
        """Workers end what they have; the decider goes when they have gone."""
        config = self.config
        processes.tell([_DECIDER, *self.workers])
        await processes.gone(self.workers, config.epp.drain_delay_s + config.drain_timeout_s + _GOING)
        self.doorman.close()
        await processes.gone([_DECIDER], _GOING)

    def _decider(self, life: int) -> Launch:
        sockets = (self.bus, self.health, self.admin)
        return self._launch(_DECIDER, 0, life, [-1 if each is None else each.fileno() for each in sockets])

    def _worker(self, index: int, life: int) -> Launch:
        name = self.workers[index]
        way = self.doorman.way(name)
        return self._launch(name, index, life, [way.fileno()], after=way.close)

    def _launch(
        self, name: str, index: int, life: int, descriptors: list[int], after: Callable[[], None] = lambda: None
    ) -> Launch:
        level = logging.getLevelName(logging.getLogger().level)
        orders = Orders(name, index, life, str(self.path), self.secret, self.mark, descriptors, level, self.config)
        command = (sys.executable, "-m", "picker.commands.epp_workers", name)
        return Launch(command, msgspec.json.encode(orders), [each for each in descriptors if each >= 0], after)


async def _either(*waits: Coroutine[Any, Any, Any]) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(wait) for wait in waits]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


# --- the decider -------------------------------------------------------------------------------------------


async def decide(orders: Orders, leaving: asyncio.Event) -> None:
    """Decide for workers until told to leave and they have gone."""
    config = orders.config
    bus, health, admin = (None if each < 0 else socket.socket(fileno=each) for each in orders.descriptors)
    assert bus is not None
    assert health is not None
    app, probes, stop = App(config, secret=orders.secret), Health(), asyncio.Event()
    desk = _desk(app, orders)

    def stand(_: object = None) -> None:
        say_readiness(app, desk, probes, leaving)

    stand()
    desk.on_workers = stand
    if app.election is not None:
        app.election.on_change = stand
    frontends: list[Serve] = [partial(_at_the_desk, desk, bus, probes, health, leaving, app, stand)]
    if admin is not None:
        routes = Admin(app.runtime, token=config.admin.token, guard_metrics=config.admin.guard_metrics)
        frontends.append(partial(routes.serve, admin))
    await app.run(frontends, stop)


def say_readiness(app: App, desk: Desk, probes: Health, leaving: asyncio.Event) -> None:
    """Ready is who knows what there is to know, and is the one that serves."""
    if not leaving.is_set():  # then workers know by themselves
        ready = app.informed and app.leads
        desk.set_serving(ready)
        probes.set_serving(ready and bool(desk.workers))


def _desk(app: App, orders: Orders) -> Desk:
    config, scheduler = app.config, app.runtime.scheduler
    terms = Terms(app.secret, config.index.block_bytes, scheduler.headers, app.exact is not None, orders.life)
    desk = Desk(app.runtime, terms, build_feedback(app, orders.mark))
    desk.follow(app.rewriting)
    app.telemetry.registry.register(desk)
    return desk


async def _at_the_desk(
    desk: Desk,
    bus: socket.socket,
    probes: Health,
    health: socket.socket,
    leaving: asyncio.Event,
    app: App,
    stand: Callable[[], None],
    stop: asyncio.Event,
) -> None:
    config = app.config

    async def learn() -> None:
        await app.get_informed()
        stand()

    async def leave() -> None:
        await leaving.wait()
        probes.set_serving(False)
        if app.election is not None:
            app.election.resign()
        if desk.workers:  # they serve on until gateways have had time to notice
            await asyncio.sleep(config.epp.drain_delay_s)
        stop.set()

    async with asyncio.TaskGroup() as tasks:
        server = GrpcServer(probes.handlers, tasks)
        await server.serve(health)
        background = [tasks.create_task(leave()), tasks.create_task(learn())]
        await desk.serve(bus, stop, grace=config.drain_timeout_s)
        for task in background:
            task.cancel()
        await server.stop(None)


# --- a worker ----------------------------------------------------------------------------------------------


async def work(orders: Orders, leaving: asyncio.Event) -> None:
    """Serve the connections that come through the door until told to leave."""
    config = orders.config
    certificates = build_certificates(config)
    gate = RemoteGate(orders.index, clock=time.monotonic, limits=build_limits(config))
    log_of = RemoteLog(gate) if Mode(config.epp.mode) is Mode.LEAN else None
    epp = build_extproc(config, gate, log_of)
    told = asyncio.Event()

    def serving(serving: bool) -> None:
        epp.set_serving(serving and not leaving.is_set())
        told.set()

    gate.on_serving, gate.streams = serving, lambda: epp.open_streams
    tls = None if certificates is None else certificates.context
    async with asyncio.TaskGroup() as tasks:
        background = [tasks.create_task(gate.run(Path(orders.bus))), tasks.create_task(follow(certificates))]

        def part() -> None:
            tasks.create_task(epp.part(0.0))

        gate.on_part = part

        async def begin(server: GrpcServer, _: GrpcServer) -> None:
            server.keep()
            way = socket.socket(fileno=orders.descriptors[0])
            door = Door(way, partial(_taken, tasks, server, tls), lambda: server.load, server.part_from_one)
            # Who is asked before it is ready answers all the same: nobody is refused.
            await _either(told.wait(), leaving.wait())
            background.append(tasks.create_task(_open_until(door, leaving, epp, config.epp.drain_delay_s)))

        await epp.serve_by(begin, grace=config.drain_timeout_s)
        for task in background:
            task.cancel()


async def _open_until(door: Door, leaving: asyncio.Event, epp: ExtProc, delay: float) -> None:
    """Told to go: nobody is refused before gateways have had time to notice."""
    async with asyncio.TaskGroup() as tasks:
        opened = tasks.create_task(door.serve())
        await leaving.wait()
        await epp.part(delay)
        opened.cancel()
    epp.shutdown()


def _taken(tasks: asyncio.TaskGroup, server: GrpcServer, tls: ssl.SSLContext | None, connection: socket.socket) -> None:
    tasks.create_task(_adopt(server, tls, connection))


async def _adopt(server: GrpcServer, tls: ssl.SSLContext | None, connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # a handshake that fails, a peer that has gone
        await server.adopt(connection, tls=tls)


# --- a process ---------------------------------------------------------------------------------------------


async def _run(orders: Orders) -> None:
    leaving = asyncio.Event()
    loop = asyncio.get_running_loop()

    def orphaned() -> None:
        if not os.read(0, 4096):  # the parent has gone, where the system does not see to it
            loop.remove_reader(0)
            leaving.set()

    loop.add_reader(0, orphaned)
    with stopping_on_signals(leaving), collector.seldom():
        await (decide if orders.name == _DECIDER else work)(orders, leaving)


def _read_orders() -> Orders:
    """The first line of stdin, without taking more."""
    line = bytearray()
    while not line.endswith(b"\n"):
        data = os.read(0, 65536)
        if not data:
            raise RuntimeError("started without orders; start picker epp --workers N")
        line += data
    return msgspec.json.decode(line, type=Orders)


def main() -> None:
    """Follow the orders on stdin. Exit status as that of the `picker` command."""
    try:
        orders = _read_orders()
        start_logging(orders.log_level)
        form = f"%(asctime)s %(levelname)s %(name)s [{orders.name}] %(message)s"
        logging.getLogger().handlers[0].setFormatter(logging.Formatter(form))
        run(_run(orders))
    except (ConfigError, OSError, RuntimeError) as error:
        click.echo(f"picker: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
