from __future__ import annotations

import sys
from pathlib import Path

import pytest

from load.fake_openai import DONE, FakeAnswer, Json, chunk, fake_server, usage
from picker.errors import ConfigError
from picker.load.client import Client, Target, UnreachableError
from picker.load.text import PLAIN, Piece, PseudoWords, Vocabulary, Words, key
from picker.load.wording import calibrated, vocabulary

tokenizers = pytest.importorskip("tokenizers")


def test_a_piece_has_the_same_text_wherever_it_stands() -> None:
    for wording in (PseudoWords(1.37), Vocabulary((" one", " two", " three"))):
        alone = wording.render([Piece(5, 64)])
        around = wording.render([Piece(1, 64), Piece(5, 64), Piece(2, 64), Words("own words"), Piece(3, 7)])
        assert around[around.index(alone) :].startswith(alone)
        assert "own words" in around


def test_calibrated_text_is_as_many_units_longer() -> None:
    assert len(PseudoWords(1.5).render([Piece(1, 100)])) == 150 * 4
    assert PseudoWords(0.5).render([Piece(1, 100)]) == PLAIN.render([Piece(1, 50)])


async def calibrate(tokens_per_byte: float, template: int) -> PseudoWords:
    async def count(request: Json, answer: FakeAnswer) -> None:
        await answer.start()
        tokens = template + round(len(request["messages"][0]["content"]) * tokens_per_byte)
        await answer.send(chunk("x") + usage(tokens, 1) + DONE)

    async with fake_server(count) as server, Client(Target(server.url, model="m")) as client:
        return await calibrated(client)


async def test_the_length_of_a_token_is_measured_without_the_template() -> None:
    # Two bytes a token: half a unit of four bytes.
    assert (await calibrate(1 / 2, template=500)).units == pytest.approx(0.5)


async def test_four_bytes_a_token_stay_exactly_that() -> None:
    assert (await calibrate(1 / 4, template=9)).units == 1.0


async def test_a_server_that_counts_no_tokens_gets_plain_text() -> None:
    async def silent(_: Json, answer: FakeAnswer) -> None:
        await answer.start()
        await answer.send(chunk("x") + DONE)

    async with fake_server(silent) as server, Client(Target(server.url, model="m")) as client:
        assert await calibrated(client) == PLAIN


async def test_a_server_that_is_not_like_openai_is_told_before_the_run() -> None:
    async def web_page(_: Json, answer: FakeAnswer) -> None:
        await answer.start({"content-type": "text/html"})
        await answer.send(b"<html>")

    async with fake_server(web_page) as server, Client(Target(server.url, model="m")) as client:
        with pytest.raises(UnreachableError, match="refuses a first request: not-a-stream"):
            await calibrated(client)


async def test_a_server_that_is_busy_for_a_moment_is_loaded_all_the_same() -> None:
    async def busy(_: Json, answer: FakeAnswer) -> None:
        answer.refuse(503)

    async with fake_server(busy) as server, Client(Target(server.url, model="m")) as client:
        assert await calibrated(client) == PLAIN


# --- a tokenizer ---------------------------------------------------------------------------------------------


def made(folder: Path, words: list[str]) -> Path:
    """A byte-level BPE tokenizer that has learned these words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words)] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


WORDS = [first + middle + last for first in "bdfgklm" for middle in "aeiou" for last in ("n", "rt", "st")]


@pytest.mark.parametrize("tokens", [1, 7, 512, 6000])
def test_prompts_are_exactly_as_long_as_planned(tokens: int, tmp_path: Path) -> None:
    wording = vocabulary(made(tmp_path, WORDS))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces = [Piece(key("a"), tokens), Piece(key("b"), 3)]
    assert len(tokenizer.encode(wording.render(pieces)).ids) == tokens + 3


def test_a_tokenizer_without_words_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no words that are one token each"):
        vocabulary(made(tmp_path, ["ab", "cd"]))


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*tokenizer\.json"):
        vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        vocabulary(tmp_path)


def test_without_its_library_a_tokenizer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install tokenizers$"):
        vocabulary(tmp_path)
