"""From a ranking to endpoints: which candidate wins, and who stands in if it fails. Ties are broken at random."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from picker.types import FloatArray, Int64Array

_FEW = 128  # candidates that are sorted by two keys faster than they are narrowed down first

Picker = Callable[[FloatArray, int, np.random.Generator], Int64Array]


def max_score(total: FloatArray, count: int, rng: np.random.Generator) -> Int64Array:
    """Indices of the `count` best totals, best first; equal totals in random order.

    Without the random tie-break a burst of equal requests piles onto the first endpoint of the list.
    """
    if total.size <= _FEW:
        return _best(total, count, rng)
    able: Int64Array = (total >= _last_place(total, count)).nonzero()[0]  # a tie at the last place is open to all
    chosen: Int64Array = able[_best(total[able], count, rng)]
    return chosen


def _last_place(total: FloatArray, count: int) -> float:
    """The total that comes in at place `count`, equal ones counted one by one; the least where there are not so many.

    From the top down: with most totals equal, which is the rule, a step or two instead of sorting all of them.
    """
    place: float = total.max()
    while (within := np.count_nonzero(total >= place)) < count and within < total.size:
        place = total[total < place].max()
    return place


def _best(total: FloatArray, count: int, rng: np.random.Generator) -> Int64Array:
    order: Int64Array = np.lexsort((rng.random(total.size), -total))
    return order[:count]


def weighted_random(total: FloatArray, count: int, rng: np.random.Generator) -> Int64Array:
    """Sample without replacement with probability proportional to the total (Efraimidis & Spirakis 2006).

    Totals are shifted so that the worst candidate weighs nothing; when all are equal the draw is uniform.
    """
    weights = total - total.min()
    if not weights.any():
        weights = np.ones_like(weights)
    with np.errstate(divide="ignore", over="ignore"):
        keys = np.log(rng.random(total.size)) / weights
    return np.argsort(-keys, kind="stable")[: min(count, total.size)]


def proportional(total: FloatArray, count: int, rng: np.random.Generator) -> Int64Array:
    """Sample without replacement with probability proportional to the total itself: keys of U^(1/total), largest first.

    llm-d's `weighted-random-picker`: a total of 0 comes behind all others; when all are, the draw is uniform.
    """
    if not (total > 0.0).any():
        return uniform(total, count, rng)
    with np.errstate(divide="ignore", over="ignore"):
        keys = np.where(total > 0.0, np.log(rng.random(total.size)) / np.maximum(total, 0.0), -np.inf)
    order: Int64Array = np.lexsort((rng.random(total.size), -keys))
    return order[:count]


def uniform(total: FloatArray, count: int, rng: np.random.Generator) -> Int64Array:
    """Anybody, whatever the totals (llm-d's `random-picker`)."""
    order: Int64Array = rng.permutation(total.size)
    return order[:count]


def power_of_two(total: FloatArray, count: int, rng: np.random.Generator) -> Int64Array:
    """The better of two candidates drawn at random (Mitzenmacher 2001), then the rest by score."""
    n = total.size
    if n <= 2:
        return max_score(total, count, rng)
    first, second = rng.choice(n, size=2, replace=False)
    winner = first if total[first] >= total[second] else second
    rest = max_score(total, count, rng)
    return np.concatenate([[winner], rest[rest != winner]])[: min(count, n)]


PICKERS: dict[str, Picker] = {
    "max-score": max_score,
    "weighted-random": weighted_random,
    "power-of-two": power_of_two,
    # the endpoint picker's
    "max-score-picker": max_score,
    "weighted-random-picker": proportional,
    "random-picker": uniform,
}
