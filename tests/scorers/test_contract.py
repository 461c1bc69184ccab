"""What every scorer promises. Walks the folder: a new scorer is held to this by existing."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import picker.scorers
from fakes import NOW, endpoint, pool, request
from picker.core.pool import COLUMNS, Pool
from picker.core.view import PoolView
from picker.scorers.no_hit_lru import NoHitLru
from picker.types import Int64Array

MODEL = "adapter"
TOTAL_BLOCKS = 8

unknown_or = st.none() | st.integers(0, 50)
states = st.fixed_dictionaries(
    {
        "waiting": unknown_or,
        "running": unknown_or,
        "kv_usage": st.none() | st.floats(0, 1.2),
        "kv_capacity": st.none() | st.integers(1, 10**7),
        "max_adapters": unknown_or,
        "observed_at": st.none() | st.floats(0, NOW),
        "inflight": st.integers(0, 50),
        "prefilling": st.integers(0, 50),
        "backlog": st.integers(0, 10**6),
        "context": st.integers(0, 10**6),
        "last_pick": st.integers(0, 9),
        "has_adapter": st.booleans(),
        "matched": st.integers(0, TOTAL_BLOCKS),
    }
)
State = dict[str, Any]


def found() -> list[type[Any]]:
    """Every class of the folder that can be called with a view and a request."""
    modules = [
        importlib.import_module(f"{picker.scorers.__name__}.{module.name}")
        for module in pkgutil.iter_modules(picker.scorers.__path__)
    ]
    return [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__ and "__call__" in vars(kind)
    ]


def pool_of(given_states: list[State]) -> Pool:
    made = pool()
    for number, state in enumerate(given_states):
        row = made.add(endpoint(f"e{number}"), NOW)
        for column in COLUMNS.keys() & state.keys():
            if state[column] is not None:
                getattr(made, column)[row] = state[column]
        made.set_adapters(row, frozenset({MODEL}) if state["has_adapter"] else frozenset())
    return made


def view_of(made: Pool, given_states: list[State], rows: Int64Array, session_row: int | None) -> PoolView:
    matched = np.array([given_states[row]["matched"] for row in rows], dtype=np.float64)
    uncached = 100.0 * (1 - matched / TOTAL_BLOCKS)
    matched.flags.writeable = uncached.flags.writeable = False
    return PoolView(
        made,
        rows,
        NOW,
        matched_blocks=matched,
        total_blocks=TOTAL_BLOCKS,
        prompt_tokens=100.0,
        uncached=uncached,
        session_row=session_row,
        model=MODEL,
    )


every_scorer = pytest.mark.parametrize("kind", found(), ids=lambda kind: kind.__name__)
# The endpoint picker ranks those never given a cold prompt by their place in the list: its formula, kept as it is.
BY_PLACE = (NoHitLru,)
impartial = [kind for kind in found() if kind not in BY_PLACE]
every_impartial_scorer = pytest.mark.parametrize("kind", impartial, ids=lambda kind: kind.__name__)
few = settings(max_examples=25, deadline=None)


def test_the_walk_finds_the_scorers() -> None:
    assert set(picker.scorers.SCORERS.values()) <= set(found())


@every_scorer
def test_a_scorer_is_a_frozen_dataclass_with_defaults_and_a_name(kind: type[Any]) -> None:
    scorer: Any = kind()
    assert dataclasses.is_dataclass(kind)
    assert isinstance(scorer.name, str)
    assert scorer.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        scorer.name = "other"
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}(")


@every_scorer
@few
@given(given_states=st.lists(states, min_size=1, max_size=6), session=st.none() | st.integers(0, 5))
def test_scores_are_float32_from_0_to_1_one_for_each_candidate_and_nothing_is_written(
    kind: type[Any], given_states: list[State], session: int | None
) -> None:
    made = pool_of(given_states)
    seen = view_of(made, given_states, np.arange(len(given_states)), session)
    before = {column: getattr(made, column).copy() for column in COLUMNS}
    scores = kind()(seen, request(model=MODEL))
    assert scores.dtype == np.float32
    assert scores.shape == (len(given_states),)
    assert not np.isnan(scores).any()
    assert scores.min() >= 0.0
    assert scores.max() <= 1.0
    for column, values in before.items():
        np.testing.assert_array_equal(getattr(made, column), values, err_msg=column)


@every_impartial_scorer
@few
@given(state=states, count=st.integers(1, 5))
def test_equal_endpoints_get_equal_scores(kind: type[Any], state: State, count: int) -> None:
    made = pool_of([state] * count)
    scores = kind()(view_of(made, [state] * count, np.arange(count), None), request(model=MODEL))
    assert len(set(scores.tolist())) == 1


@every_impartial_scorer
@few
@given(data=st.data(), given_states=st.lists(states, min_size=1, max_size=6), session=st.none() | st.integers(0, 5))
def test_permuting_endpoints_permutes_scores(
    kind: type[Any], data: st.DataObject, given_states: list[State], session: int | None
) -> None:
    order = np.array(data.draw(st.permutations(range(len(given_states)))))
    made = pool_of(given_states)
    straight = kind()(view_of(made, given_states, np.arange(len(given_states)), session), request(model=MODEL))
    mixed = kind()(view_of(made, given_states, order, session), request(model=MODEL))
    np.testing.assert_array_equal(mixed, straight[order])


@every_impartial_scorer
def test_a_scorer_copes_with_a_pool_nobody_has_scraped(kind: type[Any]) -> None:
    made = pool(a=0, b=0, c=0)
    scores = kind()(PoolView(made, np.arange(3), NOW), request())
    assert len(set(scores.tolist())) == 1
    assert not np.isnan(scores).any()
