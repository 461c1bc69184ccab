"""Named profiles under one roof: which of them a request goes by, and who is told where it went.

A plan is both the profile and the picker of a scheduler, which ranks and picks within one decision: what `rank` found
is kept for the `pick` that follows, so that each profile has a picker of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from picker.core.candidates import header, name_of
from picker.core.pick import Picker, max_score
from picker.core.profile import Filter, Filtered, Parts, Remembering, Scorer, Weighted, nobody, spread
from picker.core.view import PoolView
from picker.types import FloatArray, Int64Array, Request, Role


@dataclass(frozen=True, slots=True)
class Route:
    """One profile: filters in their order, scorers with weights, a picker, and how many endpoints it names at most."""

    scorers: Sequence[tuple[Scorer, float]]
    filters: Sequence[Filter] = ()
    picker: Picker = max_score
    most: int | None = None

    @property
    def plugins(self) -> Iterable[object]:
        """Everything that may want headers or to remember."""
        return (*self.filters, *(scorer for scorer, _ in self.scorers))

    @property
    def profile(self) -> Filtered:
        return Filtered(self.filters, Weighted(self.scorers))


class _Ranked(NamedTuple):
    """What was found of the latest request. seen: the view of whom its filters have left."""

    route: Route
    view: PoolView
    seen: PoolView
    request: Request


@dataclass(slots=True)
class Plan:
    """routes: by name; default: the one for requests that ask for none. header: names a route, where requests may.

    prefill: the route of requests that are to be prefilled only (`Request.role`), where there is one.
    """

    routes: Mapping[str, Route]
    default: str
    header: str | None = None
    prefill: str | None = None
    _ranked: _Ranked | None = field(default=None, init=False, repr=False)

    @property
    def headers(self) -> frozenset[str]:
        """Names of the request headers that decisions depend on, in lower case."""
        asked = {self.header.lower()} if self.header else set()
        for route in self.routes.values():
            for plugin in route.plugins:
                asked.update(getattr(plugin, "headers", ()))
        return frozenset(asked)

    def route(self, request: Request) -> Route | None:
        """The route a request goes by; None when it asks for one that does not exist."""
        if self.prefill is not None and request.role is Role.PREFILL:
            return self.routes[self.prefill]
        asked = header(request, self.header) if self.header else None
        return self.routes.get(asked or self.default)

    def rank(self, view: PoolView, request: Request) -> tuple[FloatArray, Parts]:
        self._ranked = None
        route = self.route(request)
        if route is None:
            return nobody(view.n)
        kept, seen = route.profile.survivors(view, request)
        if not kept.size:
            return nobody(view.n)
        self._ranked = _Ranked(route, view, seen, request)
        return spread(kept, view.n, *Weighted(route.scorers).rank(seen, request))

    def pick(self, total: FloatArray, count: int, rng: np.random.Generator) -> Int64Array:
        """Indices of those picked, best first; none where the filters of the request just ranked have left nobody."""
        ranked, self._ranked = self._ranked, None
        if ranked is None:
            return np.empty(0, dtype=np.int64)
        kept: Int64Array = np.flatnonzero(total > -np.inf)
        most = count if ranked.route.most is None else min(count, ranked.route.most)
        order: Int64Array = kept[ranked.route.picker(total[kept], most, rng)]
        _tell(ranked, int(order[0]))
        return order


def _tell(ranked: _Ranked, index: int) -> None:
    for plugin in ranked.route.plugins:
        if isinstance(plugin, Remembering):
            plugin.picked(ranked.seen, ranked.request, name_of(ranked.view, index))
