"""How candidates are ranked: filters, then a weighted sum of scorers, or one cost in seconds. Pure, over arrays.

Also what plugins need beside a view, so that a scorer has one place to import from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from picker.core.candidates import (
    SLO_TPOT,
    SLO_TTFT,
    Headroom,
    context_range,
    filled,
    header,
    headroom,
    labels,
    names,
    only,
    session_candidate,
)
from picker.core.cost import CostModel
from picker.core.cost_few import rank_few, suits
from picker.core.view import PoolView
from picker.types import BoolArray, FloatArray, Int64Array, Request, ScoreArray

__all__ = [
    "SLO_TPOT",
    "SLO_TTFT",
    "Cost",
    "Filter",
    "Filtered",
    "Headroom",
    "Parts",
    "Profile",
    "Remembering",
    "Scorer",
    "Weighted",
    "context_range",
    "filled",
    "header",
    "headroom",
    "labels",
    "names",
    "nobody",
    "session_candidate",
    "spread",
]

Parts = Mapping[str, NDArray[np.floating]]


class Scorer(Protocol):
    """Rates every candidate between 0 and 1, 1 being best: `(view, request) -> float32 (n,)`.

    A frozen dataclass holding its parameters; it must not write to the view and must never return NaN.
    `name` is its short name in configurations and explanations.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, view: PoolView, request: Request) -> ScoreArray: ...


@runtime_checkable
class Remembering(Protocol):
    """A scorer or filter that wants to know where requests went.

    view: what it rated or was asked about. name: the endpoint that was picked.
    """

    def picked(self, view: PoolView, request: Request, name: str) -> None: ...


class Filter(Protocol):
    """Says of every candidate whether it stays: `(view, request) -> bool (n,)`.

    Sees only what earlier filters have left. To leave nobody means that the request cannot be served.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, view: PoolView, request: Request) -> BoolArray: ...


class Profile(Protocol):
    """Ranks the candidates of one request: (n,) totals, higher wins, and the parts they are made of.

    A total of minus infinity means: not this one, not even as a fallback.
    """

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
            parts[scorer.name] = parts[scorer.name] + part if scorer.name in parts else part
            total += part
        return total, parts


@dataclass(frozen=True, slots=True)
class Cost:
    """picker's way: the endpoint on which this request costs the fewest seconds, to itself and to the others there."""

    model: CostModel = field(default_factory=CostModel)

    def rank(self, view: PoolView, request: Request) -> tuple[FloatArray, Parts]:
        if suits(view):
            return rank_few(self.model, view)
        terms = self.model.terms(view, request)
        total = np.zeros(view.n)
        for term in terms.values():
            total -= term
        return total, terms


@dataclass(frozen=True, slots=True)
class Filtered:
    """Filters in their order, then another profile on whom they have left: scores are relative to the survivors."""

    filters: Sequence[Filter]
    then: Profile

    def survivors(self, view: PoolView, request: Request) -> tuple[Int64Array, PoolView]:
        """Indices of the candidates that every filter keeps, and the view of them."""
        kept, seen = np.arange(view.n), view
        for each in self.filters:
            if not kept.size:
                break
            keep = each(seen, request)
            kept, seen = kept[keep], only(seen, keep)
        return kept, seen

    def rank(self, view: PoolView, request: Request) -> tuple[FloatArray, Parts]:
        kept, seen = self.survivors(view, request)
        return spread(kept, view.n, *self.then.rank(seen, request)) if kept.size else nobody(view.n)


def nobody(n: int) -> tuple[FloatArray, Parts]:
    """The ranking in which none of n candidates may be picked."""
    return np.full(n, -np.inf), {}


def spread(kept: Int64Array, n: int, total: FloatArray, parts: Parts) -> tuple[FloatArray, Parts]:
    """The ranking of some as one of all n: nothing is known of those who were filtered out, and they never win."""
    if kept.size == n:
        return total, parts
    everyone = np.full(n, -np.inf)
    everyone[kept] = total
    return everyone, {name: _among(kept, n, part) for name, part in parts.items()}


def _among(kept: Int64Array, n: int, part: NDArray[np.floating]) -> FloatArray:
    values = np.full(n, np.nan)
    values[kept] = part
    return values
