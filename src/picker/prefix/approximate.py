"""What each endpoint probably caches, learned from what we sent there: blocks, the least recently used out first.

Mirrors vLLM's automatic prefix caching: block i is useful only if 0..i-1 are there too, a request's blocks are evicted
tail first, and an endpoint holds as much as its KV cache does. Pure, with a hard bound on memory.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from picker.types import FloatArray, Int32Array, UInt64Array

SlotArray = NDArray[np.int32]

_NEVER = np.iinfo(np.int64).max
_NUMBER_BYTES = 32  # of a Python int
_CHUNK_BYTES = 256  # of a touch: the object, its array's header, its place in the queue
_COMPACT_SLACK = 1024
_WALK = 64  # hashes looked up at once: a prompt nobody knows costs no more than its first blocks

# Rules of `correct`. A miss counts forty times a hit: in balance about one prediction in forty is too high.
_SHRINK = 0.98
_RECOVER = 1.0005
_FLOOR = 0.1
_TRUST_GAIN = 0.05


@dataclass(slots=True)
class _Touch:
    """One use of one endpoint: slots, oldest block first. What is used again later belongs to the later touch."""

    stamp: int
    slots: SlotArray


@dataclass(slots=True)
class _Row:
    """One endpoint's holdings: slot -> stamp of its latest touch, and the touches in order.

    queued: slots in all touches. nbytes: of `held`. announced, effective: capacity in blocks, as the engine says and
    as it is trusted.
    """

    held: dict[int, int] = field(default_factory=dict)
    touches: deque[_Touch] = field(default_factory=deque)
    queued: int = 0
    nbytes: int = 0
    announced: float = np.inf
    effective: float = np.inf


class ApproximateIndex:
    """Who holds which block. budget_bytes: bound on everything allocated here, growth of its tables included.

    A block has a slot; `_holders[slot]` is the set of rows that hold it, as bits. Dictionaries do the looking up: a
    hundred blocks take a few microseconds, less than the calls of a vectorised hash table. Sets of rows are intersected
    for all rows at once. A touch always covers a whole prefix, so a row's holdings stay closed under prefixes when the
    oldest touch loses its tail first.
    """

    def __init__(self, budget_bytes: int, rows: int = 64) -> None:
        self.budget_bytes = budget_bytes
        self.trust: FloatArray = np.ones(rows)
        self._rows = [_Row() for _ in range(rows)]
        self._words = -(-rows // 64)
        self._slots: dict[int, int] = {}  # hash -> slot
        self._hashes: UInt64Array = np.zeros(0, dtype=np.uint64)  # by slot
        self._holders: UInt64Array = np.zeros((0, self._words), dtype=np.uint64)  # by slot
        self._free: list[int] = []
        self._stamp = 0
        self._oldest = np.full(rows, _NEVER, dtype=np.int64)  # by row: stamp of its oldest touch
        self._rows_bytes = 0

    # --- reading ---

    @property
    def nbytes(self) -> int:
        """Bytes held at this moment, to within the allocator's rounding."""
        numbers = _NUMBER_BYTES * (2 * len(self._slots) + len(self._free))
        arrays = int(self._hashes.nbytes) + int(self._holders.nbytes)
        return sys.getsizeof(self._slots) + sys.getsizeof(self._free) + numbers + arrays + self._rows_bytes

    @property
    def blocks(self) -> int:
        """Distinct blocks held by anyone."""
        return len(self._slots)

    def resident(self, row: int) -> int:
        """Blocks this row is believed to hold."""
        return len(self._rows[row].held)

    def effective_capacity(self, row: int) -> float:
        """Blocks the row is trusted to retain; inf where its capacity is not known."""
        return self._rows[row].effective

    def match(self, block_hashes: UInt64Array) -> Int32Array:
        """Count the leading blocks of a prompt that each row holds.

        block_hashes: (b,) chained hashes, oldest first. Returns (rows,) counts, 0..b. Reads only.
        """
        rows = len(self._rows)
        slots = self._known(block_hashes)
        if not slots:
            return np.zeros(rows, dtype=np.int32)
        holders = np.bitwise_and.accumulate(self._holders[slots], axis=0)
        # Leading holders only drop out: the last block of each run of equal sets tells the whole run.
        ends = [*(holders[1:] != holders[:-1]).any(axis=1).nonzero()[0].tolist(), len(slots) - 1]
        bits = np.unpackbits(holders[ends].view(np.uint8), axis=1, bitorder="little")[:, :rows]
        lengths = np.array([end - before for end, before in zip(ends, [-1, *ends], strict=False)], dtype=np.int32)
        counts: Int32Array = lengths @ bits.astype(np.int32)
        return counts

    # --- learning ---

    def store(self, row: int, block_hashes: UInt64Array) -> None:
        """This row holds these blocks as of this touch; what it held longest untouched makes room, tail first."""
        mine = self._rows[row]
        if block_hashes.size > mine.effective:
            block_hashes = block_hashes[: int(mine.effective)]
        if block_hashes.size == 0 or not self._make_room(row, block_hashes.size):
            return
        self._stamp += 1
        slots = self._slots_of(block_hashes)
        array = np.array(slots, dtype=np.int32)
        self._holders[array, row >> 6] |= np.uint64(1 << (row & 63))
        mine.held.update(zip(slots, repeat(self._stamp), strict=False))
        self._queue(row, _Touch(self._stamp, array))
        if len(mine.held) > mine.effective:
            self._evict(row, int(np.ceil(len(mine.held) - mine.effective)))
        if mine.queued > 2 * len(mine.held) + _COMPACT_SLACK:
            self._compact(row)
        self._weigh(mine)

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
        mine = self._rows[row]
        if np.isfinite(mine.announced):
            factor = _RECOVER if actual >= predicted else _SHRINK
            mine.effective = min(mine.announced, max(_FLOOR * mine.announced, mine.effective * factor))
            self._trim(row)

    def set_capacity(self, row: int, blocks: int | None) -> None:
        """What the engine announces to hold, in our blocks; None when it does not say. What was learned is kept."""
        mine = self._rows[row]
        learned = mine.effective / mine.announced if np.isfinite(mine.announced) else 1.0
        mine.announced = np.inf if blocks is None else float(blocks)
        mine.effective = mine.announced * learned
        self._trim(row)

    def clear(self, row: int) -> None:
        """The row holds nothing any more (its engine restarted)."""
        mine = self._rows[row]
        self._let_go(row, np.fromiter(mine.held, dtype=np.int32, count=len(mine.held)))
        mine.held = {}
        mine.touches.clear()
        mine.queued = 0
        self._oldest[row] = _NEVER
        self._weigh(mine)

    def remove_row(self, row: int) -> None:
        """The endpoint left; whoever gets the row next starts from nothing."""
        self.clear(row)
        self._rows[row].announced = self._rows[row].effective = np.inf
        self.trust[row] = 1.0

    def grow_rows(self, rows: int) -> None:
        """Make room for more rows; does nothing when there are as many."""
        extra = rows - len(self._rows)
        if extra <= 0:
            return
        self._rows.extend(_Row() for _ in range(extra))
        self._oldest = np.concatenate([self._oldest, np.full(extra, _NEVER, dtype=np.int64)])
        self.trust = np.concatenate([self.trust, np.ones(extra)])
        self._words = -(-rows // 64)
        self._resize(self._hashes.size)

    # --- blocks and slots ---

    def _known(self, block_hashes: UInt64Array) -> list[int]:
        """Slots of the leading blocks that anyone holds."""
        slots: list[int] = []
        for start in range(0, block_hashes.size, _WALK):
            found = list(map(self._slots.get, block_hashes[start : start + _WALK].tolist()))
            if None in found:
                return slots + _leading(found)
            slots += found  # type: ignore[arg-type]  # none of them is None
        return slots

    def _slots_of(self, block_hashes: UInt64Array) -> list[int]:
        """Slots of all blocks, new ones for those nobody holds."""
        hashes = block_hashes.tolist()
        found = list(map(self._slots.get, hashes))
        if None in found:
            for index, slot in enumerate(found):
                if slot is None:
                    slot = self._slots.get(hashes[index])  # a hash may come twice in one prompt
                    found[index] = self._new_slot(hashes[index]) if slot is None else slot
        return found  # type: ignore[return-value]  # every None has been replaced

    def _new_slot(self, block_hash: int) -> int:
        slot = self._free.pop()
        self._slots[block_hash] = slot
        self._hashes[slot] = block_hash
        return slot

    def _let_go(self, row: int, slots: SlotArray) -> None:
        """The row holds these no more; blocks that nobody holds then are forgotten."""
        if slots.size == 0:
            return
        self._holders[slots, row >> 6] &= ~np.uint64(1 << (row & 63))
        orphans = slots[~self._holders[slots].any(axis=1)]
        for block_hash in self._hashes[orphans].tolist():
            self._free.append(self._slots.pop(block_hash))

    # --- room ---

    def _make_room(self, row: int, count: int) -> bool:
        """Let so many new blocks in within the budget, the globally oldest touches going first; False: impossible."""
        while self._peak(row, count) > self.budget_bytes:
            oldest = int(np.argmin(self._oldest))
            if self._oldest[oldest] == _NEVER:
                return False
            self._evict(oldest, max(count, 1))
            self._weigh(self._rows[oldest])
        if len(self._free) < count:
            self._resize(self._grown(count))
        return True

    def _peak(self, row: int, count: int) -> int:
        """Bytes at the worst moment of storing so many blocks: a table that grows is there twice, thrice as large."""
        new = count * (2 * _NUMBER_BYTES + 8) + _CHUNK_BYTES
        tables = 3 * (sys.getsizeof(self._slots) + sys.getsizeof(self._rows[row].held)) + 200 * count
        slots = self._grown(count) if len(self._free) < count else 0
        return self.nbytes + new + tables + slots * (8 * self._words + 16 + _NUMBER_BYTES)

    def _grown(self, count: int) -> int:
        size = int(self._hashes.size)
        return size + max(count, size // 4, 1024)

    def _resize(self, slots: int) -> None:
        old = int(self._hashes.size)
        hashes, holders = np.zeros(slots, dtype=np.uint64), np.zeros((slots, self._words), dtype=np.uint64)
        hashes[:old] = self._hashes
        holders[:old, : self._holders.shape[1]] = self._holders
        self._hashes, self._holders = hashes, holders
        self._free.extend(range(slots - 1, old - 1, -1))

    def _weigh(self, mine: _Row) -> None:
        """Keep the sum of what the rows take up to date."""
        nbytes = sys.getsizeof(mine.held) + 4 * mine.queued + _CHUNK_BYTES * len(mine.touches)
        self._rows_bytes += nbytes - mine.nbytes
        mine.nbytes = nbytes

    # --- eviction ---

    def _trim(self, row: int) -> None:
        mine = self._rows[row]
        if len(mine.held) > mine.effective:
            self._evict(row, int(np.ceil(len(mine.held) - mine.effective)))
            self._weigh(mine)

    def _evict(self, row: int, count: int) -> None:
        """Take so many blocks from a row, or all it has: oldest touch first, each from its tail."""
        mine = self._rows[row]
        while count > 0 and mine.touches:
            touch = mine.touches[0]
            claimed = self._claimed(mine, touch)
            drop = claimed[max(0, len(claimed) - count) :]
            count -= len(drop)
            for slot in drop:
                del mine.held[slot]
            self._let_go(row, np.array(drop, dtype=np.int32))
            if len(drop) == len(claimed):
                self._pop(row)
            else:
                kept = claimed[: len(claimed) - len(drop)]
                mine.queued += len(kept) - touch.slots.size
                touch.slots = np.array(kept, dtype=np.int32)

    def _claimed(self, mine: _Row, touch: _Touch) -> list[int]:
        """The touch's slots, oldest block first, that no later touch has claimed."""
        held, stamp = mine.held, touch.stamp
        return [slot for slot in touch.slots.tolist() if held.get(slot) == stamp]

    def _queue(self, row: int, touch: _Touch) -> None:
        mine = self._rows[row]
        if not mine.touches:
            self._oldest[row] = touch.stamp
        mine.touches.append(touch)
        mine.queued += touch.slots.size

    def _pop(self, row: int) -> None:
        mine = self._rows[row]
        mine.queued -= mine.touches.popleft().slots.size
        self._oldest[row] = mine.touches[0].stamp if mine.touches else _NEVER

    def _compact(self, row: int) -> None:
        """Forget what later touches have claimed: a queue is never much longer than what its row holds."""
        mine = self._rows[row]
        touches, mine.touches, mine.queued = mine.touches, deque(), 0
        for touch in touches:
            claimed = self._claimed(mine, touch)
            if claimed:
                self._queue(row, _Touch(touch.stamp, np.array(claimed, dtype=np.int32)))


def _leading(found: Iterable[int | None]) -> list[int]:
    leading: list[int] = []
    for slot in found:
        if slot is None:
            break
        leading.append(slot)
    return leading
