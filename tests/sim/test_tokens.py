import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.sim import tokens
from picker.sim.tokens import Message


@given(st.text(max_size=60))
def test_text_survives_the_round_trip(text: str) -> None:
    # Zero bytes pad the last token, so they alone do not survive.
    assert tokens.decode(tokens.encode(text)) == text.replace("\0", "")


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_a_prefix_of_the_text_gives_a_prefix_of_the_ids(head: bytes, tail: bytes) -> None:
    text = head.hex()
    longer = text + tail.hex()
    whole = len(text) // 4
    assert tokens.encode(longer)[:whole].tolist() == tokens.encode(text)[:whole].tolist()


def test_four_bytes_are_a_token() -> None:
    assert [len(tokens.encode(text)) for text in ("", "a", "abcd", "abcde", "äöü")] == [0, 1, 1, 2, 2]


def test_special_tokens_have_names_in_text() -> None:
    ids = tokens.encode_chat([Message("user", "hi")])
    assert tokens.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_next_turn_begins_with_the_ids_of_prompt_and_answer() -> None:
    asked = [Message("system", "Be brief."), Message("user", "What is it?")]
    prompt = tokens.encode_chat(asked)
    said = tokens.answer(tokens.fingerprint(prompt), 9)
    turn = tokens.encode_chat([*asked, Message("assistant", said.decode()), Message("user", "And then?")])
    known = [*prompt.tolist(), *np.frombuffer(said, dtype="<u4").tolist()]
    assert turn[: len(known)].tolist() == known


def test_tools_come_before_the_messages() -> None:
    bare = tokens.encode_chat([Message("user", "hi")])
    with_tools = tokens.encode_chat([Message("user", "hi")], preamble='[{"name":"f"}]')
    assert tokens.decode(with_tools).endswith(tokens.decode(bare))
    assert tokens.decode(with_tools).startswith("<|im_start|>system\n")


def ids(*values: int) -> tokens.TokenArray:
    return np.array(values, dtype="<u4")


def test_only_full_blocks_have_a_hash() -> None:
    assert [len(tokens.block_hashes(ids(*range(n)), 4, 0)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.integers(0, 11))
def test_a_hash_depends_on_every_token_before_its_end_and_on_none_after(values: list[int], changed: int) -> None:
    other = values.copy()
    other[changed] ^= 1
    pairs = zip(tokens.block_hashes(ids(*values), 4, 7), tokens.block_hashes(ids(*other), 4, 7), strict=True)
    assert [a == b for a, b in pairs] == [block < changed // 4 for block in range(3)]


def test_swapped_blocks_and_equal_blocks_hash_apart() -> None:
    a, b = [1, 2, 3, 4], [5, 6, 7, 8]
    hashes = {*tokens.block_hashes(ids(*a, *b), 4, 0).tolist(), *tokens.block_hashes(ids(*b, *a), 4, 0).tolist()}
    assert len(hashes) == 4
    assert len(set(tokens.block_hashes(ids(*a * 50), 4, 0).tolist())) == 50


def test_namespaces_share_no_hashes() -> None:
    seeds = {
        tokens.namespace("m", None, None),
        tokens.namespace("m", "lora", None),
        tokens.namespace("m", None, "salt"),
    }
    assert len(seeds) == 3
    hashes = {int(tokens.block_hashes(ids(1, 2, 3, 4), 4, seed)[0]) for seed in seeds}
    assert len(hashes) == 3


def test_an_answer_has_its_length_and_is_fixed_by_its_seed() -> None:
    assert len(tokens.answer(5, 100)) == 400
    assert tokens.answer(5, 100)[:40] == tokens.answer(5, 10)
    assert tokens.answer(5, 10) != tokens.answer(6, 10)
    assert len(tokens.answer((1 << 64) - 1, 200_000)) == 800_000


def test_answers_that_end_by_themselves_vary_around_200_tokens() -> None:
    lengths = [tokens.answer_length(seed) for seed in range(2000)]
    assert (min(lengths) >= 16, max(lengths) <= 2048) == (True, True)
    assert float(np.median(lengths)) == pytest.approx(200, rel=0.1)
    assert tokens.answer_length(3) == tokens.answer_length(3)
