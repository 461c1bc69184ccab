from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from picker.load.text import Piece, key, render

keys = st.integers(min_value=0, max_value=2**64 - 1)


@given(keys, st.integers(min_value=0, max_value=3000))
@settings(max_examples=50)
def test_text_is_four_ascii_bytes_for_each_token(name: int, tokens: int) -> None:
    assert len(render([Piece(name, tokens)]).encode()) == 4 * tokens


@given(keys, st.integers(min_value=0, max_value=600), st.integers(min_value=0, max_value=600))
@settings(max_examples=50)
def test_equal_keys_give_equal_beginnings_whatever_the_length(name: int, short: int, more: int) -> None:
    assert render([Piece(name, short + more)]).startswith(render([Piece(name, short)]))


def test_different_keys_differ_within_the_first_block_of_sixteen_tokens() -> None:
    beginnings = {render([Piece(key(0, "block", number), 16)]) for number in range(2000)}
    assert len(beginnings) == 2000


def test_text_is_the_same_in_every_process() -> None:
    # Written down, because a trace replayed twice must meet the same cache.
    assert key(0, "block", 7) == 6201657784952653245
    assert render([Piece(key(0, "block", 7), 6)]) == "tus budubul tem letedam "


def test_pieces_follow_each_other_without_a_gap() -> None:
    first, second = Piece(1, 10), Piece(2, 20)
    assert render([first, second]) == render([first]) + render([second])


def test_text_needs_no_escaping_in_json() -> None:
    assert set(render([Piece(5, 4000)])) <= set("abcdefghijklmnopqrstuvwxyz ")
