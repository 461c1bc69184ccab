"""Which LoRA adapters the requests in flight keep busy on each row, counted from our own bookings.

An engine runs only so many adapters at once. A request of a further one waits until all requests of one that runs have
ended, while requests of those that run pass it: what it waits for is a slot, not its turn. No constants, no clock.
"""

from __future__ import annotations

import numpy as np

from picker.types import BoolArray, Int64Array


class Adapters:
    """Requests in flight by adapter and row. The scheduler says which model names are adapters.

    taken: (rows,) adapters with a request past its first token. queued: (rows,) further adapters whose requests wait.
    """

    def __init__(self, rows: int) -> None:
        self.known: set[str] = set()
        self.taken: Int64Array = np.zeros(rows, dtype=np.int64)
        self.queued: Int64Array = np.zeros(rows, dtype=np.int64)
        self._running: dict[str, Int64Array] = {}
        self._waiting: dict[str, Int64Array] = {}

    def of(self, model: str | None) -> str | None:
        """The model, if it is an adapter."""
        return model if model in self.known else None

    def here(self, adapter: str) -> BoolArray:
        """(rows,) where the adapter runs."""
        counts = self._running.get(adapter)
        return np.zeros(self.taken.size, dtype=bool) if counts is None else counts > 0

    def awaited(self, adapter: str) -> BoolArray:
        """(rows,) where requests of the adapter wait and none of them runs."""
        counts = self._waiting.get(adapter)
        return np.zeros(self.taken.size, dtype=bool) if counts is None else (counts > 0) & ~self.here(adapter)

    def book(self, adapter: str, row: int) -> None:
        """A request of the adapter was sent there."""
        running, waiting = self._counts(adapter)
        self.queued[row] += not running[row] and not waiting[row]
        waiting[row] += 1

    def begin(self, adapter: str, row: int) -> None:
        """One of them has its first token."""
        running, waiting = self._counts(adapter)
        self.taken[row] += not running[row]
        self.queued[row] -= not running[row]
        waiting[row] -= 1
        running[row] += 1

    def end(self, adapter: str, row: int, *, begun: bool) -> None:
        """One of them is over, with or without a first token."""
        running, waiting = self._counts(adapter)
        if begun:
            running[row] -= 1
            self.taken[row] -= not running[row]
            self.queued[row] += not running[row] and waiting.item(row) > 0
        else:
            waiting[row] -= 1
            self.queued[row] -= not running[row] and not waiting[row]
        if not waiting.any() and not running.any():
            del self._running[adapter], self._waiting[adapter]

    def clear(self, row: int) -> None:
        """The endpoint left, and all that it ran."""
        for counts in (self.taken, self.queued, *self._running.values(), *self._waiting.values()):
            counts[row] = 0

    def grow(self, rows: int) -> None:
        """Make room for more rows."""
        self.taken, self.queued = _wide(self.taken, rows), _wide(self.queued, rows)
        for table in (self._running, self._waiting):
            for adapter, counts in table.items():
                table[adapter] = _wide(counts, rows)

    def _counts(self, adapter: str) -> tuple[Int64Array, Int64Array]:
        if adapter not in self._running:
            self._running[adapter] = np.zeros(self.taken.size, dtype=np.int64)
            self._waiting[adapter] = np.zeros(self.taken.size, dtype=np.int64)
        return self._running[adapter], self._waiting[adapter]


def _wide(counts: Int64Array, rows: int) -> Int64Array:
    return np.concatenate([counts, np.zeros(rows - counts.size, dtype=np.int64)])
