from __future__ import annotations

import numpy as np

import fakes
from picker.core.pick import max_score
from picker.core.profile import Cost, Weighted
from picker.live_policy import LivePolicy
from picker.scorers.inflight import Inflight
from picker.types import Decision


def shares(weights: dict[str, float], requests: int = 300) -> dict[str, int]:
    """Where requests go that never end, by predicted cost."""
    policy = LivePolicy(Cost(), max_score, weights)
    scheduler = fakes.scheduler("a", "b", profile=policy, picker=policy.pick)
    counts = {"a": 0, "b": 0}
    for number in range(requests):
        decision = scheduler.submit(fakes.request(number), fakes.NOW)
        assert isinstance(decision, Decision)
        counts[decision.endpoint.name] += 1
    return counts


def test_without_weights_both_get_the_same() -> None:
    counts = shares({})
    assert abs(counts["a"] - counts["b"]) <= 20


def test_a_weight_of_three_gets_about_three_times_as_much() -> None:
    counts = shares({"a": 3.0})
    assert 2.0 < counts["a"] / counts["b"] < 4.0


def test_a_small_weight_gets_little_and_not_nothing() -> None:
    counts = shares({"b": 0.1})
    assert 0 < counts["b"] < counts["a"] / 4


def test_a_weight_multiplies_scores_and_lets_nobody_in_who_is_out() -> None:
    policy = LivePolicy(Weighted([(Inflight(), 1.0)]), max_score, {"a": 2.0})
    view = fakes.view(fakes.pool(a=0, b=0))
    total, _ = policy.rank(view, fakes.request())
    assert total.tolist() == [2.0, 1.0]
    out = policy._weighed(view, np.array([-np.inf, -4.0]))
    assert out.tolist() == [-np.inf, -4.0]


def test_another_profile_decides_from_the_next_request_on() -> None:
    policy = LivePolicy(Cost(), max_score)
    scheduler = fakes.scheduler("a", profile=policy, picker=policy.pick)
    scheduler.submit(fakes.request(1), fakes.NOW)
    policy.replace(Weighted([(Inflight(), 1.0)]), max_score)
    decision = scheduler.submit(fakes.request(2), fakes.NOW)
    assert isinstance(decision, Decision)
    assert decision.ranking is not None
    assert list(decision.ranking.candidates()[0].parts) == [Inflight().name]
