"""Prefers endpoints where the request's LoRA adapter is loaded, then those with room for one more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class LoraAffinity:
    """Active 1.0, room for a new one `room_score`, else 0 (llm-d's `lora-affinity-scorer`).

    Its third tier, an adapter that only waits, does not exist here: vLLM reports running and waiting adapters as the
    same set, so the two cannot be told apart.
    """

    room_score: float = 0.8
    name: str = "lora-affinity-scorer"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        room = np.where(view.adapter_room, self.room_score, 0.0)
        return np.where(view.adapter_active, 1.0, room).astype(np.float32)
