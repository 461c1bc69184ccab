"""Replicas in one process: runtimes over the same endpoints, each with a circle, and a bus of any kind between them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry

from fakes import BLOCK_BYTES, ManualClock, request, scheduler
from picker.frontends.als import Feedback
from picker.prefix.blocks import BlockHasher
from picker.replicas import words
from picker.replicas.circle import Circle
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import Decision, Finished, FirstToken, UInt64Array, Usage

SECRET = b"what all replicas know"
ENDPOINTS = ("a", "b", "c")


class Replica:
    """One of several. clock: by hand, where time matters to it."""

    def __init__(self, name: str, clock: Callable[[], float] | None = None, block_bytes: int = BLOCK_BYTES) -> None:
        self.clock = clock or ManualClock()
        self.scheduler = scheduler(*ENDPOINTS)
        hasher, telemetry = BlockHasher(b"x", block_bytes), Telemetry(CollectorRegistry())
        self.runtime = Runtime(self.scheduler, hasher, telemetry, clock=self.clock)
        self.circle = Circle(self.runtime, name=name, block_bytes=block_bytes, ready=lambda: True)

    def lean(self) -> Feedback:
        """What waits here for the access log, wherever it goes."""
        made = Feedback(self.runtime, lambda decision: 5.0)
        made.elsewhere = self.circle.relay
        self.circle.relay.serve(made)
        return made

    def hand_on(self, feedback: Feedback, number: int, alias: str = "") -> str:
        """Decide, and leave the request to the data plane; returns its mark."""
        outcome = self.runtime.place(request(number))
        assert isinstance(outcome, Decision)
        feedback.expect(outcome, alias, self.clock())
        return feedback.mark(number)

    def route(self, number: int, prompt: UInt64Array | None = None, **more: object) -> str:
        """Decide; returns the endpoint."""
        outcome = self.runtime.place(request(number, prompt, **more))
        assert isinstance(outcome, Decision)
        return outcome.endpoint.name

    def finish(self, number: int, usage: Usage | None = None) -> None:
        self.runtime.emit(FirstToken(number))
        self.runtime.emit(Finished(number, 200, usage))

    def inflight(self, name: str) -> int:
        row = self.scheduler.pool.row(name)
        assert row is not None
        return int(self.scheduler.pool.inflight[row])

    @property
    def all_inflight(self) -> int:
        return sum(map(self.inflight, ENDPOINTS))

    def believes(self, name: str, prompt: UInt64Array) -> int:
        """Blocks of a prompt that it takes to be cached there."""
        row = self.scheduler.pool.row(name)
        assert row is not None
        return int(self.scheduler.index.match(prompt)[row])

    def metric(self, name: str) -> float | None:
        return self.runtime.telemetry.registry.get_sample_value(name)


def joined(*replicas: Replica) -> None:
    """Have them hear each other at once, in bytes, without a wire."""
    for speaker in replicas:
        others = [each for each in replicas if each is not speaker]
        speaker.circle.tell = partial(_hear, speaker, others)
        speaker.circle.tell_one = partial(_hear_one, speaker, {each.circle.name: each for each in others})
        for other in others:
            other.circle.greeted(speaker.circle.name, speaker.circle.greeting())


def _hear(speaker: Replica, others: list[Replica], data: bytes) -> None:
    for other in others:
        other.circle.hear(speaker.circle.name, words.unbatch(words.batch([data])))


def _hear_one(speaker: Replica, others: dict[str, Replica], name: str, data: bytes) -> None:
    if name in others:
        _hear(speaker, [others[name]], data)


def taught(pupil: Replica, teacher: Replica) -> None:
    """Tell one all that another knows, in pieces of bytes."""
    for word in (teacher.circle.standing(), *teacher.circle.knowledge(words.Wanted(lessons=True)), words.Handed()):
        pupil.circle.hear(teacher.circle.name, words.unbatch(words.batch([words.encode(word)])))


def port() -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


async def until(check: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for another task's doing."""
    async with asyncio.timeout(seconds):
        while not check():  # noqa: ASYNC110 - real sockets
            await asyncio.sleep(0.002)
