"""From the repeats of a measurement to the figures of a row: the median of each, and its spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

import numpy as np

from picker.bench.client import Latency


def row_figures(repeats: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """By key of the repeats: the median, and as `KEY_min` and `KEY_max` the extremes. A None makes all three None."""
    repeats = list(repeats)
    row: dict[str, float | None] = {}
    for key in repeats[0]:
        values = [value for repeat in repeats if (value := repeat[key]) is not None]
        if len(values) < len(repeats):
            row |= {key: None, f"{key}_min": None, f"{key}_max": None}
        else:
            spread = (statistics.median(values), min(values), max(values))
            row |= dict(zip((key, f"{key}_min", f"{key}_max"), map(_rounded, spread), strict=True))
    return row


def added(behind: Latency, baseline: Latency) -> dict[str, float | None]:
    """What a gateway adds, in milliseconds: the difference of the percentiles of two runs at the same rate.

    added: from sending a request to its first byte, without the time the upstream takes; a stream that is produced
    more slowly than it is passed on ends later by as much. added_chunk: one chunk on its way back.
    """
    figures: dict[str, float | None] = {}
    for name, slow, fast in (
        ("added", behind.first_byte, baseline.first_byte),
        ("added_chunk", behind.chunk, baseline.chunk),
    ):
        for percent in (50, 99):
            difference = float(np.percentile(slow, percent) - np.percentile(fast, percent))
            figures[f"{name}_p{percent}_ms"] = difference * 1e3
    return figures


def _rounded(value: float) -> float:
    """Four significant digits are more than a machine under load can repeat."""
    return float(f"{value:.4g}")
