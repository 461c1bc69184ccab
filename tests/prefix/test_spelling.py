"""Prefix hashes and vocabularies: one prefix has one hash however it is reached, and no other has it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.prefix.spelling import PrefixHasher, Vocabulary

HASHER = PrefixHasher(b"secret")
WORDS = Vocabulary([b"a", b"bc", b"", None, "€".encode(), b"\xe2\x82", b"\xac"])


@given(st.binary(max_size=200))
@settings(max_examples=50)
def test_a_hash_of_a_prefix_is_the_hash_of_the_prefix_alone(data: bytes) -> None:
    running = HASHER.hashes(data)
    assert running.shape == (len(data) + 1,)
    assert running[0] == HASHER.start
    assert [int(HASHER.hashes(data[:n])[-1]) for n in range(len(data) + 1)] == running.tolist()


@given(st.binary(max_size=100), st.lists(st.binary(max_size=50), max_size=5))
@settings(max_examples=50)
def test_a_chain_continued_piece_by_piece_is_the_chain_of_the_whole(begin: bytes, pieces: list[bytes]) -> None:
    whole, key = begin, int(HASHER.hashes(begin)[-1])
    for piece in pieces:
        found = HASHER.extend(key, len(whole), piece, [0, len(piece)])
        assert found is not None
        assert int(found[0]) == key
        whole, key = whole + piece, int(found[1])
    assert key == int(HASHER.hashes(whole)[-1])


def test_token_ids_are_hashed_like_bytes_of_the_same_values() -> None:
    assert HASHER.hashes_of_ids([1, 2, 255]).tolist() == HASHER.hashes(bytes([1, 2, 255])).tolist()
    key = int(HASHER.hashes_of_ids([70000])[-1])
    continued = HASHER.extend(key, 1, np.array([151_643, 3]), [1, 2])
    assert continued is not None
    assert continued.tolist() == HASHER.hashes_of_ids([70000, 151_643, 3])[2:].tolist()


@given(st.binary(min_size=1, max_size=60), st.data())
@settings(max_examples=50)
def test_one_changed_byte_changes_every_prefix_that_holds_it(data: bytes, draw: st.DataObject) -> None:
    place = draw.draw(st.integers(0, len(data) - 1))
    other = draw.draw(st.integers(0, 255).filter(lambda value: value != data[place]))
    changed = HASHER.hashes(data[:place] + bytes([other]) + data[place + 1 :])
    same = changed == HASHER.hashes(data)
    assert same[: place + 1].all()
    assert not same[place + 1 :].any()


def test_swapped_bytes_and_zero_bytes_are_told_apart() -> None:
    assert HASHER.hashes(b"ab")[-1] != HASHER.hashes(b"ba")[-1]
    places = {HASHER.hashes(b"\0" * place + b"a" + b"\0" * (49 - place)).item(50) for place in range(50)}
    assert len({*places, HASHER.hashes(b"\0" * 50).item(50)}) == 51


def test_another_secret_gives_other_hashes() -> None:
    assert PrefixHasher(b"other").hashes(b"same").tolist() != HASHER.hashes(b"same").tolist()
    assert PrefixHasher(b"secret").hashes(b"same").tolist() == HASHER.hashes(b"same").tolist()


def test_keys_do_not_depend_on_how_they_grew() -> None:
    data = bytes(range(256)) * 1200
    stepwise = PrefixHasher(b"secret")
    for size in (10, 70_000, 200_000):
        stepwise.hashes(data[:size])
    assert (stepwise.hashes(data) == PrefixHasher(b"secret").hashes(data)).all()


def test_a_prompt_beyond_the_limit_is_not_hashed() -> None:
    short = PrefixHasher(b"secret", max_units=10)
    assert len(short.hashes(b"0123456789")) == 11
    with pytest.raises(ValueError, match="longer than 10"):
        short.hashes(b"0123456789a")
    assert short.extend(1, 8, b"abc", [3]) is None
    assert short.extend(1, 8, b"ab", [2]) is not None


def test_ids_are_spelled_with_the_end_of_every_token() -> None:
    spelling = WORDS.spell([0, 1, 2, 4])
    assert spelling is not None
    assert spelling.data == "abc€".encode()
    assert spelling.ends.tolist() == [1, 3, 3, 6]


def test_ends_of_blocks_leave_out_the_partial_one() -> None:
    spelling = WORDS.spell([0, 1, 5, 6, 1], every=2)
    assert spelling is not None
    assert spelling.data == "abc€bc".encode()
    assert spelling.ends.tolist() == [3, 6]


@pytest.mark.parametrize("ids", [[0, 3], [0, 7], [-1, 0]])
def test_an_id_that_is_not_known_spells_nothing_and_is_counted(ids: list[int]) -> None:
    vocabulary = Vocabulary([b"a", b"bc", b"", None, b"d"])
    assert vocabulary.spell(ids) is None
    assert vocabulary.unspelled == 1


def test_what_is_learned_is_spelled() -> None:
    vocabulary = Vocabulary()
    assert vocabulary.spell([]) is not None
    assert vocabulary.missing([5, 2, 5]) == [5, 2]
    vocabulary.learn(5, b"five")
    vocabulary.learn(2, b"")
    assert vocabulary.missing([5, 2, 9]) == [9]
    assert vocabulary.known == 2
    spelling = vocabulary.spell([5, 2, 5])
    assert spelling is not None
    assert spelling.data == b"fivefive"
    with pytest.raises(ValueError, match="negative"):
        vocabulary.learn(-1, b"")


def test_a_spelling_does_not_show_its_text() -> None:
    assert "bc" not in repr(WORDS.spell([1]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=5), st.integers(1, 4), st.integers(1, 3))
def test_blocks_are_spelled_as_their_ids_are(ids: list[int], size: int, blocks: int) -> None:
    ids = (ids * 12 or [0] * 12)[: size * blocks]
    if len(ids) < size * blocks:
        return
    vocabulary, other = (Vocabulary([b"a", b"bc", b"", None, "€".encode(), b"d"]) for _ in range(2))
    found, wanted = vocabulary.spell_blocks(ids, size), other.spell(ids, size)
    assert (None if found is None else found[0]) == (None if wanted is None else wanted.data)
    assert (None if found is None else found[1]) == (None if wanted is None else wanted.ends.tolist())
    assert vocabulary.unspelled == other.unspelled


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_chain_is_extended_by_one_as_by_many(before: bytes, data: bytes) -> None:
    start = HASHER.hashes(before).item(len(before))
    many = HASHER.extend(start, len(before), data, [len(data)])
    assert many is not None
    assert HASHER.extend_by_one(start, len(before), data) == many.item(0)


def test_nothing_is_extended_beyond_the_limit() -> None:
    short = PrefixHasher(b"secret", max_units=10)
    assert short.extend_by_one(1, 8, b"abc") is None
    assert short.extend_by_one(1, 0, b"") == 1
    assert short.extend_by_one(1, 8, b"ab") is not None
