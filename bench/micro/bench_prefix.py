"""How long hashing a prompt and asking and teaching the approximate index take, and how much memory it needs.

    pytest bench/micro -o python_files='bench_*.py' --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name -s

Prompts of 1, 32 and 400 KB in blocks of 256 bytes; half of each is shared with earlier ones. Every row that is used is
full (6,250 blocks: 400,000 tokens of four bytes), so every store evicts.
"""

import functools
import gc
import itertools
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from picker.prefix.approximate import ApproximateIndex
from picker.prefix.blocks import BlockHasher
from picker.types import UInt64Array

BLOCKS = [4, 128, 1563]
ROWS = [10, 100, 1000]
CAPACITY = 6250
BUDGET = 1 << 30
HEADS = 64
USED_ROWS = 100  # of those there are: filling more of them shows nothing new
ROUNDS = 1000

pytestmark = pytest.mark.benchmark(disable_gc=True)


def prompts(blocks: int, seed: int = 0) -> Iterator[UInt64Array]:
    """Hashes of endless prompts, the first half of each one of a few heads."""
    rng = np.random.default_rng(seed)
    heads = [rng.integers(0, 2**64, blocks // 2, dtype=np.uint64) for _ in range(HEADS)]
    while True:
        tail = rng.integers(0, 2**64, blocks - blocks // 2, dtype=np.uint64)
        yield np.concatenate([heads[rng.integers(HEADS)], tail])


def row_of(number: int, rows: int) -> int:
    used = min(rows, USED_ROWS)
    return number % used * (rows // used)


def measure(benchmark: BenchmarkFixture, act: Callable[..., object], setup: Callable[[], object] | None = None) -> None:
    benchmark.pedantic(act, setup=setup, rounds=ROUNDS, warmup_rounds=50)  # type: ignore[no-untyped-call]


@functools.cache
def full_index(blocks: int, rows: int) -> ApproximateIndex:
    index = ApproximateIndex(BUDGET, rows)
    for row in range(rows):
        index.set_capacity(row, CAPACITY)
    used = min(rows, USED_ROWS)
    count = HEADS + 2 * used * CAPACITY // blocks
    for number, hashes in enumerate(itertools.islice(prompts(blocks), round(1.2 * count))):
        index.store(row_of(number, rows), hashes)
    assert all(index.resident(row_of(number, rows)) == CAPACITY for number in range(used))
    return index


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("what", ["match", "store", "match+store"])
def test_a_prompt_half_of_which_is_known(benchmark: BenchmarkFixture, what: str, blocks: int, rows: int) -> None:
    index = full_index(blocks, rows)
    upcoming = zip(itertools.count(), prompts(blocks, seed=0), strict=False)
    next(itertools.islice(upcoming, 2 * ROUNDS, 2 * ROUNDS), None)
    rng = np.random.default_rng(len(what))

    def setup() -> tuple[tuple[int, UInt64Array], dict[str, object]]:
        number, hashes = next(upcoming)
        hashes[blocks // 2 :] = rng.integers(0, 2**64, blocks - blocks // 2, dtype=np.uint64)
        return (row_of(number, rows), hashes), {}

    def both(row: int, hashes: UInt64Array) -> None:
        index.match(hashes)
        index.store(row, hashes)

    act = {"match": lambda row, hashes: index.match(hashes), "store": index.store, "match+store": both}[what]
    measure(benchmark, act, setup)
    benchmark.extra_info["nbytes"] = index.nbytes


@pytest.mark.parametrize("rows", [100, 1000])
def test_a_conversation_of_which_every_turn_branched(benchmark: BenchmarkFixture, rows: int) -> None:
    """The longest way through the tree: 100 turns of 4 blocks, each of which once went on differently elsewhere."""
    index = ApproximateIndex(BUDGET, rows)
    whole = next(prompts(400))
    branches = prompts(2, seed=1)
    for number in range(1, 100):
        index.store(number % rows, np.concatenate([whole[: 4 * number], next(branches)]))

    def act() -> None:
        index.match(whole)
        index.store(0, whole)

    measure(benchmark, act)


@pytest.mark.parametrize("size", [1024, 32768, 400_000])
def test_hashing(benchmark: BenchmarkFixture, size: int) -> None:
    hasher = BlockHasher(b"secret")
    prompt = np.random.default_rng(0).bytes(size)
    root = hasher.root("model", None)
    measure(benchmark, lambda: hasher.hash(prompt, root=root))


@pytest.mark.parametrize(("blocks", "pairs"), [(4, 200_000), (32, 1_000_000), (128, 1_000_000), (1563, 1_000_000)])
def test_bytes_of_a_block_on_a_row(blocks: int, pairs: int) -> None:
    """Printed, not timed: what the interpreter traced, on a hundred rows, for each (block, row) pair."""
    index = ApproximateIndex(BUDGET, 100)
    upcoming = prompts(blocks)
    next(upcoming)
    gc.collect()
    tracemalloc.start()
    try:
        for number in itertools.takewhile(lambda _: sum(map(index.resident, range(100))) < pairs, itertools.count()):
            for row in range(100):
                index.store((row + number) % 100, next(upcoming))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = sum(map(index.resident, range(100)))
    print(
        f"\n{blocks} blocks a prompt, {held} pairs: {taken / held:.1f} bytes a pair, {index.nbytes / held:.1f} reported"
    )
