from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from load.runs import ORIGIN, failed, measured_of, noisy, record
from picker.load.compare import Compared, Line, Verdict, compare
from picker.load.measured import Measured
from picker.load.slo import Slo

OTHER = replace(ORIGIN, seed=2)


def beside(a: Measured, b: Measured, slo: Slo | None = None) -> Compared:
    return compare(a, b, np.random.default_rng(0), slo)


def line(compared: Compared, metric: str) -> Line:
    (found,) = (each for each in compared.lines if each.metric == metric)
    return found


def test_a_run_beside_itself_is_alike() -> None:
    found = beside(noisy(0), noisy(0))
    assert found.paired == 300
    ttft = line(found, "TTFT mean")
    assert ttft.a == ttft.b == pytest.approx(np.mean(noisy(0).requests.ttft))
    assert (ttft.ratio, ttft.low, ttft.high, ttft.verdict) == (1.0, 1.0, 1.0, Verdict.ALIKE)
    assert line(found, "failed").verdict is Verdict.ALIKE


def test_the_figures_are_those_of_the_rows() -> None:
    a, b = noisy(1), noisy(2)
    found = beside(a, b)
    for metric, key in (("TTFT mean", "ttft_mean_s"), ("TTFT P95", "ttft_p95_s"), ("end to end P95", "e2e_p95_s")):
        assert line(found, metric).a == pytest.approx(a.figures[key], abs=1e-6)
        assert line(found, metric).b == pytest.approx(b.figures[key], abs=1e-6)


def test_a_slower_run_is_worse_and_the_interval_holds_its_factor() -> None:
    ttft = line(beside(noisy(1), noisy(2, slower=1.5)), "TTFT mean")
    assert ttft.verdict is Verdict.WORSE
    assert ttft.low is not None
    assert ttft.high is not None
    assert ttft.low < 1.5 < ttft.high
    assert line(beside(noisy(2, slower=1.5), noisy(1)), "TTFT mean").verdict is Verdict.BETTER


def test_noise_is_seldom_taken_for_a_difference() -> None:
    """Ten pairs of runs that differ by chance: at 95 % hardly one of them seems to differ."""
    verdicts = Counter(
        line(beside(noisy(100 + n, count=120), noisy(200 + n, count=120)), "TTFT mean").verdict for n in range(10)
    )
    assert verdicts[Verdict.UNSURE] + verdicts[Verdict.ALIKE] >= 8


def queued(seed: int, count: int = 600) -> Measured:
    """One server at a load of 0.8, whose queue makes neighbours late together."""
    rng, waiting, before, records = np.random.default_rng(seed), 0.0, 0.0, []
    times = np.cumsum(np.random.default_rng(0).exponential(1 / 20, count))
    for number, at in enumerate(times.tolist()):
        waiting = max(0.0, waiting - (at - before)) + float(rng.exponential(0.04))
        records.append(record(at, waiting, conversation=number))
        before = at
    return measured_of(*records)


def test_requests_of_one_queue_are_no_independent_witnesses() -> None:
    """Drawn one by one, or in blocks shorter than the queue, about four such pairs in ten seem to differ."""
    found = [beside(queued(1000 + n), queued(5000 + n)) for n in range(10)]
    assert sum(line(one, "TTFT mean").verdict is Verdict.UNSURE for one in found) >= 8
    assert any("run longer" in note for one in found for note in one.notes)
    assert not beside(noisy(1), noisy(2)).notes


def test_pairs_that_move_together_make_a_narrow_interval() -> None:
    """The same noise in both, as of prompts of different length: pairing takes it out."""
    paired = line(beside(noisy(1), noisy(1, slower=1.05)), "TTFT mean")
    apart = line(beside(noisy(1), noisy(1, slower=1.05, origin=OTHER)), "TTFT mean")
    assert (paired.verdict, apart.verdict) == (Verdict.WORSE, Verdict.UNSURE)


def test_runs_of_different_plans_are_not_paired() -> None:
    found = beside(noisy(1), noisy(2, origin=OTHER))
    assert found.paired is None
    assert "different plans" in found.notes[0]


def test_only_requests_that_both_sent_are_paired() -> None:
    whole = measured_of(*(record(float(n), conversation=n) for n in range(40)), planned=40)
    early = measured_of(*(record(float(n), 0.2, conversation=n) for n in range(30)), planned=40)
    found = beside(whole, early)
    assert found.paired == 30
    assert "10 requests that only one of the runs sent" in found.notes[0]


def test_failures_make_a_percentile_infinite_and_the_run_worse() -> None:
    good = measured_of(*(record(float(n), conversation=n) for n in range(60)))
    bad = measured_of(*((failed if n % 2 else record)(float(n), conversation=n) for n in range(60)))
    found = beside(good, bad)
    late = line(found, "TTFT P95")
    assert late.a == pytest.approx(0.1)
    assert (late.b, late.ratio, late.low, late.verdict) == (None, None, None, Verdict.WORSE)
    assert line(found, "failed").verdict is Verdict.WORSE
    assert line(beside(bad, bad), "TTFT P95").verdict is Verdict.UNKNOWN


def test_more_is_better_of_hits_and_good_answers() -> None:
    cold = measured_of(*(record(float(n), 0.6, conversation=n, cached_tokens=n % 9) for n in range(60)))
    warm = measured_of(*(record(float(n), 0.4, conversation=n, cached_tokens=50 + n % 9) for n in range(60)))
    found = beside(cold, warm, Slo(ttft=0.5))
    assert line(found, "hit ratio").verdict is Verdict.BETTER
    assert line(found, "good: TTFT ≤ 0.5 s").verdict is Verdict.BETTER


def test_turns_of_one_conversation_are_drawn_together() -> None:
    """Two long conversations, one slow: with so few of them nothing is sure, however many turns they have."""

    def run(slow: float) -> Measured:
        turns = [(n, turn) for n in range(2) for turn in range(50)]
        return measured_of(*(record(float(t), 0.1 + slow * n, conversation=n, turn=t) for n, t in turns))

    ttft = line(beside(run(0.0), run(1.0)), "TTFT mean")
    assert ttft.low is not None
    assert ttft.low == pytest.approx(1.0)
    assert ttft.verdict is Verdict.UNSURE


def test_of_few_requests_nothing_is_said() -> None:
    few = measured_of(*(record(float(n), conversation=n) for n in range(5)))
    assert line(beside(few, few), "TTFT mean").verdict is Verdict.FEW
    assert line(beside(measured_of(), measured_of()), "TTFT mean").verdict is Verdict.UNKNOWN


def test_throughput_has_no_interval() -> None:
    found = line(beside(noisy(1), noisy(2)), "output tokens/s")
    assert (found.low, found.verdict) == (None, Verdict.UNTESTED)
