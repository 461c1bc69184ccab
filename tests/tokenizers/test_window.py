"""Where tokens end, told from a window: as full tokenisation has it; "no" where it cannot be told."""

from __future__ import annotations

import random

import pytest

from picker.tokenizers.samples import mixtures
from picker.tokenizers.tokenizer import TextTokenizer
from picker.tokenizers.window import KnownSplits, Seams, TextSplits
from tiny_tokenizers import KINDS, PROSE, spec

TOKENIZERS = {kind: TextTokenizer(spec(kind)) for kind in KINDS}
SEAMS = {kind: Seams(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
CHANCE = random.Random(11)
TEXTS = {
    "mixtures": "".join(mixtures(3, 300, seed=5)),
    "code": 'def f(a_b, *c):\n\treturn {"k": a_b[0] ** 2}  # 1234\n\n' * 40,
    "prose": PROSE * 4,
    "chat": "".join(f"<|im_start|>user\n{text}<|im_end|>\n<|user|>{text}</s>" for text in mixtures(15, 15, seed=6)),
    "white": "".join(CHANCE.choices([" ", "\n", "\t", "  ", "\r\n", "a", "."], k=1200)),
    "cjk": "".join(CHANCE.choices("的一是在不了有和人这中大为上个国我以要他，。", k=700)),
    "base64": "".join(CHANCE.choices("ABCDEFabcdefghijklmnop0123456789+/", k=900)),
    "emoji": "".join(CHANCE.choices(["😀", "👩‍👧", "🇩🇪", "€", " "], k=300)),
    "marks": "".join(CHANCE.choices("!@#$%^&*()_+-=[]{}|;:,.<>/?`~'\"", k=600)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_window_agrees_with_full_tokenisation(kind: str, name: str) -> None:
    tokenizer = TOKENIZERS[kind]
    text = tokenizer.canonical(TEXTS[name])
    spelling = tokenizer.vocabulary.spell(tokenizer.encode(text))
    if spelling is None:
        pytest.skip("the vocabulary lacks characters of this text")
    ends = {0, *spelling.ends.tolist()}
    splits = TextSplits(SEAMS[kind], spelling.data)
    positions = random.Random(1).sample(range(1, len(spelling.data)), 60)
    wrong = [position for position in positions if splits(position) != (position in ends)]
    assert [position for position in wrong if position not in ends] == []  # never a "yes" that is not so
    assert len(wrong) <= 1


def test_usual_text_is_answered_from_seams_alone() -> None:
    tokenizer = TOKENIZERS["qwen"]
    seams = Seams(tokenizer)
    data = tokenizer.canonical(TEXTS["prose"] + TEXTS["code"]).encode()
    for position in range(1, len(data), 7):
        TextSplits(seams, data)(position)
    assert seams.counts.unsure == 0
    assert seams.counts.agreed == 0
    assert seams.counts.seam > 100


def test_a_place_inside_the_text_of_an_added_token_is_no_end() -> None:
    data = b"some words<|im_start|>user\nmore words"
    splits = TextSplits(SEAMS["qwen"], data)
    token = range(data.index(b"<|im"), data.index(b"user"))
    assert [splits(place) for place in token] == [True] + [False] * (len(token) - 1)
    assert splits(data.index(b"user"))


def test_an_added_token_is_seen_although_the_window_cuts_it() -> None:
    splits = TextSplits(SEAMS["qwen"], b"<|im_start|>" * 400)
    assert [splits(place) for place in range(2400, 2425)] == [place % 12 == 0 for place in range(2400, 2425)]


@pytest.mark.parametrize("before", range(100, 120))
def test_half_an_added_token_at_the_edge_of_a_window_makes_no_seam(before: int) -> None:
    tokenizer = TOKENIZERS["qwen"]
    text = "words <|im_start|>" + "(" * (before + 6) + " end of it"
    spelling = tokenizer.vocabulary.spell(tokenizer.encode(text))
    assert spelling is not None
    splits, ends = TextSplits(SEAMS["qwen"], text.encode()), set(spelling.ends.tolist())
    assert [place for place in range(before, before + 24) if splits(place) and place not in ends] == []


def test_tokens_that_end_within_a_character_are_found() -> None:
    tokenizer = TOKENIZERS["gpt2"]
    text = "word ꙮꚙ𐎀 word " * 30
    spelling = tokenizer.vocabulary.spell(tokenizer.encode(text))
    assert spelling is not None
    splits = TextSplits(SEAMS["gpt2"], text.encode())
    assert [place for place in range(len(text.encode()) + 1) if splits(place)] == [0, *spelling.ends.tolist()]


def test_the_edges_of_a_text() -> None:
    data = b"some text"
    assert TextSplits(SEAMS["qwen"], data)(0)
    assert TextSplits(SEAMS["qwen"], data)(len(data))
    assert not TextSplits(SEAMS["qwen"], data, closed=False)(len(data))
    assert not TextSplits(SEAMS["qwen"], data)(len(data) + 1)
    assert not TextSplits(SEAMS["qwen"], data)(-1)


def test_what_cannot_be_told_is_no_and_counted() -> None:
    seams = Seams(TOKENIZERS["qwen"])
    splits = TextSplits(seams, b"x" + b" " * 30_000 + b"y")
    assert not splits(15_000)
    assert seams.counts.unsure == 1


def test_kinds_of_place_that_do_not_hold_for_a_tokenizer_are_not_used() -> None:
    class Shifty(TextTokenizer):
        """Cuts every third character off, wherever a text begins."""

        def encode(self, canonical: str) -> list[int]:
            groups = [canonical[n : n + 3] for n in range(0, len(canonical), 3)]
            return [token for group in groups for token in super(Shifty, self).encode(group)]

        def _try_out(self) -> None:
            return

    assert Seams(Shifty(spec("gpt2"))).kinds == []
    assert len(SEAMS["qwen"].kinds) >= 6
    assert len(SEAMS["llama2"].kinds) >= 1


def test_known_ends_are_ends() -> None:
    splits = KnownSplits([3, 5])
    assert [place for place in range(8) if splits(place)] == [0, 3, 5]
