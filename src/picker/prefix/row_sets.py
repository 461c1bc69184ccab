"""Sets of rows, each kept once and known by a number: who holds a block, in four bytes a block however many rows.

Neighbouring blocks are mostly held by the same rows, so there are far fewer sets than blocks. Knows nothing of blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from picker.types import BoolArray, Int64Array, Tier

TIERS = tuple(Tier)  # the order of a set's parts, the best first
EMPTY = 0  # the number of the empty set

_ALIGNMENT = 16  # of CPython's allocator
_NUMBER_BYTES = 32  # the Python int that is a set's number


class RowSets:
    """Sets of (row, tier) as bits of a Python int: tier t of a row is bit t * width + row.

    What lies in the first tier alone makes a short int, which is nearly every set. A set lives as long as it has users.
    """

    def __init__(self, rows: int) -> None:
        self.width = rows
        self._bits = [0]
        self._users = [0]
        self._numbers = {0: EMPTY}
        self._free: list[int] = []
        self._int_bytes = 0
        self._weigh()

    def __len__(self) -> int:
        return len(self._numbers)

    def growth(self, count: int) -> int:
        """Bytes at the worst moment of making so many sets: a table that grows is there twice."""
        return count * (2 * _NUMBER_BYTES + 80 + len(TIERS) * self.width // 7) + 3 * self.nbytes - 3 * self._int_bytes

    def bit(self, row: int, tier: Tier) -> int:
        return 1 << TIERS.index(tier) * self.width + row

    def every_tier(self, row: int) -> int:
        """The bits of a row in all tiers."""
        return sum(self.bit(row, tier) for tier in TIERS)

    def bits(self, number: int) -> int:
        return self._bits[number]

    def number(self, bits: int) -> int:
        """Of the set with these bits; -1 where nobody uses it."""
        return self._numbers.get(bits, -1)

    def by_tier(self, number: int) -> tuple[int, ...]:
        """The rows of each tier, as bits."""
        bits, every = self._bits[number], (1 << self.width) - 1
        return tuple(bits >> index * self.width & every for index in range(len(TIERS)))

    def rows(self, number: int) -> int:
        """The rows that have it in any tier, as bits."""
        bits = self._bits[number]
        if bits >> self.width == 0:
            return bits
        found = 0
        for part in self.by_tier(number):
            found |= part
        return found

    def move(self, number: int, bits: int, users: int = 1) -> int:
        """So many users leave a set for the one with these bits; returns its number."""
        target = self._numbers.get(bits)
        if target is None:
            target = self._make(bits)
        self._users[target] += users
        self._users[number] -= users
        if not self._users[number] and number != EMPTY:
            self._forget(number)
        return target

    def grow_rows(self, rows: int) -> None:
        """Make the tiers' parts of every set wide enough for so many rows."""
        before = [self.by_tier(number) for number in range(len(self._bits))]
        self.width = rows
        self._int_bytes = 0
        for bits, number in [item for item in self._numbers.items() if item[0]]:
            del self._numbers[bits]
            self._bits[number] = sum(part << index * rows for index, part in enumerate(before[number]))
            self._int_bytes += _int_bytes(self._bits[number])
        self._numbers |= {bits: number for number, bits in enumerate(self._bits) if bits}
        self._weigh()

    def users(self, number: int) -> int:
        return self._users[number]

    def numbers(self) -> list[int]:
        """Of all sets but the empty one."""
        return [number for bits, number in self._numbers.items() if bits]

    def recount(self, held: Int64Array) -> None:
        """Count the users of all sets anew: (n,) the number each of them has."""
        counts = np.bincount(held, minlength=len(self._bits)).tolist()
        for number in self.numbers():
            self._users[number] = counts[number]
            if not counts[number]:
                self._forget(number)

    def _make(self, bits: int) -> int:
        if self._free:
            number = self._free.pop()
            self._bits[number] = bits
        else:
            number = len(self._bits)
            self._bits.append(bits)
            self._users.append(0)
        self._numbers[bits] = number
        self._int_bytes += _int_bytes(bits)
        self._weigh()
        return number

    def _forget(self, number: int) -> None:
        bits = self._bits[number]
        del self._numbers[bits]
        self._int_bytes -= _int_bytes(bits)
        self._bits[number] = 0
        self._free.append(number)
        self._weigh()

    def _weigh(self) -> None:
        lists = sys.getsizeof(self._bits) + sys.getsizeof(self._users) + sys.getsizeof(self._free)
        self.nbytes = lists + sys.getsizeof(self._numbers) + self._int_bytes


def unpack(sets: Sequence[int], rows: int) -> BoolArray:
    """(sets, rows) of which row is in which, from rows as bits."""
    width = -(-rows // 8)
    packed = np.frombuffer(b"".join([each.to_bytes(width, "little") for each in sets]), dtype=np.uint8)
    found: BoolArray = np.unpackbits(packed.reshape(len(sets), width), axis=1, count=rows, bitorder="little").view(bool)
    return found


def _int_bytes(bits: int) -> int:
    return -(-sys.getsizeof(bits) // _ALIGNMENT) * _ALIGNMENT + 2 * _NUMBER_BYTES  # its number, its count of users
