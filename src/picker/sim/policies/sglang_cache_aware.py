"""The `cache_aware` policy of sglang-router 0.3.2 and SMG (Shepherd Model Gateway) 1.9, with the CLI's defaults.

cache-threshold 0.3, balance-abs-threshold 64, balance-rel-threshold 1.5; load is the number of requests in flight.
"""

from __future__ import annotations

import numpy as np

from picker.sim.policies.knowledge import Knowledge
from picker.sim.policies.peer import Asked, Peer
from picker.types import FloatArray


class SglangCacheAware(Peer):
    """Out of balance, or too little of the prompt cached anywhere: the fewest requests. Else the longest match.

    Out of balance: max - min > absolute and max > relative * min.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        rng: np.random.Generator,
        *,
        block_tokens: int,
        threshold: float = 0.3,
        absolute: int = 64,
        relative: float = 1.5,
    ) -> None:
        super().__init__(knowledge, rng, block_tokens=block_tokens)
        self._threshold = threshold
        self._absolute = absolute
        self._relative = relative

    def cost(self, asked: Asked) -> FloatArray:
        load = self.fleet.inflight[asked.rows].astype(np.float64)
        low, high = load.min(), load.max()
        unbalanced = high - low > self._absolute and high > self._relative * low
        matched = asked.matched_blocks
        share = matched.max() * self.block_tokens / max(asked.tokens, 1.0)
        if unbalanced or share <= self._threshold:
            return load
        cost: FloatArray = np.where(matched == matched.max(), load, np.inf)
        return cost
