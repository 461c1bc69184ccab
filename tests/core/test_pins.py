from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import blocks
from picker.core.pins import NOTHING, Hold, Pins, hold
from picker.types import UInt64Array

ROWS = 3
BLOCK = 64.0  # tokens


def held(*, tail: int = 0, **segments: int) -> Hold:
    """Of a prompt that ends so many tokens after its last full block."""
    prompt = blocks(**segments)
    return hold(prompt, BLOCK, prompt.size * BLOCK + tail)


def pieces(of: Hold) -> list[int]:
    """Tokens from mark to mark."""
    return [of.upto(marks + 1) - of.upto(marks) for marks in range(len(of.keys))]


def size(of: Hold) -> int:
    return sum(pieces(of)) + of.rest


# --- what a prompt holds ---


def test_a_short_prompt_is_marked_at_every_block_and_its_end_belongs_to_it_alone() -> None:
    prompt = blocks(a=3)
    made = hold(prompt, BLOCK, 200.0)
    assert (made.keys, pieces(made), made.rest) == (tuple(prompt.tolist()), [64, 64, 64], 8)


def test_a_prompt_without_full_blocks_shares_nothing() -> None:
    made = hold(blocks(), BLOCK, 40.4)
    assert (made.keys, made.rest) == ((), 40)
    assert size(NOTHING) == 0


def test_blocks_that_are_said_to_be_longer_than_the_prompt_hold_no_more_than_it() -> None:
    made = hold(blocks(a=3), BLOCK, 100.0)
    assert (made.keys, pieces(made), made.rest) == (tuple(blocks(a=3).tolist()), [64, 36, 0], 0)


@pytest.mark.parametrize("number", [1, 16, 17, 100, 5000])
def test_marks_lie_at_most_a_sixteenth_apart_and_are_few(number: int) -> None:
    made = hold(np.arange(number, dtype=np.uint64), 1.0, float(number))
    marks = np.array(made.keys)
    assert (np.diff(marks) <= 1 + marks[:-1] / 16).all()
    assert marks[-1] + 1 + marks[-1] / 16 >= number - 1
    assert len(made.keys) <= min(number, 120)


@given(
    number=st.integers(0, 200),
    block_tokens=st.floats(0.1, 500.0),
    tail=st.floats(0.0, 50.0),
    cut=st.sampled_from([1.0, 1.0, 0.5, 0.0]),
)
@settings(max_examples=100, deadline=None)
def test_the_pieces_of_a_prompt_add_up_to_it(number: int, block_tokens: float, tail: float, cut: float) -> None:
    tokens = (number * block_tokens + tail) * cut
    made = hold(np.arange(number, dtype=np.uint64), block_tokens, tokens)
    assert size(made) == round(tokens)
    assert min(pieces(made), default=0) >= 0
    assert made.rest >= 0


# --- who holds what ---


def test_nothing_is_shared_with_nobody() -> None:
    pins = Pins()
    assert pins.shared(held(a=5, tail=9), ROWS).tolist() == [0, 0, 0]
    assert (pins.take(1, held(a=5, tail=9)), pins.take(1, held(b=5, tail=9))) == (329, 329)
    assert pins.shared(held(c=5), ROWS).tolist() == [0, 0, 0]


def test_a_whole_prompt_is_shared_but_for_its_end() -> None:
    pins = Pins()
    pins.take(1, held(a=5, tail=9))
    assert pins.shared(held(a=5, tail=9), ROWS).tolist() == [0, 320, 0]
    assert pins.take(1, held(a=5, tail=9)) == 9


def test_what_is_shared_ends_at_the_last_mark_before_prompts_differ() -> None:
    """Of 40 blocks in common marks see 39: from the 33rd on they lie three apart."""
    pins = Pins()
    one, other = held(system=40, x=30), held(system=40, y=20)
    common = sum(tokens for key, tokens in zip(one.keys, pieces(one), strict=True) if key in other.keys)
    assert common == 39 * BLOCK
    pins.take(0, one)
    assert pins.shared(other, ROWS).tolist() == [common, 0, 0]
    assert pins.take(0, other) == 60 * BLOCK - common


def test_each_row_shares_what_is_held_there() -> None:
    pins = Pins()
    for row, prompt in enumerate((held(a=10), held(a=4), held(a=7, b=9))):
        pins.take(row, prompt)
    assert pins.shared(held(a=10, c=2), ROWS).tolist() == [640, 256, 448]


def test_a_row_far_beyond_the_bits_of_a_word_is_found_too() -> None:
    pins = Pins()
    pins.take(4000, held(a=2))
    found = pins.shared(held(a=2), 4001)
    assert (found[4000], found.sum()) == (128, 128)


def test_a_piece_is_given_back_by_the_last_of_its_holders_whatever_the_order() -> None:
    long, short = held(a=6), held(a=4)
    pins = Pins()
    assert [pins.take(0, each) for each in (long, short, long)] == [384, 0, 0]
    assert [pins.give_back(0, each) for each in (long, long, short)] == [0, 128, 256]
    assert len(pins) == 0
    assert pins.shared(long, ROWS).tolist() == [0, 0, 0]


def test_what_one_row_gives_back_others_keep() -> None:
    pins = Pins()
    pins.take(0, held(a=6))
    pins.take(2, held(a=6))
    assert (pins.give_back(0, held(a=6)), len(pins)) == (384, 6)
    assert pins.shared(held(a=6), ROWS).tolist() == [0, 0, 384]


def test_a_piece_counts_what_it_counted_for_its_first_holder_until_its_last_has_ended() -> None:
    """The estimate of tokens per block is another when the second comes."""
    first, second = hold(blocks(a=2), 60.0, 125.0), hold(blocks(a=2), 64.0, 130.0)
    pins = Pins()
    assert (pins.take(0, first), pins.take(0, second)) == (125, 2)
    assert (pins.give_back(0, first), pins.give_back(0, second)) == (5, 122)


def test_a_row_that_was_cleared_holds_nothing_and_others_all_they_held() -> None:
    pins = Pins()
    for row in (0, 1, 1):
        pins.take(row, held(a=6, tail=1))
    pins.clear(1)
    assert pins.shared(held(a=6), ROWS).tolist() == [384, 0, 0]
    assert pins.take(1, held(a=6, tail=1)) == 385
    assert [pins.give_back(row, held(a=6, tail=1)) for row in (0, 1)] == [385, 385]
    assert len(pins) == 0


def test_a_hash_that_occurs_twice_in_a_prompt_is_given_back_as_often_as_it_was_taken() -> None:
    twice = hold(np.array([7, 8, 7], dtype=np.uint64), BLOCK, 3 * BLOCK)
    pins = Pins()
    assert (pins.take(0, twice), pins.give_back(0, twice), len(pins)) == (192, 192, 0)


# --- any interleaving ---

# Prompts of a small tree: how much of the trunk, which branch, how much of it, and tokens after the last block.
prompts = st.tuples(st.integers(0, 60), st.sampled_from("xy"), st.integers(0, 40), st.integers(0, 30))
# None: the oldest ends; otherwise a prompt comes. With the row, and which of the open ones ends.
calls = st.lists(st.tuples(st.integers(0, ROWS - 1), st.none() | prompts, st.integers(0, 30)), max_size=40)


def prompt_of(described: tuple[int, str, int, int]) -> UInt64Array:
    trunk, branch, more, _ = described
    return blocks(**({"trunk": trunk} | {branch: more}))


def common_blocks(one: UInt64Array, other: UInt64Array) -> int:
    shorter = min(one.size, other.size)
    same = one[:shorter] == other[:shorter]
    return shorter if same.all() else int(np.argmin(same))


def recounted(holds: list[Hold]) -> tuple[int, int]:
    """(pieces, tokens) of one row: every piece once, and the ends of all."""
    counted = {key: tokens for each in holds for key, tokens in zip(each.keys, pieces(each), strict=True)}
    return len(counted), sum(counted.values()) + sum(each.rest for each in holds)


@settings(max_examples=60, deadline=None)
@given(calls=calls, block_tokens=st.sampled_from([64.0, 51.2, 0.7]))
def test_whatever_comes_and_goes_each_row_counts_what_it_holds_once(calls: Any, block_tokens: float) -> None:
    pins, counted = Pins(), [0] * ROWS
    open_: list[list[tuple[UInt64Array, Hold]]] = [[] for _ in range(ROWS)]
    for row, described, number in calls:
        if described is not None:
            prompt = prompt_of(described)
            tokens = prompt.size * block_tokens + described[3]
            wanted = hold(prompt, block_tokens, tokens)
            shared = pins.shared(wanted, ROWS)
            for other, found in enumerate(shared):
                true = max((common_blocks(prompt, theirs) for theirs, _ in open_[other]), default=0) * block_tokens
                assert 0 <= found <= true <= tokens
                assert true <= found * 17 / 16 + 2
            new = pins.take(row, wanted)
            assert new == size(wanted) - int(shared[row])
            counted[row] += new
            open_[row].append((prompt, wanted))
        elif open_[row]:
            _, ended = open_[row].pop(number % len(open_[row]))
            freed = pins.give_back(row, ended)
            assert 0 <= freed <= size(ended)
            counted[row] -= freed
        recounts = [recounted([each for _, each in theirs]) for theirs in open_]
        assert counted == [tokens for _, tokens in recounts]
        assert len(pins) == sum(marks for marks, _ in recounts)
    for row, theirs in enumerate(open_):
        assert sum(pins.give_back(row, each) for _, each in theirs) == counted[row]
    assert len(pins) == 0


@settings(max_examples=60, deadline=None)
@given(
    calls=calls, clears=st.sets(st.integers(0, 39), max_size=4), block_tokens=st.lists(st.floats(0.1, 99), min_size=40)
)
def test_nothing_is_lost_or_left_when_estimates_change_and_rows_are_cleared(
    calls: Any, clears: set[int], block_tokens: list[float]
) -> None:
    pins, counted = Pins(), [0] * ROWS
    open_: list[list[Hold]] = [[] for _ in range(ROWS)]
    for at, (row, described, number) in enumerate(calls):
        if at in clears:
            pins.clear(row)
            counted[row], open_[row] = 0, []
        elif described is not None:
            prompt = prompt_of(described)
            open_[row].append(hold(prompt, block_tokens[at], prompt.size * block_tokens[at] + described[3]))
            counted[row] += pins.take(row, open_[row][-1])
        elif open_[row]:
            counted[row] -= pins.give_back(row, open_[row].pop(number % len(open_[row])))
        assert len(pins) == sum(recounted(theirs)[0] for theirs in open_)
        assert all(tokens >= sum(each.rest for each in theirs) for tokens, theirs in zip(counted, open_, strict=True))
    for row, theirs in enumerate(open_):
        assert sum(pins.give_back(row, each) for each in theirs) == counted[row]
    assert len(pins) == 0


@given(
    taken=st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, 6), st.integers(0, 3)), max_size=6),
    asked=st.tuples(st.integers(0, 6), st.integers(0, 3)),
    rows=st.integers(0, 2**ROWS - 1),
)
@settings(max_examples=60, deadline=None)
def test_some_rows_are_told_what_they_share_as_all_are(
    taken: list[tuple[int, int, int]], asked: tuple[int, int], rows: int
) -> None:
    pins = Pins()
    for row, head, other in taken:
        pins.take(row, held(head=head, **{f"own{other}": 2}))
    wanted = held(head=asked[0], **{f"own{asked[1]}": 2})
    everybody = pins.shared(wanted, ROWS).tolist()
    expected = {row: tokens for row, tokens in enumerate(everybody) if tokens and rows >> row & 1}
    assert dict(pins.shared_by(wanted, rows)) == expected
