"""Sends a plan at its times and collects what became of each request.

Open loop: a request goes out when the plan says so, whatever happened to the ones before it, and its latency counts
from that instant (a slow server cannot slow down its own test). A closed loop and a cap on requests in flight exist
when asked for; with a cap the wait for a slot counts as latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from picker.load.client import Client, Message, Record
from picker.load.text import render
from picker.load.workload import Plan, Planned, Turn


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. elapsed: wall seconds."""

    planned: int
    sent: int
    done: int
    failed: int
    elapsed: float

    @property
    def in_flight(self) -> int:
        return self.sent - self.done


@dataclass(frozen=True, slots=True)
class Pace:
    """How a plan is walked.

    time_scale: pods run this many times faster than real time, so the plan does too. closed: that many users, each
    beginning its next conversation as soon as one ends; the plan's times are ignored. cap: requests in flight at
    most. until: seconds of the plan after which nothing is begun.
    """

    time_scale: float = 1.0
    closed: int | None = None
    cap: int | None = None
    until: float | None = None


@dataclass(slots=True)
class Run:
    """What was measured. Times in wall seconds on one monotonic clock; `Pace.time_scale` says how fast pods ran.

    cancelled: requests in flight when the run was stopped. lost_turns: not sent because a turn before them failed.
    stopped: the run was ended before its plan was.
    """

    plan: Plan
    pace: Pace
    started_at: float = 0.0
    ended_at: float = 0.0
    sent: int = 0
    records: list[Record] = field(default_factory=list)
    cancelled: int = 0
    lost_turns: int = 0
    stopped: bool = False

    @property
    def failed(self) -> int:
        return sum(record.error is not None for record in self.records)


async def drive(
    plan: Plan,
    client: Client,
    pace: Pace | None = None,
    *,
    stop: asyncio.Event | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Send all of `plan` and wait for the answers. Setting `stop` ends the run early, with what it has measured."""
    driver = _Driver(Run(plan, pace or Pace()), client)
    async with asyncio.TaskGroup() as group:
        work = group.create_task(driver.walk())
        helpers = [group.create_task(driver.report_progress(on_progress))] if on_progress else []
        if stop is not None:
            helpers.append(group.create_task(driver.stop_when_told(stop, work)))
        await asyncio.wait({work})
        for helper in helpers:
            helper.cancel()
    if on_progress:
        on_progress(driver.progress())
    return driver.run


class _Driver:
    def __init__(self, run: Run, client: Client) -> None:
        self.run = run
        self._client = client
        self._failed = 0
        self._slots = asyncio.Semaphore(run.pace.cap) if run.pace.cap else None

    async def walk(self) -> None:
        self.run.started_at = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                if self.run.pace.closed is None:
                    await self._send_on_time(group)
                else:
                    upcoming = iter(self.run.plan.conversations)
                    for _ in range(self.run.pace.closed):
                        group.create_task(self._use(upcoming))
        finally:
            self.run.ended_at = time.monotonic()

    async def stop_when_told(self, stop: asyncio.Event, work: asyncio.Task[None]) -> None:
        await stop.wait()
        self.run.stopped = True
        work.cancel()

    async def report_progress(self, on_progress: Callable[[Progress], None]) -> None:
        while True:
            on_progress(self.progress())
            await asyncio.sleep(0.25)

    def progress(self) -> Progress:
        return Progress(
            planned=self.run.plan.requests,
            sent=self.run.sent,
            done=len(self.run.records),
            failed=self._failed,
            elapsed=time.monotonic() - self.run.started_at,
        )

    def _wall(self, plan_time: float) -> float:
        return self.run.started_at + plan_time / self.run.pace.time_scale

    def _over(self, intended_at: float) -> bool:
        until = self.run.pace.until
        return until is not None and intended_at >= self._wall(until)

    async def _send_on_time(self, group: asyncio.TaskGroup) -> None:
        for conversation in self.run.plan.conversations:
            intended_at = self._wall(conversation.at)
            if self._over(intended_at):
                return
            # Worded before its time comes: rendering a long prompt takes milliseconds.
            messages = _opening(conversation)
            body = self._client.body(messages, conversation.turns[0].max_tokens)
            await _sleep_until(intended_at)
            group.create_task(self._converse(conversation, messages, body, intended_at))

    async def _use(self, upcoming: Iterator[Planned]) -> None:
        for conversation in upcoming:
            if self._over(time.monotonic()):
                return
            messages = _opening(conversation)
            body = self._client.body(messages, conversation.turns[0].max_tokens)
            await self._converse(conversation, messages, body, time.monotonic())

    async def _converse(self, conversation: Planned, messages: list[Message], body: bytes, intended_at: float) -> None:
        following: Iterator[Turn] = iter(conversation.turns[1:])
        for sent in range(1, len(conversation.turns) + 1):
            answer = await self._ask(body, intended_at, keep=sent < len(conversation.turns))
            turn = next(following, None)
            if turn is None:
                return
            if answer is None:
                self.run.lost_turns += len(conversation.turns) - sent
                return
            # Think time begins when the answer ends.
            intended_at = time.monotonic() + turn.think / self.run.pace.time_scale
            if self._over(intended_at):
                return
            messages += [("assistant", answer), ("user", render(turn.text))]
            body = self._client.body(messages, turn.max_tokens)
            await _sleep_until(intended_at)

    async def _ask(self, body: bytes, intended_at: float, *, keep: bool) -> str | None:
        """Ask once and keep the record. Returns the answer's text when `keep`, and None when the request failed."""
        async with self._slot():
            self.run.sent += 1
            try:
                record, stream = await self._client.ask(body, intended_at=intended_at)
            except asyncio.CancelledError:
                self.run.cancelled += 1
                raise
        self.run.records.append(record)
        if stream is None:
            self._failed += 1
            return None
        return stream.text() if keep else ""

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        if self._slots is None:
            yield
            return
        async with self._slots:
            yield


def _opening(conversation: Planned) -> list[Message]:
    messages = [("system", render(conversation.system))] if conversation.system else []
    return [*messages, ("user", render(conversation.turns[0].text))]


async def _sleep_until(moment: float) -> None:
    delay = moment - time.monotonic()
    # Yield even when late, so that answers are read and stamped between two sends.
    await asyncio.sleep(max(0.0, delay))
