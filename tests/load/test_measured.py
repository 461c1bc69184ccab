from __future__ import annotations

import numpy as np
import pytest

from load.runs import failed, measured_of, plan_of, record, run
from picker.load.measured import Origin, Stage, measured, statistics


def test_latencies_count_from_the_intended_time_and_failures_have_none() -> None:
    requests = measured_of(record(1.0, 0.25, sent_at=1001.1), failed(2.0)).requests
    assert requests.ttft == pytest.approx([0.25, np.nan], nan_ok=True)
    assert requests.e2e == pytest.approx([1.25, np.nan], nan_ok=True)
    assert requests.tpot == pytest.approx([0.1, np.nan], nan_ok=True)
    assert requests.delay[0] == pytest.approx(0.1)


def test_requests_stand_in_order_of_their_intended_times() -> None:
    requests = measured_of(record(2.0, conversation=1), record(1.0, conversation=0)).requests
    assert requests.conversation.tolist() == [0, 1]


def test_times_are_seconds_of_the_pods() -> None:
    requests = measured_of(record(1.0, 0.25), time_scale=10).requests
    assert requests.intended[0] == pytest.approx(10.0)
    assert requests.ttft[0] == pytest.approx(2.5)


def test_gaps_between_all_tokens_are_summed_up() -> None:
    gaps = measured_of(record(1.0), record(2.0), failed(3.0), time_scale=2).gaps
    assert gaps is not None
    assert gaps["count"] == 20
    assert gaps["mean"] == pytest.approx(0.2)


def test_stages_begin_where_measuring_did() -> None:
    plan = plan_of([5.0, 15.0], stages=((0.0, 10.0, 1.0), (10.0, 20.0, 2.0)))
    # A warm-up of 4 seconds: what the plan wanted at 15 is at 11 of the run.
    found = measured(run(record(11.0, conversation=1), plan=plan), Origin())
    assert found.stages == (Stage(-4.0, 6.0, 1.0), Stage(6.0, 16.0, 2.0))
    assert found.rate is None


def test_the_rate_is_the_one_that_was_asked_for() -> None:
    plan = plan_of([1.0, 2.0])
    assert measured(run(record(1.0), plan=plan), Origin(shape={"rate": 4.0})).rate == 4.0
    assert measured(run(record(1.0), plan=plan), Origin()).rate == 1.0


def test_statistics_are_nearest_ranks_of_what_is_known() -> None:
    found = statistics(np.array([*range(1, 101), np.nan], dtype=float))
    assert found is not None
    assert (found["count"], found["mean"], found["min"], found["max"]) == (100, 50.5, 1.0, 100.0)
    assert (found["p50"], found["p99"], found["p99p9"], found["p0p1"]) == (50.0, 99.0, 100.0, 1.0)
    assert statistics(np.array([np.nan])) is None
