"""Prefers endpoints where the request's LoRA adapter is loaded, then those with room for one more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.view import PoolView
from picker.types import BoolArray, Request, ScoreArray


@dataclass(frozen=True, slots=True)
class LoraAffinity:
    """Active 1.0, room for a new one `room_score`, waiting for a slot `waiting_score`, else 0 (`lora-affinity-scorer`).

    vLLM reports running and waiting adapters as the same set, so the third tier cannot be scraped: that requests of the
    adapter wait somewhere is known from our own bookings.
    """

    room_score: float = 0.8
    waiting_score: float = 0.6
    name: str = "lora-affinity-scorer"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        waiting = np.where(self._awaited(view), self.waiting_score, 0.0)
        room = np.where(view.adapter_room, self.room_score, waiting)
        return np.where(view.adapter_active, 1.0, room).astype(np.float32)

    def _awaited(self, view: PoolView) -> BoolArray:
        return np.zeros(view.n, dtype=bool) if view.adapter is None else view.adapter_here(view.adapter)[1]
