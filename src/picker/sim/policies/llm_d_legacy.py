"""llm-d's weighted blend: prefix-cache-scorer 3, queue-scorer 2, kv-cache-utilization-scorer 2, max-score-picker.

Source: llm-d inference scheduler, sample configuration up to v0.7 (2026), which descends from the Gateway API Inference
Extension's endpoint picker. Queue and KV usage are what the latest scrape showed (there every 50 ms), nothing else.
"""

from __future__ import annotations

import numpy as np

from picker.sim.policies.knowledge import Knowledge
from picker.sim.policies.peer import Asked, Peer
from picker.types import FloatArray


class LlmdLegacy(Peer):
    """Each scorer is within 0..1, the best at 1; what no scrape has shown yet counts as zero, as it does there."""

    def __init__(
        self,
        knowledge: Knowledge,
        rng: np.random.Generator,
        *,
        block_tokens: int,
        prefix: float = 3.0,
        queue: float = 2.0,
        kv: float = 2.0,
    ) -> None:
        super().__init__(knowledge, rng, block_tokens=block_tokens)
        self._weights = (prefix, queue, kv)

    def cost(self, asked: Asked) -> FloatArray:
        prefix, queue, kv = self._weights
        waiting = np.nan_to_num(self.fleet.waiting[asked.rows])
        free = 1.0 - np.nan_to_num(self.fleet.kv_usage[asked.rows])
        return -(prefix * asked.ratio + queue * _fewest(waiting) + kv * free)


def _fewest(waiting: FloatArray) -> FloatArray:
    """(max - q) / (max - min); all 1 where equal."""
    low, high = waiting.min(), waiting.max()
    score: FloatArray = np.ones(waiting.size) if high == low else (high - waiting) / (high - low)
    return score
