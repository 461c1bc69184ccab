"""Prefers the endpoint picked longest ago: alone, this is round robin over whoever is a candidate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class Recency:
    """Rank by the number of the last decision that picked each candidate; never picked comes first."""

    name: str = "recency-scorer"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        values, order = np.unique(-view.last_pick, return_inverse=True)
        return (order / max(values.size - 1, 1)).astype(np.float32)
