from __future__ import annotations

import math

import pytest

from picker.sim.cluster import Outcome
from picker.sim.result import figures, percentile


def served(at: float, ttft: float, *, endpoint: str = "a", cached: int = 0) -> Outcome:
    """100 tokens in, 11 out, a tenth of a second apart."""
    ends = at + ttft + 1.0
    return Outcome(
        at, 100, 11, None, endpoint=endpoint, first_token_at=at + ttft, ended_at=ends, cached_tokens=cached, attempts=1
    )


def failed(at: float) -> Outcome:
    return Outcome(at, 100, 11, None, failed=True)


def test_figures_of_served_requests() -> None:
    run = figures([served(0.0, 0.5), served(1.0, 1.5, endpoint="b", cached=50)], pods=4)
    assert run == {
        "requests": 2,
        "failed": 0,
        "ttft_mean_s": 1.0,
        "ttft_p50_s": 0.5,
        "ttft_p90_s": 1.5,
        "ttft_p95_s": 1.5,
        "ttft_p99_s": 1.5,
        "ttft_growth": None,
        "e2e_mean_s": 2.0,
        "e2e_p95_s": 2.5,
        "tpot_mean_s": 0.1,
        "hit_ratio": 0.25,
        "output_tokens_per_s": pytest.approx(22 / 3.5, abs=1e-6),
        "duration_s": 3.5,
        "picks_max_over_mean": 2.0,
    }


def test_failed_requests_are_infinitely_late() -> None:
    run = figures([*(served(float(n), 0.5) for n in range(18)), failed(3.0), failed(4.0)], pods=1)
    assert (run["requests"], run["failed"]) == (20, 2)
    assert run["ttft_p50_s"] == 0.5
    assert run["ttft_p95_s"] is None
    assert run["ttft_mean_s"] == 0.5


def test_what_arrives_before_measuring_begins_does_not_count() -> None:
    run = figures([served(0.0, 9.0), served(5.0, 1.0)], pods=1, measured_from=5.0)
    assert (run["requests"], run["ttft_mean_s"], run["duration_s"]) == (1, 1.0, 2.0)


def test_a_run_without_answers_has_no_figures_and_no_nan() -> None:
    assert set(figures([], pods=2).values()) <= {None, 0}
    assert figures([failed(0.0)], pods=2)["ttft_mean_s"] is None


def test_a_percentile_is_a_value_that_was_seen() -> None:
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert percentile([1.0] * 99 + [math.inf], 0.99) == 1.0
    assert percentile([], 0.5) is None


def test_growth_is_the_slope_of_the_wait_over_arrivals() -> None:
    rising = [served(float(n), 0.5 + 0.02 * n) for n in range(20)]
    assert figures(rising, pods=1)["ttft_growth"] == pytest.approx(0.02)
    assert figures([*rising, failed(3.0)], pods=1)["ttft_growth"] == pytest.approx(0.02)
    assert figures([served(n / 10.0, 0.5) for n in range(20)], pods=1)["ttft_growth"] == 0.0


def test_too_few_requests_or_one_instant_have_no_slope() -> None:
    assert figures([served(float(n), 1.0) for n in range(9)], pods=1)["ttft_growth"] is None
    assert figures([served(1.0, 1.0 * n) for n in range(20)], pods=1)["ttft_growth"] is None
