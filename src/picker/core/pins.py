"""How much of each endpoint's KV cache the requests in flight hold: what several of them share counts once.

What is shared is found at marks, positions that lie a sixteenth of the way apart: the hash of a block stands for all
that leads to it, so a prompt of any length has a few dozen; what is shared is at most a sixteenth more. Marks that have
always been held together are one piece of a radix tree, and cost one look-up however many they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import msgspec
import numpy as np

from picker.types import FloatArray, Int64Array, UInt64Array

MARKS = 16  # pieces of a prompt, about


class Hold(msgspec.Struct, frozen=True, gc=False):
    """What one request holds where it runs.

    keys: hashes at the marks. ends: blocks up to each mark, ascending. block_tokens, prompt_tokens: tokens of a block,
    and of all of the prompt.
    """

    keys: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    block_tokens: float = 0.0
    prompt_tokens: float = 0.0

    def upto(self, marks: int) -> int:
        """Tokens up to so many marks."""
        return int(min(self.ends[marks - 1] * self.block_tokens, self.prompt_tokens)) if marks else 0

    @property
    def rest(self) -> int:
        """Tokens after the last mark, which it shares with nobody."""
        return max(0, round(self.prompt_tokens) - self.upto(len(self.keys)))


NOTHING = Hold()


def hold(block_hashes: UInt64Array, block_tokens: float, prompt_tokens: float) -> Hold:
    """What a prompt of so many tokens will hold; block_hashes: (b,) chained, each of block_tokens."""
    if not block_hashes.size:
        return Hold(prompt_tokens=prompt_tokens)
    marks, ends = _marks(block_hashes.size)
    keys = block_hashes if marks is None else block_hashes[marks]
    return Hold(tuple(keys.tolist()), ends, block_tokens, prompt_tokens)


@functools.lru_cache(maxsize=4096)
def _marks(blocks: int) -> tuple[Int64Array | None, tuple[int, ...]]:
    """Positions within so many blocks, ever further apart, None for all of them; and the blocks up to each."""
    marks, at = [], 0
    while at < blocks:
        marks.append(at)
        at += 1 + at // MARKS
    positions = None if len(marks) == blocks else np.array(marks, dtype=np.int64)
    return positions, tuple([mark + 1 for mark in marks])


class _Share:
    """One row's part in a piece: how many hold it there, and between which marks of whose prompt its tokens count."""

    __slots__ = ("begin", "count", "end", "first")

    def __init__(self, first: Hold, begin: int, end: int, count: int = 1) -> None:
        self.first = first
        self.begin = begin
        self.end = end
        self.count = count

    @property
    def tokens(self) -> int:
        return self.first.upto(self.end) - self.first.upto(self.begin)

    def split(self, at: int) -> _Share:
        """Give away what lies behind so many of its marks."""
        lower = _Share(self.first, self.begin + at, self.end, self.count)
        self.end = self.begin + at
        return lower


class _Piece:
    """Marks that whoever holds one of them holds all of. rows: as bits, who does. children: by their first keys."""

    __slots__ = ("children", "keys", "rows", "shares")

    def __init__(self, keys: tuple[int, ...]) -> None:
        self.keys = keys
        self.rows = 0
        self.shares: dict[int, _Share] = {}
        self.children: dict[int, _Piece] = {}

    def split(self, at: int) -> None:
        """Cut it in two after so many marks; this one stays the upper."""
        lower = _Piece(self.keys[at:])
        lower.rows, lower.children = self.rows, self.children
        lower.shares = {row: share.split(at) for row, share in self.shares.items()}
        self.keys, self.children = self.keys[:at], {lower.keys[0]: lower}

    def leave(self, row: int) -> int:
        """The row holds it no more; returns the tokens that were counted for it."""
        self.rows ^= 1 << row
        return self.shares.pop(row).tokens


class Pins:
    """Who holds which pieces. A row gives a piece back when the last of its requests that held it has ended."""

    def __init__(self) -> None:
        self._root = _Piece(())

    def __len__(self) -> int:
        """Marks held, each once for every row."""
        return sum(len(piece.keys) * piece.rows.bit_count() for piece in _below(self._root))

    def shared(self, wanted: Hold, rows: int) -> FloatArray:
        """(rows,) leading tokens of a prompt that requests in flight hold there already."""
        found = np.zeros(rows)
        for row, tokens in self.shared_by(wanted, -1):
            found[row] = tokens
        return found

    def shared_by(self, wanted: Hold, rows: int) -> Iterable[tuple[int, int]]:
        """(row, the same) of those of these rows, as bits, that hold any; minus one: of all."""
        keys, piece, at, holders = wanted.keys, self._root, 0, rows
        found: list[tuple[int, int]] = []
        while at < len(keys):
            below = piece.children.get(keys[at])
            still = 0 if below is None else below.rows & holders
            if still != holders:
                if at:
                    tokens = wanted.upto(at)
                    found += [(row, tokens) for row in _members(holders ^ still)]
                holders = still
            if below is None or not still:
                return found
            piece, same = below, _same(below.keys, keys, at)
            at += same
            if same < len(below.keys):
                break
        tokens = wanted.upto(at)
        found += [(row, tokens) for row in _members(holders)]
        return found

    def take(self, row: int, held: Hold) -> int:
        """Hold it in this row; returns the tokens that nobody held there before."""
        keys, piece, at, new = held.keys, self._root, 0, held.rest
        while at < len(keys):
            above, piece = piece, piece.children.get(keys[at]) or _Piece(keys[at:])
            if not piece.rows:
                above.children[keys[at]] = piece
            if (same := _same(piece.keys, keys, at)) < len(piece.keys):
                piece.split(same)
            if (share := piece.shares.get(row)) is not None:
                share.count += 1
            else:
                piece.rows |= 1 << row
                piece.shares[row] = share = _Share(held, at, at + same)
                new += share.tokens
            at += same
        return new

    def give_back(self, row: int, held: Hold) -> int:
        """End what `take` began; returns the tokens that nobody holds there any more."""
        keys, piece, at, freed = held.keys, self._root, 0, held.rest
        while at < len(keys):
            above, piece = piece, piece.children[keys[at]]
            share = piece.shares[row]
            share.count -= 1
            if not share.count:
                freed += piece.leave(row)
                if not piece.rows:  # then nobody holds what goes on from it either
                    del above.children[keys[at]]
            at += len(piece.keys)
        return freed

    def clear(self, row: int) -> None:
        """Forget the row: its endpoint has left, and nothing that it held will be given back."""
        for piece in [self._root, *_below(self._root)]:
            if piece.rows >> row & 1:
                piece.leave(row)
            piece.children = {key: child for key, child in piece.children.items() if child.rows & ~(1 << row)}


def _below(piece: _Piece) -> Iterator[_Piece]:
    """All pieces that go on from one, upper before lower."""
    for child in piece.children.values():
        yield child
        yield from _below(child)


def _same(ours: tuple[int, ...], keys: tuple[int, ...], at: int) -> int:
    """How many of our marks a prompt has from its mark `at` on."""
    theirs = keys[at : at + len(ours)]
    if theirs == ours:
        return len(ours)
    same = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        same += 1
    return same


def _members(rows: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    while rows > 0:
        lowest = rows & -rows
        yield lowest.bit_length() - 1
        rows ^= lowest
