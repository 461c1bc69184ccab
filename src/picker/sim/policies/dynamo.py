"""NVIDIA Dynamo's KV router with its defaults (1.0, 2026).

    cost = prefill_load_scale * max(0, active_prefill_blocks + request_blocks - credit) + decode_blocks

prefill_load_scale 1, credit = blocks cached on the device, no decay; decode_active_request_weight 0; output blocks not
tracked; temperature 0: the lowest cost, ties by lot. After `lib/llm/src/kv_router`: active prefill blocks are uncached
tokens of requests without a first token, decode blocks are the distinct prompt blocks of all active requests there and
of this one, until they end.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from picker.sim.policies.knowledge import Holdings, Knowledge, leading
from picker.sim.policies.peer import Asked, Booking, Peer
from picker.types import FloatArray, Int64Array


class Dynamo(Peer):
    """Both parts in blocks; a last block that is not full counts as its share when prefilled, whole when held."""

    def __init__(
        self, knowledge: Knowledge, rng: np.random.Generator, *, block_tokens: int, prefill_load_scale: float = 1.0
    ) -> None:
        super().__init__(knowledge, rng, block_tokens=block_tokens)
        self._scale = prefill_load_scale
        self._active = Holdings()
        self._distinct: Int64Array = np.zeros(self.fleet.rows, dtype=np.int64)

    def cost(self, asked: Asked) -> FloatArray:
        prefill = (self.fleet.uncached[asked.rows] + asked.uncached) / self.block_tokens
        self._cover(self.fleet.rows)
        shared = leading(asked.request.block_hashes, (self._active,), self.fleet.rows)
        held = self._distinct[asked.rows] + self._blocks(asked.request.prompt_tokens, asked.total_blocks)
        cost: FloatArray = self._scale * prefill + (held - shared[asked.rows])
        return cost

    def booked(self, booking: Booking) -> None:
        hashes = booking.request.block_hashes.tolist()
        self._distinct[booking.row] += self._extra(booking) + self._absent(booking.row, hashes)
        self._active.add(booking.row, hashes)

    def ended(self, booking: Booking) -> None:
        hashes = booking.request.block_hashes.tolist()
        self._active.discard(booking.row, hashes)
        self._distinct[booking.row] -= self._extra(booking) + self._absent(booking.row, hashes)

    def _blocks(self, tokens: int | None, full: int) -> int:
        """Of a whole prompt, the last one begun."""
        return full if tokens is None else max(full, -(-tokens // self.block_tokens))

    def _extra(self, booking: Booking) -> int:
        """Blocks without a hash: never shared."""
        full = int(booking.request.block_hashes.size)
        return self._blocks(booking.request.prompt_tokens, full) - full

    def _absent(self, row: int, hashes: Iterable[int]) -> int:
        find = self._active.rows_of.get
        return sum(not find(block_hash, 0) >> row & 1 for block_hash in hashes)

    def _cover(self, rows: int) -> None:
        extra = rows - self._distinct.size
        if extra > 0:
            self._distinct = np.concatenate([self._distinct, np.zeros(extra, dtype=np.int64)])
