"""An index told in words is the same index, and what is told is bounded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import blocks
from picker.prefix.approximate import ApproximateIndex
from picker.replicas.handover import Receiver, lessons_of, offer, taught
from picker.replicas.words import Held, Node, Taught, batch, encode, unbatch
from picker.types import EndpointLessons, Lessons, UInt64Array

NAMES = ("a", "b", "c")


def retold(index: ApproximateIndex, most: int = 1 << 20) -> ApproximateIndex:
    receiver, copy = Receiver(), ApproximateIndex(1 << 20)
    for word in offer(index, lambda row: NAMES[row], most):
        fact = receiver.take(word)
        if fact is not None:
            copy.store(NAMES.index(fact.name), fact.block_hashes)
    return copy


PROMPTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=30
)


def prompt(system: int, user: int, turns: int) -> UInt64Array:
    return blocks(**{f"system{system}": 6, f"user{user}": 1 + turns})


@given(PROMPTS)
@settings(max_examples=60, deadline=None)
def test_the_copy_knows_what_the_original_knows(stored: list[tuple[int, int, int, int]]) -> None:
    index = ApproximateIndex(1 << 20)
    for row, system, user, turns in stored:
        index.store(row, prompt(system, user, turns))
    copy = retold(index)
    for _, system, user, turns in stored:
        wanted = prompt(system, user, turns)
        assert np.array_equal(index.match(wanted)[:3], copy.match(wanted)[:3])
    assert [copy.resident(row) for row in range(3)] == [index.resident(row) for row in range(3)]


@given(PROMPTS, st.integers(5, 20))
@settings(max_examples=60, deadline=None)
def test_the_copy_forgets_in_the_same_order(stored: list[tuple[int, int, int, int]], capacity: int) -> None:
    index = ApproximateIndex(1 << 20)
    for row, system, user, turns in stored:
        index.store(row, prompt(system, user, turns))
    copy = retold(index)
    for each in (index, copy):
        for row in range(3):
            each.set_capacity(row, capacity)
    for _, system, user, turns in stored:
        wanted = prompt(system, user, turns)
        assert np.array_equal(index.match(wanted)[:3], copy.match(wanted)[:3])


def test_what_is_held_in_part_is_told_in_part() -> None:
    index = ApproximateIndex(1 << 20)
    for row in (0, 1):
        index.store(row, blocks(p=20))
    index.set_capacity(1, 12)
    assert retold(index).match(blocks(p=20))[:2].tolist() == [20, 12]


def test_the_latest_count_when_not_all_may_be_told() -> None:
    index = ApproximateIndex(1 << 20)
    for number in range(10):
        index.store(0, blocks(**{f"p{number}": 10}))
    copy = retold(index, most=30)
    assert [int(copy.match(blocks(**{f"p{number}": 10}))[0]) for number in range(10)] == [0] * 7 + [10] * 3


def test_what_many_share_is_told_once() -> None:
    index = ApproximateIndex(1 << 20)
    for number in range(50):
        index.store(0, blocks(system=100, **{f"p{number}": 1}))
    hashes = sum(len(word.hashes) // 8 for word in offer(index, lambda row: NAMES[row]) if isinstance(word, Node))
    assert hashes == 100 + 50


def test_telling_may_take_its_time_while_all_changes() -> None:
    index = ApproximateIndex(1 << 20)
    for number in range(20):
        index.store(number % 3, blocks(system=10, **{f"p{number}": 10}))
    receiver, copy = Receiver(), ApproximateIndex(1 << 20)
    for count, word in enumerate(offer(index, lambda row: NAMES[row])):
        if (fact := receiver.take(word)) is not None:
            copy.store(NAMES.index(fact.name), fact.block_hashes)
        index.store(count % 3, blocks(system=5, **{f"q{count}": 10}))  # splits what has been told
        index.store(count % 3, blocks(system=10, **{f"p{count}": 15}))  # makes it longer
    for number in range(20):
        wanted = blocks(system=10, **{f"p{number}": 10})
        assert (copy.match(wanted)[:3] <= index.match(wanted)[:3]).all()
        assert copy.match(wanted)[number % 3] == 20


@pytest.mark.parametrize("words", [[Node(2, 1, b"12345678")], [Held("a", 3)], [Node(1, 0, b"123"), Held("a", 1)]])
def test_what_makes_no_sense_is_refused(words: list[Node | Held]) -> None:
    receiver = Receiver()
    with pytest.raises(ValueError, match=r"goes on from|leads nowhere|multiple of element size"):
        _ = [receiver.take(word) for word in words]


def test_a_prompt_that_leads_to_itself_is_refused() -> None:
    receiver = Receiver()
    for node in (Node(1, 0, b"12345678"), Node(2, 1, b"12345678"), Node(1, 2, b"12345678")):
        receiver.take(node)
    with pytest.raises(ValueError, match="leads nowhere"):
        receiver.take(Held("a", 2))


# --- what was learned --------------------------------------------------------------------------------------

LESSONS = Lessons(
    prefill={-2: np.arange(15.0).reshape(3, 5), 4: np.empty((0, 5))},
    decode={0: np.ones((2, 4))},
    ratios={"output_tokens": (300.0, 1.5)},
    rates={"arrivals": (60.0, 30.0)},
    endpoints=(EndpointLessons("a", (1.0, 2.0), (3.0, 4.0), 0.5, 1000.0, 900.0, 7.0), EndpointLessons("b")),
)


def test_lessons_are_the_same_in_words() -> None:
    (word,) = unbatch(batch([encode(taught(LESSONS))]))
    assert isinstance(word, Taught)
    heard = lessons_of(word)
    for mine, theirs in ((LESSONS.prefill, heard.prefill), (LESSONS.decode, heard.decode)):
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[size], theirs[size]) for size in mine)
    assert (heard.ratios, heard.rates, heard.endpoints) == (LESSONS.ratios, LESSONS.rates, LESSONS.endpoints)


NAN, TOO_MUCH = float("nan"), {0: np.ones((2000, 5)).tobytes()}


@pytest.mark.parametrize(
    "change",
    [
        {"ratios": {"tied": (NAN, 1.0)}},
        {"rates": {"work": (-1.0, 1.0)}},
        {"rates": {"work": (1.0, float("inf"))}},
        {"endpoints": [("a", 1.0, NAN, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0)]},
        {"prefill": {0: b"123"}},
        {"prefill": {0: np.ones((1, 4)).tobytes()}},
        {"prefill": {0: np.full((1, 5), NAN).tobytes()}},
        {"decode": {0: np.full((1, 4), -1.0).tobytes()}},
        {"decode": {9999: np.ones((1, 4)).tobytes()}},
        {"prefill": TOO_MUCH},
    ],
)
def test_lessons_that_nobody_can_have_learned_are_refused(change: dict[str, object]) -> None:
    word = Taught(**({"prefill": {}, "decode": {}, "ratios": {}, "rates": {}, "endpoints": []} | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"that nobody can have|of no size|multiple of element size"):
        lessons_of(word)
