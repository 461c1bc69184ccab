"""Prefers endpoints whose label says that they are meant for prompts of this length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.profile import context_range, labels
from picker.core.view import PoolView
from picker.types import Request, ScoreArray

_BESIDE = 0.3  # what an endpoint scores at most whose range the prompt is not in


@dataclass(frozen=True, slots=True)
class ContextLength:
    """llm-d's `context-length-aware`: by the range "min-max" of prompt tokens in an endpoint's `label`.

    Within it 0.3 + 0.7 * (0.7 / (1 + width / 10,000) + 0.3 * (max - length) / width), so that narrow ranges with room
    to spare win; beside it 0.3 / (1 + distance / 1,000); without the label 0.5; with one that is no range 0.
    """

    label: str = "llm-d.ai/context-length-range"
    name: str = "context-length-aware"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        length = view.prompt_tokens
        return np.array([_score(length, text) for text in labels(view, self.label)], dtype=np.float32)


def _score(length: float, text: str | None) -> float:
    if text is None:
        return 0.5
    meant = context_range(text)
    if meant is None:
        return 0.0
    low, high = meant
    if not low <= length <= high:
        return _BESIDE / (1.0 + max(length - high, low - length) / 1000.0)
    width = high - low
    if width == 0:
        return 1.0
    return _BESIDE + (0.7 / (1.0 + width / 10_000.0) + 0.3 * (high - length) / width) * (1.0 - _BESIDE)
