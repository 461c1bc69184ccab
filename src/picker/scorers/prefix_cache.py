"""Prefers endpoints that hold more of the prompt's leading blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """matched / total blocks (llm-d's `prefix-cache-scorer` with its default matchLengthWeight of 0)."""

    name: str = "prefix-cache-scorer"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        return (view.matched_blocks / max(view.total_blocks, 1)).astype(np.float32)
