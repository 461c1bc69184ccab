from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import cast

import pytest

from picker.frontends.leash import Leash, Watch
from picker.types import FailureReason

TIMEOUT, CLIENT_GONE = FailureReason.TIMEOUT, FailureReason.CLIENT_GONE


class ManualLoop:
    """The part of an event loop that keeps time, moved by hand. timers: how many were ever set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers = 0
        self._due: list[tuple[float, ManualTimer]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, at: float, callback: Callable[[], None]) -> ManualTimer:
        self.timers += 1
        timer = ManualTimer(callback)
        self._due.append((at, timer))
        return timer

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [entry for entry in self._due if entry[0] <= end]:
            self.now, timer = entry = min(due, key=lambda entry: entry[0])
            self._due.remove(entry)
            timer.ring()
        self.now = end

    @property
    def pending(self) -> int:
        return sum(not timer.cancelled for _, timer in self._due)


class ManualTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def ring(self) -> None:
        if not self.cancelled:
            self._callback()


class CountingTask:
    """cancelling: how often it was cancelled and not uncancelled."""

    def __init__(self) -> None:
        self.cancelling = 0

    def cancel(self) -> None:
        self.cancelling += 1

    def uncancel(self) -> None:
        self.cancelling -= 1


class Held:
    """A task on a leash; `another` shares its loop and watch."""

    def __init__(self, another: Held | None = None) -> None:
        self.loop: ManualLoop = another.loop if another else ManualLoop()
        self.watch: Watch = another.watch if another else Watch(cast(asyncio.AbstractEventLoop, self.loop))
        self.task = CountingTask()
        self.leash = Leash(cast("asyncio.Task[None]", self.task), self.watch)


def test_a_wait_that_takes_too_long_is_cancelled_with_its_blame() -> None:
    held = Held()
    held.leash.within(10.0, TIMEOUT)
    held.loop.advance(9.9)
    assert held.task.cancelling == 0
    held.loop.advance(0.2)
    assert (held.task.cancelling, held.leash.reason) == (1, TIMEOUT)


def test_a_later_deadline_replaces_an_earlier_one_to_the_point() -> None:
    held = Held()
    held.leash.within(10.0, TIMEOUT)
    held.loop.advance(5.0)
    held.leash.within(10.0, CLIENT_GONE)
    held.loop.advance(9.9)
    assert held.leash.reason is None
    held.loop.advance(0.1)
    assert held.leash.reason is CLIENT_GONE


def test_an_earlier_deadline_replaces_a_later_one() -> None:
    held = Held()
    held.leash.within(60.0, CLIENT_GONE)
    held.leash.within(1.0, TIMEOUT)
    held.loop.advance(1.0)
    assert held.leash.reason is TIMEOUT


def test_a_long_stream_sets_few_timers() -> None:
    held = Held()
    for _ in range(1000):
        held.leash.within(10.0, TIMEOUT)
        held.loop.advance(0.1)
        held.leash.within(10.0, CLIENT_GONE)
    assert held.leash.reason is None
    assert held.loop.timers < 15


def test_without_a_deadline_nothing_is_pulled_and_a_new_one_holds_again() -> None:
    held = Held()
    held.leash.within(1.0, TIMEOUT)
    held.leash.within(math.inf, CLIENT_GONE)
    held.loop.advance(1000.0)
    assert held.leash.reason is None
    held.leash.within(1.0, TIMEOUT)
    held.loop.advance(1.0)
    assert held.leash.reason is TIMEOUT


def test_a_slackened_task_goes_on_and_can_be_pulled_again() -> None:
    held = Held()
    held.leash.within(1.0, TIMEOUT)
    held.loop.advance(1.0)
    held.leash.slacken()
    assert (held.task.cancelling, held.leash.reason) == (0, None)
    held.leash.pull()
    assert (held.task.cancelling, held.leash.reason) == (1, CLIENT_GONE)


def test_the_first_reason_stays_and_cancels_once() -> None:
    held = Held()
    held.leash.within(1.0, TIMEOUT)
    held.leash.pull(CLIENT_GONE)
    held.loop.advance(1.0)
    assert (held.task.cancelling, held.leash.reason) == (1, CLIENT_GONE)


def test_after_its_release_it_pulls_nothing() -> None:
    held = Held()
    held.leash.within(1.0, TIMEOUT)
    held.leash.release()
    held.leash.pull()
    held.loop.advance(2.0)
    assert (held.task.cancelling, held.leash.reason) == (0, None)
    assert held.loop.pending == 0


def test_a_closed_watch_leaves_no_timer() -> None:
    held = Held()
    held.leash.within(1.0, TIMEOUT)
    held.watch.close()
    assert held.loop.pending == 0


def test_many_requests_share_few_timers() -> None:
    first = Held()
    for _ in range(1000):
        held = Held(first)
        held.leash.within(10.0, TIMEOUT)
        first.loop.advance(0.05)
        held.leash.release()
    assert first.loop.timers < 10


def test_each_of_many_is_held_to_its_own_deadline() -> None:
    first = Held()
    every = [first, *(Held(first) for _ in range(9))]
    for number, held in enumerate(reversed(every)):
        held.leash.within(10.0 - number, TIMEOUT)
    for number, held in enumerate(every, start=1):
        assert held.leash.reason is None
        first.loop.advance(float(number) - first.loop.now)
        assert held.leash.reason is TIMEOUT


def test_deadlines_one_upon_another_are_looked_at_together_a_moment_later() -> None:
    first = Held()
    every = [first, *(Held(first) for _ in range(99))]
    for number, held in enumerate(every):
        held.leash.within(1.0 + number * 1e-4, TIMEOUT)
    first.loop.advance(1.0 + 0.01 + 0.01)
    assert all(held.leash.reason is TIMEOUT for held in every)
    assert first.loop.timers < 5


def test_one_that_fails_when_its_time_is_over_leaves_the_others_watched() -> None:
    first = Held()
    second = Held(first)
    for held in (first, second):
        held.leash.within(1.0, TIMEOUT, lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            first.loop.advance(1.0)
    first.loop.advance(1.0)
    third = Held(first)
    third.leash.within(1.0, TIMEOUT)
    first.loop.advance(1.0)
    assert third.leash.reason is TIMEOUT


def test_when_the_time_is_over_whoever_knows_better_is_asked() -> None:
    held = Held()
    loop, task, leash = held.loop, held.task, held.leash
    answers = [3.0, 0.0]
    leash.within(10.0, TIMEOUT, lambda: answers.pop(0))
    loop.advance(12.9)
    assert (task.cancelling, answers) == (0, [0.0])
    loop.advance(0.2)
    assert (task.cancelling, leash.reason) == (1, TIMEOUT)


def test_the_next_deadline_asks_nobody() -> None:
    held = Held()
    loop, leash = held.loop, held.leash
    leash.within(10.0, TIMEOUT, lambda: 1e6)
    leash.within(1.0, TIMEOUT)
    loop.advance(1.1)
    assert leash.reason is TIMEOUT


def test_how_long_somebody_has_been_waited_for() -> None:
    held = Held()
    loop, leash = held.loop, held.leash
    leash.within(10.0, TIMEOUT)
    loop.advance(4.0)
    assert (leash.silence(TIMEOUT), leash.silence(CLIENT_GONE)) == (4.0, 0.0)
    leash.within(10.0, CLIENT_GONE)
    assert leash.silence(TIMEOUT) == 0.0
