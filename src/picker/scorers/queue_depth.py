"""Prefers endpoints with fewer requests waiting in the engine."""

from __future__ import annotations

from dataclasses import dataclass

from picker.core.view import PoolView
from picker.scorers.scale import less_is_better
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Scraped waiting requests, min-max over the candidates (llm-d's `queue-scorer`)."""

    name: str = "queue-scorer"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        return less_is_better(view.waiting)
