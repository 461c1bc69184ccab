"""Prefers endpoints with fewer of our own requests in flight, and idle ones above all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class ActiveRequest:
    """1 up to `idle_threshold` requests, else (max - n) / max * `max_busy_score` (llm-d's `active-request-scorer`)."""

    idle_threshold: int = 0
    max_busy_score: float = 1.0
    name: str = "active-request-scorer"

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_busy_score <= 1.0:
            raise ValueError(f"max_busy_score must be from 0 to 1, got {self.max_busy_score}")

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        count = view.inflight
        most = max(int(count.max()), 1)
        busy = (most - count) / most * self.max_busy_score
        return np.where(count <= self.idle_threshold, 1.0, busy).astype(np.float32)
