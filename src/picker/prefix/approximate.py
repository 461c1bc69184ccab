"""What each endpoint probably caches, learned from what we sent there: prefixes, the least recently used out first.

Mirrors vLLM's automatic prefix caching: block i is useful only if 0..i-1 are there too, a request's blocks are evicted
tail first, and an endpoint holds as much as its KV cache does. Pure, with a hard bound on memory.
"""

from __future__ import annotations

import heapq
import itertools
import math
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from picker.types import FloatArray, Int32Array, UInt64Array

_NEVER = np.iinfo(np.int64).max
_HASH = 8  # bytes
_TABLES = 64  # the table of runs, in parts: one part at a time grows, and for a moment is there twice
_LAST = _TABLES - 1

# Bytes on CPython 3.11, with the allocator's rounding.
_RUN_BYTES = 240  # a run: the object, its number, its key in the table, the heads of its hashes and of its set of rows
_ENTRY_BYTES = 32  # the stamp of an entry in a row's order
_LINK_BYTES = 56  # the link of an entry in a row's order, which is not made anew when the order's tables grow
_PROMPT_BYTES = 4096  # what a prompt adds besides its hashes: two runs, their entries, tables that were empty
_FEW = 16  # rows that are counted one by one faster than as bits of arrays
_SPARSE = 512  # a table with more bytes an entry has lost most of its entries: made anew

# Rules of `correct`. A miss counts ten times a hit: in balance about one prediction in eleven misses. At forty times,
# predictions were better still, but the few misses that have nothing to do with capacity (a request that was aborted
# before its prefill, or does not read the cache) ruin it: 5 % of them took an honest engine to a quarter of its own.
_SHRINK = 0.98
_RECOVER = 1.002
_NEARLY = 0.9  # of the prediction, or one block less than it, is no miss: bytes and tokens do not divide alike
_FLOOR = 0.1
_TRUST_GAIN = 0.05


Prompt = list[tuple[int, bytes]]
"""Runs of blocks by which a prompt goes on, from its first: the number of the run, and hashes as `_Run` has them."""


class _Run(msgspec.Struct, eq=False, gc=False):
    """Blocks that have always been used together, after those of `parent`: an edge of a radix tree over prompts.

    hashes: of its blocks, oldest first, as bytes. number: its own, never given again. children: runs that go on from
    here. whole, part: rows, as bits, that hold all of it and only its first blocks, of which `_part` has the number.
    Somebody always holds all of it, and whoever holds a child does.

    They refer to each other only upwards: the garbage collector has nothing to find here, and would stop the process
    for half a second to see that (measured with 300,000 of them).
    """

    hashes: bytes
    parent: _Run | None
    number: int
    children: int = 0
    whole: int = 0
    part: int = 0

    @property
    def blocks(self) -> int:
        return len(self.hashes) // _HASH


@dataclass(slots=True)
class _Row:
    """One endpoint's holdings.

    order: run -> stamp of its latest touch, the next to go first. A run follows all that continue it, so what goes
    first is always the end of something. A run that was split off the head of another has no entry until it is touched
    or the other goes. blocks: held. nbytes: of `order`. announced, effective: capacity in blocks, as the engine says
    and as it is trusted.
    """

    order: OrderedDict[_Run, int] = field(default_factory=OrderedDict)
    blocks: int = 0
    nbytes: int = 0
    announced: float = np.inf
    effective: float = np.inf


class ApproximateIndex:
    """Who holds which prefix. budget_bytes: bound on everything learned, growth of tables included.

    A radix tree, as in SGLang's RadixAttention, shared by all rows: blocks that are only used together cost one
    comparison and one entry however many they are, so time and memory follow the number of branches in a prompt rather
    than its length. Who holds a run is a set of rows as bits; the sets of a path are turned into counts for all rows at
    once. The bare rows, under a kilobyte each, come on top of the budget.
    """

    def __init__(self, budget_bytes: int, rows: int = 64) -> None:
        self.budget_bytes = budget_bytes
        self.trust: FloatArray = np.ones(rows)
        self._rows = [_Row() for _ in range(rows)]
        self._part: Int32Array = np.zeros(rows, dtype=np.int32)  # by row: blocks held of the one run it holds in part
        self._oldest = np.full(rows, _NEVER, dtype=np.int64)  # by row: stamp of the next to go
        self._root = _Run(b"", None, 0)
        self._tables: list[dict[int, _Run]] = [{} for _ in range(_TABLES)]
        self._numbers = itertools.count(1)
        self._stamp = 0
        # The latest walk and whose it was, until the tree changes: what is matched is stored a moment later.
        self._walked: tuple[UInt64Array, list[_Run], list[int]] | None = None
        self._runs = self._blocks = 0
        self._weights = [0] * _TABLES  # bytes by table
        self._order_bytes = self._table_bytes = self._largest_table = 0

    # --- reading ---

    @property
    def nbytes(self) -> int:
        """Bytes that what was learned takes at this moment, to within the allocator's rounding."""
        runs = self._runs * (_RUN_BYTES + len(self._rows) // 7)  # a Python int holds 30 bits in 4 bytes
        return runs + _HASH * self._blocks + self._order_bytes + self._table_bytes

    @property
    def blocks(self) -> int:
        """Distinct blocks held by anyone."""
        return self._blocks

    def resident(self, row: int) -> int:
        """Blocks this row is believed to hold."""
        return self._rows[row].blocks

    def effective_capacity(self, row: int) -> float:
        """Blocks the row is trusted to retain; inf where its capacity is not known."""
        return self._rows[row].effective

    def match(self, block_hashes: UInt64Array) -> Int32Array:
        """Count the leading blocks of a prompt that each row holds.

        block_hashes: (b,) chained hashes, oldest first. Returns (rows,) counts, 0..b. Reads only.
        """
        path, lengths = self._walk(block_hashes)
        if not path:
            return np.zeros(len(self._rows), dtype=np.int32)
        counts = self._count(path, lengths)
        for run, length in zip(path, lengths, strict=True):
            if run.part:
                counts += self._bits([run.part])[0] * np.minimum(self._part, length)
        return counts

    def match_few(self, block_hashes: UInt64Array, rows: int) -> Iterable[tuple[int, int]]:
        """(row, the same) of those of these rows, as bits, that hold any block; for a handful of rows. Reads only."""
        counts: dict[int, int] = {}
        path, lengths = self._walk(block_hashes)
        for run, length in zip(path, lengths, strict=True):
            for row in _members(run.whole & rows):
                counts[row] = counts.get(row, 0) + length
            for row in _members(run.part & rows):
                counts[row] = counts.get(row, 0) + min(self._part.item(row), length)
        return counts.items()

    # --- learning ---

    def store(self, row: int, block_hashes: UInt64Array) -> None:
        """This row holds these blocks as of this touch; what it held longest untouched makes room, tail first."""
        mine = self._rows[row]
        if block_hashes.size > mine.effective:
            block_hashes = block_hashes[: int(mine.effective)]
        if block_hashes.size == 0 or not self._make_room(self._growth(mine, block_hashes.size)):
            return
        self._stamp += 1
        for run in reversed(self._path(row, block_hashes)):
            self._touch(row, run)
        self._trim(row)

    def correct(self, row: int, block_hashes: UInt64Array, predicted: int, actual: int) -> None:
        """The engine had `actual` leading blocks cached when we had predicted so many.

        It has computed and stored the prompt since, so the blocks stay. What is learned is how much it retains: a
        prediction that was too high shrinks the capacity we credit it with, one that held lets it recover slowly to
        what the engine announced. `trust` follows the share of predicted blocks that were there: near 0 for an engine
        that does not cache at all.
        """
        if predicted <= 0:
            return
        held = min(actual, predicted) / predicted
        self.trust[row] += _TRUST_GAIN * (held - self.trust[row])
        mine = self._rows[row]
        if math.isfinite(mine.announced):
            factor = _SHRINK if held < _NEARLY and predicted - actual > 1 else _RECOVER
            mine.effective = min(mine.announced, max(_FLOOR * mine.announced, mine.effective * factor))
            if mine.blocks > mine.effective:
                self._trim(row)

    def take_back(self, row: int, block_hashes: UInt64Array, kept: int, *, thorough: bool = True) -> None:
        """The row never computed this prompt: of what `store` has credited it with, the first `kept` blocks stay.

        So does what other prompts of the row go on from. thorough: to find out which these are takes as long as the row
        holds many; else what prompts of any row go on from stays.
        """
        path, lengths = self._walk(block_hashes)
        position, needed = sum(lengths), self._needed(row, path) if thorough else None
        for run, length in zip(reversed(path), reversed(lengths), strict=True):
            position -= length
            held = self._held(row, run) if (run.whole | run.part) >> row & 1 else 0
            if held and (held > length or position + held <= kept):
                break
            if held and (run.children > 0 if needed is None else run in needed):
                break
            if held and position < kept:
                self._split(run, kept - position)
            if held:
                self._lose(row, run)
        self._weigh(row)
        self._make_room(0)

    def retention(self, row: int) -> tuple[float, float, float]:
        """(trust, capacity announced, capacity as trusted)."""
        mine = self._rows[row]
        return float(self.trust[row]), mine.announced, mine.effective

    def learn_retention(self, row: int, trust: float, announced: float, effective: float) -> None:
        """Believe of a row what somebody else has found out about it, if we have found out nothing."""
        mine = self._rows[row]
        if self.trust[row] == 1.0 and mine.effective == mine.announced:
            self.trust[row] = min(trust, 1.0)
            if math.isfinite(announced) and announced > 0:
                share = min(effective / announced, 1.0)
                mine.announced = mine.announced if math.isfinite(mine.announced) else announced
                mine.effective = mine.announced * share
                self._trim(row)

    def set_capacity(self, row: int, blocks: int | None) -> None:
        """What the engine announces to hold, in our blocks; None when it does not say. What was learned is kept."""
        mine = self._rows[row]
        known = math.isfinite(mine.announced) and mine.announced > 0
        learned = mine.effective / mine.announced if known else 1.0
        mine.announced = np.inf if blocks is None else float(blocks)
        mine.effective = mine.announced * learned
        self._trim(row)

    def clear(self, row: int) -> None:
        """The row holds nothing any more (its engine restarted)."""
        self._evict(row, self._rows[row].blocks)

    def remove_row(self, row: int) -> None:
        """The endpoint left; whoever gets the row next starts from nothing."""
        self.clear(row)
        self._rows[row].announced = self._rows[row].effective = np.inf
        self.trust[row] = 1.0

    def grow_rows(self, rows: int) -> None:
        """Make room for more rows; does nothing when there are as many."""
        extra = rows - len(self._rows)
        if extra <= 0:
            return
        self._rows.extend(_Row() for _ in range(extra))
        self._part = np.concatenate([self._part, np.zeros(extra, dtype=np.int32)])
        self._oldest = np.concatenate([self._oldest, np.full(extra, _NEVER, dtype=np.int64)])
        self.trust = np.concatenate([self.trust, np.ones(extra)])
        self._make_room(0)

    # --- handing on ---

    def holdings(self, most: int) -> Iterator[tuple[int, Prompt]]:
        """(row, prompt) of what rows hold, the longest untouched first; of all blocks the latest `most`, about.

        What changes while somebody takes his time may be left out, or be there in its new shape.
        """
        entries = [[(stamp, row, run) for run, stamp in mine.order.items()] for row, mine in enumerate(self._rows)]
        too_many = sum(run.blocks for of_row in entries for _, _, run in of_row) - most
        for _, row, run in heapq.merge(*filter(None, entries), key=_stamp):
            if too_many > 0:
                too_many -= run.blocks
            elif (run.whole | run.part) >> row & 1:
                yield row, _prompt(run, self._held(row, run))

    # --- sets of rows ---

    def _count(self, path: list[_Run], lengths: list[int]) -> Int32Array:
        """(rows,) blocks of the runs that a row holds whole."""
        sets: list[int] = []
        sums: list[int] = []
        for run, length in zip(path, lengths, strict=True):
            if sets and sets[-1] == run.whole:  # sets only shrink along a path: equal ones follow each other
                sums[-1] += length
            else:
                sets.append(run.whole)
                sums.append(length)
        if sum([each.bit_count() for each in sets]) <= _FEW:
            few = np.zeros(len(self._rows), dtype=np.int32)
            for each, blocks in zip(sets, sums, strict=True):
                for row in _members(each):
                    few[row] += blocks
            return few
        counts: Int32Array = np.array(sums, dtype=np.int32) @ self._bits(sets)
        return counts

    def _bits(self, sets: list[int]) -> Int32Array:
        """(sets, rows) of 0 and 1."""
        rows = len(self._rows)
        width = -(-rows // 8)
        packed = np.frombuffer(b"".join([each.to_bytes(width, "little") for each in sets]), dtype=np.uint8)
        bits = np.unpackbits(packed.reshape(len(sets), width), axis=1, count=rows, bitorder="little")
        return bits.astype(np.int32)

    # --- the tree ---

    def _walk(self, block_hashes: UInt64Array) -> tuple[list[_Run], list[int]]:
        """The runs that a prompt leads through, and how many blocks of each: all of them, except in the last."""
        if self._walked is not None and self._walked[0] is block_hashes:
            return self._walked[1:]
        path: list[_Run] = []
        lengths: list[int] = []
        data, position, run = block_hashes.tobytes(), 0, self._root
        while position < block_hashes.size:
            key = run.number << 64 | block_hashes.item(position)
            found = self._tables[key & _LAST].get(key)
            if found is None:
                break
            run = found
            whole = data.startswith(run.hashes, _HASH * position)
            length = run.blocks if whole else _common(run.hashes, block_hashes[position:])
            path.append(run)
            lengths.append(length)
            if not whole:
                break
            position += length
        self._walked = block_hashes, path, lengths
        return path, lengths

    def _path(self, row: int, block_hashes: UInt64Array) -> list[_Run]:
        """The runs that make up this prompt and nothing else; those that are missing are held by nobody yet."""
        path, lengths = self._walk(block_hashes)
        self._walked = None  # what follows writes to the path
        if path and lengths[-1] < path[-1].blocks:
            path[-1] = self._split(path[-1], lengths[-1])
        rest = block_hashes[sum(lengths) :].tobytes()
        last = path[-1] if path else self._root
        if rest and last.whole == 1 << row and not last.children:
            last.hashes += rest  # a conversation that goes on where it was stays one run
            self._blocks += len(rest) // _HASH
            self._rows[row].blocks += len(rest) // _HASH
        elif rest:
            path.append(self._attach(rest, last))
        return path

    def _attach(self, hashes: bytes, parent: _Run) -> _Run:
        run = _Run(hashes, parent, next(self._numbers))
        parent.children += 1
        self._runs += 1
        self._blocks += run.blocks
        self._enter(run)
        return run

    def _split(self, run: _Run, at: int) -> _Run:
        """Cut a run in two after so many blocks; returns the new upper one, the old one continues it."""
        assert run.parent is not None
        upper = _Run(run.hashes[: _HASH * at], run.parent, next(self._numbers), children=1, whole=run.whole)
        self._enter(upper)
        run.hashes = run.hashes[_HASH * at :]
        run.parent = upper
        self._enter(run)
        self._runs += 1
        for row in _members(run.part):
            if self._part[row] > at:
                upper.whole |= 1 << row
                self._part[row] -= at
            else:
                self._move_up(row, run, upper)
        return upper

    def _move_up(self, row: int, run: _Run, upper: _Run) -> None:
        """The row held no more of a run than what became the upper one."""
        run.part ^= 1 << row
        upper.part |= 1 << row
        order = self._rows[row].order
        order[upper] = order.pop(run)
        order.move_to_end(upper, last=False)
        self._weigh(row)

    def _forget(self, run: _Run) -> None:
        """Nobody holds any of it."""
        assert run.parent is not None
        self._walked = None
        key = _key(run)
        del self._tables[key & _LAST][key]
        self._weigh_table(key & _LAST)
        run.parent.children -= 1
        self._runs -= 1
        self._blocks -= run.blocks

    def _enter(self, run: _Run) -> None:
        self._walked = None
        key = _key(run)
        self._tables[key & _LAST][key] = run
        self._weigh_table(key & _LAST)

    # --- holding ---

    def _touch(self, row: int, run: _Run) -> None:
        """The row holds this run; of all it holds, it is the last to go."""
        mine, bit = self._rows[row], 1 << row
        if not run.whole & bit:
            mine.blocks += run.blocks
            if run.part & bit:
                mine.blocks -= int(self._part[row])
                run.part ^= bit
            run.whole |= bit
        mine.order[run] = self._stamp
        mine.order.move_to_end(run)

    def _trim(self, row: int) -> None:
        """Hold the row to its capacity and all to the budget."""
        mine = self._rows[row]
        if mine.blocks > mine.effective:
            self._evict(row, int(np.ceil(mine.blocks - mine.effective)))
        else:
            self._weigh(row)
        self._make_room(0)

    def _evict(self, row: int, count: int) -> None:
        """Take so many blocks from a row, or all it has: what was touched first, from its tail."""
        mine = self._rows[row]
        while count > 0 and mine.order:
            run = next(iter(mine.order))
            held = self._held(row, run)
            if held > count:
                self._cut(row, run, held - count)
            else:
                self._drop(row, run)
            count -= held
        self._weigh(row)

    def _held(self, row: int, run: _Run) -> int:
        return run.blocks if run.whole >> row & 1 else int(self._part[row])

    def _drop(self, row: int, run: _Run) -> None:
        """The row holds nothing of its next to go."""
        mine, bit = self._rows[row], 1 << row
        mine.blocks -= self._held(row, run)
        run.whole &= ~bit
        run.part &= ~bit
        stamp = mine.order.pop(run)
        parent = run.parent
        if parent is not None and parent is not self._root and parent not in mine.order:
            mine.order[parent] = stamp
            mine.order.move_to_end(parent, last=False)
        self._settle(run)

    def _lose(self, row: int, run: _Run) -> None:
        """The row holds nothing of this run, and nothing behind it; what is before it goes when this would have."""
        mine, bit, parent = self._rows[row], 1 << row, run.parent
        mine.blocks -= self._held(row, run)
        run.whole &= ~bit
        run.part &= ~bit
        if parent is None or parent is self._root or parent in mine.order:
            del mine.order[run]
        else:
            mine.order = OrderedDict((parent if each is run else each, at) for each, at in mine.order.items())
        self._settle(run)

    def _cut(self, row: int, run: _Run, kept: int) -> None:
        """The row keeps only the first blocks of its next to go."""
        self._rows[row].blocks -= self._held(row, run) - kept
        run.whole &= ~(1 << row)
        run.part |= 1 << row
        self._part[row] = kept
        self._settle(run)

    def _settle(self, run: _Run) -> None:
        """A run ends where the last holder's part of it does."""
        if run.whole:
            return
        if not run.part:
            self._forget(run)
            return
        rows = list(_members(run.part))
        longest = max(int(self._part[row]) for row in rows)
        self._walked = None
        self._blocks -= run.blocks - longest
        run.hashes = run.hashes[: _HASH * longest]
        run.whole = sum(1 << row for row in rows if self._part[row] == longest)
        run.part ^= run.whole

    def _needed(self, row: int, path: Sequence[_Run]) -> set[_Run]:
        """What the row's runs beside this path go on from."""
        needed: set[_Run] = set()
        for run in self._rows[row].order.keys() - set(path):
            above = run.parent
            while above is not None and above not in needed:
                needed.add(above)
                above = above.parent
        return needed

    # --- room ---

    def _growth(self, mine: _Row, blocks: int) -> int:
        """Bytes at the worst moment of storing so many blocks: what grows is there thrice, old and new."""
        order_tables = mine.nbytes - (_ENTRY_BYTES + _LINK_BYTES) * len(mine.order)
        return 3 * _HASH * blocks + _PROMPT_BYTES + 2 * order_tables + 4 * self._largest_table

    def _make_room(self, extra: int) -> bool:
        """Let so many more bytes in within the budget, the globally oldest runs going first; False: impossible."""
        if extra > self.budget_bytes:
            return False
        while self.nbytes + extra > self.budget_bytes:
            row = int(self._oldest.argmin())
            if self._oldest[row] == _NEVER:
                return False
            self._evict(row, self._held(row, next(iter(self._rows[row].order))))
        return True

    def _weigh(self, row: int) -> None:
        """Keep up to date what a row's order takes and when its next to go was touched."""
        mine = self._rows[row]
        nbytes = sys.getsizeof(mine.order)
        if nbytes > _SPARSE * len(mine.order):
            mine.order = OrderedDict(mine.order)
            nbytes = sys.getsizeof(mine.order) if mine.order else 0
        nbytes += _ENTRY_BYTES * len(mine.order)
        self._order_bytes += nbytes - mine.nbytes
        mine.nbytes = nbytes
        self._oldest[row] = mine.order[next(iter(mine.order))] if mine.order else _NEVER

    def _weigh_table(self, index: int) -> None:
        table = self._tables[index]
        nbytes = sys.getsizeof(table)
        if nbytes > _SPARSE * len(table):
            self._tables[index] = table = dict(table)
            nbytes = sys.getsizeof(table) if table else 0
        self._table_bytes += nbytes - self._weights[index]
        self._weights[index] = nbytes
        self._largest_table = max(self._largest_table, nbytes)


def _key(run: _Run) -> int:
    """A run's place in the table: which run it goes on from, and its first block."""
    assert run.parent is not None
    return run.parent.number << 64 | int.from_bytes(run.hashes[:_HASH], sys.byteorder)


def _stamp(entry: tuple[int, int, _Run]) -> int:
    return entry[0]


def _prompt(run: _Run, blocks: int) -> Prompt:
    """All that leads to a run, and so many blocks of it."""
    path, above = [(run.number, run.hashes[: _HASH * blocks])], run.parent
    while above is not None and above.parent is not None:
        path.append((above.number, above.hashes))
        above = above.parent
    return path[::-1]


def _common(hashes: bytes, block_hashes: UInt64Array) -> int:
    """How many leading blocks are the same."""
    ours = np.frombuffer(hashes, dtype=np.uint64)[: block_hashes.size]
    unequal = ours != block_hashes[: ours.size]
    return int(unequal.argmax()) if unequal.any() else int(ours.size)


def _members(rows: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    while rows:
        lowest = rows & -rows
        yield lowest.bit_length() - 1
        rows ^= lowest
