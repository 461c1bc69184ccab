"""Prefers endpoints with fewer of our own requests in flight: least-request balancing, exact at any scrape interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.view import PoolView
from picker.scorers.scale import less_is_better
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class Inflight:
    """Requests we booked and have not seen the end of, min-max over the candidates."""

    name: str = "inflight-scorer"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        return less_is_better(view.inflight.astype(np.float64))
