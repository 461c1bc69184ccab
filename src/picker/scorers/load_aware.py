"""Prefers endpoints with fewer requests waiting in the engine, on a fixed scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.profile import filled
from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class LoadAware:
    """0.5 * (1 - min(waiting, T) / T): half for an empty queue, 0 from `threshold` on (llm-d's `load-aware-scorer`)."""

    threshold: float = 128.0
    name: str = "load-aware-scorer"

    def __post_init__(self) -> None:
        if not self.threshold > 0.0:
            raise ValueError(f"threshold must be greater than 0, got {self.threshold}")

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        waiting = filled(view.waiting, 0.0)
        return (0.5 * (1.0 - np.clip(waiting / self.threshold, 0.0, 1.0))).astype(np.float32)
