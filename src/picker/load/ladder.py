"""Latency against rate: what each stage of a run, or each of several runs, gave at its rate.

Pure. A rung is one rate; a rate that comes twice within a run counts the second time, as the first warms up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from picker.load.measured import Floats, Measured, Requests, hit_ratio, rank
from picker.load.slo import Slo, goodput


@dataclass(frozen=True, slots=True)
class Rung:
    """Seconds; percentiles count failures as infinitely late, and means leave them out. share: of good requests."""

    rate: float
    requests: int
    failed: int
    ttft_mean: float
    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    e2e_p95: float
    hit_ratio: float | None
    output_tokens_per_s: float
    share: float | None


def rungs(runs: Sequence[Measured], slo: Slo | None) -> list[Rung]:
    """By rate, ascending. Runs of no rate (closed loops) have no place on the ladder."""
    found: dict[float, Rung] = {}
    for run in runs:
        for rate, requests, duration in _parts(run):
            if len(requests):
                found[rate] = _rung(rate, requests, duration, slo)
    return [found[rate] for rate in sorted(found)]


def _parts(run: Measured) -> Iterator[tuple[float, Requests, float]]:
    at = run.requests.intended
    for stage in run.stages:
        yield stage.rate, run.requests.where((at >= stage.start) & (at < stage.end)), stage.end - stage.start
    if not run.stages and run.rate is not None:
        yield float(f"{run.rate:.3g}"), run.requests, run.duration


def _rung(rate: float, requests: Requests, duration: float, slo: Slo | None) -> Rung:
    ttft, e2e, ok = requests.ttft, requests.e2e, requests.ok
    good = goodput(requests, slo, duration) if slo is not None else None
    return Rung(
        rate=rate,
        requests=len(requests),
        failed=int((~ok).sum()),
        ttft_mean=float(ttft[np.isfinite(ttft)].mean()) if np.isfinite(ttft).any() else float("inf"),
        ttft_p50=quantile(ttft, 0.50),
        ttft_p95=quantile(ttft, 0.95),
        ttft_p99=quantile(ttft, 0.99),
        e2e_p95=quantile(e2e, 0.95),
        hit_ratio=hit_ratio(requests),
        output_tokens_per_s=float(requests.output_tokens[ok].sum()) / duration if duration > 0 else 0.0,
        share=good.share if good is not None else None,
    )


def quantile(values: Floats, fraction: float) -> float:
    """Nearest rank; nan, which stands for a failure, is infinitely late."""
    ordered = np.sort(np.where(np.isnan(values), np.inf, values))
    return float(ordered[rank(fraction, len(ordered))])
