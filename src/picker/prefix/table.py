"""A hash table of 64-bit keys on numpy arrays: whole batches are found, inserted and deleted with few numpy calls.

Open addressing with triangular probing in a power-of-two array. Values live in columns that the table owns, so that a
rebuild can move them along. Keys must be scattered already: their low bits are the first place looked at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from picker.types import BoolArray, Int64Array, UInt64Array

EMPTY = np.uint64(0)
TOMBSTONE = np.uint64(1)

_FULL = 0.7  # of the slots used, deleted ones included: rebuild
_ROOMY = 0.35  # of the slots live: a rebuild at the same size would not last


class Table:
    """keys -> slots. Slots stay valid until the next `reserve`; values are `table.columns[name][slots]`.

    columns: name -> (dtype, further dimensions), zero for a new key.
    """

    def __init__(self, columns: dict[str, tuple[type, tuple[int, ...]]], capacity: int = 1024) -> None:
        assert capacity & (capacity - 1) == 0, "capacity must be a power of two"
        self.live = 0
        self._used = 0  # live and deleted
        self._shapes = columns
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        self.capacity = capacity
        self._mask = np.uint64(capacity - 1)
        self._keys: UInt64Array = np.zeros(capacity, dtype=np.uint64)
        self.columns: dict[str, NDArray[np.unsignedinteger]] = {
            name: np.zeros((capacity, *shape), dtype=dtype) for name, (dtype, shape) in self._shapes.items()
        }

    @property
    def nbytes(self) -> int:
        return int(self._keys.nbytes) + sum(int(column.nbytes) for column in self.columns.values())

    @property
    def slot_bytes(self) -> int:
        """Bytes a slot takes in the arrays."""
        return self.nbytes // self.capacity

    def find(self, keys: UInt64Array) -> Int64Array:
        """(k,) slots of the keys, -1 where absent."""
        slots = (keys & self._mask).astype(np.int64)
        found = self._keys[slots]
        hit = found == keys
        if hit.all():
            return slots
        slots_out = np.where(hit, slots, -1)
        pending = np.flatnonzero(~hit & (found != EMPTY))
        step = 1
        while pending.size:
            slots[pending] = (slots[pending] + step) & (self.capacity - 1)
            found = self._keys[slots[pending]]
            hit = found == keys[pending]
            slots_out[pending[hit]] = slots[pending[hit]]
            pending = pending[~hit & (found != EMPTY)]
            step += 1
        return slots_out

    def insert(self, keys: UInt64Array) -> tuple[Int64Array, int]:
        """Slots of the keys, absent ones put in with zero values, and how many were new.

        The keys of a batch must differ, and `reserve` must have been called for them.
        """
        slots = self.find(keys)
        absent = np.flatnonzero(slots < 0)
        if absent.size:
            slots[absent] = self._place(keys[absent])
            for column in self.columns.values():
                column[slots[absent]] = 0
            self.live += absent.size
        return slots, int(absent.size)

    def delete(self, slots: Int64Array) -> None:
        """Remove the keys in these slots, each of them live."""
        self._keys[slots] = TOMBSTONE
        self.live -= slots.size

    def keys_at(self, slots: Int64Array) -> UInt64Array:
        return self._keys[slots]

    def reserve_bytes(self, count: int) -> int:
        """Bytes that `reserve(count)` would add at its peak: new arrays, and the copies made on the way."""
        capacity = self._capacity_for(count)
        if capacity is None:
            return 0
        copies = self.live * (self.slot_bytes + 48) + self.capacity
        return copies + (capacity * self.slot_bytes if capacity != self.capacity else 0)

    def reserve(self, count: int) -> None:
        """Make room for so many new keys. Invalidates all slots when it has to rebuild."""
        capacity = self._capacity_for(count)
        if capacity is None:
            return
        old = np.flatnonzero(self._keys > TOMBSTONE)
        keys = self._keys[old]
        values = {name: column[old] for name, column in self.columns.items()}
        if capacity == self.capacity:
            self._keys[:] = EMPTY
        else:
            self._allocate(capacity)
        self._used = 0
        slots = self._place(keys)
        for name, column in self.columns.items():
            column[slots] = values[name]

    def widen(self, name: str, shape: tuple[int, ...]) -> None:
        """Give a column more room in its further dimensions; new places are zero."""
        dtype, _ = self._shapes[name]
        self._shapes = {**self._shapes, name: (dtype, shape)}
        wide: NDArray[np.unsignedinteger] = np.zeros((self.capacity, *shape), dtype=dtype)
        old = self.columns[name]
        wide[tuple(slice(0, size) for size in old.shape)] = old
        self.columns[name] = wide

    def _capacity_for(self, count: int) -> int | None:
        """The size to rebuild at before so many keys go in; None when there is room."""
        if self._used + count <= _FULL * self.capacity:
            return None
        capacity = self.capacity
        while self.live + count > _ROOMY * capacity:
            capacity *= 2
        return capacity

    def _place(self, keys: UInt64Array) -> Int64Array:
        """Write absent keys into free slots. Of keys that want the same slot one gets it, the others go on probing."""
        slots = np.full(keys.size, -1, dtype=np.int64)
        pending = np.arange(keys.size)
        at = (keys & self._mask).astype(np.int64)
        step = 1
        while pending.size:
            before = self._keys[at]
            free: BoolArray = before <= TOMBSTONE
            self._keys[at[free]] = keys[pending[free]]
            placed = free & (self._keys[at] == keys[pending])
            self._used += int(np.count_nonzero(placed & (before == EMPTY)))
            slots[pending[placed]] = at[placed]
            pending = pending[~placed]
            at = (at[~placed] + step) & (self.capacity - 1)
            step += 1
        return slots
