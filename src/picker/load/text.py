"""Deterministic prompt text of an exact size: equal keys give equal bytes, different keys share no prefix.

Pure. Without a tokenizer a token is taken as four bytes of text, which is what the simulated pods count; how many of
them make a token of another model is measured (`load.wording`). The text is made of pronounceable pseudo-words, so that
nothing in it is anybody's. With a tokenizer it is made of words that are one token each.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of prompt text: `tokens` tokens of the endless text that `key` stands for (64 bits)."""

    key: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Words:
    """A stretch of prompt text that is somebody's own; its tokens are estimated."""

    text: str

    @property
    def tokens(self) -> int:
        return -(-len(self.text.encode()) // BYTES_PER_TOKEN)


class Wording(Protocol):
    """Turns pieces into text: equal pieces into equal text, which does not depend on what stands before."""

    def render(self, pieces: Iterable[Piece | Words]) -> str: ...


@dataclass(frozen=True, slots=True)
class PseudoWords:
    """units: stretches of four bytes that make a token of the model under load."""

    units: float = 1.0

    def render(self, pieces: Iterable[Piece | Words]) -> str:
        return "".join(part if isinstance(part, str) else self._text(*part) for part in _alike(pieces))

    def _text(self, keys: list[int], tokens: int) -> str:
        units = max(1, round(tokens * self.units)) if tokens else 0
        # The top bits of a splitmix number are its best.
        picks: NDArray[np.bytes_] = _UNITS[_splitmix(keys, units) >> np.uint64(64 - _UNIT_BITS)]
        return picks.tobytes().decode("ascii")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """words: of the model's vocabulary, each one token wherever it stands."""

    words: tuple[str, ...]

    def render(self, pieces: Iterable[Piece | Words]) -> str:
        return "".join(part if isinstance(part, str) else self._text(*part) for part in _alike(pieces))

    def _text(self, keys: list[int], tokens: int) -> str:
        words, count = self.words, np.uint64(len(self.words))
        # The top half of a splitmix number, so that taking the remainder favours no word.
        picks = (_splitmix(keys, tokens) >> np.uint64(32)) % count
        return "".join([words[i] for i in picks.ravel().tolist()])


def _alike(pieces: Iterable[Piece | Words]) -> Iterator[str | tuple[list[int], int]]:
    """Own words, and the keys of neighbours of one length: a prompt of a thousand blocks is rendered at once."""
    for tokens, group in itertools.groupby(
        pieces, key=lambda piece: None if isinstance(piece, Words) else piece.tokens
    ):
        if tokens is None:
            yield "".join(piece.text for piece in group if isinstance(piece, Words))
        else:
            yield [piece.key for piece in group if isinstance(piece, Piece)], tokens


PLAIN = PseudoWords()


def key(*parts: object) -> int:
    """A 64-bit key named by its parts, the same in every process and on every machine."""
    name = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def render(pieces: Iterable[Piece | Words]) -> str:
    """The text of the pieces, one after the other: exactly 4 ASCII bytes for each token."""
    return PLAIN.render(pieces)


def _splitmix(seeds: list[int], count: int) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014), (seeds, count) numbers at once: number i does not depend on `count`."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = z + np.array(seeds, dtype=np.uint64)[:, np.newaxis]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


_UNIT_BITS = 12


def _units() -> NDArray[np.bytes_]:
    """4,096 units of four letters: three in four end a word, the others run on into the next."""
    syllables = [first + vowel + last for first in "bdfgklmnprstvz" for vowel in "aeiou" for last in "dklmnrst"]
    endings = [syllable + " " for syllable in syllables]
    stems = [syllable + vowel for syllable in syllables for vowel in "aeiou"]
    count = 1 << _UNIT_BITS
    words = [endings[i % len(endings)] if i % 4 else stems[i % len(stems)] for i in range(count)]
    return np.array(words, dtype=f"S{BYTES_PER_TOKEN}")


_UNITS = _units()
