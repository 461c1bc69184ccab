"""Prefers endpoints with fewer requests running in the engine."""

from __future__ import annotations

from dataclasses import dataclass

from picker.core.view import PoolView
from picker.scorers.scale import less_is_better
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class Running:
    """Scraped running requests, min-max over the candidates (llm-d's `running-requests-size-scorer`)."""

    name: str = "running-requests-size-scorer"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        return less_is_better(view.running)
