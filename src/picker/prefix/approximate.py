"""What each endpoint probably caches, learned from what we sent there: blocks, the least recently used out first.

Mirrors vLLM's automatic prefix caching: block i is useful only if 0..i-1 are there too, a request's blocks are evicted
tail first, and an endpoint holds as much as its KV cache does. Pure; arrays instead of objects; a hard bound in bytes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from picker.prefix.blocks import RESERVED, mix
from picker.prefix.table import Table
from picker.types import FloatArray, Int32Array, Int64Array, UInt64Array

_NEVER = np.iinfo(np.int64).max
_CHUNK_BYTES = 320  # of a deque entry, its object and its array's header
_COMPACT_SLACK = 1024

# Rules of `correct`. A miss counts forty times a hit: in balance about one prediction in forty is too high.
_SHRINK = 0.98
_RECOVER = 1.0005
_FLOOR = 0.1
_TRUST_GAIN = 0.05


@dataclass(slots=True)
class _Chunk:
    """One touch of one endpoint: hashes oldest first. Those touched again later belong to the later chunk."""

    stamp: int
    hashes: UInt64Array


class ApproximateIndex:
    """(block, endpoint row) pairs. budget_bytes: bound on everything allocated here, rebuilds included.

    `_blocks` maps a block's hash to the bit set of rows that hold it; `_pairs` maps a pair to the stamp of its latest
    touch. Each row queues its touches in order: evicting means taking, from the oldest touch, the tail of what no
    later touch has claimed. A touch always claims a whole prefix, so a row's holdings stay closed under prefixes.
    """

    def __init__(self, budget_bytes: int, rows: int = 64) -> None:
        self.budget_bytes = budget_bytes
        self.trust: FloatArray = np.ones(rows)
        self._rows = rows
        self._words = -(-rows // 64)
        self._blocks = Table({"holders": (np.uint64, (self._words,))})
        self._pairs = Table({"stamp": (np.uint32, ())})
        self._stamp = 0
        self._lives = 0
        self._queues: list[deque[_Chunk]] = [deque() for _ in range(rows)]
        self._row_keys: UInt64Array = np.array([self._new_key() for _ in range(rows)], dtype=np.uint64)
        self._resident: Int64Array = np.zeros(rows, dtype=np.int64)
        self._queued: Int64Array = np.zeros(rows, dtype=np.int64)
        self._oldest: Int64Array = np.full(rows, _NEVER, dtype=np.int64)
        self._announced: FloatArray = np.full(rows, np.inf)
        self._effective: FloatArray = np.full(rows, np.inf)

    # --- reading ---

    @property
    def nbytes(self) -> int:
        """Bytes held at this moment."""
        chunks = sum(len(queue) for queue in self._queues)
        return self._blocks.nbytes + self._pairs.nbytes + 8 * int(self._queued.sum()) + _CHUNK_BYTES * chunks

    @property
    def blocks(self) -> int:
        """Distinct blocks held by anyone."""
        return self._blocks.live

    def resident(self, row: int) -> int:
        """Blocks this row is believed to hold."""
        return int(self._resident[row])

    def effective_capacity(self, row: int) -> float:
        """Blocks the row is trusted to retain; inf where its capacity is not known."""
        return float(self._effective[row])

    def match(self, block_hashes: UInt64Array) -> Int32Array:
        """Count the leading blocks of a prompt that each row holds.

        block_hashes: (b,) chained hashes, oldest first. Returns (rows,) counts, 0..b. Reads only.
        """
        counts = np.zeros(self._rows, dtype=np.int32)
        slots = self._blocks.find(block_hashes)
        absent = np.flatnonzero(slots < 0)
        known = int(absent[0]) if absent.size else slots.size
        if known == 0:
            return counts
        holders = np.bitwise_and.accumulate(self._blocks.columns["holders"][slots[:known]], axis=0)
        # Leading holders only drop out: the last block of each run of equal sets tells the whole run.
        ends = np.append(np.flatnonzero((holders[1:] != holders[:-1]).any(axis=1)), known - 1)
        bits = np.unpackbits(holders[ends].view(np.uint8), axis=1, bitorder="little")[:, : self._rows]
        lengths = np.diff(ends, prepend=-1).astype(np.int32)
        result: Int32Array = lengths @ bits.astype(np.int32)
        return result

    # --- learning ---

    def store(self, row: int, block_hashes: UInt64Array) -> None:
        """This row holds these blocks as of this touch; what it held longest untouched makes room, tail first."""
        if block_hashes.size > self._effective[row]:
            block_hashes = block_hashes[: int(self._effective[row])]
        if block_hashes.size == 0 or not self._make_room(block_hashes.size):
            return
        word, bit = _bit(row)
        slots, _ = self._blocks.insert(block_hashes)
        self._blocks.columns["holders"][slots, word] |= bit
        pairs, new = self._pairs.insert(self._pair_keys(row, block_hashes))
        self._stamp += 1
        self._pairs.columns["stamp"][pairs] = self._stamp
        self._resident[row] += new
        self._enqueue(row, _Chunk(self._stamp, block_hashes))
        if self._resident[row] > self._effective[row]:
            self._evict(row, int(self._resident[row] - self._effective[row]))
        if self._queued[row] > 2 * self._resident[row] + _COMPACT_SLACK:
            self._compact(row)

    def correct(self, row: int, block_hashes: UInt64Array, predicted: int, actual: int) -> None:
        """The engine had `actual` leading blocks cached when we had predicted so many.

        It has computed and stored the prompt since, so the blocks stay. What is learned is how much it retains: a
        prediction that was too high shrinks the capacity we credit it with, one that held lets it recover slowly to
        what the engine announced. `trust` follows the share of predicted blocks that were there: near 0 for an engine
        that does not cache at all.
        """
        if predicted <= 0:
            return
        held = min(actual, predicted) / predicted
        self.trust[row] += _TRUST_GAIN * (held - self.trust[row])
        announced = self._announced[row]
        if not np.isfinite(announced):
            return
        factor = _RECOVER if actual >= predicted else _SHRINK
        self._effective[row] = min(announced, max(_FLOOR * announced, self._effective[row] * factor))
        self._trim(row)

    def set_capacity(self, row: int, blocks: int | None) -> None:
        """What the engine announces to hold, in our blocks; None when it does not say."""
        announced = np.inf if blocks is None else float(blocks)
        learned = self._effective[row] / self._announced[row] if np.isfinite(self._announced[row]) else 1.0
        self._announced[row] = announced
        self._effective[row] = announced * learned
        self._trim(row)

    def clear(self, row: int) -> None:
        """The row holds nothing any more (its engine restarted)."""
        self._evict(row, int(self._resident[row]))
        self._drop_queue(row)

    def remove_row(self, row: int) -> None:
        """The endpoint left; whoever gets the row next starts from nothing."""
        self.clear(row)
        self._row_keys[row] = self._new_key()
        self._announced[row] = self._effective[row] = np.inf
        self.trust[row] = 1.0

    def grow_rows(self, rows: int) -> None:
        """Make room for more rows; does nothing when there are as many."""
        extra = rows - self._rows
        if extra <= 0:
            return
        self._rows = rows
        self._queues.extend(deque() for _ in range(extra))
        fresh = np.array([self._new_key() for _ in range(extra)], dtype=np.uint64)
        self._row_keys = np.concatenate([self._row_keys, fresh])
        self._resident = np.concatenate([self._resident, np.zeros(extra, dtype=np.int64)])
        self._queued = np.concatenate([self._queued, np.zeros(extra, dtype=np.int64)])
        self._oldest = np.concatenate([self._oldest, np.full(extra, _NEVER, dtype=np.int64)])
        self._announced = np.concatenate([self._announced, np.full(extra, np.inf)])
        self._effective = np.concatenate([self._effective, np.full(extra, np.inf)])
        self.trust = np.concatenate([self.trust, np.ones(extra)])
        words = -(-rows // 64)
        if words > self._words:
            self._words = words
            self._blocks.widen("holders", (words,))

    # --- room ---

    def _make_room(self, count: int) -> bool:
        """Let the tables take so many new blocks within the budget, the globally oldest touches going first."""
        while self._peak(count) > self.budget_bytes:
            row = int(np.argmin(self._oldest))
            if self._oldest[row] == _NEVER:
                return False
            self._evict_chunk(row)
        self._blocks.reserve(count)
        self._pairs.reserve(count)
        return True

    def _peak(self, count: int) -> int:
        growth = self._blocks.reserve_bytes(count) + self._pairs.reserve_bytes(count)
        return self.nbytes + growth + 8 * count + _CHUNK_BYTES

    def _trim(self, row: int) -> None:
        if self._resident[row] > self._effective[row]:
            self._evict(row, int(np.ceil(self._resident[row] - self._effective[row])))

    # --- eviction ---

    def _evict(self, row: int, count: int) -> None:
        """Take so many blocks from a row: oldest touch first, from its tail."""
        while count > 0:
            chunk = self._queues[row][0]
            live, pairs = self._claimed(row, chunk)
            drop = live[max(0, live.size - count) :]
            self._release(row, chunk.hashes[drop], pairs[drop])
            count -= drop.size
            if drop.size == live.size:
                self._pop_chunk(row)
            else:
                self._queued[row] -= chunk.hashes.size - int(drop[0])
                chunk.hashes = chunk.hashes[: int(drop[0])].copy()

    def _evict_chunk(self, row: int) -> None:
        """Take all that the row's oldest touch still claims."""
        chunk = self._queues[row][0]
        live, pairs = self._claimed(row, chunk)
        self._release(row, chunk.hashes[live], pairs[live])
        self._pop_chunk(row)

    def _claimed(self, row: int, chunk: _Chunk) -> tuple[Int64Array, Int64Array]:
        """(indices of the chunk's blocks that no later touch has claimed, slots of all its pairs)."""
        pairs = self._pairs.find(self._pair_keys(row, chunk.hashes))
        # Slot -1 reads the last slot's stamp; the first condition takes it out again.
        return np.flatnonzero((pairs >= 0) & (self._pairs.columns["stamp"][pairs] == chunk.stamp)), pairs

    def _release(self, row: int, hashes: UInt64Array, pairs: Int64Array) -> None:
        if hashes.size == 0:
            return
        word, bit = _bit(row)
        self._pairs.delete(pairs)
        self._resident[row] -= hashes.size
        slots = self._blocks.find(hashes)
        holders = self._blocks.columns["holders"]
        holders[slots, word] &= ~bit
        self._blocks.delete(slots[~holders[slots].any(axis=1)])

    # --- queues of touches ---

    def _enqueue(self, row: int, chunk: _Chunk) -> None:
        if not self._queues[row]:
            self._oldest[row] = chunk.stamp
        self._queues[row].append(chunk)
        self._queued[row] += chunk.hashes.size

    def _pop_chunk(self, row: int) -> None:
        queue = self._queues[row]
        self._queued[row] -= queue.popleft().hashes.size
        self._oldest[row] = queue[0].stamp if queue else _NEVER

    def _drop_queue(self, row: int) -> None:
        self._queues[row].clear()
        self._queued[row] = 0
        self._oldest[row] = _NEVER

    def _compact(self, row: int) -> None:
        """Forget what later touches have claimed: a queue is never much longer than what the row holds."""
        chunks = list(self._queues[row])
        self._drop_queue(row)
        for chunk in chunks:
            live, _ = self._claimed(row, chunk)
            if live.size:
                self._enqueue(row, _Chunk(chunk.stamp, chunk.hashes[live]))

    def _pair_keys(self, row: int, hashes: UInt64Array) -> UInt64Array:
        keys = mix(hashes ^ self._row_keys[row])
        keys[keys < RESERVED] += np.uint64(RESERVED)
        return keys

    def _new_key(self) -> np.uint64:
        """A number no row has had before: pairs of a row's former endpoint can never be taken for its own."""
        self._lives += 1
        return np.uint64(mix(np.array([self._lives], dtype=np.uint64))[0])


def _bit(row: int) -> tuple[int, np.uint64]:
    return row >> 6, np.uint64(1 << (row & 63))
