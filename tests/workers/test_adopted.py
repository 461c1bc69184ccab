"""The ext-proc service on connections that somebody else has accepted, with nobody in its own process who decides."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from fakes import scheduler
from frontends.test_extproc import Gateway
from picker.frontends.extproc import ExtProc
from picker.frontends.grpc_server import GrpcServer
from picker.frontends.serving import listen, port_of
from picker.workers.remote import RemoteGate
from workers.bus import Bus


@asynccontextmanager
async def service(gate: RemoteGate) -> AsyncIterator[tuple[Gateway, GrpcServer]]:
    """A worker's service, and a gateway that is connected to it by hand."""
    epp, listener, begun = ExtProc(gate), listen("127.0.0.1", 0), asyncio.Event()
    servers: list[GrpcServer] = []
    loop = asyncio.get_running_loop()

    async def begin(server: GrpcServer, probes: GrpcServer) -> None:
        server.keep()
        servers.append(server)
        epp.set_serving(True)
        begun.set()

    async def accept() -> None:
        listener.setblocking(False)
        while True:
            connection, _ = await loop.sock_accept(listener)
            await servers[0].adopt(connection)

    with listener:
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(epp.serve_by(begin))
            await begun.wait()
            accepting = tasks.create_task(accept())
            gateway = Gateway(port_of(listener))
            async with gateway.channel:
                yield gateway, servers[0]
            epp.shutdown()
            accepting.cancel()
            await serving


async def test_a_request_is_routed_by_the_decider(bus: Bus) -> None:
    async with bus.decider(scheduler("a")) as desk, bus.welcomed() as gate, service(gate) as (gateway, _):
        stream = gateway.stream()
        assert await stream.route() == "a:8000"
        assert len(desk.runtime.scheduler.charges) == 1
        stream.call.cancel()
        await bus.until(lambda: len(desk.runtime.scheduler.charges) == 0)


async def test_without_a_decider_streams_end_as_unavailable_and_nothing_is_answered(bus: Bus) -> None:
    """So that the data plane's own failure mode applies, which an answer of ours would go over."""
    async with bus.worker() as gate, service(gate) as (gateway, _):
        assert await gateway.stream().end() is grpc.StatusCode.UNAVAILABLE


async def test_a_stream_whose_decider_does_not_come_back_ends_as_unavailable(bus: Bus) -> None:
    async with bus.worker(patience=0.01) as gate, service(gate) as (gateway, _):
        async with bus.decider(scheduler("a", max_inflight=1)) as desk:
            await bus.until(lambda: gate._welcome is not None)
            await gateway.stream().route()
            stream = gateway.stream()
            await stream.request_headers()
            await stream.request_body(b'{"model": "m", "prompt": "Once"}')
            await bus.until(lambda: len(desk.runtime.scheduler.queue) == 1)
        assert await stream.end() is grpc.StatusCode.UNAVAILABLE


async def test_questions_after_health_are_no_load_and_one_connection_can_be_parted_from(bus: Bus) -> None:
    async with bus.decider(), bus.welcomed() as gate, service(gate) as (gateway, server):
        assert await gateway.health("") == "SERVING"
        assert (len(server.connections), server.load) == (1, 0)
        stream = gateway.stream()
        await stream.route()
        assert server.load == 1
        server.part_from_one()
        assert server.load == 0
        server.part_from_one()
        async with asyncio.timeout(60):
            while server.load == 0:  # the other side has its own time to notice
                await gateway.stream().route()
        assert len(server.connections) == 2


async def test_a_connection_that_is_gone_already_does_not_disturb(bus: Bus) -> None:
    async with bus.decider(), bus.welcomed() as gate, service(gate) as (gateway, server):
        ours, theirs = socket.socketpair()
        ours.close()
        theirs.setblocking(False)
        await server.adopt(theirs)
        assert await gateway.health("") == "SERVING"
