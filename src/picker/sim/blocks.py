"""The paged KV cache of one engine: ref-counted blocks, the hash table that finds them again, the order of eviction.

Owns which block is held, hashed or free. Knows no tokens, requests or time, and never decides who gets a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice


class BlockPool:
    """Fixed-size KV blocks with prefix caching, as vLLM v1 keeps them.

    A block is held (by one or more sequences), or free. A free block that carries a hash still matches until it is
    allocated again; free blocks without a hash are allocated first. Block 0 is the null block and never handed out.

        allocate: blank (last freed first) -> evictable (least recently freed first; its hash is forgotten)
        release:  no hash -> blank;  hash -> end of evictable, tail of the sequence first

    vLLM keeps one queue, where blocks without a hash are put in front: that is these two, one after the other.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"{num_blocks} blocks leave none beside the null block")
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._hashes: list[int | None] = [None] * num_blocks
        self._blank = list(range(num_blocks - 1, 0, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._by_hash: dict[int, int] = {}
        # Further blocks that carry a hash some block has already: recomputed copies are never merged.
        self._twins: dict[int, list[int]] = {}

    @property
    def usable(self) -> int:
        return self.num_blocks - 1

    @property
    def free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._blank) + len(self._evictable)

    @property
    def usage(self) -> float:
        """vLLM's `kv_cache_usage_perc`, a fraction: what sequences hold; cached but free blocks do not count."""
        return 1.0 - self.free / self.usable

    @property
    def cached(self) -> int:
        """Distinct hashes that a lookup can find."""
        return len(self._by_hash)

    def __contains__(self, block_hash: int) -> bool:
        return block_hash in self._by_hash

    def match(self, hashes: Sequence[int], limit: int) -> list[int]:
        """The blocks of the longest cached prefix of `hashes`, at most `limit`. Reads only."""
        find = self._by_hash.get
        blocks = []
        for block_hash in islice(hashes, limit):
            block = find(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: taking them costs free blocks, though nothing is computed."""
        refs = self._refs
        return sum(not refs[block] for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Take a reference on matched blocks; free ones leave the eviction order."""
        refs, evictable = self._refs, self._evictable
        for block in blocks:
            if not refs[block]:
                del evictable[block]
            refs[block] += 1

    def allocate(self, count: int, evicted: list[int]) -> list[int]:
        """Hand out `count` free blocks with one reference each; hashes they carried are appended to `evicted`.

        The caller has compared `count` with `free`; running short raises KeyError.
        """
        blank = self._blank
        blocks = [blank.pop() for _ in range(min(count, len(blank)))]
        for _ in range(count - len(blocks)):
            block, _none = self._evictable.popitem(last=False)
            evicted.append(self._forget(block))
            blocks.append(block)
        refs = self._refs
        for block in blocks:
            refs[block] = 1
        return blocks

    def register(self, block: int, block_hash: int) -> None:
        """A held block is full and will be computed in this step: lookups find it from here on."""
        self._hashes[block] = block_hash
        if self._by_hash.setdefault(block_hash, block) != block:
            self._twins.setdefault(block_hash, []).append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference on each block of a sequence; its tail becomes evictable before its head."""
        refs, hashes, blank, evictable = self._refs, self._hashes, self._blank, self._evictable
        for block in reversed(blocks):
            refs[block] -= 1
            if refs[block]:
                continue
            if hashes[block] is None:
                blank.append(block)
            else:
                evictable[block] = None

    def clear(self) -> bool:
        """Forget every hash (`/reset_prefix_cache`). False, and nothing happens, while any block is held."""
        if self.free != self.usable:
            return False
        for block in self._evictable:
            self._hashes[block] = None
        self._blank.extend(self._evictable)
        self._evictable.clear()
        self._by_hash.clear()
        self._twins.clear()
        return True

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless refs, queues and hash table agree with what `holders` say they hold."""
        refs = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                refs[block] += 1
        assert refs == self._refs, "reference counts differ from the sequences' blocks"
        free = [*self._blank, *self._evictable]
        assert len(set(free)) == len(free), "a block is free twice"
        assert sorted(free) == [b for b in range(1, self.num_blocks) if not refs[b]], (
            "a block leaked or is free and held"
        )
        assert all(self._hashes[b] is None for b in self._blank), "a hashed block is kept as blank"
        found: dict[int, set[int]] = {}
        for block, block_hash in enumerate(self._hashes):
            if block_hash is not None:
                found.setdefault(block_hash, set()).add(block)
        table = {h: {b, *self._twins.get(h, ())} for h, b in self._by_hash.items()}
        assert found == table, "the hash table differs from the blocks' hashes"
        assert self._twins.keys() <= self._by_hash.keys(), "a twin without a first"

    def _forget(self, block: int) -> int:
        block_hash = self._hashes[block]
        assert block_hash is not None
        self._hashes[block] = None
        twins = self._twins.get(block_hash)
        if twins is None:
            del self._by_hash[block_hash]
            return block_hash
        if self._by_hash[block_hash] == block:
            self._by_hash[block_hash] = twins.pop(0)
        else:
            twins.remove(block)
        if not twins:
            del self._twins[block_hash]
        return block_hash
