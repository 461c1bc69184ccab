"""Prefers endpoints with fewer prompt tokens still to be computed, the request's own included."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class TokenLoad:
    """1 - min(tokens, T) / T of the uncached tokens booked there plus this request's (llm-d's `token-load-scorer`).

    queue_threshold_tokens: T, beyond which all are equally bad (the default is 128 requests of 32 Ki tokens).
    """

    queue_threshold_tokens: float = 4_194_304.0
    name: str = "token-load-scorer"

    def __post_init__(self) -> None:
        if not self.queue_threshold_tokens > 0.0:
            raise ValueError(f"queue_threshold_tokens must be greater than 0, got {self.queue_threshold_tokens}")

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        tokens = view.backlog + view.uncached
        # Near 1 a float32 holds steps of 1/16,777,216: with the default T one token is four of them.
        return (1.0 - np.clip(tokens / self.queue_threshold_tokens, 0.0, 1.0)).astype(np.float32)
