"""Prefers endpoints by what is predicted to be left of the request's objectives there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.profile import SLO_TPOT, SLO_TTFT, Headroom, headroom
from picker.core.view import PoolView
from picker.types import BoolArray, FloatArray, Request, ScoreArray

_LEVELS = 100  # scores are whole hundredths, as the endpoint picker's are
_SAME_S = 1e-12  # headrooms closer than this are equal (1e-9 ms)
STRATEGIES = ("least", "most")


@dataclass(frozen=True, slots=True)
class Latency:
    """llm-d's `latency-scorer`, on predictions of what the pool itself has taught instead of a sidecar's.

    Endpoints where both objectives are met are scored alone; if there are none, idle ones; then those that miss the
    time per token only, the first token only, both. Within the group by the weighted distance to the objectives: the
    nearest scores best (`least`, which packs), or the farthest (`most`, which spreads) where the objectives are met.

    tokens: whether the time per token counts. buffer: factor on its objective.
    """

    ttft_weight: float = 0.8
    tpot_weight: float = 0.2
    strategy: str = "least"
    tokens: bool = True
    buffer: float = 1.0
    name: str = "latency-scorer"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")

    @property
    def headers(self) -> tuple[str, ...]:
        """The request headers it looks at."""
        return (*SLO_TTFT, *SLO_TPOT)

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        left = headroom(view, request, tokens=self.tokens, buffer=self.buffer)
        group, met = _group(left, view.inflight == 0)
        scores = np.zeros(view.n, dtype=np.float32)
        combined = self._combined(np.abs(left.ttft_s[group]), np.abs(left.tpot_s[group]))
        nearness = combined if met and self.strategy == "most" else 1.0 - combined
        # A whole number of hundredths plus one, of a hundred: the best is 1.01 there, which its scheduler cuts to 1.
        scores[group] = np.minimum((np.floor(nearness * _LEVELS) + 1.0) / _LEVELS, 1.0)
        return scores

    def _combined(self, ttft: FloatArray, tpot: FloatArray) -> FloatArray:
        """(k,) distances to the objectives from 0, the nearest, to 1; one that is the same for all weighs nothing."""
        first, second = _scaled(ttft), _scaled(tpot)
        if first is None and second is None:
            return np.full(ttft.size, 0.5)
        if first is None or second is None:
            only: FloatArray = first if first is not None else second  # type: ignore[assignment]
            return only
        total = self.ttft_weight + self.tpot_weight
        share = self.ttft_weight / total if total > 0.0 else 1.0
        return share * first + (1.0 - share) * second


def _scaled(distance: FloatArray) -> FloatArray | None:
    low, high = distance.min(), distance.max()
    return None if high - low <= _SAME_S else (distance - low) / (high - low)


def _group(left: Headroom, idle: BoolArray) -> tuple[BoolArray, bool]:
    """Which candidates are scored, and whether they meet the objectives."""
    late, slow = left.ttft_s < 0.0, left.tpot_s < 0.0
    if (met := ~late & ~slow).any():
        return met, True
    for group in (idle, slow & ~late, late & ~slow):
        if group.any():
            return group, False
    return late & slow, False
