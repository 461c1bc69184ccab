"""How late simulated pods answered: what their figures are worth.

Pods compute with exact virtual times, but a busy machine sends their answers later than those times, and whoever
measures the answers measures the machine too. Kept as counts by size, so that it costs the same after hours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DISTORTED_S = 0.05
"""Seconds of the pods by which one answer in a hundred may be late. Beyond, times to first token, which are some tenths
of a second, would be the machine's rather than the pods'."""

_SMALLEST_S, _GROWTH, _SIZES = 1e-5, 1.25, 96  # up to some 20,000 s
_LOG_GROWTH = math.log(_GROWTH)


@dataclass(frozen=True, slots=True)
class Lateness:
    """Seconds of the pods between what was due and when it was done: at the median, at P99, and at worst."""

    events: int
    p50_s: float
    p99_s: float
    max_s: float

    @property
    def distorted(self) -> bool:
        """Whether figures measured meanwhile are not the pods'."""
        return self.p99_s > DISTORTED_S


class LatenessCounts:
    """Counts events by how late they were; percentiles are right to a quarter."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._counts = [0] * _SIZES
        self._events, self._worst = 0, 0.0

    def note(self, seconds: float) -> None:
        """What was due so long ago is done just now."""
        size = 0 if seconds <= _SMALLEST_S else int(math.log(seconds / _SMALLEST_S) / _LOG_GROWTH) + 1
        self._counts[min(size, _SIZES - 1)] += 1
        self._events += 1
        self._worst = max(self._worst, seconds)

    def read(self) -> Lateness:
        return Lateness(self._events, self._percentile(0.50), self._percentile(0.99), self._worst)

    def _percentile(self, share: float) -> float:
        """The upper end of the size that it falls into, and never more than the worst."""
        left = math.ceil(share * self._events)
        for size, count in enumerate(self._counts):
            left -= count
            if left <= 0:
                return min(_SMALLEST_S * _GROWTH**size, self._worst)
        return self._worst
