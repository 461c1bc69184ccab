"""Which blocks each endpoint caches, as its engine says: KV events as a tree of blocks that prompts are matched with.

Pure, with a hard bound on memory. A block is known by where it ends in a prompt and by a keyed hash of the prompt up to
there, in whatever unit the caller counts; no text and no token ids are kept. What an engine says about itself changes
nothing that is known of others, but for the memory they share.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from picker.prefix.block_placing import COPY_BYTES, Holder, Row, evict
from picker.prefix.block_tree import BlockTree
from picker.prefix.block_walk import Walk, Way, boundary, credit
from picker.prefix.row_sets import TIERS, RowSets
from picker.types import FloatArray, Int32Array, Int64Array, Reading, Tier, UInt64Array

WORTH: Mapping[Tier, float] = {Tier.GPU: 1.0, Tier.CPU: 0.8, Tier.DISK: 0.4}

_PLACED_BYTES = 400  # of a block at most: in tree and table, a set of its own, a copy
_SPARE = 512  # blocks that memory is counted for in advance
_EVENT_BYTES = 4096  # what an event adds beside its blocks: a root, a fan


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """What is known of a prompt.

    blocks: (rows,) leading blocks that a row holds, in any tier. tokens: (rows,) the same in tokens, those in lower
    tiers counting less; cached: (rows,) all counting alike. position, depth_tokens: where the longest held prefix of
    any row ends, in units of the prompt and in tokens. explored: blocks that were compared.
    """

    blocks: Int32Array
    tokens: FloatArray
    cached: FloatArray
    position: int = 0
    depth_tokens: float = 0.0
    explored: int = 0


class _Best:
    """By row, the longest of the ways looked at so far, and the deepest that any row holds."""

    def __init__(self, rows: int) -> None:
        self.blocks = np.zeros(rows, dtype=np.int32)
        self.tokens = np.zeros(rows)
        self.position = self.explored = 0
        self.depth_tokens = 0.0
        self.length = np.zeros(rows)  # in tokens, whatever they are worth

    def add(self, way: Way, blocks: int, position: int, block_tokens: int) -> None:
        """Consider a way, of which the first `blocks` count; they end at `position`."""
        if not blocks:
            return
        held, worth = credit(way, blocks, len(self.blocks))
        longer = held * float(block_tokens) > self.length
        self.blocks[longer] = held[longer]
        self.tokens[longer] = worth[longer] * block_tokens
        self.length[longer] = held[longer] * float(block_tokens)
        if position > self.position:
            self.position, self.depth_tokens = position, float(blocks * block_tokens)


class PreciseIndex:
    """Who holds which block. budget_bytes: bound on everything learned, growth of tables included.

    worth: what a token in a tier is worth. secret: chains are named by a keyed hash under it, so that a snapshot shows
    nobody's salt; it should differ where positions count different units. The bare rows, about a kilobyte each, come on
    top of the budget.
    """

    def __init__(
        self, budget_bytes: int, rows: int = 64, worth: Mapping[Tier, float] = WORTH, secret: bytes = b""
    ) -> None:
        self._budget_bytes = budget_bytes
        self._spare = 0  # blocks that may come before memory is counted again, see `_make_room`
        self.tree = BlockTree()
        self.sets = RowSets(rows)
        self.rows = [Row() for _ in range(rows)]
        self._holders: dict[int, Holder] = {}
        self._row_bytes = sum(row.nbytes for row in self.rows)
        self.evictions = 0  # how often blocks were dropped for want of room: then `truncated` may have changed
        self._fan_bytes = 0  # of the tree, when memory was counted
        self._asked: tuple[int, int, int] = (0, 0, 0)  # row, hash, block: what `parent_of` found last
        self._deficits = [1 - worth[tier] for tier in TIERS]
        self._secret = hashlib.blake2b(secret, digest_size=32, person=b"precise").digest()

    # --- reading ---

    @property
    def nbytes(self) -> int:
        """Bytes that what was learned takes at this moment, to within the allocator's rounding."""
        return self.tree.nbytes + self.sets.nbytes + self._row_bytes

    @property
    def blocks(self) -> int:
        """Distinct blocks known, those included that only lead to one that somebody holds."""
        return self.tree.blocks

    def resident(self, row: int) -> int:
        """Blocks that this row holds, in any tier."""
        return len(self.rows[row].table)

    def orphans(self, row: int) -> int:
        """Blocks the row has announced that could not be placed: their parent is not known, or their hash is taken."""
        return self.rows[row].orphans

    def truncated(self, row: int) -> bool:
        """Whether some of its blocks were dropped for room: until it is cleared, it may hold more than is known."""
        return self.rows[row].truncated

    def parent_of(self, row: int, number: int) -> tuple[int, int] | None:
        """(position, key) where the row's block with this hash ends: what a continuation of it begins from."""
        block = self.rows[row].table.get(number)
        self._asked = row, number, block
        return (self.tree.position_at[block], self.tree.key_at[block]) if block else None

    def match(self, reading: Reading, identity: Hashable) -> Match:
        """How much of a prompt each row holds, by the chains of this identity (see `stored`). Reads only."""
        best = _Best(len(self.rows))
        splits = reading.splits and functools.cache(reading.splits)
        for tokens, root in self.tree.roots.get(self.name(identity), {}).items():
            walk = Walk(self.tree, self.sets, reading.hashes, self._deficits)
            for way in walk.ways(root):
                end = way.blocks, self.tree.position_at[way.block]
                best.add(way, *(end if splits is None else boundary(self.tree, way, splits)), tokens)
            best.explored += walk.explored
        return Match(best.blocks, best.tokens, best.length, best.position, best.depth_tokens, best.explored)

    # --- learning ---

    def stored(
        self,
        row: int,
        chain: tuple[Hashable, int],
        hashes: Sequence[int],
        parent: int | None,
        ends: Int64Array | Sequence[int],
        keys: UInt64Array | Sequence[int],
        block_tokens: int,
        tier: Tier = Tier.GPU,
    ) -> int:
        """These blocks are in a row's cache, each the continuation of the one before it. Returns how many were placed.

        chain: what the hashes cover beside tokens, by which `match` finds it, and the block size; chains that differ
        in either have nothing in common. hashes: the engine's. parent: the hash that the first continues;
        None: nothing. ends: (b,) absolute positions, not decreasing; keys: (b,) hashes of all units up to there. Blocks
        that continue an unknown one are not placed, nor is a block whose hash the row has for another one.
        """
        if not hashes:
            return 0
        mine = self.rows[row]
        if not self._make_room(mine, len(hashes)):
            mine.truncated = True
            return 0
        start = self._start(row, chain, parent, block_tokens)
        if not start:
            mine.orphans += len(hashes)
            return 0
        before, holder = mine.nbytes, self._holder(row, tier)
        if len(hashes) > 1:
            placed = holder.place(start, hashes, np.asarray(ends, np.int64), np.asarray(keys, np.uint64))
        else:
            placed = holder.place_one(start, hashes[0], int(ends[0]), int(keys[0]))
        if not placed:
            self.tree.prune(start)
        self._row_bytes += mine.nbytes - before
        mine.orphans += len(hashes) - placed
        return placed

    def stored_again(self, row: int, hashes: Sequence[int], tier: Tier) -> int:
        """Blocks are in a further tier of a row's cache, told by their hashes alone. Returns how many were known."""
        mine = self.rows[row]
        if not self._make_room(mine, len(hashes)):
            return 0
        before, holder = mine.nbytes, self._holder(row, tier)
        known = sum([holder.copy(number) for number in hashes])
        self._row_bytes += mine.nbytes - before
        return known

    def removed(self, row: int, hashes: Sequence[int], tier: Tier = Tier.GPU) -> int:
        """One copy of each of these blocks left a tier of the row's cache. Returns how many were known."""
        mine, holder = self.rows[row], self._holder(row, tier)
        self._changed(len(hashes))
        if not mine.copies:
            return holder.remove_all(hashes)  # from a table, which stays as large as it is
        before = mine.nbytes
        known = sum([holder.remove(number) for number in hashes])
        self._row_bytes += mine.nbytes - before
        return known

    def clear(self, row: int, tier: Tier | None = None) -> None:
        """The row's cache is empty, or one tier of it."""
        before = self.rows[row].nbytes
        self._changed(self._spare)
        for each in TIERS if tier is None else (tier,):
            self._holder(row, each).clear()
        if tier is None:
            self.rows[row].reset()
        self._row_bytes += self.rows[row].nbytes - before

    def remove_row(self, row: int) -> None:
        """The endpoint left; whoever gets the row next starts from nothing."""
        self.clear(row)

    def grow_rows(self, rows: int) -> None:
        """Make room for more rows; does nothing when there are as many."""
        extra = rows - len(self.rows)
        if extra <= 0:
            return
        self._changed(self._spare)
        added = [Row() for _ in range(extra)]
        self.rows += added
        self._row_bytes += sum(row.nbytes for row in added)
        if rows > self.sets.width:
            self.sets.grow_rows(max(rows, 2 * self.sets.width))
            self._holders.clear()
        self._make_room(self.rows[0], 0)

    @property
    def budget_bytes(self) -> int:
        """Bound on everything learned; what there is above a lower one goes with the next event."""
        return self._budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, budget: int) -> None:
        self._budget_bytes, self._spare = budget, 0

    def settle(self) -> None:
        """Hold everything to the budget after the rows were filled from outside."""
        self._row_bytes = sum(row.nbytes for row in self.rows)
        self._changed(self._spare)
        self._make_room(self.rows[0], 0)

    def name(self, identity: Hashable) -> bytes:
        """A chain's name: a keyed hash of what it covers beside its units."""
        return hashlib.blake2b(repr(identity).encode(errors="surrogatepass"), digest_size=16, key=self._secret).digest()

    # --- rows ---

    def _holder(self, row: int, tier: Tier) -> Holder:
        if tier is not Tier.GPU:
            return Holder.of(self.tree, self.sets, self.rows[row], row, tier)
        holder = self._holders.get(row)  # made once for the tier that nearly all events are about
        if holder is None:
            self._holders[row] = holder = Holder.of(self.tree, self.sets, self.rows[row], row, tier)
        return holder

    def _start(self, row: int, chain: tuple[Hashable, int], parent: int | None, tokens: int) -> int:
        """The block that a chain continues; 0 where it is not known."""
        if parent is None:
            return self.tree.root(self.name(chain[0]), tokens)
        asked_row, number, block = self._asked
        return block if block and number == parent and asked_row == row else self.rows[row].table.get(parent)

    # --- room ---

    def _make_room(self, mine: Row, count: int) -> bool:
        """Let a row's next blocks in within the budget; False: impossible.

        Memory is counted for more blocks than there are, so that those after them need not count, as long as nothing
        has to grow for them.
        """
        tree = self.tree
        same = mine.table.fits(count) and tree.fits(count + 1) and tree.fan_bytes == self._fan_bytes
        if count <= self._spare and same:
            self._spare -= count
            return True
        if count * _PLACED_BYTES > self.budget_bytes // 2:
            return False  # nobody's other blocks are worth one event of such a size
        while self.nbytes + self._growth(mine, count) > self.budget_bytes:
            if not self.tree.trim() and not self._evict():
                return False
        self.tree.grow(count + 1)
        spare = self.nbytes + self._growth(mine, count + _SPARE) + _SPARE * _EVENT_BYTES
        self._spare, self._fan_bytes = _SPARE if spare <= self.budget_bytes else 0, self.tree.fan_bytes
        return True

    def _changed(self, blocks: int) -> None:
        """So many blocks may have got new sets without room made for them; parents may be gone."""
        self._spare -= blocks
        self._asked = (0, 0, 0)

    def _growth(self, mine: Row, count: int) -> int:
        """Bytes at the worst moment of placing so many blocks: each might make a set and be a copy."""
        return (
            _EVENT_BYTES
            + self.tree.growth(count + 1)
            + self.sets.growth(count)
            + mine.table.growth(count)
            + COPY_BYTES * count
        )

    def _evict(self) -> bool:
        """Drop some of the oldest blocks, tail first, of the row that has most: a flood costs its own row first."""
        row = max(range(len(self.rows)), key=lambda each: len(self.rows[each].table))
        mine = self.rows[row]
        if not mine.table:
            return False
        before = mine.nbytes
        self._changed(self._spare)
        mine.truncated = True
        self.evictions += 1
        evict(self._holder(row, Tier.GPU))
        self._row_bytes += mine.nbytes - before
        return True
