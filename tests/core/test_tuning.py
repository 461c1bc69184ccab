"""A scheduler that is given other numbers while it decides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

import fakes
from picker.core.scheduler import Scheduler
from picker.types import Decision, EndpointAdded


def failing(times: int, **numbers: Any) -> Scheduler:
    """Of four endpoints `a` has failed so often in a row."""
    subject = fakes.scheduler("a", "b", "c", "d", **({"eject_after": 3, "eject_s": 4.0, "eject_max_s": 60.0} | numbers))
    row = subject.pool.row("a")
    assert row is not None
    for _ in range(times):
        subject.faults.failed(row, fakes.NOW)
    return subject


def retune(subject: Scheduler, now: float = fakes.NOW, **numbers: Any) -> None:
    subject.tune(replace(subject.settings, **numbers), now)


def asked(subject: Scheduler, count: int, now: float, first: int = 1) -> set[str]:
    outcomes = [subject.submit(fakes.request(first + number), now) for number in range(count)]
    return {outcome.endpoint.name for outcome in outcomes if isinstance(outcome, Decision)}


def test_who_rests_and_has_not_failed_as_often_as_it_takes_now_comes_back() -> None:
    subject = failing(3)
    assert "a" not in asked(subject, 40, fakes.NOW + 1.0)
    retune(subject, fakes.NOW + 1.0, eject_after=5)
    assert "a" in asked(subject, 40, fakes.NOW + 1.0, first=100)
    row = subject.pool.row("a")
    assert row is not None
    for _ in range(2):
        subject.faults.failed(row, fakes.NOW + 1.0)
    assert "a" not in asked(subject, 40, fakes.NOW + 1.0, first=200), "three faults and two make five"


def test_who_has_failed_as_often_as_it_takes_now_is_tried_by_one() -> None:
    subject = failing(2)
    retune(subject, eject_after=2)
    names = [subject.submit(fakes.request(number), fakes.NOW) for number in range(40)]
    assert sum(isinstance(each, Decision) and each.endpoint.name == "a" for each in names) == 1


def test_nobody_rests_longer_than_the_new_longest_rest() -> None:
    subject = failing(3, eject_s=50.0)
    retune(subject, eject_s=0.5, eject_max_s=2.0)
    assert "a" not in asked(subject, 40, fakes.NOW + 1.9)
    assert "a" in asked(subject, 40, fakes.NOW + 2.1, first=100)


def test_rests_go_on_when_other_numbers_change() -> None:
    subject = failing(3)
    retune(subject, retry_ratio=0.5, slow_start_s=1.0)
    assert "a" not in asked(subject, 40, fakes.NOW + 3.9)


def test_retries_of_late_count_against_the_new_budget() -> None:
    subject = failing(0, retry_ratio=0.0, retry_floor=5.0)
    assert [subject.retries.take(0, fakes.NOW) for _ in range(4)] == [True] * 4
    retune(subject, retry_floor=6.0)
    assert [subject.retries.take(0, fakes.NOW) for _ in range(3)] == [True, True, False]
    assert (subject.retries.allowed, subject.retries.refused) == (6, 1)


def test_requests_under_way_are_waited_for_as_long_as_is_said_now() -> None:
    subject = failing(0, hang_floor_s=10.0, hang_factor=0.0)
    subject.submit(fakes.request(1), fakes.NOW)
    assert subject.patience(1, fakes.NOW) == pytest.approx(10.0, abs=0.01)
    retune(subject, hang_floor_s=3.0)
    assert subject.patience(1, fakes.NOW) == pytest.approx(3.0, abs=0.01)
    retune(subject, hang_floor_s=0.0)
    assert subject.patience(1, fakes.NOW) == math.inf


def test_a_slow_start_that_has_begun_ends_when_it_is_switched_off() -> None:
    subject = failing(0, slow_start_s=100.0)
    now = fakes.NOW + 1000.0
    subject.apply(EndpointAdded(fakes.endpoint("new")), now)
    for number in range(40):
        subject.submit(fakes.request(number), now)
    few = subject.pool.inflight[subject.pool.row("new")]
    assert few <= 2
    retune(subject, now, slow_start_s=0.0)
    for number in range(40, 80):
        subject.submit(fakes.request(number), now)
    assert subject.pool.inflight[subject.pool.row("new")] > 8


def test_the_memory_and_the_choices_are_those_it_began_with() -> None:
    subject = failing(0)
    before = subject.settings
    retune(subject, seed=99, block_bytes=12, fallbacks=7, queue_size=3)
    assert (subject.settings.seed, subject.settings.block_bytes) == (before.seed, before.block_bytes)
    assert (subject.settings.fallbacks, subject.queue.capacity) == (7, 3)
