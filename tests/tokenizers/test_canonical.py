"""Sampled tokens that are not what their text is cut into again are told from those that are."""

from __future__ import annotations

import pytest

from picker.tokenizers.canonical import Canonical
from picker.tokenizers.samples import mixtures
from picker.tokenizers.tokenizer import TextTokenizer
from picker.tokenizers.window import Seams
from tiny_tokenizers import KINDS, PROSE, spec

TOKENIZERS = {kind: TextTokenizer(spec(kind)) for kind in KINDS}
SEAMS = {kind: Seams(tokenizer) for kind, tokenizer in TOKENIZERS.items()}


def canonical(kind: str) -> Canonical:
    return Canonical(TOKENIZERS[kind], SEAMS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_tokenised_text_are_canonical(kind: str) -> None:
    judge = canonical(kind)
    for text in (PROSE, *mixtures(4, 150, seed=8)):
        ids = TOKENIZERS[kind].encode(TOKENIZERS[kind].canonical(text))
        for start in range(0, len(ids) - 32, 32):
            assert judge.check(ids[:start], ids[start : start + 32])
    assert judge.odd == 0


@pytest.mark.parametrize("kind", ["qwen", "llama3", "gpt2", "llama2"])
def test_a_block_with_a_token_taken_apart_is_not(kind: str) -> None:
    tokenizer, judge = TOKENIZERS[kind], canonical(kind)
    ids = tokenizer.encode(
        tokenizer.canonical("The scheduler places each request on the endpoint where it costs least.")
    )
    spelled = [tokenizer.vocabulary.spells(token) or b"" for token in ids]
    place = next(n for n in range(4, len(ids)) if len(spelled[n]) >= 3 and spelled[n].isascii())
    pieces = [tokenizer.encode(chr(byte))[0] for byte in spelled[place]]
    sampled = ids[:place] + pieces + ids[place + 1 :]
    assert not judge.check(sampled[:2], sampled[2:])
    assert judge.check(ids[:2], ids[2:])
    assert (judge.checked, judge.odd) == (2, 1)


def test_bytes_that_are_no_text_are_odd() -> None:
    ids = TOKENIZERS["gpt2"].encode("some words here and there")
    lead = next(token for token in range(300) if TOKENIZERS["gpt2"].vocabulary.spells(token) == b"\xe4")
    assert not canonical("gpt2").check(ids, [lead, *ids])


def test_a_character_cut_by_the_edges_of_a_block_is_not_held_against_it() -> None:
    tokenizer = TOKENIZERS["gpt2"]
    ids = tokenizer.encode("words ꙮꚙ𐎀 and 𐎀𐎀 words")
    for start in range(len(ids)):
        for end in range(start + 1, len(ids) + 1):
            assert canonical("gpt2").check(ids[:start], ids[start:end])


def test_what_cannot_be_told_is_not_odd() -> None:
    assert canonical("gpt2").check([], [10**6])
    assert canonical("gpt2").check([], [])
    assert canonical("gpt2").check([], TOKENIZERS["gpt2"].encode("x"))


def test_a_seam_within_the_block_is_judged_with_little_context() -> None:
    tokenizer, judge = TOKENIZERS["qwen"], canonical("qwen")
    ids = tokenizer.encode(PROSE)
    assert all(judge.check(ids[place - 3 : place], ids[place : place + 16]) for place in range(3, 120))
