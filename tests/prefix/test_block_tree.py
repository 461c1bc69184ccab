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
    keys = np.arange(1, room + 1, dtype=np.uint64)
    start, count = tree.extend(root, 10 * np.arange(1, room + 1), keys, HELD)[-1]
    last = start + count - 1
    assert path(tree, last) == list(range(room, 0, -1))
    assert (tree.live, tree.capacity) == (capacity, capacity)  # to the last number that is free
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


def test_a_part_of_the_numbers_stays_free() -> None:
    tree = BlockTree()
    root = tree.root(b"chain", 16)
    for number in range(500):
        grown(tree, root, 1000 * number, 30)
        assert tree.live <= tree.capacity * 7 / 8
    assert tree.live >= tree.capacity / 3


def test_growth_covers_what_making_blocks_takes() -> None:
    tree = BlockTree()
    root = tree.root(b"chain", 16)
    last = root
    for number in range(300):
        before, growth = tree.nbytes, tree.growth(30)
        last = grown(tree, last, 1000 * number, 30)
        assert tree.nbytes <= before + growth


def test_prompts_of_many_keep_together_while_others_come_and_go() -> None:
    rng = np.random.default_rng(0)
    tree = BlockTree()
    root = tree.root(b"chain", 16)
    ranges, adjacent, lasts = 0, 0, [root] * 20
    held: list[list[int]] = []
    for number in range(2000):
        which = int(rng.integers(20))
        ends = tree.position_at[lasts[which]] + 10 * np.arange(1, 33)
        tree.grow(32)
        made = tree.extend(lasts[which], ends, np.arange(32, dtype=np.uint64) + np.uint64(100 * number), HELD)
        ranges += len(made)
        adjacent += made[0][0] == lasts[which] + 1
        lasts[which] = made[-1][0] + made[-1][1] - 1
        held.append([block for start, count in made for block in range(start, start + count)])
        if number % 8 == 7:
            lasts[which] = root
        if len(held) > 300:
            gone = np.array(held.pop(int(rng.integers(100))))
            tree.held[gone] = 0
            tree.prune_many(gone)
    assert ranges < 1.3 * 2000
    assert adjacent > 0.25 * 2000
