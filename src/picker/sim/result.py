"""The figures of a run in virtual time, by the names of `picker simulate --json`.

Times are virtual seconds from the intended arrival. Failed requests are left out of means and counted in `failed`; in
percentiles they are infinitely late, so one that falls among them is None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from picker.sim.cluster import Outcome

Figures = dict[str, float | int | None]

# A slope through fewer requests says nothing.
_FEWEST = 10


def figures(outcomes: Sequence[Outcome], *, pods: int, measured_from: float = 0.0) -> Figures:
    """The figures of the requests that were meant to arrive at or after `measured_from`. pods: how many there are."""
    measured = [outcome for outcome in outcomes if outcome.at >= measured_from]
    good = [outcome for outcome in measured if not outcome.failed]
    ttft = [math.inf if outcome.failed else outcome.ttft for outcome in measured]
    e2e = [math.inf if outcome.failed else outcome.e2e for outcome in measured]
    duration = _duration(measured)
    return {
        "requests": len(measured),
        "failed": len(measured) - len(good),
        "ttft_mean_s": _mean(outcome.ttft for outcome in good),
        "ttft_p50_s": percentile(ttft, 0.50),
        "ttft_p90_s": percentile(ttft, 0.90),
        "ttft_p95_s": percentile(ttft, 0.95),
        "ttft_p99_s": percentile(ttft, 0.99),
        "ttft_growth": _growth(good),
        "e2e_mean_s": _mean(outcome.e2e for outcome in good),
        "e2e_p95_s": percentile(e2e, 0.95),
        "tpot_mean_s": _mean(_tpot(outcome) for outcome in good if outcome.output_tokens > 1),
        "hit_ratio": _ratio(sum(o.cached_tokens for o in good), sum(o.prompt_tokens for o in good)),
        "output_tokens_per_s": _ratio(sum(outcome.output_tokens for outcome in good), duration),
        "duration_s": _rounded(duration),
        "picks_max_over_mean": _imbalance(measured, pods),
    }


def percentile(values: Sequence[float], q: float) -> float | None:
    """The smallest value that at least the fraction `q` does not exceed; None when it is infinite or there is none."""
    if not values:
        return None
    value = sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
    return _rounded(value) if math.isfinite(value) else None


def _growth(outcomes: Sequence[Outcome]) -> float | None:
    """Seconds by which the wait for a first token grows in a second of arrivals: a least-squares slope."""
    if len(outcomes) < _FEWEST:
        return None
    at, ttft = np.array([(outcome.at, outcome.ttft) for outcome in outcomes]).T
    at -= at.mean()
    spread = float(at @ at)
    return _rounded(float(at @ ttft) / spread) if spread else None


def _duration(outcomes: Sequence[Outcome]) -> float:
    """From the first intended arrival to the last end."""
    ends = [outcome.ended_at for outcome in outcomes if math.isfinite(outcome.ended_at)]
    return max(ends) - min(outcome.at for outcome in outcomes) if ends else 0.0


def _tpot(outcome: Outcome) -> float:
    return (outcome.ended_at - outcome.first_token_at) / (outcome.output_tokens - 1)


def _imbalance(outcomes: Iterable[Outcome], pods: int) -> float | None:
    picks = Counter(outcome.endpoint for outcome in outcomes if outcome.endpoint is not None)
    return _ratio(max(picks.values(), default=0), sum(picks.values()) / pods)


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return _rounded(math.fsum(known) / len(known)) if known else None


def _ratio(part: float, whole: float) -> float | None:
    return _rounded(part / whole) if whole else None


def _rounded(value: float) -> float:
    return round(value, 6)
