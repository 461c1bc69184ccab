"""Consistent hashing of the prompt's beginning with bounded loads.

Rule: Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads" (2016), as in HAProxy's
`hash-balance-factor`, c = 1.25. Key: the first 256 tokens, as `prefix_hash` of SMG (Shepherd Model Gateway) 1.9 has
it; its ring has 150 points an endpoint.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from picker.sim.policies.knowledge import Knowledge
from picker.sim.policies.peer import Asked, Peer
from picker.types import FloatArray, UInt64Array

_POINTS = 150


class ConsistentHash(Peer):
    """The next endpoint on the ring whose requests in flight stay within `bound` times the mean, this one included."""

    def __init__(
        self,
        knowledge: Knowledge,
        rng: np.random.Generator,
        *,
        block_tokens: int,
        bound: float = 1.25,
        key_tokens: int = 256,
    ) -> None:
        super().__init__(knowledge, rng, block_tokens=block_tokens)
        self._bound = bound
        self._key_blocks = max(1, key_tokens // block_tokens)
        self._points: UInt64Array = np.empty(0, dtype=np.uint64)
        self._owners: list[int] = []
        self._on_ring = 0

    def cost(self, asked: Asked) -> FloatArray:
        """(n,) 0 for the endpoint to take, 1 for the others."""
        self._extend_ring()
        place = {row: i for i, row in enumerate(asked.rows.tolist())}
        inflight = self.fleet.inflight[asked.rows]
        limit = math.ceil(self._bound * (int(inflight.sum()) + 1) / asked.rows.size)
        cost = np.ones(asked.rows.size)
        start = int(np.searchsorted(self._points, self._key(asked)))
        for step in range(len(self._owners)):
            i = place.get(self._owners[(start + step) % len(self._owners)])
            if i is not None and inflight[i] < limit:
                cost[i] = 0.0
                break
        return cost

    def _key(self, asked: Asked) -> np.uint64:
        """Of the first blocks; a prompt shorter than a block shares nothing, and its own number is as good."""
        hashes = asked.request.block_hashes
        if hashes.size:
            text = hashes[min(self._key_blocks, hashes.size) - 1].tobytes()
        else:
            text = str(asked.request.session or asked.request.id).encode()
        return _point(text)

    def _extend_ring(self) -> None:
        """Rows are never given again, so the ring only grows; who may not serve is stepped over."""
        endpoints = self.fleet.endpoints
        if self._on_ring == len(endpoints):
            return
        points = [
            (_point(f"{endpoint.name}#{i}".encode()), row)
            for row, endpoint in enumerate(endpoints)
            for i in range(_POINTS)
        ]
        points.sort()
        self._points = np.array([point for point, _ in points], dtype=np.uint64)
        self._owners = [row for _, row in points]
        self._on_ring = len(endpoints)


def _point(text: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
