"""Figures as people read them: three digits, a dash for what is unknown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from picker.sim.compare import Interval

# Bounds closer than this differ by rounding alone.
_POINT = 1e-9


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant ones, without an exponent."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, decimals)}f}"


def ratio(interval: Interval | None) -> str:
    """A ratio and its bounds, which a single seed does not have."""
    if interval is None:
        return "–"
    if not interval.high - interval.low > _POINT:
        return f"{interval.ratio:.3f}" if math.isfinite(interval.ratio) else "∞"
    return f"{interval.ratio:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def seeds(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[list[int]] = []
    for seed in sorted(set(numbers)):
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
