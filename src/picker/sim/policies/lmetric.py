"""LMetric: new prefill tokens times batch size, nothing to tune (arXiv 2603.15202, 2026).

The batch counts this request too, which also keeps an idle endpoint's product from being zero whatever it would have
to compute.
"""

from __future__ import annotations

import numpy as np

from picker.sim.policies.knowledge import Knowledge
from picker.sim.policies.peer import Asked, Peer
from picker.types import FloatArray


class LMetric(Peer):
    """queued: whether tokens that are booked there and not computed yet count as new, too."""

    def __init__(
        self, knowledge: Knowledge, rng: np.random.Generator, *, block_tokens: int, queued: bool = False
    ) -> None:
        super().__init__(knowledge, rng, block_tokens=block_tokens)
        self._queued = queued

    def cost(self, asked: Asked) -> FloatArray:
        tokens = asked.uncached + self.fleet.uncached[asked.rows] if self._queued else asked.uncached
        cost: FloatArray = tokens * (self.fleet.inflight[asked.rows] + 1)
        return cost
