"""Estimates that learn online: ratios of decayed sums. Time is an argument, randomness is none."""

from __future__ import annotations

import numpy as np

from picker.types import FloatArray


class Ratio:
    """numerator / denominator of what was observed, older samples fading by `keep` with every new one.

    A ratio of sums weighs a sample by its size: one long prefill says more about speed than many tiny ones.
    prior_weight is how much denominator the prior counts for.
    """

    __slots__ = ("_bottom", "_keep", "_top")

    def __init__(self, prior: float, prior_weight: float, keep: float) -> None:
        self._top = prior * prior_weight
        self._bottom = prior_weight
        self._keep = keep

    def add(self, numerator: float, denominator: float) -> None:
        self._top = self._top * self._keep + numerator
        self._bottom = self._bottom * self._keep + denominator

    @property
    def value(self) -> float:
        return self._top / self._bottom


class Speeds:
    """Prefill speed of every row, in tokens per second, learned from first tokens.

    A row starts at what the pool as a whole shows and is pulled away from it by its own samples, each weighing its
    own seconds: with `prior_s` seconds of observed prefill, its own evidence weighs as much as the pool's.
    """

    def __init__(self, rows: int, *, prior: float = 8000.0, prior_s: float = 2.0, keep: float = 0.98) -> None:
        self._pool = Ratio(prior, prior_s, keep=0.995)
        self._prior_s = prior_s
        self._keep = keep
        self._tokens = np.zeros(rows)
        self._seconds = np.zeros(rows)

    def add(self, row: int, tokens: float, seconds: float) -> None:
        self._pool.add(tokens, seconds)
        self._tokens[row] = self._tokens[row] * self._keep + tokens
        self._seconds[row] = self._seconds[row] * self._keep + seconds

    def forget(self, row: int) -> None:
        self._tokens[row] = self._seconds[row] = 0.0

    def grow(self, rows: int) -> None:
        extra = np.zeros(rows - self._tokens.size)
        self._tokens = np.concatenate([self._tokens, extra])
        self._seconds = np.concatenate([self._seconds, extra])

    def of(self, rows: np.ndarray | slice) -> FloatArray:
        """(n,) tokens per second."""
        return (self._tokens[rows] + self._pool.value * self._prior_s) / (self._seconds[rows] + self._prior_s)
