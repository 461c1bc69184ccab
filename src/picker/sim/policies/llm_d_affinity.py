"""llm-d's default of 2026: a gate of cache affinity, a valve on the load gap, then the fewest uncached tokens.

Source: llm-d router, `prefix-cache-affinity-filter` (affinityThreshold 0.8, explorationProbability 0,
maxTTFTPenaltyMs 18000 at peakPrefillThroughput 15928 tokens/s, which makes 286,704 tokens), then `token-load-scorer`
over `inflight-load-producer`; August 2026 ("sticky until saturated").
"""

from __future__ import annotations

import numpy as np

from picker.sim.policies.knowledge import Knowledge
from picker.sim.policies.peer import Asked, Peer
from picker.types import FloatArray


class LlmdAffinity(Peer):
    """Tokens in flight are uncached prompt tokens, released with the first token.

    When the valve opens all candidates come back, the sticky ones included.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        rng: np.random.Generator,
        *,
        block_tokens: int,
        threshold: float = 0.8,
        valve: float = 286_704.0,
        horizon: float = 4_194_304.0,
    ) -> None:
        super().__init__(knowledge, rng, block_tokens=block_tokens)
        self._threshold = threshold
        self._valve = valve
        self._horizon = horizon

    def cost(self, asked: Asked) -> FloatArray:
        inflight = self.fleet.uncached[asked.rows]
        sticky = asked.ratio >= self._threshold
        if sticky.any() and not sticky.all():
            if inflight[sticky].min() - inflight[~sticky].min() > self._valve:
                sticky = np.ones_like(sticky)
        elif not sticky.any():
            sticky = np.ones_like(sticky)
        # The scorer is 1 - min(tokens, horizon) / horizon: beyond it all are equally bad.
        tokens = np.minimum(inflight + asked.uncached, self._horizon)
        cost: FloatArray = np.where(sticky, tokens, np.inf)
        return cost
