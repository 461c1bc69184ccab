"""Blocks as nodes of a tree, by number, in columns of arrays: 28 bytes each. Who holds them is a number to the tree.

A block that continues another is given the next number wherever that is free, so that most of a prompt's path is a
range of numbers: it is compared with a prompt, made and freed as slices.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np

from picker.prefix.block_table import BlockTable
from picker.types import Int64Array, UInt64Array

ROOT = -(2**31)  # `up` of a block that continues none
_FAN = 2**32 - 1  # `first` of a block whose children are in a table
_FEW = 8  # children that are searched one by one
_FIRST = 1 << 10  # room for so many blocks at first
_STEP = 1 << 16  # blocks that the arrays grow by: 2 MB, well under a millisecond
_GAP = 8  # numbers left free behind a chain that may grow: a block of generated tokens at a time
_WIDE_GAP = 128  # and behind a part of a prompt, at most
_WORTH_TAKING = 16  # free numbers in a row; fewer are left to be joined by those around them
_EASE = 8  # a part of the numbers that stays free, so that free ones lie together
_SWEEP = 1 << 15  # numbers looked through for free ones at a time
_GALLOP = 16, 4096  # blocks compared at once, at first and at most
_SLICES = 6  # from so many blocks on, slices of arrays cost less than a loop over memoryviews
_ROOT_BYTES = 640  # a root: its name, its places in two dicts
_FAN_BYTES = 900  # a fan: the objects, the slots of a table without entries
_SPAN_BYTES = 120  # one length of a child: in a dict and an array


class _Fan:
    """Many children of one block that do not follow it by number: by key, and how much further than it they end."""

    __slots__ = ("_spans", "children", "spans")

    def __init__(self) -> None:
        self.children = BlockTable()
        self.spans: dict[int, int] = {}
        self._spans: Int64Array | None = None

    @property
    def nbytes(self) -> int:
        return _FAN_BYTES + self.children.nbytes + _SPAN_BYTES * len(self.spans)

    def ends(self, position: int, limit: int) -> Int64Array:
        """Where in a prompt of `limit` units a child may end."""
        if self._spans is None:
            self._spans = np.array(sorted(self.spans), dtype=np.int64)
        found = self._spans + position
        return found[: int(np.searchsorted(found, limit, side="right"))]

    def count(self, span: int, step: int) -> None:
        left = self.spans.get(span, 0) + step
        if left == step or not left:
            self._spans = None
        if left:
            self.spans[span] = left
        else:
            del self.spans[span]


class BlockTree:
    """Columns by block number. Number 0 is no block; the last is never given away.

    up: how far before it, by number, its parent is: 1 for most, 0 for a number that is free. position, key: where the
    block ends in a prompt, and the hash of all up to there. held: number of the set of its holders, 0 for nobody.
    first, sibling: of the children that do not follow by number. The views with `_at` are the same memory.
    roots: name of a chain -> tokens in a block -> the block, of no units, that all begin with. live: numbers in use.
    capacity: how many could be. fan_bytes: what the tables of blocks with many children take.
    """

    def __init__(self) -> None:
        self.up = np.zeros(_FIRST, dtype=np.int32)
        self.position = np.zeros(_FIRST, dtype=np.uint32)
        self.key = np.zeros(_FIRST, dtype=np.uint64)
        self.held = np.zeros(_FIRST, dtype=np.uint32)
        self.first = np.zeros(_FIRST, dtype=np.uint32)
        self.sibling = np.zeros(_FIRST, dtype=np.uint32)
        self.roots: dict[bytes, dict[int, int]] = {}
        self._names: dict[int, tuple[bytes, int]] = {}
        self._fans: dict[int, _Fan] = {}
        self.fan_bytes = self._widest = 0  # of the largest fan there has been
        self._top = 1  # numbers from here on have never been used
        self._cursor = 1  # where the search for free numbers goes on
        self._extents: list[tuple[int, int]] = []  # free numbers it found: (how many, from where), the most last
        self.live = self._worth_trimming = 0
        self._look()

    # --- reading ---

    @property
    def blocks(self) -> int:
        return self.live - len(self._names)

    @property
    def nbytes(self) -> int:
        return self._column_nbytes + self.fan_bytes + _ROOT_BYTES * len(self._names)

    def fits(self, count: int) -> bool:
        """Whether so many more blocks can be made without growing."""
        return self.live + count <= self._easy

    def growth(self, count: int) -> int:
        """Bytes at the worst moment of making so many more blocks; the columns grow one by one, for some in place."""
        fan = _FAN_BYTES + 3 * self._widest
        if self.fits(count):
            return fan
        return fan + self._column_bytes(self._next_size(count) - len(self.up)) + self.key.itemsize * len(self.up)

    def parent(self, block: int) -> int:
        """The block that this one continues; 0 for a root."""
        up = self.up_at[block]
        return 0 if up == ROOT else block - up

    def child_at(self, block: int, position: int, key: int) -> Iterator[int]:
        """The children that end here; several when an engine spells the same text with different tokens."""
        child = block + 1
        if self.up_at[child] == 1 and self.key_at[child] == key and self.position_at[child] == position:
            yield child
        child = self.first_at[block]
        if child == _FAN:
            child = self._fans[block].children.get(key)
        while child:
            if self.key_at[child] == key and self.position_at[child] == position:
                yield child
            child = self.sibling_at[child]

    def children(self, block: int) -> list[int]:
        """All children."""
        found = [block + 1] if self.up_at[block + 1] == 1 else []
        child = self.first_at[block]
        if child != _FAN:
            return found + list(self._along(child))
        for first in self._fans[block].children.held()[1].tolist():
            found += self._along(first)
        return found

    def branches(self, block: int, hashes: UInt64Array) -> list[int]:
        """The children in a prompt with these prefix hashes that do not follow the block by number."""
        first, limit = self.first_at[block], len(hashes) - 1
        if first == _FAN:
            fan = self._fans[block]
            keys = hashes[fan.ends(self.position_at[block], limit)]
            firsts = [fan.children.get(key) for key in dict.fromkeys(keys.tolist())]
            candidates = [child for first in firsts if first for child in self._along(first)]
        else:
            candidates = list(self._along(first))
        return [child for child in candidates if self.spells(child, hashes)]

    def spells(self, block: int, hashes: UInt64Array) -> bool:
        """Whether a prompt with these prefix hashes has the text of this block where it ends."""
        position = self.position_at[block]
        return position < len(hashes) and hashes.item(position) == self.key_at[block]

    def follow(self, start: int, hashes: UInt64Array) -> int:
        """How many blocks from `start` on, each the continuation of the one before it, a prompt goes through."""
        if self.up_at[start] != 1 or not self.spells(start, hashes):
            return 0
        count, (size, most) = 1, _GALLOP
        while True:
            part = slice(start + count, start + count + size)
            position = self.position[part]
            same = hashes.take(position, mode="clip") == self.key[part]
            same &= self.up[part] == 1
            same &= position < len(hashes)
            leading = _leading(same)
            count += leading
            if leading < size:
                return count
            size = min(4 * size, most)

    def follow_keys(self, start: int, ends: Int64Array, keys: UInt64Array) -> int:
        """How many blocks from `start` on are these, in order."""
        part = slice(start, start + len(keys))
        same = self.up[part] == 1
        there = len(same)
        same &= self.key[part] == keys[:there]
        same &= self.position[part] == ends[:there]
        return _leading(same)

    # --- making ---

    def root(self, name: bytes, tokens: int, key: int = 0) -> int:
        """The block, of no units, that a kind of chain begins with; made where there is none."""
        found = self.roots.get(name, {}).get(tokens)
        if found is None:
            ((found, _),) = self._take(0, 1)
            self.up_at[found] = ROOT
            self.position_at[found], self.key_at[found] = 0, key
            self.roots.setdefault(name, {})[tokens] = found
            self._names[found] = (name, tokens)
        return found

    def is_free_behind(self, parent: int) -> bool:
        """Whether a block without children can be given the next number for one."""
        return not self.up_at[parent + 1] and not self.first_at[parent] and parent < self.capacity

    def append(self, parent: int, end: int, key: int, held: int) -> None:
        """Make one block right behind a parent, where `is_free_behind` it."""
        block = parent + 1
        self.up_at[block], self.position_at[block], self.key_at[block], self.held_at[block] = 1, end, key, held
        self.live += 1
        if block >= self._top:
            self._top = block + 1

    def extend(self, parent: int, ends: Int64Array, keys: UInt64Array, held: int) -> list[tuple[int, int]]:
        """Make a chain of blocks below a parent; returns (start, count) of the ranges of numbers it was given."""
        last, done = parent, 0
        ranges = self._take(parent, len(keys))
        for start, count in ranges:
            part = slice(start, start + count)
            self.position[part] = ends[done : done + count]
            self.key[part] = keys[done : done + count]
            self.held[part] = held
            if start != last + 1:
                self.up_at[start] = start - last
                self._attach(last, start)
            last, done = start + count - 1, done + count
        return ranges

    def prune(self, block: int) -> None:
        """Free a block that nobody holds and nothing continues, and every such block above it."""
        while not self.held_at[block] and not self.first_at[block] and self.up_at[block + 1] != 1:
            up = self.up_at[block]
            if up == ROOT:
                self._drop_root(block)
                return
            if up != 1:
                self._detach(block)
            self.up_at[block] = 0
            self.live -= 1
            block -= up

    def prune_many(self, blocks: Int64Array) -> None:
        """Prune blocks that nobody holds, in any order, those that follow each other at once."""
        ordered = np.sort(blocks)
        breaks = (np.flatnonzero((ordered[1:] - ordered[:-1] != 1) | (self.up[ordered[1:]] != 1)) + 1).tolist()
        starts, stops = [0, *breaks], [*breaks, len(ordered)]
        for start, stop in zip(reversed(starts), reversed(stops), strict=True):
            if stop and self.up_at[ordered.item(stop - 1)]:
                self._prune_run(ordered.item(start), ordered.item(stop - 1))

    # --- keeping ---

    def dump(self) -> Iterator[bytes]:
        """The columns, little-endian, as far as they are used, one after the other. It must not change between."""
        stop = int(np.flatnonzero(self.up).max(initial=0)) + 1
        for column in self._columns():
            yield column[:stop].astype(column.dtype.newbyteorder("<"), copy=False).tobytes()

    def restore(self, columns: list[bytes], roots: Iterable[tuple[bytes, int, int]]) -> None:
        """Become what was dumped; roots: (name, tokens, block). For a tree with nothing in it."""
        self._resize(max(_FIRST, len(columns[0]) // 4 + 2 + _GAP))
        for column, data in zip(self._columns(), columns, strict=True):
            stored = np.frombuffer(data, dtype=column.dtype.newbyteorder("<"))
            column[: len(stored)] = stored
        self._top = len(columns[0]) // 4
        self.live = int(np.count_nonzero(self.up))
        for name, tokens, block in roots:
            self.roots.setdefault(name, {})[tokens] = block
            self._names[block] = (name, tokens)
        self._spread_again()

    def _spread_again(self) -> None:
        """Make the fans, of which only the mark in `first` is kept."""
        apart = np.flatnonzero((self.up != 0) & (self.up != 1) & (self.up != ROOT))
        parents = apart - self.up[apart]
        wide = self.first[parents] == _FAN
        for parent, child in zip(parents[wide].tolist(), apart[wide].tolist(), strict=True):
            if parent not in self._fans:
                self._fans[parent] = fan = _Fan()
                self.fan_bytes += fan.nbytes
            self._spread(parent, self._fans[parent], child)

    # --- room ---

    def grow(self, count: int) -> None:
        """Make room for so many more blocks."""
        if not self.fits(count):
            self._resize(self._next_size(count))

    def trim(self) -> bool:
        """Give back the numbers behind the last that is used, if there are many; whether there were."""
        if self.live > self._worth_trimming:
            return False
        self._worth_trimming = self.live // 2  # the search takes about a nanosecond a number
        last = int(np.flatnonzero(self.up).max(initial=0))
        size = max(_FIRST, last + 2 + _GAP)
        if size > 3 * len(self.up) // 4:
            return False
        self._top = last + 1
        self._extents.clear()
        self._cursor = 1
        self._resize(size)
        return True

    def _next_size(self, count: int) -> int:
        least = (self.live + count + 2) * _EASE // (_EASE - 1) + 1
        return max(len(self.up) + min(len(self.up), _STEP), least)

    def _column_bytes(self, size: int) -> int:
        return sum(column.itemsize for column in self._columns()) * size

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.up, self.position, self.key, self.held, self.first, self.sibling

    def _resize(self, size: int) -> None:
        for view in (self.up_at, self.position_at, self.key_at, self.held_at, self.first_at, self.sibling_at):
            view.release()
        for column in self._columns():
            column.resize(size, refcheck=False)  # in place where the C library can move pages, as glibc does
        self._look()

    def _look(self) -> None:
        self.up_at, self.position_at, self.key_at = (each.data for each in self._columns()[:3])
        self.held_at, self.first_at, self.sibling_at = (each.data for each in self._columns()[3:])
        self._column_nbytes = self._column_bytes(len(self.up))
        self._worth_trimming = len(self.up) // 2
        self.capacity = len(self.up) - 2
        self._easy = self.capacity - self.capacity // _EASE

    def _take(self, after: int, count: int) -> list[tuple[int, int]]:
        """Mark numbers as used, right behind `after` as far as they are free, and as few ranges as there can be."""
        self.live += count
        taken = []
        start, free = after + 1, self._free_from(after + 1, count) if after else 0
        while True:
            if free:
                self.up[start : start + free] = 1
                taken.append((start, free))
                self._top = max(self._top, start + free)
                count -= free
            if not count:
                return taken
            start, free = self._find(count, self._gap(after, count))

    def _gap(self, after: int, count: int) -> int:
        """Numbers to leave free behind so many blocks: prompts grow by parts of one size, answers block by block."""
        if count > _GAP:
            return min(count, _WIDE_GAP)
        apart = not after or self.first_at[after] or self.up_at[after + 1] == 1
        return count if apart else _GAP

    def _free_from(self, start: int, count: int) -> int:
        """How many numbers from `start` on are free, up to `count`."""
        stop = min(start + count, len(self.up) - 1)
        if count <= _SLICES:
            at = start
            while at < stop and not self.up_at[at]:
                at += 1
            return at - start
        part = self.up[start:stop]
        return int((part != 0).argmax()) if np.count_nonzero(part) else len(part)

    def _find(self, count: int, gap: int) -> tuple[int, int]:
        """(start, count) of free numbers, `count` at most: the smallest extent with enough of them, or the largest."""
        if self._top + count <= len(self.up) - 1:
            start = self._top
            self._top = min(start + count + gap, len(self.up) - 1)
            return start, count
        swept = 0
        while not self._extents:
            self._sweep(_WORTH_TAKING if swept < len(self.up) else 1)
            swept += _SWEEP
        extents = self._extents
        length, start = extents.pop(min(bisect_left(extents, (count + gap, 0)), len(extents) - 1))
        stop = start + length
        if self.up_at[start]:  # the chain before it has grown into it
            start += _leading(self.up[start:stop] != 0)
        free = self._free_from(start, min(count, stop - start))
        left = stop - (start + free + gap)
        if left >= _WORTH_TAKING:
            insort(extents, (left, stop - left))
        return start, free

    def _sweep(self, least: int) -> None:
        """Look for extents of so many free numbers, or more, in the next part of the columns."""
        stop = min(self._cursor + _SWEEP, len(self.up) - 1)
        edges = np.flatnonzero(np.diff(self.up[self._cursor : stop] == 0, prepend=False, append=False)) + self._cursor
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        worth = lengths >= least
        self._extents = sorted(zip(lengths[worth].tolist(), starts[worth].tolist(), strict=True))
        self._cursor = stop if stop < len(self.up) - 1 else 1

    # --- links ---

    def _along(self, child: int) -> Iterator[int]:
        while child:
            yield child
            child = self.sibling_at[child]

    def _attach(self, parent: int, child: int) -> None:
        first = self.first_at[parent]
        if first == _FAN:
            self._spread(parent, self._fans[parent], child)
            return
        self.sibling_at[child] = first
        self.first_at[parent] = child
        children = list(self._along(child))
        if len(children) > _FEW:
            self._fans[parent] = fan = _Fan()
            self.fan_bytes += fan.nbytes
            self.first_at[parent] = _FAN
            for each in children:
                self._spread(parent, fan, each)

    def _spread(self, parent: int, fan: _Fan, child: int) -> None:
        before = fan.nbytes
        key = self.key_at[child]
        self.sibling_at[child] = same = fan.children.get(key)
        if same:
            fan.children.replace(key, child)
        else:
            fan.children.add([key], child)
        fan.count(self.position_at[child] - self.position_at[parent], 1)
        self.fan_bytes += fan.nbytes - before
        self._widest = max(self._widest, fan.nbytes)

    def _detach(self, child: int) -> None:
        parent = child - self.up_at[child]
        if self.first_at[parent] == _FAN:
            self._gather(parent, self._fans[parent], child)
        else:
            self._unchain(parent, child)
        self.sibling_at[child] = 0

    def _unchain(self, parent: int, child: int) -> None:
        before = self.first_at[parent]
        if before == child:
            self.first_at[parent] = self.sibling_at[child]
            return
        while self.sibling_at[before] != child:
            before = self.sibling_at[before]
        self.sibling_at[before] = self.sibling_at[child]

    def _gather(self, parent: int, fan: _Fan, child: int) -> None:
        before, key = fan.nbytes, self.key_at[child]
        entry = fan.children.find(key)
        same = list(self._along(fan.children.block(entry)))
        index = same.index(child)
        if index:
            self.sibling_at[same[index - 1]] = self.sibling_at[child]
        elif len(same) > 1:
            fan.children.replace(key, same[1])
        else:
            fan.children.drop(entry)
        fan.count(self.position_at[child] - self.position_at[parent], -1)
        self.fan_bytes += fan.nbytes - before
        if not fan.children:
            self.fan_bytes -= fan.nbytes
            del self._fans[parent]
            self.first_at[parent] = 0

    def _prune_run(self, start: int, last: int) -> None:
        """Free what can be of a range of blocks, each the continuation of the one before it and held by nobody."""
        if self.up_at[last + 1] == 1:
            return
        branching = np.flatnonzero(self.first[start : last + 1])
        start = start + branching.item(-1) + 1 if branching.size else start
        if start > last:
            return
        up = self.up_at[start]
        if up == ROOT or start == last:
            self.prune(last)
            return
        if up != 1:
            self._detach(start)
        self.up[start : last + 1] = 0
        self.live -= last + 1 - start
        self.prune(start - up)

    def _drop_root(self, block: int) -> None:
        name, tokens = self._names.pop(block)
        del self.roots[name][tokens]
        if not self.roots[name]:
            del self.roots[name]
        self.up_at[block] = 0
        self.live -= 1


def _leading(same: np.ndarray) -> int:
    """How many leading ones."""
    return len(same) if np.count_nonzero(same) == len(same) else int(same.argmin())
