"""Stages as inference-perf runs them: how many requests, when, and how many at once."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from picker.sim import latency
from picker.sim.capacity import OnlyOne
from picker.sim.cluster import Cluster, Timing
from picker.sim.engine import Engine
from picker.sim.ladder import Ladder, _asked, climb, ladders, send_times
from picker.sim.workload import Context


def ladder(**changes: object) -> Ladder:
    small = {"groups": 4, "prompts": 2, "output_tokens": 40, "warmup": (2, 2), "rates": (4, 8), "seconds": (3, 3)}
    return replace(ladders()["70b"], **{**small, **changes})  # type: ignore[arg-type]


def test_published_runs_have_a_figure_for_every_stage() -> None:
    for each in ladders().values():
        for run in each.runs.values():
            assert len(each.rates) == len(each.seconds) == len(run.output)
            assert len(run.ttft_p90) in (0, len(each.rates))
            assert len(run.sent) in (0, len(each.rates))


@pytest.mark.parametrize("poisson", [True, False])
def test_a_stage_sends_rate_times_seconds_requests_in_order(poisson: bool) -> None:
    times = send_times(15, 20, np.random.default_rng(1), poisson=poisson)
    assert len(times) == 300
    assert np.all(np.diff(times) >= 0)
    assert times[0] >= 0


def test_only_a_constant_rate_ends_with_its_stage() -> None:
    ends = [send_times(3, 20, np.random.default_rng(seed), poisson=False)[-1] for seed in range(5)]
    drawn = [send_times(3, 20, np.random.default_rng(seed), poisson=True)[-1] for seed in range(5)]
    assert ends == pytest.approx([20.0] * 5)
    assert max(drawn) - min(drawn) > 1.0


def test_a_stage_waits_for_the_answers_of_the_one_before() -> None:
    """Twice the answer takes twice the drain, and no stage sees the other's queue."""
    run = ladders()["70b"].runs["random"]
    short, long = (climb(ladder(output_tokens=n), run, 1) for n in (40, 400))
    assert len(short) == 2
    # 12 and 24 requests: rate-bound while answers are short, drain-bound when they are long.
    assert short[1].output > short[0].output
    assert long[0].output > short[0].output
    assert all(stage.ttft_p90 < 2.0 for stage in (*short, *long))


def test_a_client_never_has_more_requests_under_way_than_its_limit() -> None:
    profile = latency.profile("llama-3.1-70b-4xh100")
    prompts = [Context(16).extended(number, 64) for number in range(3)]
    for limit in (1, 3, None):
        asked = _asked(ladder(in_flight=limit), prompts, [0.1 * n for n in range(12)])
        timing = Timing(think=math.inf if limit is None else 0.0)
        outcomes = Cluster(OnlyOne(), [Engine(profile, name="pod-0")], timing=timing).run(asked)
        assert len(outcomes) == 12
        together = max(sum(o.at <= each.at < o.ended_at for o in outcomes) for each in outcomes)
        assert together == limit if limit is not None else together > 3
