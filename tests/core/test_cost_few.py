"""`core.cost_few` against `core.cost`: the same numbers to the last bit, whatever the pool looks like."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import NOW, endpoint, learned, request
from picker.core.adapters import Adapters
from picker.core.cost import CostModel
from picker.core.cost_few import FEW, Terms, rank_few, suits
from picker.core.learned import Learned
from picker.core.pool import Pool
from picker.core.profile import Cost
from picker.core.view import PoolView

MODEL = CostModel()


def plain_rank(view: PoolView) -> tuple[list[float], dict[str, list[float]]]:
    """What `Cost` makes of `CostModel.terms`, for any number of candidates."""
    terms = MODEL.terms(view, request())
    total = np.zeros(view.n)
    for term in terms.values():
        total -= term
    return total.tolist(), {name: term.tolist() for name, term in terms.items()}


STATES = st.fixed_dictionaries(
    {
        "prefilling": st.integers(0, 3),
        "decodes": st.integers(0, 40),
        "backlog": st.integers(0, 100_000),
        "work": st.integers(0, 10**11),
        "awaited": st.integers(0, 10**11),
        "pinned": st.integers(0, 10**6),
        "decoding": st.integers(0, 10**6),
        "recent": st.just(0.0) | st.floats(0, 500),
        "recently": st.floats(0, 200),
        "silent": st.floats(0, 1e4),
        "progress": st.just(np.inf) | st.floats(0, 1e4),
        "waiting": st.none() | st.floats(0, 100),
        "kv_capacity": st.none() | st.floats(1e3, 1e7),
        "cached": st.floats(0, 1),
        "shared": st.floats(0, 1),
        "speed": st.floats(0.1, 10),
    }
)


def pool_of(states: list[dict[str, Any]]) -> Pool:
    made = Pool(rows=4)
    for number, state in enumerate(states):
        row = made.add(endpoint(f"e{number}"), NOW)
        busy, prefills = state["prefilling"] + state["decodes"], state["prefilling"]
        made.inflight[row], made.prefilling[row] = busy, prefills
        # As `Pool` books: nothing is ahead where nothing prefills, and nothing held where nothing is in flight.
        for column in ("backlog", "work", "awaited"):
            getattr(made, column)[row] = state[column] if prefills else 0
        made.pinned[row] = state["pinned"] if busy else 0
        made.decoding[row] = state["decoding"] if state["decodes"] else 0
        made.recent[row], made.recent_at[row] = state["recent"], NOW - state["recently"]
        made.busy_since[row], made.progress_at[row] = NOW - state["silent"], NOW - state["progress"]
        for column in ("waiting", "kv_capacity"):
            if state[column] is not None:
                getattr(made, column)[row] = state[column]
    return made


def view_of(states: list[dict[str, Any]], prompt: float, taught: Learned) -> PoolView:
    for row, state in enumerate(states):
        taught.prefill_speed.add(row, expected=1.0, took=state["speed"])
        taught.decode_speed.add(row, expected=state["speed"], took=1.0)
    uncached, shared = (prompt * np.array([state[of] for state in states], dtype=float) for of in ("cached", "shared"))
    known: dict[str, Any] = {"prompt_tokens": prompt, "uncached": uncached, "shared": shared, "learned": taught}
    return PoolView(pool_of(states), np.arange(len(states)), NOW, **known)


@settings(max_examples=150, deadline=None)
@given(
    states=st.lists(STATES, min_size=1, max_size=12),
    prompt=st.just(0.0) | st.floats(0, 1e6),
    bookings=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.booleans()), max_size=5),
)
def test_few_candidates_cost_what_many_do_to_the_last_bit(
    states: list[dict[str, Any]], prompt: float, bookings: list[tuple[float, float, bool]]
) -> None:
    taught = Learned(16)
    for seconds, before, tied in sorted(bookings, key=lambda each: -each[1]):
        taught.booked(seconds, tied=tied, now=NOW - before)
    view = view_of(states, prompt, taught)
    total, terms = rank_few(MODEL, view)
    assert (total.tolist(), {name: term.tolist() for name, term in terms.items()}) == plain_rank(view)


def test_the_default_profile_takes_the_short_way_for_few_candidates_and_the_other_for_many() -> None:
    for count, kind in ((FEW, Terms), (FEW + 1, dict)):
        made = Pool(rows=count)
        for number in range(count):
            made.add(endpoint(f"e{number}"), NOW)
        view = PoolView(made, np.arange(count), NOW, prompt_tokens=100.0, learned=learned(rows=count))
        assert isinstance(Cost().rank(view, request())[1], kind)


def test_an_adapter_and_nobody_at_all_are_left_to_the_long_way() -> None:
    made = Pool(rows=1)
    made.add(endpoint("a"), NOW)
    adapters = Adapters(1)
    adapters.known.add("lora")
    assert not suits(PoolView(made, np.arange(1), NOW, model="lora", adapters=adapters))
    assert not suits(PoolView(made, np.arange(0), NOW))
    assert suits(PoolView(made, np.arange(1), NOW, model="other", adapters=adapters))


def test_terms_are_asked_for_by_name() -> None:
    terms = Terms([(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), (8.0,) * 7])
    assert list(terms) == ["queue", "prefill", "followers", "neighbours", "decoding", "memory", "stall"]
    assert terms["stall"].tolist() == [7.0, 8.0]
    with pytest.raises(KeyError):
        terms["adapter"]
