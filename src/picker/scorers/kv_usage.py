"""Prefers endpoints whose KV cache is less used by running requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.profile import filled
from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class KvUsage:
    """1 - scraped usage (llm-d's `kv-cache-utilization-scorer`); unknown counts as the mean of the known, else 0.5."""

    name: str = "kv-cache-utilization-scorer"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        return np.clip(1.0 - filled(view.kv_usage, 0.5), 0.0, 1.0).astype(np.float32)
