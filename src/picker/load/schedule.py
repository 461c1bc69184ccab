"""Sends a plan at its times and collects what became of each request.

Open loop: a request goes out when the plan says so, whatever happened to the ones before it, and its latency counts
from that instant (a slow server cannot slow down its own test). A closed loop and a cap on requests in flight exist
when asked for; with a cap the wait for a slot counts as latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from picker.load.client import Api, Client, Message, Record
from picker.load.text import PLAIN, Wording
from picker.load.workload import Plan, Planned, Turn

# Above this the schedule was not kept (inference-perf's rule: wall seconds), nor below this share of the planned rate.
LATE = 0.010
FEWEST = 0.98
# Answers over which the progress says how soon they begin.
_LATEST = 100


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. elapsed: wall seconds. ttft: mean of the latest answers, in seconds of the pods."""

    planned: int
    sent: int
    done: int
    failed: int
    elapsed: float
    ttft: float | None = None

    @property
    def in_flight(self) -> int:
        return self.sent - self.done


@dataclass(frozen=True, slots=True)
class Pace:
    """How a plan is walked.

    time_scale: pods run this many times faster than real time, so the plan does too. closed: that many users, each
    beginning its next conversation as soon as one ends; the plan's times are ignored. starts: seconds of the plan at
    which they begin. cap: requests in flight at most. until: seconds of the plan after which nothing is begun.
    warmup: seconds of the plan, warmup_share: share of the requests, that are sent and not measured.
    """

    time_scale: float = 1.0
    closed: int | None = None
    cap: int | None = None
    until: float | None = None
    starts: tuple[float, ...] = ()
    warmup: float = 0.0
    warmup_share: float = 0.0


@dataclass(slots=True)
class Run:
    """What was measured. Times in wall seconds on one monotonic clock; `Pace.time_scale` says how fast pods ran.

    cancelled: requests in flight when the run was stopped. lost_turns: not sent because a turn before them failed.
    stopped: the run was ended before its plan was. processes: that sent it; cpu_s: CPU seconds that they used.
    warmup: records of what was sent before `started_at`, from where on everything else counts.
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
    processes: int = 1
    cpu_s: float = 0.0
    warmup: list[Record] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(record.error is not None for record in self.records)

    @property
    def schedule_delay_p99(self) -> float | None:
        """Wall seconds by which the latest one in a hundred requests was sent too late by us."""
        delays = sorted(record.delay for record in self.records)
        return delays[max(0, math.ceil(0.99 * len(delays)) - 1)] if delays else None

    @property
    def requested_rate(self) -> float | None:
        """Requests a wall second as they were meant to be sent."""
        return self._rate(max((record.intended_at for record in self.records), default=self.started_at))

    @property
    def achieved_rate(self) -> float | None:
        """Requests a wall second as they were sent."""
        return self._rate(max((record.sent_at for record in self.records), default=self.started_at))

    def _rate(self, last: float) -> float | None:
        return len(self.records) / (last - self.started_at) if last > self.started_at else None

    @property
    def on_schedule(self) -> bool:
        """Whether this machine sent what was planned, when it was planned. With a cap, waiting was asked for."""
        delay = self.schedule_delay_p99
        if self.pace.cap is not None or delay is None:
            return True
        return delay <= LATE and not self._behind()

    def _behind(self) -> bool:
        """Whether fewer were sent a second than planned; of short runs the last one's delay says nothing."""
        wanted, sent = self.requested_rate, self.achieved_rate
        if wanted is None or sent is None:
            return False
        return sent < FEWEST * wanted and len(self.records) * (1 / sent - 1 / wanted) > LATE


async def drive(
    plan: Plan,
    client: Client,
    pace: Pace | None = None,
    *,
    stop: asyncio.Event | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    wording: Wording = PLAIN,
    begin_at: float | None = None,
    numbers: Iterable[int] | None = None,
) -> Run:
    """Send all of `plan` and wait for the answers. Setting `stop` ends the run early, with what it has measured.

    begin_at: the plan's zero on the client's clock, None: at once. numbers: of the conversations, where they are part
    of a larger plan.
    """
    driver = _Driver(Run(plan, pace or Pace()), client, wording, itertools.count() if numbers is None else numbers)
    before = time.process_time()
    async with asyncio.TaskGroup() as group:
        work = group.create_task(driver.walk(begin_at))
        helpers = [group.create_task(driver.report_progress(on_progress))] if on_progress else []
        if stop is not None:
            helpers.append(group.create_task(driver.stop_when_told(stop, work)))
        await asyncio.wait({work})
        for helper in helpers:
            helper.cancel()
    if on_progress:
        on_progress(driver.progress())
    driver.run.cpu_s = time.process_time() - before
    return driver.run


def without_warmup(run: Run) -> Run:
    """Set what was sent to warm up apart; the run begins where measuring does."""
    pace, records = run.pace, run.records
    began = run.started_at + pace.warmup / pace.time_scale
    if pace.warmup_share and records:
        order = sorted(record.intended_at for record in records)
        began = max(began, order[min(len(order) - 1, int(pace.warmup_share * len(order)))])
    if began > run.started_at:
        run.warmup = [record for record in records if record.intended_at < began]
        run.records = [record for record in records if record.intended_at >= began]
        run.started_at = min(began, run.ended_at)
    return run


@dataclass(frozen=True, slots=True)
class _Worded:
    """A request ready to be sent: its JSON, and which endpoint of the API it is for."""

    body: bytes
    api: Api | None = None


class _Driver:
    def __init__(self, run: Run, client: Client, wording: Wording, numbers: Iterable[int]) -> None:
        self.run = run
        self._client = client
        self._now = client.clock
        self._wording = wording
        self._conversations = zip(numbers, run.plan.conversations, strict=False)
        self._failed = 0
        self._slots = asyncio.Semaphore(run.pace.cap) if run.pace.cap else None

    async def walk(self, begin_at: float | None) -> None:
        self.run.started_at = self._now() if begin_at is None else begin_at
        try:
            async with asyncio.TaskGroup() as group:
                if self.run.pace.closed is None:
                    await self._send_on_time(group)
                else:
                    for user in range(self.run.pace.closed):
                        group.create_task(self._use(user))
        finally:
            self.run.ended_at = max(self._now(), self.run.started_at)

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
            elapsed=self._now() - self.run.started_at,
            ttft=self._latest_ttft(),
        )

    def _latest_ttft(self) -> float | None:
        known = [ttft for record in self.run.records[-_LATEST:] if (ttft := record.ttft) is not None]
        return sum(known) / len(known) * self.run.pace.time_scale if known else None

    def _wall(self, plan_time: float) -> float:
        return self.run.started_at + plan_time / self.run.pace.time_scale

    def _over(self, intended_at: float) -> bool:
        until = self.run.pace.until
        return until is not None and intended_at >= self._wall(until)

    async def _send_on_time(self, group: asyncio.TaskGroup) -> None:
        for number, conversation in self._conversations:
            intended_at = self._wall(conversation.at)
            if self._over(intended_at):
                return
            # Worded before its time comes: rendering a long prompt takes milliseconds.
            messages = self._opening(conversation)
            worded = self._word(conversation, conversation.turns[0], messages)
            await self._sleep_until(intended_at)
            group.create_task(self._converse(number, conversation, messages, worded, intended_at))

    async def _use(self, user: int) -> None:
        starts = self.run.pace.starts
        await self._sleep_until(self._wall(starts[user % len(starts)] if starts else 0.0))
        for number, conversation in self._conversations:
            if self._over(self._now()):
                return
            messages = self._opening(conversation)
            worded = self._word(conversation, conversation.turns[0], messages)
            await self._converse(number, conversation, messages, worded, self._now())

    async def _converse(
        self, number: int, conversation: Planned, messages: list[Message], worded: _Worded, intended_at: float
    ) -> None:
        last = len(conversation.turns) - 1
        for turn, following in itertools.zip_longest(range(last + 1), conversation.turns[1:]):
            answer = await self._ask(worded, intended_at, keep=turn < last, place=(number, turn))
            if following is None:
                return
            if answer is None:
                self.run.lost_turns += last - turn
                return
            # Think time begins when the answer ends.
            intended_at = self._now() + following.think / self.run.pace.time_scale
            if self._over(intended_at):
                return
            messages += [("assistant", answer), ("user", self._wording.render(following.text))]
            worded = self._word(conversation, following, messages)
            await self._sleep_until(intended_at)

    async def _ask(self, worded: _Worded, intended_at: float, *, keep: bool, place: tuple[int, int]) -> str | None:
        """Ask once and keep the record. Returns the answer's text when `keep`, and None when the request failed."""
        conversation, turn = place
        async with self._slot():
            self.run.sent += 1
            try:
                record, reply = await self._client.ask(
                    worded.body,
                    intended_at=intended_at,
                    api=worded.api,
                    keep=keep,
                    conversation=conversation,
                    turn=turn,
                )
            except asyncio.CancelledError:
                self.run.cancelled += 1
                raise
        self.run.records.append(record)
        if reply is None:
            self._failed += 1
            return None
        return reply.text() if keep else ""

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        if self._slots is None:
            yield
            return
        async with self._slots:
            yield

    def _opening(self, conversation: Planned) -> list[Message]:
        render = self._wording.render
        messages = [("system", render(conversation.system))] if conversation.system else []
        return [*messages, ("user", render(conversation.turns[0].text))]

    def _word(self, conversation: Planned, turn: Turn, messages: list[Message]) -> _Worded:
        if turn.raw is not None:
            return _Worded(*self._client.adapted(turn.raw))
        return _Worded(self._client.body(messages, turn.max_tokens, model=conversation.model))

    async def _sleep_until(self, moment: float) -> None:
        # Yield even when late, so that answers are read and stamped between two sends.
        await asyncio.sleep(max(0.0, moment - self._now()))
