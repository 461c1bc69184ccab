"""The circuit breaker, retries within a budget, hangs, newcomers, and what a full queue tells its clients."""

from __future__ import annotations

import math
from typing import Any

import pytest

from core.test_scheduler import column, decide, fault, load, picked, pinned
from fakes import NOW, endpoint, request, scheduler
from picker.core.scheduler import Scheduler
from picker.types import (
    Decision,
    EndpointAdded,
    EndpointDraining,
    EndpointRemoved,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    HealthObserved,
    Queued,
    Rejection,
    RejectReason,
)


def ended(subject: Scheduler, name: str, request_id: int, status: int, now: float = NOW) -> None:
    subject.submit(request(request_id, subset=pinned(name)), now)
    subject.apply(Finished(request_id, status), now)


def again(subject: Scheduler, request_id: int, *tried: str, now: float = NOW) -> Decision | Rejection | Queued:
    return subject.submit(request(request_id, exclude=frozenset(tried)), now)


def names(subject: Scheduler, count: int, now: float, first: int = 1000) -> list[str]:
    return [picked(subject, request(first + number), now) for number in range(count)]


# --- the circuit breaker ---


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 422, 429, 499, 501, 505])
def test_what_is_the_clients_fault_or_wish_opens_no_circuit(status: int) -> None:
    subject = scheduler("a", "b", eject_after=2, eject_s=5.0)
    for number in range(10):
        ended(subject, "a", number, status)
    assert column(subject, "a", "failures") == 0
    assert column(subject, "a", "ejected_until") == -math.inf


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_an_endpoints_own_faults_do(status: int) -> None:
    subject = scheduler("a", "b", eject_after=2, eject_s=5.0)
    for number in range(2):
        ended(subject, "a", number, status)
    assert column(subject, "a", "ejected_until") == NOW + 5.0


def test_clients_that_leave_open_no_circuit() -> None:
    subject = scheduler("a", "b", eject_after=1, eject_s=5.0)
    for number in range(5):
        subject.submit(request(number, subset=pinned("a")), NOW)
        subject.apply(Failed(number, FailureReason.CLIENT_GONE), NOW)
    assert column(subject, "a", "failures") == 0


def half_open() -> tuple[Scheduler, float]:
    """`a` of four has just rested, and has not been tried since."""
    subject = scheduler("a", "b", "c", "d", eject_after=3, eject_s=4.0, eject_max_s=60.0)
    fault(subject, "a", 1, times=3)
    return subject, NOW + 4.0


def test_after_its_rest_one_request_finds_out_whether_an_endpoint_answers() -> None:
    subject, now = half_open()
    assert names(subject, 40, now).count("a") == 1
    assert names(subject, 40, now + 3.9, first=2000).count("a") == 0


def test_when_that_one_fails_the_rest_is_twice_as_long() -> None:
    subject, now = half_open()
    probe = next(n for n in range(100, 140) if picked(subject, request(n), now) == "a")
    subject.apply(Failed(probe, FailureReason.RESET), now + 0.5)
    assert column(subject, "a", "ejected_until") == now + 0.5 + 8.0


def test_when_it_ends_well_the_endpoint_is_in_service() -> None:
    subject, now = half_open()
    probe = next(n for n in range(100, 140) if picked(subject, request(n, streaming=False), now) == "a")
    subject.charges.get(probe).sure = True  # type: ignore[union-attr]
    subject.apply(Finished(probe, 200), now + 0.5)
    assert column(subject, "a", "failures") == 0
    assert "a" in names(subject, 8, now + 0.5, first=2000)


def test_a_first_token_lets_the_next_one_try() -> None:
    subject, now = half_open()
    probe = next(n for n in range(100, 140) if picked(subject, request(n), now) == "a")
    subject.apply(FirstToken(probe), now + 0.1)
    assert names(subject, 40, now + 0.1, first=2000).count("a") == 1


# --- retries ---


def test_a_retry_goes_elsewhere_and_beyond_the_budget_nowhere() -> None:
    subject = scheduler("a", "b", retry_ratio=0.0, retry_floor=2.0)
    tried = [again(subject, number, "a") for number in range(4)]
    assert [isinstance(each, Decision) for each in tried] == [True, True, False, False]
    last = tried[-1]
    assert isinstance(last, Rejection)
    assert (last.reason, last.status) == (RejectReason.SATURATED, 503)
    assert (subject.retries.allowed, subject.retries.refused) == (2, 2)


def test_everything_that_was_under_way_at_an_endpoint_that_dies_may_move() -> None:
    subject = scheduler("a", "b", retry_ratio=0.0, retry_floor=0.0, eject_after=3)
    for number in range(30):
        subject.submit(request(number, subset=pinned("a")), NOW)
    for number in range(30):
        subject.apply(Failed(number, FailureReason.RESET), NOW + 1.0)
        assert isinstance(again(subject, number, "a", now=NOW + 1.0), Decision)


def test_those_whom_an_endpoint_turns_away_all_at_once_may_move() -> None:
    subject = scheduler("a", "b", retry_ratio=0.0, retry_floor=0.0, eject_after=3)
    for number in range(5):
        subject.submit(request(number, subset=pinned("a")), NOW)
    for number in range(5):
        subject.apply(Finished(number, 503), NOW + 1.0)
        assert isinstance(again(subject, number, "a", now=NOW + 1.0), Decision)


def test_what_was_sent_to_a_failing_endpoint_afterwards_is_a_matter_of_the_budget() -> None:
    subject = scheduler("a", "b", retry_ratio=0.0, retry_floor=0.0, eject_after=99)
    fault(subject, "a", 1)
    assert isinstance(again(subject, 1, "a"), Decision)
    fault(subject, "a", 2, now=NOW + 1.0)
    assert isinstance(again(subject, 2, "a", now=NOW + 1.0), Rejection)


def test_an_endpoint_that_comes_and_goes_is_granted_one_move_a_while() -> None:
    subject = scheduler("a", "b", retry_ratio=0.0, retry_floor=0.0, eject_after=99)
    moved = 0
    for second in range(20):
        now = NOW + second
        fault(subject, "a", 10 * second, now=now)
        moved += isinstance(again(subject, 10 * second, "a", now=now), Decision)
        ended(subject, "a", 10 * second + 5, 200, now)
    assert moved == 1


def test_what_ran_at_an_endpoint_that_was_removed_may_move() -> None:
    subject = scheduler("a", "b", retry_ratio=0.0, retry_floor=0.0)
    subject.submit(request(1, subset=pinned("a")), NOW)
    subject.apply(EndpointRemoved("a"), NOW)
    subject.apply(Failed(1, FailureReason.RESET), NOW + 1.0)
    assert isinstance(again(subject, 1, "a", now=NOW + 1.0), Decision)


# --- hangs ---


def hanging(**fields: Any) -> Scheduler:
    subject = scheduler("a", "b", hang_floor_s=10.0, hang_factor=4.0, eject_after=3, eject_s=5.0)
    decide(subject, request(1, subset=pinned("a"), **fields))
    return subject


def test_a_stream_is_waited_for_as_long_as_it_should_take_several_times_over() -> None:
    subject = hanging()
    predicted = subject.learned.work(1000.0, 1000.0)
    assert subject.patience(1, NOW) == pytest.approx(10.0 + 4.0 * predicted, rel=0.01)
    assert subject.patience(1, NOW + 12.0) < 0.0


def test_behind_others_it_is_waited_for_longer() -> None:
    subject = hanging()
    alone = subject.patience(1, NOW)
    for number in range(2, 22):
        decide(subject, request(number, subset=pinned("a")))
    assert subject.patience(21, NOW) > 2.0 * alone - 10.0


def test_an_answer_in_one_piece_may_take_as_long_as_all_its_tokens() -> None:
    short = hanging(streaming=False, max_tokens=100).patience(1, NOW)
    long = hanging(streaming=False, max_tokens=10_000).patience(1, NOW)
    unknown = hanging(streaming=False).patience(1, NOW)
    assert long > 10.0 * short
    assert unknown > 60.0


def test_an_endpoint_that_puts_something_out_is_busy_and_does_not_hang() -> None:
    subject = hanging()
    decide(subject, request(2, subset=pinned("a")))
    subject.apply(FirstToken(2), NOW + 30.0)
    assert subject.patience(1, NOW + 31.0) == pytest.approx(9.0)


def test_gauges_that_move_are_a_sign_of_life_and_frozen_ones_are_none() -> None:
    subject = hanging()
    for second, usage in ((0, 0.5), (20, 0.51), (25, 0.51), (30, 0.51)):
        subject.apply(load("a", kv_usage=usage, running=3.0), NOW + second)
    assert subject.patience(1, NOW + 29.0) == pytest.approx(1.0)
    assert subject.patience(1, NOW + 31.0) < 0.0


def test_without_a_prediction_or_a_limit_nobody_is_given_up() -> None:
    assert hanging(prompt_bytes=0).patience(1, NOW + 1e6) == math.inf
    off = scheduler("a", hang_floor_s=0.0)
    decide(off, request(1))
    assert off.patience(1, NOW + 1e6) == math.inf
    assert off.patience(77, NOW) == math.inf


def test_one_hang_is_enough_for_a_rest() -> None:
    subject = hanging()
    subject.apply(Failed(1, FailureReason.TIMEOUT), NOW + 15.0)
    assert column(subject, "a", "ejected_until") == NOW + 20.0
    assert set(names(subject, 6, NOW + 16.0)) == {"b"}


def test_a_late_answer_of_an_endpoint_that_works_is_one_fault() -> None:
    subject = hanging()
    decide(subject, request(2, subset=pinned("a")))
    subject.apply(FirstToken(2), NOW + 10.0)
    subject.apply(Failed(1, FailureReason.TIMEOUT), NOW + 15.0)
    assert column(subject, "a", "failures") == 1
    assert column(subject, "a", "ejected_until") == -math.inf


# --- newcomers, and those that come back ---


def test_a_newcomer_is_not_flooded() -> None:
    subject = scheduler("a", "b", slow_start_s=10.0)
    for number in range(20):
        decide(subject, request(number), NOW + 50.0)
    subject.apply(EndpointAdded(endpoint("new")), NOW + 60.0)
    assert names(subject, 12, NOW + 60.0).count("new") == 1
    assert names(subject, 20, NOW + 65.0, first=2000).count("new") >= 4


def test_neither_is_one_that_was_unhealthy() -> None:
    subject = scheduler("a", "b", slow_start_s=10.0)
    subject.apply(HealthObserved("b", False, "refused"), NOW + 50.0)
    for number in range(20):
        decide(subject, request(number), NOW + 50.0)
    subject.apply(HealthObserved("b", True), NOW + 60.0)
    assert names(subject, 12, NOW + 60.0).count("b") == 1


def test_one_that_drains_gets_nothing_new_and_keeps_what_it_has() -> None:
    subject = scheduler("a", "b")
    decide(subject, request(1, subset=pinned("a")))
    subject.apply(EndpointDraining("a"), NOW)
    assert set(names(subject, 6, NOW)) == {"b"}
    assert column(subject, "a", "inflight") == 1
    subject.apply(EndpointDraining("a", draining=False), NOW)
    assert "a" in names(subject, 6, NOW, first=2000)


# --- a full queue ---


def test_who_is_sent_away_is_told_when_there_will_be_room() -> None:
    subject = scheduler("a", max_inflight=1, queue_size=4)
    decide(subject, request(0))
    for number in range(1, 5):
        assert isinstance(subject.submit(request(number), NOW), Queued)
    for number in range(3):  # one leaves every two seconds
        now = NOW + 2.0 * (number + 1)
        subject.apply(Finished(number, 200), now)
        assert len(subject.poll(now)) == 1
        assert isinstance(subject.submit(request(100 + number), now), Queued)
    refused = subject.submit(request(99), NOW + 6.0)
    assert isinstance(refused, Rejection)
    assert (refused.reason, refused.status) == (RejectReason.SATURATED, 429)
    assert refused.retry_after == pytest.approx(8.0, rel=0.3)  # four wait, two seconds each
