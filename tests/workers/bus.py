"""A decider and its workers in one loop, over a real local socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

import fakes
from fakes import ManualClock, scheduler
from picker.core.scheduler import Scheduler
from picker.exchange import (
    Action,
    Exchange,
    Forward,
    Limits,
    RequestBody,
    RequestHead,
    ResponseBody,
    ResponseHead,
)
from picker.frontends.als import Feedback
from picker.gate import Gate
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import Fact
from picker.workers.desk import Desk, Terms
from picker.workers.remote import RemoteGate, RemoteLog

SECRET = b"a secret"
BLOCK_BYTES = 256
ANSWER = b'{"choices": [{"text": "Hi"}], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}'


def runtime_of(subject: Scheduler, **options: Any) -> Runtime:
    hasher = BlockHasher(SECRET, BLOCK_BYTES)
    return Runtime(subject, hasher, Telemetry(CollectorRegistry()), clock=ManualClock(), **options)


class Bus:
    """A desk that is served, and the workers that have come to it. facts: all that its scheduler was told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen()
        self.facts: list[Fact] = []
        self.news = asyncio.Event()

    @asynccontextmanager
    async def decider(
        self,
        subject: Scheduler | None = None,
        *,
        lean: bool = False,
        start: int = 0,
        reads: bool = False,
        **options: Any,
    ) -> AsyncIterator[Desk]:
        runtime = runtime_of(subject or scheduler("a", "b"), **options)
        fakes.Ear(runtime, self._heard)
        feedback = Feedback(runtime, lambda decision: 5.0) if lean else None
        terms = Terms(SECRET, BLOCK_BYTES, runtime.scheduler.headers, reads, start)
        desk, stop = Desk(runtime, terms, feedback), asyncio.Event()
        desk.on_workers = lambda count: self.news.set()
        runtime.telemetry.registry.register(desk)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(desk.serve(self.listener.dup(), stop, grace=5.0))
            try:
                yield desk
            finally:
                task.cancel()

    @asynccontextmanager
    async def worker(self, index: int = 0, *, patience: float = 10.0) -> AsyncIterator[RemoteGate]:
        """A worker that is connected, whether or not somebody decides."""
        gate = RemoteGate(index, clock=ManualClock(), limits=Limits(), patience=patience)
        gate.on_serving = lambda serving: self.news.set()
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(gate.run(self.path))
            try:
                yield gate
            finally:
                task.cancel()

    @asynccontextmanager
    async def welcomed(self, index: int = 0, *, patience: float = 10.0) -> AsyncIterator[RemoteGate]:
        async with self.worker(index, patience=patience) as gate:
            await self.until(lambda: gate._welcome is not None)
            yield gate

    def _heard(self, fact: Fact) -> None:
        self.facts.append(fact)
        self.news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what comes over the bus."""
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0)


def log_of(gate: RemoteGate) -> RemoteLog:
    return RemoteLog(gate)


async def ask(
    gate: Gate, body: bytes, exchange: Exchange | None = None, headers: Mapping[str, str] | None = None
) -> list[Action]:
    """Everything up to the decision."""
    exchange = exchange or gate.open()
    assert await gate.receive(exchange, RequestHead("POST", "/v1/completions", headers or {})) == []
    return await gate.receive(exchange, RequestBody(body, end=True))


async def answer(gate: Gate, exchange: Exchange) -> None:
    await gate.receive(exchange, ResponseHead(200, {"content-type": "application/json"}))
    await gate.receive(exchange, ResponseBody(ANSWER, end=True))


def went_to(actions: list[Action]) -> str:
    (forward,) = actions
    assert isinstance(forward, Forward)
    return forward.decision.endpoint.name
