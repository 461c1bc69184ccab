"""One row's blocks: entering chains of them and taking them out, where a tree, its sets of holders and the row meet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from picker.prefix.block_table import BlockTable
from picker.prefix.block_tree import BlockTree
from picker.prefix.row_sets import EMPTY, TIERS, RowSets
from picker.types import Int64Array, Tier, UInt64Array

_MANY = 96  # blocks from which on arrays are quicker than one at a time
COPY_BYTES = 160  # a number and its count in a dict, which may just have grown
_WINDOW = 64, 2048  # blocks looked at for eviction at a time: a sixteenth of a row's, but no fewer and no more


@dataclass(slots=True, eq=False)
class Row:
    """One endpoint's blocks. table: its engine's hashes -> blocks. copies: of blocks it has more than once, how many
    more, by hash and tier. orphans: blocks that could not be placed. truncated: some were dropped for want of room.
    """

    table: BlockTable = field(default_factory=BlockTable)
    copies: dict[int, int] = field(default_factory=dict)
    orphans: int = 0
    truncated: bool = False

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + COPY_BYTES * len(self.copies)

    def reset(self) -> None:
        """Nothing is held, and everything is known."""
        self.table = BlockTable()
        self.copies = {}
        self.orphans = 0
        self.truncated = False


@dataclass(slots=True, eq=False)
class Holder:
    """One row in one tier, as the tree and its sets see it. bit: of the two; every: of the row in all tiers."""

    tree: BlockTree
    sets: RowSets
    row: Row
    tier: int
    bit: int
    every: int

    @classmethod
    def of(cls, tree: BlockTree, sets: RowSets, row: Row, number: int, tier: Tier) -> Holder:
        return cls(tree, sets, row, TIERS.index(tier), sets.bit(number, tier), sets.every_tier(number))

    def place_one(self, parent: int, number: int, end: int, key: int) -> int:
        """As `place`, of one block; most go right behind a parent which nothing else continues."""
        if self.tree.is_free_behind(parent) and self.row.table.enter(number, parent + 1):
            self.tree.append(parent, end, key, self.sets.move(EMPTY, self.bit))
            return 1
        return self.place(parent, (number,), np.array((end,), np.int64), np.array((key,), np.uint64))

    def place(self, parent: int, numbers: Sequence[int], ends: Int64Array, keys: UInt64Array) -> int:
        """Hold a chain of blocks that continues `parent`; returns how many of them could be placed."""
        done, count, block, total = 0, 0, parent, len(numbers)
        while done < total:
            if done:
                numbers, ends, keys = numbers[count:], ends[count:], keys[count:]
            count, block = self._some(block, numbers, ends, keys)
            if not count:
                break
            done += count
        return done

    def copy(self, number: int) -> bool:
        """Hold a block that the row has already once more, or in this tier as well; False: it has none."""
        block = self.row.table.get(number)
        if block:
            self._again(block, number)
        return bool(block)

    def remove(self, number: int) -> bool:
        """Give up one copy of a block."""
        table, tree, copies = self.row.table, self.tree, self.row.copies
        entry = table.find(number)
        if entry < 0:
            return False
        block = table.block(entry)
        if number << 2 | self.tier in copies and self.sets.bits(tree.held_at[block]) & self.bit:
            self._give_copy(number)
            return True
        return self._give_shared(entry, block)

    def remove_all(self, numbers: Sequence[int]) -> int:
        """Give up blocks of which the row has one copy each; returns how many were there."""
        entries = self.row.table.find_all(numbers)
        if len(entries) >= _MANY and len(set(numbers)) == len(numbers):
            return self._give(np.array(entries, dtype=np.int64))
        return self._give_some(entries)

    def drop(self, entry: int) -> None:
        """Give up an entry of the row's table, in all tiers."""
        table, tree = self.row.table, self.tree
        block = table.block(entry)
        held = tree.held_at[block]
        tree.held_at[block] = self.sets.move(held, self.sets.bits(held) & ~self.every)
        if self.row.copies:
            for tier in range(len(TIERS)):
                self.row.copies.pop(table.number(entry) << 2 | tier, None)
        table.drop(entry)
        tree.prune(block)

    def clear(self) -> None:
        """Give up all blocks in this tier, and all copies of them."""
        self.row.copies = {each: count for each, count in self.row.copies.items() if each & 3 != self.tier}
        self._give(self.row.table.oldest(len(self.row.table)))

    def _give(self, entries: Int64Array) -> int:
        """Give up distinct entries of the row's table in this tier; returns how many were in it."""
        tree, table, given = self.tree, self.row.table, 0
        held = tree.held[table.blocks[entries]]
        for number, same in _by_set(held, entries):
            before = self.sets.bits(number)
            if not before & self.bit:
                continue
            blocks = table.blocks[same].astype(np.int64)
            tree.held[blocks] = self.sets.move(number, before & ~self.bit, len(same))
            given += len(same)
            if not before & self.every & ~self.bit:
                table.drop_many(same)
            if before == self.bit:
                tree.prune_many(blocks)
        return given

    def _give_some(self, entries: Sequence[int]) -> int:
        """As `_give`, one by one, of blocks that the row has no copies of; an entry may be there twice."""
        tree, table = self.tree, self.row.table
        held_at, up_at, first_at, block_at = tree.held_at, tree.up_at, tree.first_at, table.block_at
        alone, mine, others = self.sets.number(self.bit), 0, 0
        for entry in entries:
            block = block_at[entry]
            if held_at[block] != alone:
                others += bool(block) and self._give_shared(entry, block)
                continue
            mine += 1
            block_at[entry] = held_at[block] = 0
            if first_at[block] or up_at[block + 1] == 1:
                continue
            if up_at[block] != 1 or not held_at[block - 1]:
                tree.prune(block)
            else:
                up_at[block] = 0
                tree.live -= 1
        table.live -= mine
        if mine:
            self.sets.move(alone, EMPTY, mine)
        return mine + others

    def _give_shared(self, entry: int, block: int) -> bool:
        """Give up a block that others have, too, or the row in other tiers."""
        tree = self.tree
        held = tree.held_at[block]
        bits = self.sets.bits(held)
        if not bits & self.bit:
            return False
        tree.held_at[block] = self.sets.move(held, bits & ~self.bit)
        if not bits & self.every & ~self.bit:
            self.row.table.drop(entry)
        if bits == self.bit:
            tree.prune(block)
        return True

    def _some(self, parent: int, numbers: Sequence[int], ends: Int64Array, keys: UInt64Array) -> tuple[int, int]:
        """Place the first blocks of a chain; returns how many, at least one where that is possible, and the last."""
        tree, table = self.tree, self.row.table
        end, key = ends.item(0), keys.item(0)
        known = table.get(numbers[0])
        if known:
            if tree.parent(known) != parent or tree.position_at[known] != end or tree.key_at[known] != key:
                return 0, parent
            self._again(known, numbers[0])
            return 1, known
        for child in tree.child_at(parent, end, key):
            count = self._join(child, numbers, ends, keys, parent)
            if count:
                return count, child + count - 1
        return self._extend(parent, numbers, ends, keys)

    def _join(self, child: int, numbers: Sequence[int], ends: Int64Array, keys: UInt64Array, parent: int) -> int:
        """Hold blocks from `child` on that are in the tree, if the row holds them under no other hash; how many."""
        count = 1
        if len(numbers) > 1 and child == parent + 1:
            count = self.tree.follow_keys(child, ends, keys)
        joined = self.row.table.add(numbers[: self._not_held(child, count)], child)
        held = self.tree.held[child : child + joined]
        for begin, end in _runs(held):
            number = held.item(begin)
            held[begin:end] = self.sets.move(number, self.sets.bits(number) | self.bit, end - begin)
        return joined

    def _not_held(self, start: int, count: int) -> int:
        """How many blocks of a range come before one that the row holds."""
        held = self.tree.held[start : start + count]
        for begin, _ in _runs(held):
            if self.sets.bits(held.item(begin)) & self.every:
                return begin
        return count

    def _extend(self, parent: int, numbers: Sequence[int], ends: Int64Array, keys: UInt64Array) -> tuple[int, int]:
        """Make blocks that nobody has yet, up to one whose hash is taken."""
        mine = self.sets.move(EMPTY, self.bit, len(numbers))
        ranges = self.tree.extend(parent, ends, keys, mine)
        done, last = 0, parent
        for start, length in ranges:
            added = self.row.table.add(numbers[done : done + length], start)
            done, last = done + added, start + added - 1
            if added < length:
                break
        if done < len(numbers):
            self._unmake(np.concatenate([np.arange(start, start + length) for start, length in ranges])[done:], mine)
        return done, last

    def _unmake(self, blocks: Int64Array, mine: int) -> None:
        self.tree.held[blocks] = self.sets.move(mine, 0, len(blocks))
        self.tree.prune_many(blocks)

    def _again(self, block: int, number: int) -> None:
        """The row has a further copy of a block, or one in a further tier."""
        held = self.tree.held_at[block]
        bits = self.sets.bits(held)
        if bits & self.bit:
            copy = number << 2 | self.tier
            self.row.copies[copy] = self.row.copies.get(copy, 0) + 1
        else:
            self.tree.held_at[block] = self.sets.move(held, bits | self.bit)

    def _give_copy(self, number: int) -> None:
        copy = number << 2 | self.tier
        self.row.copies[copy] -= 1
        if not self.row.copies[copy]:
            del self.row.copies[copy]


def evict(holder: Holder) -> None:
    """Drop some of the blocks that a row has had longest, in all tiers, none before those that continue it.

    A block that is continued is as new as what continues it: it goes behind the others.
    """
    table, tree = holder.row.table, holder.tree
    least, most = _WINDOW
    window = table.oldest(min(max(len(table) // 16, least), most))
    kept = []
    for entry in reversed(window.tolist()):
        block = table.block(entry)
        if any(holder.sets.bits(tree.held_at[child]) & holder.every for child in tree.children(block)):
            kept.append(entry)
        else:
            holder.drop(entry)
    table.renew(np.array(kept[::-1], dtype=np.int64))


def _by_set(held: np.ndarray, entries: Int64Array) -> Iterator[tuple[int, Int64Array]]:
    """Entries by the number of the set that holds them."""
    if len(held) and not (held != held[0]).any():
        yield held.item(0), entries
        return
    order = np.argsort(held, kind="stable")
    held, entries = held[order], entries[order]
    for begin, end in _runs(held):
        yield held.item(begin), entries[begin:end]


def _runs(held: np.ndarray) -> Iterator[tuple[int, int]]:
    """[begin, end) of neighbours with the same number."""
    changes = (np.flatnonzero(held[1:] != held[:-1]) + 1).tolist() if len(held) > 1 else []
    if len(held):
        yield from itertools.pairwise([0, *changes, len(held)])
