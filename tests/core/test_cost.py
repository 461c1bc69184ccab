from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import NOW, pool, request, view
from picker.core.cost import CostModel
from picker.core.pool import Pool

SPEED = 1000.0  # tokens per second


def terms(of: Pool, *, prompt_tokens: float = 500.0, now: float = NOW, **known: Any) -> dict[str, list[float]]:
    fields = {"speed": np.full(len(of), SPEED)} | known
    seen = view(of, prompt_tokens=prompt_tokens, now=now, **fields)
    return {name: seconds.tolist() for name, seconds in CostModel().terms(seen, request()).items()}


def total(of: Pool, *, now: float = NOW, **known: Any) -> list[float]:
    return [float(sum(each)) for each in zip(*terms(of, now=now, **known).values(), strict=True)]


def booked(count: int, tokens: int, *, since: float = 0.0) -> dict[str, float]:
    """So many prefills of so many tokens each, booked `since` seconds ago."""
    backlog = count * tokens
    since_then = {"busy_since": NOW - since, "awaited": backlog}
    return {"prefilling": count, "inflight": count, "backlog": backlog} | since_then


def test_an_idle_endpoint_costs_only_its_own_prefill() -> None:
    assert terms(pool(a=0)) == {
        "queue": [0.0],
        "stall": [0.0],
        "prefill": [0.5],
        "neighbours": [0.0],
        "foreign": [0.0],
        "memory": [0.0],
    }


def test_what_is_cached_is_not_computed_again() -> None:
    assert terms(pool(a=0, b=0), uncached=np.array([500.0, 100.0]))["prefill"] == [0.5, 0.1]


def test_a_faster_endpoint_costs_less_for_the_same_work() -> None:
    made = pool(slow=booked(1, 2000), fast=booked(1, 2000))
    cost = terms(made, speed=np.array([1000.0, 4000.0]))
    assert (cost["prefill"], cost["queue"]) == ([0.5, 0.125], [2.0, 0.5])


def test_the_queue_shrinks_by_what_was_done_since_but_not_below_the_prefills_behind_the_first() -> None:
    made = pool(a=booked(2, 1000))
    assert terms(made)["queue"] == [2.0]
    assert terms(made, now=NOW + 0.4)["queue"] == pytest.approx([1.6])
    assert terms(made, now=NOW + 50)["queue"] == [1.0]


def test_silence_beyond_the_expected_makes_an_endpoint_dearer_by_the_second() -> None:
    made = pool(hangs=booked(1, 1000))
    assert terms(made, now=NOW + 3)["stall"] == [0.0]
    assert terms(made, now=NOW + 4)["stall"] == [1.0]
    assert terms(made, now=NOW + 60)["stall"] == [57.0]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 5), tokens=st.integers(0, 9000), more=st.integers(0, 9000), silent=st.floats(0.0, 100.0))
def test_more_work_never_makes_an_endpoint_cheaper(count: int, tokens: int, more: int, silent: float) -> None:
    made = pool(a=0)
    for _ in range(count):
        made.book(0, tokens=tokens, context=tokens, now=NOW)
    before = total(made, now=NOW + silent)
    made.book(0, tokens=more, context=more, now=NOW + silent)
    assert total(made, now=NOW + silent)[0] >= before[0] - 1e-9


def test_a_hanging_endpoint_soon_costs_more_than_a_busy_one_that_moves() -> None:
    made = pool(hangs=booked(1, 100), moves=booked(20, 500) | {"progress_at": NOW})
    hangs, moves = total(made)
    assert hangs < moves
    made.progress_at[1] = NOW + 60
    hangs, moves = total(made, now=NOW + 60)
    assert hangs > moves


def test_a_prefill_is_felt_by_every_request_in_flight_there() -> None:
    assert terms(pool(a=0, b=10))["neighbours"] == pytest.approx([0.0, 0.35 * 0.5 * 10])


def test_requests_of_other_gateways_cost_their_prefills() -> None:
    made = pool(alone={"waiting": 2} | booked(2, 1000), shared={"waiting": 5} | booked(2, 1000))
    assert terms(made)["foreign"] == [0.0, 3.0]


def test_nothing_foreign_is_assumed_when_nobody_was_scraped() -> None:
    assert terms(pool(a=0, b=0))["foreign"] == [0.0, 0.0]


def test_an_unknown_queue_is_taken_to_be_like_the_others() -> None:
    foreign = terms(pool(known={"waiting": 6}, idle={"waiting": 2}, unknown={}))["foreign"]
    assert foreign == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("column", ["waiting", "kv_usage", "kv_capacity", "running"])
def test_an_endpoint_never_scraped_is_neither_shunned_nor_flooded(column: str) -> None:
    level = {"waiting": 2.0, "kv_usage": 0.5, "kv_capacity": 50_000.0, "running": 4.0}
    without = {name: value for name, value in level.items() if name != column}
    known, unknown = total(pool(known=level, unknown=without))
    assert known == pytest.approx(unknown)


def test_memory_is_free_up_to_the_headroom_and_then_costs_what_must_be_computed_again() -> None:
    made = pool(
        fits={"kv_capacity": 10_000, "context": 8_500},
        over={"kv_capacity": 10_000, "context": 9_500},
    )
    assert terms(made)["memory"] == pytest.approx([0.0, 1.0])


def test_a_capacity_nobody_knows_has_no_price_and_one_unknown_is_like_the_others() -> None:
    assert terms(pool(a={"context": 99_999}))["memory"] == [0.0]
    made = pool(known={"kv_capacity": 10_000, "context": 9_500}, unknown={"context": 9_500})
    assert terms(made)["memory"] == pytest.approx([1.0, 1.0])
    made = pool(full={"kv_capacity": 10_000, "kv_usage": 1.0}, unknown={"kv_capacity": 10_000})
    assert terms(made)["memory"] == pytest.approx([1.0, 1.0])


def test_memory_counts_what_a_scrape_shows_when_that_is_more() -> None:
    made = pool(a={"kv_capacity": 10_000, "kv_usage": 0.95}, b={"kv_capacity": 10_000, "kv_usage": 0.2})
    assert terms(made)["memory"] == pytest.approx([0.5, 0.0])


numbers = st.floats(0, 1e6)
scraped = st.none() | numbers
columns = st.fixed_dictionaries(
    {
        "awaited": st.integers(0, 10**7),
        "prefilling": st.integers(0, 100),
        "inflight": st.integers(0, 500),
        "backlog": st.integers(0, 10**7),
        "context": st.integers(0, 10**8),
        "silent": st.floats(0, 1e4),
        "waiting": scraped,
        "kv_usage": st.none() | st.floats(0, 1),
        "kv_capacity": st.none() | st.floats(1, 1e8),
        "speed": st.floats(0.1, 1e6),
        "cached": st.floats(0, 1),
    }
)


@settings(max_examples=80, deadline=None)
@given(states=st.lists(columns, min_size=1, max_size=4), prompt=st.floats(0, 1e6))
def test_every_term_is_a_finite_number_of_seconds_and_none_is_negative(
    states: list[dict[str, float | None]], prompt: float
) -> None:
    made = pool()
    for number, state in enumerate(states):
        row = made.add(next(each for _, each in pool(**{f"e{number}": 0})), NOW)
        for column in ("prefilling", "inflight", "backlog", "awaited", "context", "waiting", "kv_usage", "kv_capacity"):
            if state[column] is not None:
                getattr(made, column)[row] = state[column]
        made.busy_since[row] = NOW - (state["silent"] or 0.0)
    speed = np.array([state["speed"] for state in states], dtype=np.float64)
    uncached = prompt * np.array([state["cached"] for state in states], dtype=np.float64)
    cost = terms(made, prompt_tokens=prompt, speed=speed, uncached=uncached)
    for name, seconds in cost.items():
        assert np.isfinite(seconds).all(), name
        assert min(seconds) >= 0.0, name
