"""Faults under load, in short: what a retry before the first byte can save, it saves. At length: bench/faults.py."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
import pytest
from bench.fault_pod import TOKENS

from e2e.gateway import Gateway, gateway
from picker.children import free_ports
from picker.config import HealthConfig, LimitConfig
from picker.types import FirstToken, HealthObserved

pytestmark = pytest.mark.e2e

HEALTH = HealthConfig(eject_s=0.2, eject_max_s=1.0, hang_floor_s=0.5, stall_s=0.3, slow_start_s=0.0)


class FaultyPod:
    """A `bench.fault_pod` in a process of its own."""

    def __init__(self, port: int, client: aiohttp.ClientSession) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.child: asyncio.subprocess.Process | None = None
        self._arguments = ("-m", "bench.fault_pod", "--port", str(port))
        self._client = client

    async def start(self) -> None:
        self.child = await asyncio.create_subprocess_exec(sys.executable, *self._arguments)
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with self._client.get(f"{self.url}/health"):
                    return
            await asyncio.sleep(0.02)

    async def mode(self, mode: str) -> None:
        async with self._client.post(f"{self.url}/_mode", data=mode.encode()):
            pass

    def send(self, number: signal.Signals) -> None:
        assert self.child is not None
        self.child.send_signal(number)

    async def stop(self) -> None:
        if self.child is not None and self.child.returncode is None:
            self.send(signal.SIGCONT)
            self.send(signal.SIGKILL)
            await self.child.wait()


class World:
    def __init__(self, gate: Gateway, pods: list[FaultyPod], client: aiohttp.ClientSession) -> None:
        self.gate = gate
        self.pods = pods
        self.client = client

    async def ask(self, number: int) -> str:
        """What became of one request: whole, cut, its status, or what was wrong."""
        body = {"model": "m", "messages": [{"role": "user", "content": f"{number}"}], "stream": number % 2 == 0}
        got = b""
        try:
            async with (
                asyncio.timeout(25),
                self.client.post(f"{self.gate.url}/v1/chat/completions", json=body) as answer,
            ):
                async for piece in answer.content.iter_any():
                    got += piece
        except aiohttp.ClientError as error:
            return "cut" if got else type(error).__name__
        except TimeoutError:
            return "hung"
        if answer.status != 200:
            return str(answer.status)
        return "whole" if got.count(b"x") >= TOKENS else got.decode()

    async def under_way(self, count: int) -> None:
        """Wait until so many have been sent to a pod."""
        while len(self.gate.app.runtime.scheduler.charges) < count:
            async with self.client.get(f"{self.pods[-1].url}/health"):  # no fact tells of a decision
                pass

    async def many(self, count: int) -> Counter[str]:
        return Counter(await asyncio.gather(*(self.ask(number) for number in range(count))))


@contextlib.asynccontextmanager
async def world(count: int = 2, limits: LimitConfig | None = None) -> AsyncIterator[World]:
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
        contextlib.AsyncExitStack() as s,
    ):
        pods = [FaultyPod(port, client) for port in free_ports(count)]
        for pod in pods:
            s.push_async_callback(pod.stop)
        await asyncio.gather(*(pod.start() for pod in pods))
        gate = await s.enter_async_context(gateway("proxy", [pod.url for pod in pods], health=HEALTH, limits=limits))
        yield World(gate, pods, client)


async def test_no_request_is_lost_to_a_pod_that_gives_no_answers() -> None:
    async with world() as here:
        for mode in ("busy", "abort", "garbage", "reset"):
            await here.pods[0].mode(mode)
            assert await here.many(12) == {"whole": 12}, mode


async def test_a_pod_that_is_killed_takes_along_only_what_it_had_begun() -> None:
    async with world() as here:
        asked = asyncio.gather(*(here.ask(number) for number in range(20)))
        await here.under_way(20)
        here.pods[0].send(signal.SIGKILL)
        assert Counter(await asked) == {"whole": 20}
        assert await here.many(10) == {"whole": 10}


async def test_a_pod_that_stands_still_keeps_nobody() -> None:
    async with world() as here:
        asked = asyncio.gather(*(here.ask(number) for number in range(12)))
        await here.under_way(12)
        here.pods[0].send(signal.SIGSTOP)
        assert Counter(await asked) == {"whole": 12}


async def test_a_pod_that_closes_its_port_and_says_no_more_is_given_up() -> None:
    """vLLM at SIGTERM: open streams would hang for minutes."""
    async with world() as here:
        asked = asyncio.gather(*(here.ask(number) for number in range(12)))
        await here.gate.until(lambda: any(isinstance(fact, FirstToken) for fact in here.gate.facts))
        here.pods[0].send(signal.SIGTERM)
        results = Counter(await asked)
        assert results["whole"] + results["cut"] == 12
        assert results["whole"] >= 6
        assert any(isinstance(fact, HealthObserved) for fact in here.gate.facts)
        assert await here.many(6) == {"whole": 6}


async def test_with_no_other_pod_the_client_hears_what_its_pod_said() -> None:
    async with world(count=1) as here:
        await here.pods[0].mode("busy")
        assert await here.many(2) == {"503": 2}


async def test_the_models_of_all_pods_are_listed() -> None:
    async with world() as here, here.client.get(f"{here.gate.url}/v1/models") as answer:
        assert [entry["id"] for entry in (await answer.json())["data"]] == ["m"]
