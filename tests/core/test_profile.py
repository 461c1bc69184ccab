from dataclasses import dataclass

import numpy as np

from fakes import learned, pool, request, view
from picker.core.cost import CostModel
from picker.core.profile import Cost, Weighted
from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class Fixed:
    name: str
    values: tuple[float, ...]

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        return np.array(self.values, dtype=np.float32)


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
