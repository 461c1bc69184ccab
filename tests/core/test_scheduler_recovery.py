"""Who served, where it is not who was named; and how endpoints that failed come back."""

from __future__ import annotations

import pytest

from core.test_scheduler import column, decide, fault, load, picked, pinned
from fakes import NOW, blocks, request, scheduler
from picker.core.scheduler import Scheduler
from picker.types import (
    Failed,
    FailureReason,
    Finished,
    HealthObserved,
    Rejection,
    ResponseStarted,
    ScrapeFailed,
)

PROMPT = blocks(document=100)


def known(subject: Scheduler, name: str) -> int:
    """Blocks of the prompt that this endpoint is believed to hold."""
    row = subject.pool.row(name)
    assert row is not None
    return int(subject.index.match(PROMPT)[row])


def prefer(subject: Scheduler, name: str) -> None:
    """Have the next request of the prompt go there first, with the others behind."""
    decide(subject, request(999, PROMPT, subset=pinned(name)))
    subject.apply(ResponseStarted(999, 200, f"{name}:8000"), NOW)
    subject.apply(Finished(999, 200), NOW)


def names(subject: Scheduler, count: int, now: float, first: int = 1000) -> set[str]:
    return {picked(subject, request(first + number), now) for number in range(count)}


# --- who served ---


def test_the_prompt_is_known_to_be_cached_where_it_was_served_and_not_where_it_was_sent() -> None:
    subject = scheduler("a", "b")
    first = picked(subject, request(1, PROMPT))
    other = {"a": "b", "b": "a"}[first]
    assert known(subject, first) == 100
    subject.apply(ResponseStarted(1, 200, f"{other}:8000"), NOW)
    assert (known(subject, first), known(subject, other)) == (0, 100)


def test_what_was_cached_before_stays_known_where_a_request_was_not_served() -> None:
    subject = scheduler("a", "b")
    prefer(subject, "a")
    longer = blocks(document=100, more=50)
    assert picked(subject, request(1, longer)) == "a"
    subject.apply(ResponseStarted(1, 200, "b:8000"), NOW)
    assert known(subject, "a") == 100
    row = subject.pool.row("a")
    assert subject.index.match(longer)[row] == 100


@pytest.mark.parametrize(
    "fact", [Failed(1, FailureReason.CONNECT), Finished(1, 503), Finished(1, 400), Failed(1, FailureReason.TIMEOUT)]
)
def test_a_prompt_that_was_never_computed_is_not_taken_to_be_cached(fact: Failed | Finished) -> None:
    subject = scheduler("a")
    decide(subject, request(1, PROMPT))
    subject.apply(fact, NOW)
    assert known(subject, "a") == 0


def test_a_client_that_leaves_does_not_take_the_prompt_along() -> None:
    subject = scheduler("a")
    decide(subject, request(1, PROMPT))
    subject.apply(Failed(1, FailureReason.CLIENT_GONE), NOW)
    assert known(subject, "a") == 100


def test_those_in_the_list_before_who_served_have_failed_and_those_behind_have_not() -> None:
    subject = scheduler("a", "b", "c", "d", fallbacks=3)
    decision = decide(subject, request(1))
    order = [decision.endpoint.name, *(each.name for each in decision.fallbacks)]
    subject.apply(ResponseStarted(1, 200, f"{order[2]}:8000"), NOW)
    assert [column(subject, name, "failures") for name in order] == [1, 1, 0, 0]


def test_a_good_answer_of_nobody_knows_whom_does_not_vouch_for_an_endpoint_that_cannot_be_reached() -> None:
    subject = scheduler("a", "b")
    prefer(subject, "a")
    subject.apply(HealthObserved("a", False, "refused"), NOW + 20)
    assert picked(subject, request(1, PROMPT), NOW + 20) == "b"
    subject.apply(HealthObserved("a", True), NOW + 21)
    for number in range(2, 6):
        assert picked(subject, request(number, PROMPT, subset=frozenset({"a:8000", "b:8000"})), NOW + 21) in "ab"
        subject.apply(ResponseStarted(number, 200), NOW + 21)
        subject.apply(Finished(number, 200), NOW + 21)
    for name in "ab":
        assert column(subject, name, "succeeded_at") <= NOW
    subject.apply(HealthObserved("a", False, "refused"), NOW + 22)
    assert names(subject, 6, NOW + 22) == {"b"}


def test_where_nobody_can_be_probed_those_that_seem_to_answer_are_used() -> None:
    """Metrics behind a wall, and a gateway that does not tell who answered."""
    subject = scheduler("a", "b")
    for number in range(4):
        picked(subject, request(number))
        subject.apply(ResponseStarted(number, 200), NOW)
        subject.apply(Finished(number, 200), NOW)
    for name in "ab":
        subject.apply(HealthObserved(name, False, "refused"), NOW)
    assert names(subject, 6, NOW + 1) == {"a", "b"}
    assert isinstance(subject.submit(request(77), NOW + 30), Rejection)


def test_an_answer_of_nobody_knows_whom_is_put_down_to_the_first_that_can_be_reached() -> None:
    subject = scheduler("a", "b", "c")
    prefer(subject, "a")
    decision = decide(subject, request(1, PROMPT))
    assert decision.endpoint.name == "a"
    second = decision.fallbacks[0].name
    subject.apply(HealthObserved("a", False, "refused"), NOW + 20)
    subject.apply(ResponseStarted(1, 200), NOW + 20)
    assert column(subject, "a", "inflight") == 0
    assert column(subject, second, "inflight") == 1
    assert known(subject, second) == 100


def test_an_only_choice_is_who_served_without_being_told() -> None:
    subject = scheduler("a", "b", fallbacks=0)
    name = picked(subject, request(1))
    subject.apply(ResponseStarted(1, 200), NOW + 5)
    subject.apply(Finished(1, 200), NOW + 5)
    assert column(subject, name, "succeeded_at") == NOW + 5


# --- coming back ---


def test_many_faults_at_once_are_one_rest() -> None:
    subject = scheduler("a", "b", eject_after=3, eject_s=1.0)
    for number in range(20):
        subject.submit(request(number, subset=pinned("a")), NOW)
    for number in range(20):
        subject.apply(Failed(number, FailureReason.CONNECT), NOW)
    assert column(subject, "a", "ejected_until") == NOW + 1.0


def test_a_good_answer_ends_a_rest_and_makes_the_next_one_short_again() -> None:
    subject = scheduler("a", "b", eject_after=1, eject_s=4.0)
    fault(subject, "a", 1)
    fault(subject, "b", 2)
    assert picked(subject, request(3, subset=pinned("a")), NOW + 1) == "a"
    subject.apply(ResponseStarted(3, 200, "a:8000"), NOW + 1)
    subject.apply(Finished(3, 200), NOW + 1)
    assert names(subject, 6, NOW + 1) == {"a"}
    fault(subject, "a", 4, now=NOW + 2)
    assert column(subject, "a", "ejected_until") == NOW + 6.0


def test_with_most_endpoints_at_rest_each_is_tried_once_in_a_while() -> None:
    subject = scheduler("a", "b", "c", eject_after=1, eject_s=1.0, eject_max_s=60.0)
    now = NOW
    for number in range(6):
        fault(subject, "a", 10 * number, now=now)
        fault(subject, "b", 10 * number + 5, now=now)
        now = column(subject, "a", "ejected_until")
    now -= 20.0
    assert min(column(subject, name, "ejected_until") for name in "ab") == now + 20.0
    for first, instant in ((2000, now), (3000, now + 1.0)):
        tried = [picked(subject, request(first + number), instant) for number in range(12)]
        assert (tried.count("a"), tried.count("b")) == (1, 1)
        assert names(subject, 8, instant + 0.9, first + 500) == {"c"}


def test_with_most_endpoints_in_service_those_at_rest_are_left_alone() -> None:
    subject = scheduler("a", "b", "c", eject_after=1, eject_s=1.0)
    fault(subject, "a", 1)
    fault(subject, "a", 2, now=NOW + 1.0)  # rests for two seconds
    assert names(subject, 12, NOW + 2.5) == {"b", "c"}


def test_an_endpoint_that_was_gone_and_can_be_scraped_again_need_not_rest() -> None:
    subject = scheduler("a", "b", "c", "d", eject_after=1, eject_s=30.0)
    fault(subject, "a", 1)
    subject.apply(load("a", waiting=0), NOW + 1)  # it could be scraped all along: no sign of a change
    assert "a" not in names(subject, 8, NOW + 1)
    subject.apply(ScrapeFailed("a", NOW + 2, "refused"), NOW + 2)
    subject.apply(load("a", waiting=0), NOW + 3)
    assert "a" in names(subject, 8, NOW + 3, first=2000)


def test_an_endpoint_that_is_healthy_again_need_not_rest() -> None:
    subject = scheduler("a", "b", "c", "d", eject_after=1, eject_s=30.0)
    fault(subject, "a", 1)
    for healthy in (False, True):
        subject.apply(HealthObserved("a", healthy), NOW + 1)
    assert "a" in names(subject, 8, NOW + 1)


def test_an_engine_that_was_restarted_need_not_rest() -> None:
    subject = scheduler("a", "b", "c", "d", eject_after=1, eject_s=30.0)
    subject.apply(load("a", started_at=100.0), NOW)
    fault(subject, "a", 1)
    subject.apply(load("a", started_at=200.0), NOW + 1)
    assert "a" in names(subject, 8, NOW + 1)


def test_one_that_came_back_and_fails_again_rests_longer_at_once() -> None:
    subject = scheduler("a", "b", "c", "d", eject_after=3, eject_s=1.0)
    fault(subject, "a", 1, times=3)
    for healthy in (False, True):
        subject.apply(HealthObserved("a", healthy), NOW + 0.5)
    fault(subject, "a", 10, now=NOW + 0.5)
    assert column(subject, "a", "ejected_until") == NOW + 2.5


def test_after_a_total_outage_everyone_is_in_service_a_moment_after_it_answers() -> None:
    subject = scheduler("a", "b", "c", eject_after=3, eject_s=1.0, eject_max_s=30.0)
    now, number = NOW, 0
    while now < NOW + 40:
        for name in "abc":
            fault(subject, name, number := number + 1, now=now)
        now += 0.2
    back: dict[str, float] = {}
    while now < NOW + 44 and len(back) < 3:
        number += 1
        name = picked(subject, request(number), now)
        back.setdefault(name, now)
        subject.apply(ResponseStarted(number, 200, f"{name}:8000"), now)
        subject.apply(Finished(number, 200), now + 0.05)
        now += 0.1
    assert set(back) == {"a", "b", "c"}
    assert max(back.values()) - min(back.values()) <= 1.2
