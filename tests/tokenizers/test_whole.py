"""Full tokenisation that begins where a remembered conversation ends gives the tokens of beginning anew."""

from __future__ import annotations

import random

from picker.tokenizers.samples import mixtures
from picker.tokenizers.tokenizer import TextTokenizer
from picker.tokenizers.whole import WholeTokens
from picker.tokenizers.window import Seams
from tiny_tokenizers import PROSE, spec

TOKENIZER = TextTokenizer(spec("qwen"))
SEAMS = Seams(TOKENIZER)


def test_a_growing_conversation_is_tokenised_as_a_whole_from_its_new_part() -> None:
    whole = WholeTokens(TOKENIZER, SEAMS)
    text = PROSE
    for turn in mixtures(12, 60, seed=4):
        text = TOKENIZER.canonical(text + f"<|im_end|>\n<|im_start|>user\n{turn}")
        assert whole.ids(text.encode()) == TOKENIZER.encode(text)
    assert whole.reused > 6 * len(PROSE)


def test_prompts_that_part_anywhere_are_tokenised_as_if_alone() -> None:
    chance = random.Random(3)
    whole = WholeTokens(TOKENIZER, SEAMS)
    base = TOKENIZER.canonical(PROSE * 3)
    whole.ids(base.encode())
    for tail in mixtures(40, 5, seed=12):
        text = TOKENIZER.canonical(base[: chance.randrange(len(base))] + tail)
        assert whole.ids(text.encode()) == TOKENIZER.encode(text)
    assert whole.reused > 0


def test_only_the_last_conversations_are_remembered() -> None:
    whole = WholeTokens(TOKENIZER, SEAMS, remembered=2)
    for number in range(5):
        whole.ids(f"{number} {PROSE}".encode())
    whole.ids(f"0 {PROSE} and more".encode())
    assert whole.reused == 0
    whole.ids(f"4 {PROSE} and more".encode())
    assert whole.reused > 0


def test_an_empty_text_has_no_tokens() -> None:
    assert WholeTokens(TOKENIZER, SEAMS).ids(b"") == []
