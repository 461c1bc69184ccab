import numpy as np

from picker.prefix.block_tree import BlockTree

HELD = 1


def grown(tree: BlockTree, parent: int, first_key: int, count: int) -> int:
    """A chain of `count` held blocks of ten units each; returns the last."""
    tree.grow(count)
    start = tree.position_at[parent]
    ends = start + 10 * np.arange(1, count + 1)
    ranges = tree.extend(parent, ends, np.arange(first_key, first_key + count, dtype=np.uint64), HELD)
    return ranges[-1][0] + ranges[-1][1] - 1


def path(tree: BlockTree, block: int) -> list[int]:
    """Keys from a block up to its root."""
    keys = []
    while (parent := tree.parent(block)) != 0:
        keys.append(tree.key_at[block])
        block = parent
    return keys


def test_a_chain_has_numbers_in_a_row_where_they_are_free() -> None:
    tree = BlockTree()
    root = tree.root(b"chain", 16)
    last = grown(tree, root, 1, 100)
    assert last == root + 100
    assert grown(tree, last, 101, 8) == last + 8


def test_numbers_are_given_again() -> None:
    tree = BlockTree()
    root = tree.root(b"chain", 16)
    for start in range(100, 20_000, 100):
        last = grown(tree, root, start, 90)
        assert path(tree, last) == list(range(start + 89, start - 1, -1))
        tree.held[tree.up != 0] = 0
        tree.prune(last)
        root = tree.root(b"chain", 16)
    assert tree.capacity < 2100


def test_a_chain_is_whole_when_free_numbers_are_scattered() -> None:
    tree = BlockTree()
    root = tree.root(b"chain", 16)
    lasts = [grown(tree, root, 1000 * number, 3) for number in range(1, 300)]
    capacity = tree.capacity
    for last in lasts[::2]:
        tree.held[last - 2 : last + 1] = 0
        tree.prune_many(np.array([last, last - 2, last - 1]))
    room = tree.capacity - tree.live
    last = grown(tree, root, 1, room)
    assert path(tree, last) == list(range(room, 0, -1))
    assert (tree.live, tree.capacity) == (capacity, capacity)
    for kept in lasts[1::2]:
        assert len(path(tree, kept)) == 3


def test_a_tree_that_lost_its_end_gives_memory_back() -> None:
    tree = BlockTree()
    root = tree.root(b"chain", 16)
    kept = grown(tree, root, 1, 10)
    last = grown(tree, root, 1000, 5000)
    before = tree.nbytes
    tree.held[kept + 1 :] = 0
    tree.prune(last)
    assert tree.trim()
    assert tree.nbytes < before / 3
    assert path(tree, kept) == list(range(10, 0, -1))


def test_a_block_is_freed_when_nobody_holds_it_and_nothing_continues_it() -> None:
    tree = BlockTree()
    root = tree.root(b"chain", 16)
    stem = grown(tree, root, 1, 3)
    left, right = grown(tree, stem, 10, 2), grown(tree, stem, 20, 2)
    tree.held[:] = 0
    tree.prune(left)
    assert tree.blocks == 5
    tree.prune(right)
    assert (tree.live, tree.roots) == (0, {})
