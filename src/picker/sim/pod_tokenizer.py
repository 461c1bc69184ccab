"""A model's own tokenizer and chat template, for simulated pods that read and speak as that model's engine would.

Owns the files, ids, and made-up answers in ids. Needs the extra `exact`. Templates are rendered by `picker.tokenizers`,
which follows vLLM; what a tokenizer does is up to Hugging Face's library, as in the engine.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from picker.errors import ConfigError, WireError
from picker.sim.tokens import TokenArray, numbers
from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.folder import read_folder
from picker.tokenizers.libraries import library
from picker.tokenizers.template import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MOST_WORDS = 1024
_SPACES = "Ġ▁"  # how byte-level and SentencePiece vocabularies write a space
_WORD = re.compile(rf"[{_SPACES}][a-z]{{2,8}}")
_OPENER = re.compile(r"[A-Z][a-z]{0,8}")
_LETTERS = re.compile(r"[A-Za-z]+")


class Spoken(NamedTuple):
    """A made-up answer: its ids, and the text of each; ASCII."""

    ids: TokenArray
    pieces: tuple[str, ...]


class PodTokenizer:
    """Text to ids and back. template None: conversations are refused, as by a vLLM whose model has none.

    eos: id of the token that ends an answer, if there is one. Raises ConfigError where nothing can be said with it.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None, eos: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._eos = eos
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(vocabulary.values(), default=-1) + 1
        self._openers, self._words = _sayable(tokenizer, vocabulary)

    @classmethod
    def load(cls, folder: Path) -> PodTokenizer:
        """Read a model's folder; see `read_folder`. Raises ConfigError for a file or a library that is missing."""
        files = read_folder(folder)
        try:
            tokenizer = library("tokenizers").Tokenizer.from_buffer(json.dumps(files.tokenizer).encode())
        except ValueError as error:
            raise ConfigError(f"{folder / 'tokenizer.json'}: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special, template = files.special_tokens, None
        if files.no_chat is None:
            template = ChatTemplate(files.templates, special_tokens=special, seconds=time.monotonic, today=datetime.now)
        return cls(tokenizer, template, tokenizer.token_to_id(special.get("eos_token", "")))

    def encode(self, text: str, *, special: bool) -> TokenArray:
        """Ids of a text, (n,). special: with the tokens that the model begins or ends texts with."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=special).ids, dtype="<u4")

    def encode_chat(self, body: Mapping[str, Any], *, special: bool) -> TokenArray:
        """Ids of the conversation in this body of a chat request. Raises WireError."""
        if self._template is None:
            raise WireError("As of transformers v4.44, default chat template is no longer allowed")
        try:
            return self.encode(self._template.render(body).text, special=special)
        except Unreadable as error:
            raise WireError(str(error)) from None

    def decode(self, ids: TokenArray) -> str:
        """The text of ids, special tokens included."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def names(self, ids: TokenArray) -> list[str]:
        """Each id as the vocabulary spells it."""
        return [self._tokenizer.id_to_token(number) or "" for number in ids.tolist()]

    def answer(self, seed: int, count: int, *, ends: bool) -> Spoken:
        """A made-up answer of `count` tokens, fixed by the seed. ends: the last is the one that ends an answer.

        Words that tokenize back to themselves, so that an answer sent back in the next turn has the ids it was made of.
        """
        drawn = numbers(seed, count)
        ids, pieces = _drawn(self._words, drawn)
        if count:
            opener, first = _drawn(self._openers, drawn[:1])
            ids[0], pieces[0] = opener[0], first[0]
        if ends and self._eos is not None and count:
            ids[-1], pieces[-1] = self._eos, ""
        return Spoken(np.array(ids, dtype="<u4"), tuple(pieces))


class _Sayable(NamedTuple):
    ids: list[int]
    pieces: list[str]


def _drawn(words: _Sayable, drawn: np.ndarray[Any, Any]) -> tuple[list[int], list[str]]:
    chosen = (drawn % np.uint64(len(words.ids))).tolist()
    return [words.ids[n] for n in chosen], [words.pieces[n] for n in chosen]


def _sayable(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> tuple[_Sayable, _Sayable]:
    """What an answer may begin and go on with; in a vocabulary without words anything made of letters."""
    by_id = sorted((number, name) for name, number in vocabulary.items())
    openers = [(number, name) for number, name in by_id if _OPENER.fullmatch(name)]
    words = [(number, " " + name[1:]) for number, name in by_id if _WORD.fullmatch(name)]
    if openers and words:
        openers = _stable(tokenizer, "\n", openers)[:_MOST_WORDS] or openers[:1]
        words = _stable(tokenizer, "\n" + openers[0][1], words[: 4 * _MOST_WORDS])[:_MOST_WORDS]
    if not openers or not words:
        openers = words = [(number, name) for number, name in by_id if _LETTERS.fullmatch(name)][:_MOST_WORDS]
    if not words:
        raise ConfigError("the tokenizer has no token of ASCII letters, so that a pod could say nothing with it")
    return _columns(openers), _columns(words)


def _stable(tokenizer: Tokenizer, before: str, words: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Those that are one token of this id after `before` and in front of a space."""
    encoded = tokenizer.encode_batch([f"{before}{text} a" for _, text in words], add_special_tokens=False)
    shortest = len(tokenizer.encode(before, add_special_tokens=False).ids)
    return [word for word, found in zip(words, encoded, strict=True) if found.ids[shortest : shortest + 1] == [word[0]]]


def _columns(words: Sequence[tuple[int, str]]) -> _Sayable:
    return _Sayable([number for number, _ in words], [text for _, text in words])
