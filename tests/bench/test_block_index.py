import numpy as np

from picker.bench.block_index import DictIndex, memory


def test_shared_blocks_take_less_than_others() -> None:
    figures = memory(10, 20_000, np.random.default_rng(0))
    assert figures["shared_bytes_per_block"] < figures["bytes_per_block"] < figures["dict_bytes_per_block"]


def test_baseline_counts_leading_blocks() -> None:
    index = DictIndex()
    index.stored(0, [1, 2, 3])
    index.stored(1, [1, 3])
    assert index.match([1, 2, 3, 4]) == {0: 3, 1: 1}
    index.removed(0, [2])
    assert index.match([1, 2, 3, 4]) == {0: 1, 1: 1}
