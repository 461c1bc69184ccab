"""Filters by what endpoints have cached and how loaded they are; a frozen dataclass each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from picker.core.candidates import SLO_TPOT, SLO_TTFT, draw, headroom, predicted
from picker.core.view import PoolView
from picker.types import BoolArray, FloatArray, Request

TTFT_SOURCES = ("prefillThroughput", "latencyPredictor")
_AFFINITY, _TIERS = 1, 2  # salts of the draws


@dataclass(frozen=True, slots=True)
class PrefixCacheAffinity:
    """Keeps the endpoints that hold most of the prompt, unless the wait there is too long (llm-d's default of 2026).

    affinity_threshold: matched / total from which an endpoint is sticky; where nobody is, all stay. All stay, too,
    with exploration_probability, and when the soonest sticky endpoint is expected to begin more than
    max_ttft_penalty_ms after the soonest other one. ttft_source: prefillThroughput takes uncached tokens booked there
    over peak_prefill_throughput (tokens/s); latencyPredictor what the pool has taught.
    """

    affinity_threshold: float = 0.80
    exploration_probability: float = 0.0
    max_ttft_penalty_ms: float = 18_000.0
    ttft_source: str = "prefillThroughput"
    peak_prefill_throughput: float = 15_928.0
    name: str = "prefix-cache-affinity-filter"

    def __post_init__(self) -> None:
        if self.affinity_threshold > 1.0:
            raise ValueError(f"affinity_threshold must be at most 1, got {self.affinity_threshold}")
        if not 0.0 <= self.exploration_probability <= 1.0:
            raise ValueError(f"exploration_probability must be from 0 to 1, got {self.exploration_probability}")
        if self.max_ttft_penalty_ms < 0.0:
            raise ValueError(f"max_ttft_penalty_ms must not be negative, got {self.max_ttft_penalty_ms}")
        if self.ttft_source not in TTFT_SOURCES:
            raise ValueError(f"ttft_source must be one of {', '.join(TTFT_SOURCES)}, got {self.ttft_source!r}")
        if not self.peak_prefill_throughput > 0.0:
            raise ValueError(f"peak_prefill_throughput must be greater than 0, got {self.peak_prefill_throughput}")

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        everybody = np.ones(view.n, dtype=bool)
        if view.n <= 1 or self.affinity_threshold <= 0.0:
            return everybody
        if draw(request, _AFFINITY) < self.exploration_probability:
            return everybody
        sticky: BoolArray = view.matched_blocks / max(view.total_blocks, 1) >= self.affinity_threshold
        if not sticky.any() or self._overloaded(view, sticky):
            return everybody
        return sticky

    def _overloaded(self, view: PoolView, sticky: BoolArray) -> bool:
        if self.max_ttft_penalty_ms == 0.0 or sticky.all():
            return False
        ttft_ms = self._ttft_ms(view)
        return bool(ttft_ms[sticky].min() - ttft_ms[~sticky].min() > self.max_ttft_penalty_ms)

    def _ttft_ms(self, view: PoolView) -> FloatArray:
        if self.ttft_source == "latencyPredictor":
            return predicted(view).ttft_s * 1000.0
        return view.backlog / self.peak_prefill_throughput * 1000.0


@dataclass(frozen=True, slots=True)
class SloHeadroomTier:
    """Keeps the endpoints that are predicted to meet the request's objectives, all where none is or all are.

    With epsilon_explore_neg the others instead, so that predictions of them do not go stale (llm-d's
    `slo-headroom-tier-filter`). tokens, buffer: as of the latency scorer.
    """

    epsilon_explore_neg: float = 0.01
    tokens: bool = True
    buffer: float = 1.0
    name: str = "slo-headroom-tier-filter"

    def __post_init__(self) -> None:
        if not 0.0 <= self.epsilon_explore_neg <= 1.0:
            raise ValueError(f"epsilon_explore_neg must be from 0 to 1, got {self.epsilon_explore_neg}")

    @property
    def headers(self) -> tuple[str, ...]:
        """The request headers it looks at."""
        return (*SLO_TTFT, *SLO_TPOT)

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        left = headroom(view, request, tokens=self.tokens, buffer=self.buffer)
        met: BoolArray = (left.ttft_s >= 0.0) & (left.tpot_s >= 0.0)
        if view.n <= 1 or met.all() or not met.any():
            return np.ones(view.n, dtype=bool)
        return ~met if draw(request, _TIERS) < self.epsilon_explore_neg else met


# The metrics a utilization filter may bound: name -> what the view knows of it.
METRICS = ("active-requests", "running-requests", "waiting-queue", "kv-cache-utilization")


@dataclass(frozen=True, slots=True)
class UtilizationBounds:
    """Keeps endpoints within every bound: conditions of {metric, max_value} (llm-d's `utilization-filter`).

    fallback_on_empty: all stay where nobody would. What an engine does not report is taken to be within.
    """

    conditions: Sequence[Mapping[str, object]] = ()
    fallback_on_empty: bool = False
    name: str = "utilization-filter"

    def __post_init__(self) -> None:
        if not self.conditions:
            raise ValueError("conditions: at least one is needed")
        for condition in self.conditions:
            if condition.get("metric") not in METRICS:
                raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {condition.get('metric')!r}")
            most = condition.get("max_value")
            if not isinstance(most, int | float) or most < 0:
                raise ValueError(f"max_value of {condition['metric']} must be a number from 0, got {most!r}")

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        keep = np.ones(view.n, dtype=bool)
        for condition in self.conditions:
            keep &= _metric(view, str(condition["metric"])) <= float(str(condition["max_value"]))
        return keep if keep.any() or not self.fallback_on_empty else np.ones(view.n, dtype=bool)


def _metric(view: PoolView, name: str) -> FloatArray:
    match name:
        case "active-requests":
            return view.inflight.astype(np.float64)
        case "running-requests":
            return np.nan_to_num(view.running, nan=0.0)
        case "waiting-queue":
            return np.nan_to_num(view.waiting, nan=0.0)
        case _:
            return np.nan_to_num(view.kv_usage, nan=0.0)
