"""How much of each endpoint's KV cache the requests in flight hold: what several of them share counts once.

What is shared is found at marks, positions that lie a sixteenth of the way apart: the hash of a block stands for all
that leads to it, so a prompt of any length costs a few dozen look-ups; what is shared is at most a sixteenth more.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from picker.types import FloatArray, Int64Array, UInt64Array

MARKS = 16  # pieces of a prompt, about


@dataclass(frozen=True, slots=True)
class Hold:
    """What one request holds where it runs, the pieces of its prompt from mark to mark.

    keys: hashes at the marks. tokens: of each piece. rest: tokens after the last mark, which it shares with nobody.
    """

    keys: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    rest: int = 0


NOTHING = Hold()


def hold(block_hashes: UInt64Array, block_tokens: float, prompt_tokens: float) -> Hold:
    """What a prompt of so many tokens will hold; block_hashes: (b,) chained, each of block_tokens."""
    if not block_hashes.size:
        return Hold(rest=round(prompt_tokens))
    marks, ends = _marks(block_hashes.size)
    if marks is None:  # a handful of numbers, for which plain Python is faster than arrays
        reached = [int(min(end * block_tokens, prompt_tokens)) for end in ends.tolist()]
        keys = block_hashes
    else:
        reached = np.minimum(ends * block_tokens, prompt_tokens).astype(np.int64).tolist()
        keys = block_hashes[marks]
    tokens = tuple(map(operator.sub, reached, [0, *reached]))
    return Hold(tuple(keys.tolist()), tokens, max(0, round(prompt_tokens) - reached[-1]))


@functools.lru_cache(maxsize=4096)
def _marks(blocks: int) -> tuple[Int64Array | None, Int64Array]:
    """Positions within so many blocks, ever further apart, None for all of them; and the blocks up to each."""
    marks, at = [], 0
    while at < blocks:
        marks.append(at)
        at += 1 + at // MARKS
    positions = None if len(marks) == blocks else np.array(marks, dtype=np.int64)
    return positions, np.array(marks, dtype=np.int64) + 1


class Pins:
    """Who holds which pieces. A row gives a piece back when the last of its requests that held it has ended."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}  # by key: rows, as bits
        self._tokens: dict[tuple[int, int], int] = {}  # by key and row: what was counted for the piece
        self._further: Counter[tuple[int, int]] = Counter()  # by key and row: holders beyond the first

    def __len__(self) -> int:
        """Pieces held, each once for every row."""
        return len(self._tokens)

    def shared(self, wanted: Hold, rows: int) -> FloatArray:
        """(rows,) leading tokens of a prompt that requests in flight hold there already."""
        found = np.zeros(rows)
        for row, tokens in self.shared_by(wanted, -1):
            found[row] = tokens
        return found

    def shared_by(self, wanted: Hold, rows: int) -> Iterable[tuple[int, int]]:
        """(row, the same) of those of these rows, as bits, that hold any; minus one: of all."""
        holders, tokens, found = rows, 0, []
        for key, size in zip(wanted.keys, wanted.tokens, strict=True):
            still = self._rows.get(key, 0) & holders
            if still != holders:
                if tokens:
                    found += [(row, tokens) for row in _members(holders ^ still)]
                holders = still
                if not still:
                    return found
            tokens += size
        if tokens:
            found += [(row, tokens) for row in _members(holders)]
        return found

    def take(self, row: int, held: Hold) -> int:
        """Hold it in this row; returns the tokens that nobody held there before."""
        bit, new = 1 << row, held.rest
        for key, size in zip(held.keys, held.tokens, strict=True):
            rows = self._rows.get(key, 0)
            if rows & bit:
                self._further[key, row] += 1
            else:
                self._rows[key] = rows | bit
                self._tokens[key, row] = size
                new += size
        return new

    def give_back(self, row: int, held: Hold) -> int:
        """End what `take` began; returns the tokens that nobody holds there any more."""
        freed = held.rest
        for key in held.keys:
            if self._further.get((key, row)):
                self._further[key, row] -= 1
                if not self._further[key, row]:
                    del self._further[key, row]
            else:
                freed += self._tokens.pop((key, row))
                self._rows[key] &= ~(1 << row)
                if not self._rows[key]:
                    del self._rows[key]
        return freed

    def clear(self, row: int) -> None:
        """Forget the row: its endpoint has left, and nothing that it held will be given back."""
        for key, _ in [place for place in self._tokens if place[1] == row]:
            del self._tokens[key, row]
            self._further.pop((key, row), None)
            self._rows[key] &= ~(1 << row)
            if not self._rows[key]:
                del self._rows[key]


def _members(rows: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    while rows > 0:
        lowest = rows & -rows
        yield lowest.bit_length() - 1
        rows ^= lowest
