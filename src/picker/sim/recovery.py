"""What trouble cost and how soon it was over: requests lost, time to first tokens over time, how newcomers fill up.

Reads outcomes, of one run or of several with the same incidents; runs nothing. Times are virtual seconds. A window
holds the requests that were meant to arrive in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from picker.sim.cluster import Outcome
from picker.types import FloatArray

WINDOW_S = 20.0
STEP_S = 2.0
# Of the level before: how much above it counts as back, and how much of a fair share as taken up.
TOLERANCE = 0.2
FAIR = 0.8


@dataclass(frozen=True, slots=True)
class Recovery:
    """P95 TTFT in seconds: the level before a fault and of the worst window after it, and seconds until it was back.

    undisturbed: of the worst window in the same span of a run without incidents; None where there is no such run.
    seconds: None when it did not come back in time; `worst` is infinite when requests never got a first token.
    """

    before: float
    worst: float
    seconds: float | None
    undisturbed: float | None = None


@dataclass(frozen=True, slots=True)
class Joined:
    """seconds: until newcomers get 80 % of their fair share, None: not in time. hit ratios: before, worst window."""

    seconds: float | None
    hit_before: float
    hit_worst: float


@dataclass(frozen=True, slots=True)
class Losses:
    """Requests that failed. unsavable: those that had begun to answer, which nobody can repeat unseen."""

    savable: int = 0
    unsavable: int = 0

    @property
    def lost(self) -> int:
        return self.savable + self.unsavable


def losses(outcomes: Sequence[Outcome], start: float = -math.inf, stop: float = math.inf) -> Losses:
    """The requests that failed from `start` up to `stop`."""
    failed = [outcome for outcome in outcomes if outcome.failed and start <= outcome.failed_at < stop]
    unsavable = sum(outcome.unsavable for outcome in failed)
    return Losses(len(failed) - unsavable, unsavable)


def level(outcomes: Sequence[Outcome], start: float, stop: float) -> float:
    """P95 TTFT of what arrived from `start` up to `stop`; NaN when nothing did."""
    return _p95(np.array([outcome.ttft for outcome in outcomes if start <= outcome.at < stop]))


def recovery(
    outcomes: Sequence[Outcome],
    fault_at: float,
    level_before: float,
    *,
    until: float,
    undisturbed: Sequence[Outcome] = (),
) -> Recovery:
    """How high P95 TTFT rose between `fault_at` and `until`, and when it was back within 20 % of `level_before`.

    Back it is at the start of the first window that is, if so are all that begin during it. The load has moods of its
    own: a window of `undisturbed`, the same run without incidents, that is higher than the level takes its place.
    """
    starts, p95 = _windows(outcomes, fault_at, until)
    reference, usual = np.full(p95.size, level_before), None
    if undisturbed:
        usual = _windows(undisturbed, fault_at, until)[1]
        reference = np.fmax(reference, usual)
    calm = ~(p95 > reference * (1.0 + TOLERANCE))  # nobody asked: nothing to complain of
    return Recovery(
        before=level_before,
        worst=_largest(p95),
        seconds=_first_lasting(starts - fault_at, calm),
        undisturbed=None if usual is None else _largest(usual),
    )


def joined(
    outcomes: Sequence[Outcome], newcomers: Collection[str], pods: int, joined_at: float, *, until: float
) -> Joined:
    """How soon `newcomers`, of then `pods` pods, get their share of requests, and what it costs in cache hits."""

    def share(window: Sequence[Outcome]) -> float:
        return sum(outcome.endpoint in newcomers for outcome in window) / len(window) if window else math.nan

    starts, shares = _sliding(outcomes, joined_at, until, share)
    _, hits = _sliding(outcomes, joined_at, until, _hit_ratio)
    before = [outcome for outcome in outcomes if joined_at - 3 * WINDOW_S <= outcome.at < joined_at]
    filled = np.flatnonzero(shares >= FAIR * len(newcomers) / pods)
    return Joined(
        seconds=float(starts[filled[0]]) - joined_at if filled.size else None,
        hit_before=_hit_ratio(before),
        hit_worst=float(np.nanmin(hits, initial=math.inf)),
    )


def _first_lasting(seconds: FloatArray, calm: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float | None:
    """The first of `seconds` at which it is calm and stays so for a window's length, as far as one can see."""
    length = int(WINDOW_S / STEP_S)
    for i in np.flatnonzero(calm).tolist():
        if calm[i : i + length].all():
            return float(seconds[i])
    return None


def _windows(outcomes: Sequence[Outcome], start: float, stop: float) -> tuple[FloatArray, FloatArray]:
    """(starts of the windows, P95 TTFT of each)."""
    return _sliding(outcomes, start, stop, lambda window: _p95(np.array([outcome.ttft for outcome in window])))


def _sliding(
    outcomes: Sequence[Outcome], start: float, stop: float, figure: Callable[[Sequence[Outcome]], float]
) -> tuple[FloatArray, FloatArray]:
    """(starts of the windows that lie between `start` and `stop`, the figure of each)."""
    within = sorted((o for o in outcomes if start <= o.at < stop), key=lambda outcome: outcome.at)
    at = np.array([outcome.at for outcome in within])
    starts = np.arange(start, max(stop - WINDOW_S, start) + STEP_S / 2, STEP_S)
    return starts, np.array([figure(window) for window in _cut(within, at, starts)])


def _cut(within: Sequence[Outcome], at: FloatArray, starts: FloatArray) -> Iterator[Sequence[Outcome]]:
    first, last = np.searchsorted(at, starts), np.searchsorted(at, starts + WINDOW_S)
    for i, j in zip(first.tolist(), last.tolist(), strict=True):
        yield within[i:j]


def _p95(values: FloatArray) -> float:
    """The smallest value that at least 95 % do not exceed: infinite when too many got none; NaN of nothing."""
    return float(np.quantile(values, 0.95, method="inverted_cdf")) if values.size else math.nan


def _largest(values: FloatArray) -> float:
    return float(np.nanmax(values, initial=-math.inf))


def _hit_ratio(outcomes: Sequence[Outcome]) -> float:
    """Cached share of the prompt tokens of those that ended well."""
    good = [outcome for outcome in outcomes if not outcome.failed]
    asked = sum(outcome.prompt_tokens for outcome in good)
    return sum(outcome.cached_tokens for outcome in good) / asked if asked else math.nan
