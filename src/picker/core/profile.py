"""How candidates are ranked: a weighted sum of scorers, or one cost in seconds. Pure, one pass over arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from picker.core.cost import CostModel
from picker.core.view import PoolView
from picker.types import FloatArray, Request, ScoreArray

Parts = Mapping[str, NDArray[np.floating]]


class Scorer(Protocol):
    """Rates every candidate between 0 and 1, 1 being best: `(view, request) -> float32 (n,)`.

    A frozen dataclass holding its parameters; it must not write to the view and must never return NaN.
    `name` is its short name in configurations and explanations.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, view: PoolView, request: Request) -> ScoreArray: ...


class Profile(Protocol):
    """Ranks the candidates of one request: (n,) totals, higher wins, and the parts they are made of."""

    def rank(self, view: PoolView, request: Request) -> tuple[FloatArray, Parts]: ...


@dataclass(frozen=True, slots=True)
class Weighted:
    """The endpoint picker's way: each scorer's value times its weight, summed."""

    scorers: Sequence[tuple[Scorer, float]]

    def rank(self, view: PoolView, request: Request) -> tuple[FloatArray, Parts]:
        total = np.zeros(view.n)
        parts: dict[str, NDArray[np.floating]] = {}
        for scorer, weight in self.scorers:
            part = weight * scorer(view, request).astype(np.float64)
            parts[scorer.name] = part
            total += part
        return total, parts


@dataclass(frozen=True, slots=True)
class Cost:
    """picker's way: the endpoint on which this request costs the fewest seconds, to itself and to the others there."""

    model: CostModel = field(default_factory=CostModel)

    def rank(self, view: PoolView, request: Request) -> tuple[FloatArray, Parts]:
        terms = self.model.terms(view, request)
        total = np.zeros(view.n)
        for term in terms.values():
            total -= term
        return total, terms
