from dataclasses import dataclass

import numpy as np

from fakes import learned, pool, request, view
from picker.core.cost import CostModel
from picker.core.profile import Cost, Filtered, Weighted
from picker.core.view import PoolView
from picker.scorers.queue_depth import QueueDepth
from picker.types import BoolArray, Request, ScoreArray


@dataclass(frozen=True, slots=True)
class Fixed:
    name: str
    values: tuple[float, ...]

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        return np.array(self.values, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Without:
    """Drops the endpoints with so many waiting; remembers nothing."""

    waiting: float
    name: str = "without"

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        return np.not_equal(view.waiting, self.waiting)


def test_scores_are_relative_to_whom_the_filters_left() -> None:
    made = pool(a={"waiting": 100}, b={"waiting": 4}, c={"waiting": 2}, d={"waiting": 0})
    profile = Filtered([Without(100.0)], Weighted([(QueueDepth(), 2.0)]))
    total, parts = profile.rank(view(made), request())
    assert total.tolist() == [-np.inf, 0.0, 1.0, 2.0]
    np.testing.assert_array_equal(parts["queue-scorer"], [np.nan, 0.0, 1.0, 2.0])


def test_each_filter_sees_what_the_earlier_ones_left() -> None:
    made = pool(a={"waiting": 9}, b={"waiting": 4}, c={"waiting": 2})
    kept, seen = Filtered([Without(9.0), Without(2.0)], Weighted([])).survivors(view(made), request())
    assert (kept.tolist(), seen.waiting.tolist()) == ([1], [4])


def test_filters_that_drop_nobody_change_nothing_and_those_that_drop_all_leave_nobody() -> None:
    made = pool(a={"waiting": 9}, b={"waiting": 9})
    inner = Weighted([(QueueDepth(), 1.0)])
    assert Filtered([Without(1.0)], inner).rank(view(made), request())[0].tolist() == [1.0, 1.0]
    total, parts = Filtered([Without(9.0), Without(1.0)], inner).rank(view(made), request())
    assert (total.tolist(), parts) == ([-np.inf, -np.inf], {})


def test_two_scorers_of_one_name_are_shown_as_their_sum() -> None:
    profile = Weighted([(Fixed("x", (1.0, 0.0)), 1.0), (Fixed("x", (0.5, 1.0)), 2.0)])
    total, parts = profile.rank(view(pool(a=0, b=0)), request())
    assert total.tolist() == parts["x"].tolist() == [2.0, 2.0]


def test_weighted_is_the_sum_of_scores_times_weights() -> None:
    profile = Weighted([(Fixed("x", (1.0, 0.0)), 3.0), (Fixed("y", (0.25, 1.0)), 2.0)])
    total, parts = profile.rank(view(pool(a=0, b=0)), request())
    assert total.tolist() == [3.5, 2.0]
    assert {name: part.tolist() for name, part in parts.items()} == {"x": [3.0, 0.0], "y": [0.5, 2.0]}
    assert total.dtype == np.float64


def test_weighted_without_scorers_finds_all_equal() -> None:
    total, parts = Weighted([]).rank(view(pool(a=0, b=9)), request())
    assert (total.tolist(), parts) == ([0.0, 0.0], {})


def test_cost_ranks_the_cheapest_highest_and_shows_its_terms() -> None:
    seen = view(pool(busy=3, idle=0), prompt_tokens=10.0)
    total, parts = Cost().rank(seen, request())
    assert total[1] > total[0]
    np.testing.assert_allclose(-total, np.sum(list(parts.values()), axis=0))


def test_cost_uses_the_model_it_is_given() -> None:
    seen = view(pool(a=3), prompt_tokens=10.0, learned=learned(token=1.0))
    _, parts = Cost(CostModel(latency_weight=2.0)).rank(seen, request())
    assert parts["neighbours"].tolist() == [60.0]
