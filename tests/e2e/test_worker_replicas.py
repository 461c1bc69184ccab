"""`picker epp --workers 2` as one of two replicas behind a real Envoy: who dies comes back and knows what was known."""

import asyncio
import os
import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from e2e.replica_world import Picker, World, envoy_missing, two
from echo_upstream import EchoUpstream

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing())]


def prompt(number: int) -> str:
    return f"{number}: " + "a question with much context, " * 50


async def serving(port: int, name: str = "") -> bool:
    """What the health service says; of one that is just being started, as soon as it is there."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = await check(health_pb2.HealthCheckRequest(service=name), wait_for_ready=True)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def ready(this: Picker) -> None:
    async with asyncio.timeout(60):
        while not await serving(this.health):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def known(this: World) -> int:
    """Wait until both believe the same; returns how many blocks."""
    async with asyncio.timeout(60):
        while (blocks := await this.one.blocks()) != await this.two.blocks() or not blocks:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return blocks


async def test_who_dies_comes_back_and_knows_what_was_known(tmp_path: Path) -> None:
    async with EchoUpstream("a").running() as up, two(tmp_path, up.address, second=("--workers", "2")) as this:
        await ready(this.two)
        await this.ask(40, prompt)
        before = await known(this)
        await a_worker_dies(this)
        assert await this.two.blocks() == before
        await the_decider_dies(this)
        assert await this.two.blocks() == before
        assert (await this.two.json("/readyz"))["replicas"]["settled"]
        assert await serving(this.two.port)  # so say its workers
        await this.ask(20, prompt)
        figures = await this.two.until(lambda figures: figures["picker_inflight_requests"] == 0)
        assert figures["picker_predicted_cached_tokens_total"] > 0  # since it has come back
        assert await known(this) == before


async def a_worker_dies(this: World) -> None:
    os.kill(this.two.pid("worker 0"), signal.SIGKILL)
    await this.two.until(
        lambda figures: figures["picker_worker_arrivals_total"] == 3 and figures["picker_workers"] == 2
    )
    await this.ask(10, prompt)


async def the_decider_dies(this: World) -> None:
    os.kill(this.two.pid("decider"), signal.SIGKILL)
    await ready(this.two)
