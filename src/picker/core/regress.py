"""A small linear model that learns online and forgets: non-negative coefficients from the latest samples."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np

from picker.types import FloatArray

_EAGER = 64  # samples up to which every few lead to a new fit
_OUTLIER = 3.0  # root mean squares
_SHORT = 0.01  # seconds: below, errors are absolute


class _Ring:
    """The latest samples of one size."""

    def __init__(self, size: int, features: int) -> None:
        self.features = np.zeros((size, features))
        self.targets = np.zeros(size)
        self._count = 0

    @property
    def filled(self) -> int:
        return min(self._count, self.targets.size)

    def add(self, features: Sequence[float], target: float) -> None:
        at = self._count % self.targets.size
        self.features[at], self.targets[at] = features, target
        self._count += 1

    @property
    def samples(self) -> FloatArray:
        """(n, features + 1) oldest first, each with its target at the end."""
        at = self._count % self.targets.size if self._count > self.targets.size else 0
        order = np.roll(np.arange(self.filled), -at)
        return np.column_stack([self.features[order], self.targets[order]])


class Regression:
    """y = features @ coefficients, over the latest samples of each size.

    Sizes are powers of two of what the prior expects, each with a ring of its own: hours of short samples leave the
    long ones, which tell the slopes from the intercept, where they are.

    prior: the coefficients before anything was seen. scales: the size of each feature in a typical sample; with them,
    the prior weighs as much as `prior_samples` samples. Coefficients are costs and never negative: one that would be is
    left out and the others fitted again. Samples far off (a hang, a retry) are left out of a second fit.
    Targets must not be negative. costs: the coefficients as plain numbers.
    """

    def __init__(self, prior: FloatArray, scales: FloatArray, *, prior_samples: float = 4.0, ring: int = 256) -> None:
        self.coefficients = prior.copy()
        self.count = 0
        self._prior = prior
        self._expected: list[float] = prior.tolist()
        self._scales = scales
        self._ridge = prior_samples
        self._ring = ring
        self._sizes: dict[int, _Ring] = {}

    @property
    def coefficients(self) -> FloatArray:
        """Replaced, not written, on change."""
        return self._coefficients

    @coefficients.setter
    def coefficients(self, coefficients: FloatArray) -> None:
        self._coefficients = coefficients
        self.costs: list[float] = coefficients.tolist()

    def add(self, features: Sequence[float], target: float) -> None:
        """Take a sample in; now and then, fit anew."""
        expected = sum(map(operator.mul, features, self._expected))
        size = math.frexp(expected)[1]
        ring = self._sizes.get(size)
        if ring is None:
            ring = self._sizes[size] = _Ring(self._ring, len(features))
        ring.add(features, target)
        self.count += 1
        if self.count % (4 if self.count <= _EAGER else 32) == 0:
            self._fit()

    @property
    def samples(self) -> dict[int, FloatArray]:
        """The latest of each size: (n, features + 1), oldest first, each with its target at the end."""
        return {size: ring.samples for size, ring in self._sizes.items()}

    def learn(self, samples: Mapping[int, FloatArray]) -> None:
        """Take somebody else's samples for ours of each size of which there are more."""
        news = False
        for size, theirs in samples.items():
            ours = self._sizes.get(size)
            if len(theirs) <= (0 if ours is None else ours.filled):
                continue
            ring = self._sizes[size] = _Ring(self._ring, self._scales.size)
            for sample in theirs.tolist():
                ring.add(sample[:-1], sample[-1])
            self.count, news = max(self.count, sum(each.filled for each in self._sizes.values())), True
        if news:
            self._fit()

    def __call__(self, features: Sequence[float]) -> float:
        seconds: float = sum(map(operator.mul, features, self.costs))
        return seconds

    def _fit(self) -> None:
        rings = self._sizes.values()
        features = np.concatenate([ring.features[: ring.filled] for ring in rings])
        targets = np.concatenate([ring.targets[: ring.filled] for ring in rings])
        coefficients = self._solve(features, targets)
        errors = np.abs(targets - features @ coefficients)
        near = errors <= _OUTLIER * _without_the_largest(errors)
        # None is near where all errors are too small to be squared.
        whole = near.all() or not near.any()
        self.coefficients = coefficients if whole else self._solve(features[near], targets[near])

    def _solve(self, features: FloatArray, targets: FloatArray) -> FloatArray:
        """Weighted ridge towards the prior. Weights make errors relative: a long sample does not rule."""
        weights = 1.0 / np.maximum(features @ self._prior, _SHORT)
        weights /= weights.mean()
        design, prior = features / self._scales, self._prior * self._scales
        solution = np.zeros(prior.size)
        active = np.ones(prior.size, dtype=bool)
        while active.any():
            columns = design[:, active]
            weighted = columns * weights[:, None]
            gram = columns.T @ weighted + self._ridge * np.eye(columns.shape[1])
            solution[:] = 0.0
            solution[active] = np.linalg.solve(gram, weighted.T @ targets + self._ridge * prior[active])
            if (solution >= 0).all():
                break
            active &= solution > 0
        return solution / self._scales


def _without_the_largest(errors: FloatArray) -> float:
    """Root mean square of all but one: among few samples, one far off would make itself look normal."""
    squares = errors * errors
    squares[squares.argmax()] = 0.0
    return float(np.sqrt(squares.sum() / max(squares.size - 1, 1)))
