"""What a tokenizer's files say: tokens join to the canonical text, and that text gives the tokens of the original."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from picker.errors import ConfigError
from picker.tokenizers.samples import mixtures
from picker.tokenizers.tokenizer import TextTokenizer, byte_alphabet
from tiny_tokenizers import CHATML, KINDS, spec
from tokenizers import Tokenizer, pre_tokenizers

TOKENIZERS = {kind: TextTokenizer(spec(kind)) for kind in KINDS}
ORIGINALS = {kind: Tokenizer.from_str(json.dumps(spec(kind))) for kind in KINDS}
PIECES = st.sampled_from(
    [
        *CHATML,
        "<|user|>",
        "<|assistant|>",
        "<mask>",
        " ",
        "\n",
        "e\u0301",
        "word",
        " Two",
        "中文",
        "\u2581",
        "7",
        "😀",
        ".",
    ]
)


@pytest.mark.parametrize("kind", KINDS)
@example("<|assistant|>\x1f")  # white space to Python, and to nobody else
@example("<|assistant|>\x85\u2003 x")
@given(st.lists(PIECES | st.text(max_size=5), max_size=8).map("".join))
@settings(max_examples=40, deadline=None)
def test_canonical_text_has_the_tokens_of_the_original_and_is_what_they_spell(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    canonical = tokenizer.canonical(text)
    ids = ORIGINALS[kind].encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(canonical) == ids
    spelling = tokenizer.vocabulary.spell(ids)
    if spelling is not None:  # no such id as that of an unknown character
        assert spelling.data == canonical.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_long_mixtures_are_spelled_back(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    for text in mixtures(5, 200, seed=3):
        canonical = tokenizer.canonical(text)
        assert tokenizer.encode(canonical) == ORIGINALS[kind].encode(text, add_special_tokens=False).ids


def test_every_byte_can_be_spelled_at_byte_level() -> None:
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_text_is_brought_into_the_normal_form_of_the_tokenizer() -> None:
    assert TOKENIZERS["qwen"].canonical("cafe\u0301") == "caf\u00e9"
    assert TOKENIZERS["llama3"].canonical("cafe\u0301") == "cafe\u0301"
    assert TOKENIZERS["qwen"].canonical("plain") == "plain"


def test_a_space_is_put_in_front_where_the_tokenizer_does() -> None:
    assert TOKENIZERS["llama2"].canonical("a<s>b") == " a<s> b"
    assert TOKENIZERS["metaspace"].canonical("a<s>b") == " a<s>b"
    assert TOKENIZERS["gemma"].canonical("a<s>b") == "a<s>b"


def test_white_space_that_an_added_token_eats_is_gone() -> None:
    assert TOKENIZERS["phi3"].canonical("<|assistant|> \n x <mask> y") == "<|assistant|> x<mask>  y"


def test_a_completion_opens_as_the_post_processor_or_the_configuration_says() -> None:
    assert TOKENIZERS["llama3"].opening == (0,)
    assert TOKENIZERS["qwen"].opening == ()
    config = {"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}
    assert TextTokenizer(spec("qwen"), config).opening == (1,)
    assert TextTokenizer(spec("llama3"), {"add_bos_token": False, "bos_token": "<|endoftext|>"}).opening == ()


def test_added_tokens_that_only_the_configuration_knows_are_tokens() -> None:
    config = {"added_tokens_decoder": {"1500": {"content": "<|extra|>", "normalized": False, "special": True}}}
    tokenizer = TextTokenizer(spec("qwen"), config)
    assert tokenizer.encode("a<|extra|>")[-1] == 1500
    assert tokenizer.vocabulary.spells(1500) == b"<|extra|>"


def gemma() -> dict[str, object]:
    """The small Gemma with runs of spaces and of line ends that are added tokens as well as words of the model."""
    described = changed("gemma", {"content": "\u2581\u2581", "id": 1300, "special": False}, *NEWLINES)
    model = described["model"]
    assert isinstance(model, dict)
    vocabulary, merges = {**model["vocab"], "\u2581\u2581": 1300}, [["\u2581", "\u2581"], *model["merges"]]
    return {**described, "model": {**model, "vocab": vocabulary, "merges": merges}}


NEWLINES = [{"content": text, "id": spec("gemma")["model"]["vocab"][text]} for text in ("\n\n", "\n\n\n")]


def changed(kind: str, *tokens: dict[str, object]) -> dict[str, object]:
    """The small tokenizer of this kind with some of its added tokens told otherwise, or more of them."""
    described = spec(kind)
    added = {token["content"]: token for token in described["added_tokens"]}
    for token in tokens:
        content = str(token["content"])
        added[content] = {**(added.get(content) or added["<s>"]), **token}
    return {**described, "added_tokens": list(added.values())}


@pytest.mark.parametrize(
    "described",
    [
        pytest.param(changed("llama2", {"content": "<s>", "normalized": True}), id="old Llama"),
        pytest.param(gemma(), id="Gemma"),
    ],
)
def test_odd_added_tokens_of_real_models_are_followed(described: dict[str, object]) -> None:
    tokenizer, original = TextTokenizer(described), Tokenizer.from_str(json.dumps(described))
    for text in ("<s>a <s> b<s>", "    x\n\n\n  y", " <s>\n\n</s> <s>"):
        ids = original.encode(text, add_special_tokens=False).ids
        canonical = tokenizer.canonical(text)
        spelling = tokenizer.vocabulary.spell(ids)
        assert spelling is not None
        assert (tokenizer.encode(canonical), spelling.data) == (ids, canonical.encode())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "decoder WordPiece"),
        ({"decoder": None}, "decoder none"),
        ({"normalizer": {"type": "Lowercase"}, "decoder": {"type": "ByteFallback"}}, "not|do not"),
    ],
)
def test_a_tokenizer_that_cannot_be_followed_is_refused_by_name(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        TextTokenizer({**spec("qwen"), **change})


def test_an_unknown_character_is_not_spelled() -> None:
    tokenizer = TOKENIZERS["unigram"]
    assert tokenizer.vocabulary.spell(tokenizer.encode(" \U000f0000")) is None
