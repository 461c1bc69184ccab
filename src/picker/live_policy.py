"""How endpoints are chosen, exchangeable while picker runs, and how much more or less each is to get than it would.

A weight divides the seconds that a request is predicted to cost on an endpoint, or multiplies its score: with weight 2
it is taken for twice as fast, and gets about twice as much where the pool is busy. What an endpoint would be excluded
for still excludes it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from picker.core.candidates import names
from picker.core.pick import Picker
from picker.core.profile import Parts, Profile
from picker.core.view import PoolView
from picker.types import FloatArray, Int64Array, Request


class LivePolicy:
    """A profile and a picker that stand for others. weights: by name of the endpoint, live; who is not there has 1."""

    def __init__(self, profile: Profile, picker: Picker, weights: Mapping[str, float] | None = None) -> None:
        self.profile = profile
        self.picker = picker
        self.weights: Mapping[str, float] = {} if weights is None else weights

    @property
    def headers(self) -> frozenset[str]:
        """Names of the request headers that the profile wants to see."""
        return frozenset(getattr(self.profile, "headers", ()))

    def rank(self, view: PoolView, request: Request) -> tuple[FloatArray, Parts]:
        total, parts = self.profile.rank(view, request)
        return (self._weighed(view, total), parts) if self.weights else (total, parts)

    def pick(self, total: FloatArray, count: int, rng: np.random.Generator) -> Int64Array:
        return self.picker(total, count, rng)

    def replace(self, profile: Profile, picker: Picker) -> None:
        """Decide by others from here on."""
        self.profile, self.picker = profile, picker

    def _weighed(self, view: PoolView, total: FloatArray) -> FloatArray:
        weights = np.array([self.weights.get(name, 1.0) for name in names(view)])
        weighed: FloatArray = np.where(total < 0.0, total / weights, total * weights)
        return weighed
