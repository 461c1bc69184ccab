from __future__ import annotations

from dataclasses import replace

import pytest

from load.runs import failed, measured_of, record
from picker.load.ladder import rungs
from picker.load.measured import Stage
from picker.load.slo import Slo

STAGED = measured_of(
    *(record(float(n), 0.1 if n < 10 else 1.0) for n in range(20)),
    failed(19.5),
    stages=(Stage(0.0, 10.0, 1.0), Stage(10.0, 20.0, 2.0)),
)


def test_each_stage_is_a_rung() -> None:
    slow, fast = rungs([STAGED], Slo(ttft=0.5))
    assert (slow.rate, slow.requests, slow.failed, slow.share) == (1.0, 10, 0, 1.0)
    assert (fast.rate, fast.requests, fast.failed, fast.share) == (2.0, 11, 1, 0.0)
    assert slow.ttft_mean == pytest.approx(0.1)
    assert fast.ttft_p50 == pytest.approx(1.0)
    assert fast.ttft_p99 == float("inf")
    assert slow.output_tokens_per_s == pytest.approx(11.0)


def test_a_rate_that_comes_twice_counts_the_second_time() -> None:
    twice = replace(STAGED, stages=(Stage(0.0, 10.0, 2.0), Stage(10.0, 20.0, 2.0)))
    (only,) = rungs([twice], None)
    assert only.requests == 11


def test_runs_stand_by_their_rates_and_closed_loops_nowhere() -> None:
    runs = [measured_of(record(1.0), rate=rate) for rate in (8.0, 2.0, None)]
    assert [rung.rate for rung in rungs(runs, None)] == [2.0, 8.0]
