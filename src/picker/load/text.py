"""Deterministic prompt text of an exact size: equal keys give equal bytes, different keys share no prefix.

Pure. A token is taken as four bytes of text, which is what the simulated pods count and about what the tokenizers of
current models make of English. The text is made of pronounceable pseudo-words, so that nothing in it is anybody's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of prompt text: `tokens` tokens of the endless text that `key` stands for (64 bits)."""

    key: int
    tokens: int


def key(*parts: object) -> int:
    """A 64-bit key named by its parts, the same in every process and on every machine."""
    name = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def render(pieces: Iterable[Piece]) -> str:
    """The text of the pieces, one after the other: exactly 4 ASCII bytes for each token."""
    return b"".join(_bytes(piece) for piece in pieces).decode("ascii")


def _bytes(piece: Piece) -> bytes:
    numbers = _splitmix(piece.key, piece.tokens)
    # The top bits of a splitmix number are its best.
    units: NDArray[np.bytes_] = _UNITS[numbers >> np.uint64(64 - _UNIT_BITS)]
    return units.tobytes()


def _splitmix(seed: int, count: int) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014), `count` numbers at once: position i does not depend on `count`."""
    z = np.arange(1, count + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed)
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
