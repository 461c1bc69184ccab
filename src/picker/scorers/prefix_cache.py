"""Prefers endpoints that hold more of the prompt's leading blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """(1 - w) * matched / total + w * min(1, matched tokens / scale)^2 (llm-d's `prefix-cache-scorer`).

    match_length_weight: w, of 0..1. match_length_scale_tokens: the match that is as good as any longer one.
    """

    match_length_weight: float = 0.0
    match_length_scale_tokens: float = 8192.0
    name: str = "prefix-cache-scorer"

    def __post_init__(self) -> None:
        if not 0.0 <= self.match_length_weight <= 1.0:
            raise ValueError(f"match_length_weight must be from 0 to 1, got {self.match_length_weight}")
        if self.match_length_weight > 0.0 and not self.match_length_scale_tokens > 0.0:
            raise ValueError(f"match_length_scale_tokens must be greater than 0, got {self.match_length_scale_tokens}")

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        ratio = np.clip(view.matched_blocks / max(view.total_blocks, 1), 0.0, 1.0)
        weight = self.match_length_weight
        if weight == 0.0:
            return ratio.astype(np.float32)
        length = np.clip((view.prompt_tokens - view.uncached) / self.match_length_scale_tokens, 0.0, 1.0)
        return (weight * length**2 + (1.0 - weight) * ratio).astype(np.float32)
