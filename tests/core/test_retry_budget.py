from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from picker.core.retry_budget import RetryBudget


def taken(budget: RetryBudget, tries: int, requests: int, now: float) -> int:
    return sum(budget.take(requests, now) for _ in range(tries))


def test_a_quiet_pool_has_the_floor() -> None:
    assert taken(RetryBudget(0.2, 3.0), tries=10, requests=0, now=1.0) == 3


def test_a_busy_pool_has_a_share_of_its_requests_on_top() -> None:
    budget = RetryBudget(0.2, 3.0)
    assert taken(budget, 1, requests=0, now=0.0) == 1
    assert taken(budget, 100, requests=100, now=5.0) == 22
    assert (budget.allowed, budget.refused) == (23, 78)


def test_it_fills_up_again() -> None:
    budget = RetryBudget(0.0, 5.0)
    assert taken(budget, 9, requests=0, now=0.0) == 5
    assert taken(budget, 9, requests=0, now=1.0) == 0
    assert taken(budget, 9, requests=0, now=60.0) == 4  # what is left of the first five still counts


def test_hours_without_a_retry_save_up_nothing() -> None:
    budget = RetryBudget(0.2, 0.0)
    budget.take(0, now=0.0)
    assert taken(budget, 2000, requests=360_000, now=3600.0) == 200  # of the last ten seconds at 100 a second


def test_what_was_under_way_where_an_endpoint_failed_is_granted_on_top() -> None:
    budget = RetryBudget(0.0, 1.0)
    for _ in range(50):
        budget.grant(10.0)
    assert taken(budget, 99, requests=50, now=10.05) == 51


def test_without_a_ratio_there_is_no_limit() -> None:
    assert taken(RetryBudget(None, 0.0), tries=1000, requests=0, now=0.0) == 1000


@settings(max_examples=50, deadline=None)
@given(
    ratio=st.floats(0.0, 1.0),
    floor=st.floats(0.0, 20.0),
    steps=st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(0, 50), st.integers(0, 100)), max_size=20),
)
def test_in_no_outage_are_there_more_retries_than_budget(
    ratio: float, floor: float, steps: list[tuple[float, int, int]]
) -> None:
    budget, now, requests, taken_ = RetryBudget(ratio, floor), 0.0, 0, 0.0
    for passed, came, tries in steps:
        now, requests, before = now + passed, requests + came, taken_
        taken_ += taken(budget, tries, requests, now)
        # By Little's law over the fading window: the floor may be had once in it.
        assert taken_ <= ratio * requests + floor * (1.0 + now / 10.0) + 1.0, (before, taken_)
    assert not math.isnan(taken_)
