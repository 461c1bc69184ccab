"""What a router knows of the engines' prefix caches: learned from what it sends, or told by the engines' KV events.

Owns who is believed to hold which block, by row. Scores nothing. One interface, so that every policy can be run with
either kind and all of them with the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from picker.prefix.approximate import ApproximateIndex
from picker.types import BlocksRemoved, BlocksStored, Int32Array, UInt64Array


class Knowledge(Protocol):
    """Rows are the router's; hashes are chained block hashes, oldest first."""

    @property
    def wants_events(self) -> bool:
        """Whether `learn` has any effect."""
        ...

    def match(self, hashes: UInt64Array, now: float) -> Int32Array:
        """(rows,) leading blocks of a prompt that each row is believed to hold."""
        ...

    def book(self, request_id: int, row: int, hashes: UInt64Array, now: float) -> None:
        """This prompt goes to this row: until more is known, it counts as held there."""
        ...

    def prefilled(self, request_id: int, now: float) -> None:
        """The engine has computed that prompt, or never will; told once at least, and more often without harm."""
        ...

    def answered(self, row: int, hashes: UInt64Array, predicted: int, actual: int) -> None:
        """Of a prompt believed to have `predicted` leading blocks cached, the engine found `actual`."""
        ...

    def learn(self, row: int, fact: BlocksStored | BlocksRemoved) -> None: ...

    def set_capacity(self, row: int, blocks: int) -> None: ...

    def restarted(self, row: int) -> None:
        """A scrape shows another process than before."""
        ...

    def clear(self, row: int) -> None:
        """The row's cache is empty."""
        ...

    def grow_rows(self, rows: int) -> None: ...


class Approximate:
    """picker's own index: learned at booking, bounded by the scraped capacity, corrected by reported hits."""

    wants_events = False

    def __init__(self, index: ApproximateIndex) -> None:
        self._index = index

    def match(self, hashes: UInt64Array, now: float) -> Int32Array:
        return self._index.match(hashes)

    def book(self, request_id: int, row: int, hashes: UInt64Array, now: float) -> None:
        self._index.store(row, hashes)

    def prefilled(self, request_id: int, now: float) -> None:
        pass

    def answered(self, row: int, hashes: UInt64Array, predicted: int, actual: int) -> None:
        self._index.correct(row, hashes, predicted, actual)

    def learn(self, row: int, fact: BlocksStored | BlocksRemoved) -> None:
        pass

    def set_capacity(self, row: int, blocks: int) -> None:
        self._index.set_capacity(row, blocks)

    def restarted(self, row: int) -> None:
        self._index.clear(row)

    def clear(self, row: int) -> None:
        self._index.clear(row)

    def grow_rows(self, rows: int) -> None:
        self._index.grow_rows(rows)


class Exact:
    """Told by the engines' events, which come late; in between, what was just sent counts as held where it went.

    The second part is llm-d's `speculativeIndexing` and Dynamo's predict-on-route. Theirs ends a fixed time after the
    decision; here it lasts until the first token and `linger` seconds more, so that it does not end in a long queue.
    """

    wants_events = True

    def __init__(self, rows: int = 64, *, linger: float = 0.1) -> None:
        self._rows = rows
        self._linger = linger
        self._held = Holdings()
        self._expected = Holdings()
        self._booked: dict[int, tuple[int, list[int]]] = {}
        self._fading: deque[tuple[float, int, list[int]]] = deque()

    def match(self, hashes: UInt64Array, now: float) -> Int32Array:
        self._fade(now)
        return leading(hashes, (self._held, self._expected), self._rows)

    def book(self, request_id: int, row: int, hashes: UInt64Array, now: float) -> None:
        self.prefilled(request_id, now)
        expected = hashes.tolist()
        self._expected.add(row, expected)
        self._booked[request_id] = (row, expected)

    def prefilled(self, request_id: int, now: float) -> None:
        booked = self._booked.pop(request_id, None)
        if booked is not None:
            self._fading.append((now + self._linger, *booked))

    def answered(self, row: int, hashes: UInt64Array, predicted: int, actual: int) -> None:
        pass

    def learn(self, row: int, fact: BlocksStored | BlocksRemoved) -> None:
        match fact:
            case BlocksStored(hashes=hashes):
                self._held.add(row, hashes)
            case BlocksRemoved(hashes=hashes):
                self._held.discard(row, hashes)

    def set_capacity(self, row: int, blocks: int) -> None:
        pass

    def restarted(self, row: int) -> None:
        pass  # The stream of events says so itself, and in order.

    def clear(self, row: int) -> None:
        self._held.clear(row)

    def grow_rows(self, rows: int) -> None:
        self._rows = max(self._rows, rows)

    def _fade(self, now: float) -> None:
        while self._fading and self._fading[0][0] <= now:
            _, row, hashes = self._fading.popleft()
            self._expected.discard(row, hashes)


class Holdings:
    """Block hash -> the rows that hold it, as bits; how many copies a row holds is kept where it is not one.

    A removal may come before the addition it belongs to: then the two cancel.
    """

    def __init__(self) -> None:
        self.rows_of: dict[int, int] = {}
        self._further: dict[tuple[int, int], int] = {}  # (hash, row) -> copies beyond what the bit says, or fewer

    def add(self, row: int, hashes: Sequence[int]) -> None:
        bit, rows_of = 1 << row, self.rows_of
        for block_hash in hashes:
            rows = rows_of.get(block_hash, 0)
            if rows & bit or (self._further and (block_hash, row) in self._further):
                self._count(block_hash, row, 1)
            else:
                rows_of[block_hash] = rows | bit

    def discard(self, row: int, hashes: Sequence[int]) -> None:
        bit, rows_of = 1 << row, self.rows_of
        for block_hash in hashes:
            rows = rows_of.get(block_hash, 0)
            if not rows & bit or (self._further and (block_hash, row) in self._further):
                self._count(block_hash, row, -1)
            elif rows == bit:
                del rows_of[block_hash]
            else:
                rows_of[block_hash] = rows ^ bit

    def clear(self, row: int) -> None:
        for key in [key for key in self._further if key[1] == row]:
            del self._further[key]
        self.discard(row, [block_hash for block_hash, rows in self.rows_of.items() if rows >> row & 1])

    def _count(self, block_hash: int, row: int, change: int) -> None:
        copies = self._further.get((block_hash, row), 0) + change
        if copies:
            self._further[block_hash, row] = copies
        else:
            del self._further[block_hash, row]


def leading(hashes: UInt64Array, tables: Sequence[Holdings], rows: int) -> Int32Array:
    """(rows,) how many leading hashes each row holds in any of the tables. Stops at the first that nobody has."""
    counts = np.zeros(rows, dtype=np.int32)
    finds = [table.rows_of.get for table in tables]
    holders, begun, position = -1, 0, 0
    for position, block_hash in enumerate(hashes.tolist()):
        still = 0
        for find in finds:
            still |= find(block_hash, 0)
        still &= holders
        if still != holders:
            _count_bits(counts, holders, position - begun)
            holders, begun = still, position
            if not still:
                return counts
    if hashes.size:
        _count_bits(counts, holders, position + 1 - begun)
    return counts


def _count_bits(counts: Int32Array, members: int, amount: int) -> None:
    if not amount:
        return
    packed = np.frombuffer(members.to_bytes(-(-counts.size // 8), "little"), dtype=np.uint8)
    counts += np.unpackbits(packed, count=counts.size, bitorder="little") * np.int32(amount)
