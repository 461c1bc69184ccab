"""How full a pool is, as one number, and which endpoints are too full; after the endpoint picker's two detectors.

1 is saturated, more is possible. A detector is also a filter: it keeps the endpoints below its bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from picker.core.candidates import filled
from picker.core.view import PoolView
from picker.types import BoolArray, Request

MODES = ("requests", "tokens", "hybrid")


class Detector(Protocol):
    """Tells how full the candidates of a view are together, and keeps those that are not."""

    @property
    def name(self) -> str: ...

    def saturation(self, view: PoolView) -> float:
        """From 0, idle, to 1, full, and beyond; 1 where there are no candidates."""
        ...

    def __call__(self, view: PoolView, request: Request) -> BoolArray: ...


@dataclass(frozen=True, slots=True)
class Utilization:
    """The mean of max(waiting / queue_depth, KV usage / kv_usage) (llm-d's `utilization-detector`).

    stale_s: age from which scraped values count as saturated; None: they are taken as they are, and what was never seen
    as the mean of the others. headroom: by which share an endpoint may exceed the bounds and still pass the filter,
    which lets everybody pass where nobody would.
    """

    queue_depth: float = 5.0
    kv_usage: float = 0.8
    stale_s: float | None = None
    headroom: float = 0.0
    name: str = "utilization-detector"

    def __post_init__(self) -> None:
        if not self.queue_depth > 0.0:
            raise ValueError(f"queue_depth must be greater than 0, got {self.queue_depth}")
        if not 0.0 < self.kv_usage <= 1.0:
            raise ValueError(f"kv_usage must be greater than 0 and at most 1, got {self.kv_usage}")
        if self.stale_s is not None and not self.stale_s > 0.0:
            raise ValueError(f"stale_s must be greater than 0 or null, got {self.stale_s}")
        if self.headroom < 0.0:
            raise ValueError(f"headroom must not be negative, got {self.headroom}")

    def saturation(self, view: PoolView) -> float:
        if not view.n:
            return 1.0
        waiting, usage = filled(view.waiting, 0.0), filled(view.kv_usage, 0.0)
        fullness = np.maximum(waiting / self.queue_depth, usage / self.kv_usage)
        return float(np.where(self._stale(view), 1.0, fullness).mean())

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        factor = 1.0 + self.headroom
        below = filled(view.waiting, 0.0) < self.queue_depth * factor
        below &= filled(view.kv_usage, 0.0) < self.kv_usage * factor
        keep = below & ~self._stale(view)
        return keep if keep.any() else np.ones(view.n, dtype=bool)

    def _stale(self, view: PoolView) -> BoolArray:
        if self.stale_s is None:
            return np.zeros(view.n, dtype=bool)
        fresh: BoolArray = view.age <= self.stale_s  # an age nobody knows is not fresh
        return ~fresh


@dataclass(frozen=True, slots=True)
class Concurrency:
    """What is in flight of what may be (llm-d's `concurrency-detector`), counted from our own bookings.

    mode: requests, tokens (uncached prompt tokens not computed yet), or hybrid: the mean of each endpoint's larger
    share. requests, tokens: what one endpoint may have. headroom: by which share the filter lets it exceed that.
    """

    mode: str = "requests"
    requests: int = 100
    tokens: int = 1_000_000
    headroom: float = 0.0
    name: str = "concurrency-detector"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.requests <= 0 or self.tokens <= 0:
            raise ValueError(f"requests and tokens must be greater than 0, got {self.requests} and {self.tokens}")
        if self.headroom < 0.0:
            raise ValueError(f"headroom must not be negative, got {self.headroom}")

    def saturation(self, view: PoolView) -> float:
        if not view.n:
            return 1.0
        requests, tokens = view.inflight / self.requests, view.backlog / self.tokens
        return float({"requests": requests, "tokens": tokens}.get(self.mode, np.maximum(requests, tokens)).mean())

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        few: BoolArray = view.inflight < int(self.requests * (1.0 + self.headroom))
        short: BoolArray = view.backlog < int(self.tokens * (1.0 + self.headroom))
        match self.mode:
            case "requests":
                return few
            case "tokens":
                return short
            case _:
                return few & short
