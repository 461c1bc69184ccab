"""Prefers the endpoint that served this session last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class Session:
    """1 for the endpoint of the session's previous request, 0 for the others (llm-d's `session-affinity-scorer`)."""

    name: str = "session-affinity-scorer"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        if view.session_row is None:
            return np.zeros(view.n, dtype=np.float32)
        return np.equal(view.rows, view.session_row).astype(np.float32)
