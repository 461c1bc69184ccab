"""Estimates that learn online: ratios of decayed sums. Time is an argument, randomness is none."""

from __future__ import annotations


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
    def sums(self) -> tuple[float, float]:
        """Numerator and denominator, the prior among them."""
        return self._top, self._bottom

    def learn(self, sums: tuple[float, float]) -> None:
        """Take somebody else's sums for ours if they rest on more."""
        if sums[1] > self._bottom:
            self._top, self._bottom = sums

    @property
    def value(self) -> float:
        return self._top / self._bottom
