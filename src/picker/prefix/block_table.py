"""64-bit numbers to block numbers, in the order they came: 25 bytes an entry, where a dict of ints takes 110.

Open addressing over a list of entries, as in CPython's own dict, on arrays: through memoryviews one by one, through
numpy where the whole table is made anew. An entry that is dropped stays, dead, until then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from picker.types import Int64Array, UInt64Array

UInt32Array = NDArray[np.uint32]

_LOAD = 0.45  # of the slots, at most
_DEAD = 1 / 3  # of the entries; beyond it, a full table is made anew rather than larger
_PERTURB = 5  # how CPython's dict brings a number's higher bits in, where the lower ones lead to a slot that is taken
_SLACK = 5  # a table grows by a fifth
_FIRST = 4  # entries there is room for at first
_MANY = 64  # numbers from which on arrays are quicker than one at a time
_PART = 1 << 12  # entries that are moved or placed at a time


class BlockTable:
    """Distinct numbers, 0..2^64-1, and what they stand for: blocks, 1..2^32-1; 0 means none.

    An entry is an index into `blocks` and `block_at`, which are the same; it holds until the table grows.
    """

    __slots__ = (
        "_mask",
        "_number_at",
        "_numbers",
        "_slot_at",
        "_slots",
        "_used",
        "block_at",
        "blocks",
        "live",
        "nbytes",
    )

    def __init__(self) -> None:
        self._numbers: UInt64Array = np.empty(_FIRST, dtype=np.uint64)
        self.blocks: UInt32Array = np.zeros(_FIRST, dtype=np.uint32)
        self._slots: UInt32Array = np.zeros(_slots_for(_FIRST), dtype=np.uint32)
        self._used = self.live = 0
        self._look()

    def __len__(self) -> int:
        return self.live

    def fits(self, count: int) -> bool:
        """Whether so many can be added without growing."""
        return self._used + count <= len(self.block_at)

    def growth(self, count: int) -> int:
        """Bytes at the worst moment of adding so many, beside what the table takes before: one column is copied."""
        if self._used + count <= len(self.blocks):
            return 0
        entries = _capacity(self._used + count)
        more = 12 * (entries - len(self.blocks)) + 4 * (_slots_for(entries) - len(self._slots))
        return more + self._numbers.nbytes

    # --- one at a time ---

    def get(self, number: int) -> int:
        """The block, or 0."""
        slots, mask = self._slot_at, self._mask
        at, rest = number & mask, number
        while entry := slots[at]:
            if self._number_at[entry - 1] == number and (block := self.block_at[entry - 1]):
                return block
            rest >>= _PERTURB
            at = 5 * at + rest + 1 & mask
        return 0

    def find(self, number: int) -> int:
        """The entry of a number, or -1."""
        slots, mask = self._slot_at, self._mask
        at, rest = number & mask, number
        while entry := slots[at]:
            if self._number_at[entry - 1] == number and self.block_at[entry - 1]:
                return entry - 1
            rest >>= _PERTURB
            at = 5 * at + rest + 1 & mask
        return -1

    def find_all(self, numbers: Sequence[int]) -> list[int]:
        """The entries of those that are there; in order, but not where there are many."""
        if len(numbers) >= _MANY:
            return self._find_many(np.array(numbers, dtype=np.uint64))
        return self._find_some(numbers)

    def _find_some(self, numbers: Sequence[int]) -> list[int]:
        slots, entered, blocks, mask = self._slot_at, self._number_at, self.block_at, self._mask
        found = []
        for number in numbers:
            at, rest = number & mask, number
            while entry := slots[at]:
                if entered[entry - 1] == number and blocks[entry - 1]:
                    found.append(entry - 1)
                    break
                rest >>= _PERTURB
                at = 5 * at + rest + 1 & mask
        return found

    def _find_many(self, numbers: UInt64Array) -> list[int]:
        """At once those that lie where they are looked for first, which is most; one by one the others."""
        entries = self._slots[numbers & np.uint64(self._mask)] - np.uint32(1)  # none: beyond the last
        there = self._numbers.take(entries, mode="clip") == numbers
        there &= self.blocks.take(entries, mode="clip") != 0
        there &= entries < self._used
        found: list[int] = entries[there].tolist()
        return found + self._find_some(numbers[~there].tolist())

    def enter(self, number: int, block: int) -> bool:
        """As `add`, for one; whether it was not there yet."""
        used = self._used
        if used == len(self.block_at):
            self._make_room(1)
            used = self._used
        slots, at = self._slot_at, number & self._mask
        if slots[at]:
            at = self._vacancy(number, at)
            if at < 0:
                return False
        self._number_at[used] = number
        self.block_at[used] = block
        slots[at] = self._used = used + 1
        self.live += 1
        return True

    def add(self, numbers: Sequence[int], start: int) -> int:
        """Enter numbers for consecutive blocks from `start` on, up to one that is there already; returns how many."""
        if self._used + len(numbers) > len(self.blocks):
            self._make_room(len(numbers))
        slots, entered, blocks, mask = self._slot_at, self._number_at, self.block_at, self._mask
        first = used = self._used
        for number in numbers:
            at, rest = number & mask, number
            while entry := slots[at]:
                if entered[entry - 1] == number and blocks[entry - 1]:
                    break
                rest >>= _PERTURB
                at = 5 * at + rest + 1 & mask
            if entry:
                break
            entered[used] = number
            blocks[used] = start
            start += 1
            used += 1
            slots[at] = used
        self._used = used
        self.live += used - first
        return used - first

    def block(self, entry: int) -> int:
        return self.block_at[entry]

    def number(self, entry: int) -> int:
        return self._number_at[entry]

    def drop(self, entry: int) -> None:
        self.block_at[entry] = 0
        self.live -= 1

    def replace(self, number: int, block: int) -> None:
        """Let a number that is in the table stand for another block."""
        self.block_at[self.find(number)] = block

    # --- all, or many ---

    def drop_many(self, entries: Int64Array) -> None:
        """Drop distinct entries."""
        self.blocks[entries] = 0
        self.live -= len(entries)

    def held(self) -> tuple[UInt64Array, UInt32Array]:
        """All numbers and their blocks, oldest first."""
        entries = self.oldest(self.live)
        return self._numbers[entries], self.blocks[entries]

    def oldest(self, count: int) -> Int64Array:
        """The entries that came first, oldest first."""
        return np.flatnonzero(self.blocks[: self._used])[:count]

    def renew(self, entries: Int64Array) -> None:
        """Make the table no larger than it must be, and these entries the last to have come."""
        numbers, blocks = self._numbers[entries], self.blocks[entries]
        self.blocks[entries] = 0
        self._compact()
        stop = self._used + len(entries)
        self._numbers[self._used : stop] = numbers
        self.blocks[self._used : stop] = blocks
        self._used = stop
        self._fit(_capacity(stop), stale=True)

    def restore(self, numbers: UInt64Array, blocks: UInt32Array) -> None:
        """Hold these and nothing else, oldest first."""
        self._fit(_capacity(len(blocks)), stale=False)
        self._numbers[: len(blocks)] = numbers
        self.blocks[: len(blocks)] = blocks
        self._used = self.live = len(blocks)
        self._fit(len(self.blocks), stale=True)

    # --- room: everything in place, so that little is there twice ---

    def _vacancy(self, number: int, at: int) -> int:
        """The slot for a number, from one that is taken on; -1 where the number is there."""
        slots, mask, rest = self._slot_at, self._mask, number
        while entry := slots[at]:
            if self._number_at[entry - 1] == number and self.block_at[entry - 1]:
                return -1
            rest >>= _PERTURB
            at = 5 * at + rest + 1 & mask
        return at

    def _make_room(self, count: int) -> None:
        stale = self._used - self.live > _DEAD * self._used
        if stale:
            self._compact()
        enough = self._used + count <= len(self.blocks)
        self._fit(len(self.blocks) if enough else _capacity(self._used + count), stale=stale)

    def _compact(self) -> None:
        """Move the entries together, which makes the slots stale."""
        used = 0
        for start in range(0, self._used, _PART):
            entries = np.flatnonzero(self.blocks[start : min(start + _PART, self._used)]) + start
            stop = used + len(entries)
            self._numbers[used:stop] = self._numbers[entries]
            self.blocks[used:stop] = self.blocks[entries]
            used = stop
        self._used = used

    def _fit(self, entries: int, *, stale: bool) -> None:
        """Have room for so many entries, and slots that lead to them."""
        for view in (self._number_at, self.block_at, self._slot_at):
            view.release()
        self._numbers.resize(entries, refcheck=False)  # in place where the C library can, as glibc does
        self.blocks.resize(entries, refcheck=False)
        size = _slots_for(entries)
        anew = stale or size > len(self._slots)
        if anew:
            self._slots.resize(0, refcheck=False)
            self._slots = np.zeros(size, dtype=np.uint32)
        self._look()
        for start in range(0, self._used if anew else 0, _PART):
            self._place(start, min(start + _PART, self._used))

    def _place(self, start: int, stop: int) -> None:
        """Find slots for the entries start..stop, whose numbers are distinct."""
        pending = np.arange(start + 1, stop + 1, dtype=np.uint32)
        mask, rest = np.uint64(self._mask), self._numbers[start:stop]
        at = rest & mask
        while pending.size:
            free = self._slots[at] == 0
            self._slots[at[free]] = pending[free]  # of several for one slot, the last is written
            lost = self._slots[at] != pending
            pending, rest = pending[lost], rest[lost] >> np.uint64(_PERTURB)
            at = np.uint64(5) * at[lost] + rest + np.uint64(1) & mask

    def _look(self) -> None:
        self._mask = len(self._slots) - 1
        self._number_at, self.block_at, self._slot_at = self._numbers.data, self.blocks.data, self._slots.data
        self.nbytes = self._numbers.nbytes + self.blocks.nbytes + self._slots.nbytes


def _capacity(entries: int) -> int:
    return entries + max(entries // _SLACK, 4)


def _slots_for(entries: int) -> int:
    return 1 << int(entries / _LOAD).bit_length()
