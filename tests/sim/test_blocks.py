import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.sim.blocks import BlockPool


def stored(pool: BlockPool, *hashes: int) -> list[int]:
    """Blocks of a running sequence that carry these hashes."""
    blocks = pool.allocate(len(hashes), [])
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.register(block, block_hash)
    return blocks


def evictions(pool: BlockPool, count: int) -> list[int]:
    evicted: list[int] = []
    pool.allocate(count, evicted)
    return evicted


def test_block_0_is_never_handed_out() -> None:
    pool = BlockPool(4)
    assert pool.usable == 3
    assert 0 not in pool.allocate(3, [])
    assert (pool.free, pool.usage) == (0, 1.0)
    with pytest.raises(KeyError):
        pool.allocate(1, [])


def test_usage_counts_held_blocks_over_usable_ones() -> None:
    pool = BlockPool(64)
    blocks = pool.allocate(56, [])
    assert round(pool.usage, 4) == 0.8889
    pool.release(blocks)
    assert pool.usage == 0.0


def test_match_stops_at_the_first_block_that_is_not_cached() -> None:
    pool = BlockPool(10)
    blocks = stored(pool, 1, 2, 3)
    assert pool.match([1, 2, 9, 3], limit=4) == blocks[:2]
    assert pool.match([1, 2, 3], limit=2) == blocks[:2]
    assert pool.match([9], limit=1) == []


def test_a_freed_block_matches_until_it_is_allocated_again() -> None:
    pool = BlockPool(3)
    blocks = stored(pool, 1, 2)
    pool.release(blocks)
    assert pool.match([1, 2], limit=2) == blocks
    assert evictions(pool, 1) == [2]  # the tail goes first
    assert pool.match([1, 2], limit=2) == blocks[:1]


def test_eviction_takes_the_oldest_sequence_first_and_its_tail_first() -> None:
    pool = BlockPool(6)
    a, b = stored(pool, 1, 2), stored(pool, 3, 4, 5)
    pool.release(b)
    pool.release(a)
    assert evictions(pool, 5) == [5, 4, 3, 2, 1]


def test_blocks_without_a_hash_are_used_again_first() -> None:
    pool = BlockPool(4)
    full, tail = stored(pool, 1, 2), pool.allocate(1, [])
    pool.release([*full, *tail])
    assert pool.allocate(1, []) == tail
    assert evictions(pool, 1) == [2]


def test_a_shared_block_is_free_when_its_last_holder_leaves() -> None:
    pool = BlockPool(4)
    blocks = stored(pool, 1)
    pool.hold(blocks)
    pool.release(blocks)
    assert pool.count_free(blocks) == 0
    pool.release(blocks)
    assert pool.count_free(blocks) == 1


def test_a_hit_takes_a_free_block_out_of_the_eviction_order() -> None:
    pool = BlockPool(4)
    pool.release(stored(pool, 1, 2, 3))
    pool.hold(pool.match([1], limit=1))
    assert evictions(pool, 2) == [3, 2]
    assert pool.free == 0


def test_a_hash_stored_twice_is_removed_twice_and_matches_between() -> None:
    pool = BlockPool(4)
    first, second = stored(pool, 7), stored(pool, 7)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(1, []) not in (first, second)  # the blank one
    assert evictions(pool, 1) == [7]
    assert pool.match([7], limit=1) == first
    assert evictions(pool, 1) == [7]
    assert 7 not in pool


def test_the_twin_takes_over_when_the_first_is_evicted() -> None:
    pool = BlockPool(3)
    first, second = stored(pool, 7), stored(pool, 7)
    pool.release(first)
    assert evictions(pool, 1) == [7]
    assert pool.match([7], limit=1) == second
    pool.check_integrity([first, second])


def test_clear_forgets_everything_only_while_nothing_is_held() -> None:
    pool = BlockPool(4)
    blocks = stored(pool, 1, 2)
    assert not pool.clear()
    pool.release(blocks)
    assert pool.clear()
    assert (pool.cached, pool.free) == (0, 3)
    pool.check_integrity([])


Move = tuple[str, int]


@given(st.lists(st.tuples(st.sampled_from(["take", "drop", "clear"]), st.integers(0, 5)), max_size=40))
def test_no_interleaving_leaks_a_block(moves: list[Move]) -> None:
    """Sequences of up to 5 blocks with few distinct hashes, so that hits, twins and evictions all happen."""
    pool, held = BlockPool(12), list[list[int]]()
    for move, n in moves:
        if move == "take":
            hashes = list(range(n))
            hit = pool.match(hashes, limit=max(n - 1, 0))
            if n - len(hit) + pool.count_free(hit) <= pool.free:
                pool.hold(hit)
                held.append(hit + stored(pool, *hashes[len(hit) :]))
        elif move == "drop" and held:
            pool.release(held.pop(n % len(held)))
        elif move == "clear":
            assert pool.clear() == (not any(held))
        pool.check_integrity(held)
    for blocks in held:
        pool.release(blocks)
    assert pool.usage == 0.0
