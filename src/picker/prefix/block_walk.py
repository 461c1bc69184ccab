"""How far each row holds a prompt: the ways down a tree of blocks that spell it, and where on them a row's blocks end.

Reads only. Several children may spell the same text in different tokens, so there may be several ways; a row is
credited with the longest that it holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from picker.prefix.block_tree import BlockTree
from picker.prefix.row_sets import RowSets, unpack
from picker.types import FloatArray, Int32Array, Splits, UInt64Array

_MOST_WAYS = 256  # that are followed in one prompt
_MOST_ALIKE = 16  # that the same rows hold: no row can crowd out another's with ways of its own
_PATIENCE = 16  # blocks that are given up one by one where no token ends; then twice as many each time

Lower = tuple[int, int, int, float]
"""Blocks [from, to) of a way that these rows (as bits) hold in a lower tier only, and how much less each is worth."""


@dataclass(slots=True)
class Way:
    """One way down. block: the last of it that is held; blocks: so many from the root.

    rows: as bits, those that hold all of it; -1 before the first block. ended: rows that hold less, and how much.
    entry: a child of `block` to go on with.
    """

    block: int
    blocks: int = 0
    rows: int = -1
    lower: list[Lower] = field(default_factory=list)
    ended: list[tuple[int, int]] = field(default_factory=list)
    entry: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        """(rows as bits, leading blocks they hold)."""
        return [*self.ended, (self.rows, self.blocks)] if self.blocks and self.rows else self.ended


class Walk:
    """hashes: (n + 1,) of a prompt. deficits: by tier, what a block there is worth less than one in the first."""

    def __init__(self, tree: BlockTree, sets: RowSets, hashes: UInt64Array, deficits: Sequence[float]) -> None:
        self.explored = 0
        self._tree = tree
        self._sets = sets
        self._hashes = hashes
        self._deficits = deficits
        self._pending: list[Way] = []
        self._alike: dict[int, int] = {}  # by rows: ways that began

    def ways(self, root: int) -> list[Way]:
        """All ways down from a root on which anybody holds a block."""
        found: list[Way] = []
        self._pending = [Way(root)]
        while self._pending and len(found) < _MOST_WAYS:
            way = self._pending.pop()
            self._descend(way)
            if way.blocks:
                found.append(way)
        return found

    def _descend(self, way: Way) -> None:
        if way.entry:
            self._enter(way, way.entry, 1)
        while way.rows:
            before = way.block
            count = self._tree.follow(before + 1, self._hashes)
            branches = self._tree.branches(before, self._hashes) if self._tree.first_at[before] else []
            self.explored += count + len(branches)
            start, count = (before + 1, count) if count else (branches.pop(), 1) if branches else (0, 0)
            if not count:
                return
            for child in branches:
                self._fork(way, before, way.blocks, child)
            self._enter(way, start, count)

    def _fork(self, way: Way, block: int, blocks: int, child: int) -> None:
        rows = way.rows & self._sets.rows(self._tree.held_at[child])
        alike = self._alike.get(rows, 0)
        if rows and alike < _MOST_ALIKE:
            self._alike[rows] = alike + 1
            self._pending.append(Way(block, blocks, way.rows, list(way.lower), [], child))

    def _enter(self, way: Way, start: int, count: int) -> None:
        """Go through a range of blocks, each the continuation of the one before it, as long as anybody holds them."""
        if count == 1:
            self._hold(way, start, 1, self._tree.held_at[start])
            return
        held = self._tree.held[start : start + count]
        changes = (np.flatnonzero(held[1:] != held[:-1]) + 1).tolist()
        branching = (np.flatnonzero(self._tree.first[start : start + count - 1]) + start).tolist()
        for begin, end in itertools.pairwise([0, *changes, count]):
            self._hold(way, start + begin, end - begin, held.item(begin))
            if not way.rows:
                return
            while branching and branching[0] < start + end:
                block = branching.pop(0)
                for child in self._tree.branches(block, self._hashes):
                    self._fork(way, block, way.blocks - (start + end - 1 - block), child)

    def _hold(self, way: Way, start: int, count: int, number: int) -> None:
        """Go through blocks that all are held by the same."""
        rows = way.rows & self._sets.rows(number)
        if rows != way.rows:
            if way.blocks:
                way.ended.append((way.rows & ~rows, way.blocks))
            way.rows = rows
        if not rows:
            return
        if self._sets.bits(number) >> self._sets.width:
            self._note_lower(way, count, number)
        way.block, way.blocks = start + count - 1, way.blocks + count

    def _note_lower(self, way: Way, count: int, number: int) -> None:
        better = 0
        for deficit, rows in zip(self._deficits, self._sets.by_tier(number), strict=True):
            only = rows & ~better & way.rows
            better |= rows
            if deficit and only:
                way.lower.append((way.blocks, way.blocks + count, only, deficit))


def boundary(tree: BlockTree, way: Way, splits: Splits | Callable[[int], bool]) -> tuple[int, int]:
    """(blocks, units): the longest part of a way that ends where a token of the prompt does."""
    block, blocks, refused = way.block, way.blocks, 0
    while blocks and not splits(tree.position_at[block]):
        refused += 1
        step = 1 if refused < _PATIENCE else min(1 << (refused - _PATIENCE), blocks)
        for _ in range(step):
            block = tree.parent(block)
        blocks -= step
    return blocks, tree.position_at[block]


def credit(way: Way, most: int, rows: int) -> tuple[Int32Array, FloatArray]:
    """By row, the leading blocks of a way that it holds, `most` at most, and what they are worth in blocks."""
    lengths = way.lengths()
    counts = np.array([min(count, most) for _, count in lengths], dtype=np.float32)
    # A row ends in one place only, so the sum is that place. Floats go through BLAS, and are exact up to 2^24.
    blocks = (counts @ unpack([each for each, _ in lengths], rows).astype(np.float32)).astype(np.int32)
    worth = blocks.astype(np.float64)
    if way.lower:
        members = unpack([each for _, _, each, _ in way.lower], rows)
        begin, end = (np.array([each[index] for each in way.lower]) for index in (0, 1))
        deficit = np.array([each for *_, each in way.lower])
        within = np.clip(blocks - begin[:, np.newaxis], 0, (end - begin)[:, np.newaxis])
        worth -= (members * within * deficit[:, np.newaxis]).sum(axis=0)
    return blocks, worth
