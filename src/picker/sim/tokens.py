"""The simulator's tokenizer, chat template and "model": text <-> token ids, block hashes, made-up answers.

A token is four bytes of UTF-8 and its id is those bytes as a number, so no vocabulary is needed, the text of a prefix
always gives a prefix of the ids, and ids turn back into text. Nothing here resembles a real tokenizer but its rate of
about four bytes a token. Pure; deterministic across processes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from picker.types import UInt64Array

TokenArray = NDArray[np.uint32]

BYTES_PER_TOKEN = 4
VOCABULARY = 1 << 32
_BOOK_TOKENS = 1 << 16

# 0xff never occurs in UTF-8, so no text is mistaken for these.
_IM_START = b"\x01\xff\xff\xff"
_IM_END = b"\x02\xff\xff\xff"
_SPECIAL_NAMES = {_IM_START: b"<|im_start|>", _IM_END: b"<|im_end|>"}


class Message(NamedTuple):
    """One chat message, reduced to what reaches the prompt."""

    role: str
    content: str


def encode(text: str) -> TokenArray:
    """Token ids of a text, (n,); the last token is the 1-4 bytes that are left."""
    return _ids(_padded(text))


def encode_chat(messages: Iterable[Message], *, preamble: str = "", open_answer: bool = True) -> TokenArray:
    """Token ids of a conversation in ChatML.

    preamble: what a template puts before the messages, such as tools. open_answer: end with the head of an answer.

    Every part begins a token of its own, as text beside special tokens does in real tokenizers. So an answer sent back
    in the next turn gives the ids with which it was generated, and hits the cache.
    """
    parts = [_IM_START, _padded("system\n"), _padded(preamble), _IM_END, _padded("\n")] if preamble else []
    for role, content in messages:
        parts += (_IM_START, _padded(role + "\n"), _padded(content), _IM_END, _padded("\n"))
    if open_answer:
        parts += (_IM_START, _padded("assistant\n"))
    return _ids(b"".join(parts))


def decode(ids: TokenArray) -> str:
    """The text of token ids; bytes that are no UTF-8 (ids from another tokenizer) become replacement characters."""
    pieces = ids.astype("<u4").tobytes()
    if b"\xff\xff\xff" in pieces:
        tokens = [pieces[at : at + 4] for at in range(0, len(pieces), 4)]
        pieces = b"".join(_SPECIAL_NAMES.get(token, token) for token in tokens)
    return pieces.replace(b"\0", b"").decode("utf-8", "replace")


@functools.lru_cache(maxsize=256)
def namespace(*parts: str | None) -> int:
    """A seed for `block_hashes`: prompts under different models, adapters or salts share no blocks."""
    return _fold(msgspec.json.encode(parts))


def block_hashes(ids: TokenArray, block_size: int, seed: int) -> UInt64Array:
    """Chained hashes of the full blocks of a prompt, (n // block_size,).

    Hash i depends on all tokens up to the end of block i, and on `seed`. All blocks at once in numpy: a weighted sum of
    each block's tokens, mixed; then a running weighted sum over blocks, mixed. It is no defence against a client that
    looks for collisions.
    """
    count = len(ids) // block_size
    if not count:
        return np.empty(0, dtype=np.uint64)
    blocks = ids[: count * block_size].reshape(count, block_size).astype(np.uint64)
    digests = _splitmix(blocks @ _weights(seed, block_size))
    return _splitmix(np.cumsum(digests * _weights(~seed, count), dtype=np.uint64))


def fingerprint(ids: TokenArray) -> int:
    """A 64-bit number that stands for a whole prompt."""
    return _fold(ids.tobytes())


def answer(seed: int, count: int) -> bytes:
    """The text of a made-up answer of exactly `count` tokens, four ASCII bytes each: " bal dek ...".

    A stretch of one endless text, that begins where the seed says: an answer is looked up, not composed.
    """
    book = _book()
    start = seed % _BOOK_TOKENS * BYTES_PER_TOKEN
    text = book[start : start + count * BYTES_PER_TOKEN]
    while len(text) < count * BYTES_PER_TOKEN:
        text += book[: count * BYTES_PER_TOKEN - len(text)]
    return text


def answer_length(seed: int) -> int:
    """Tokens of an answer that ends by itself: log-normal around 200, 16 to 2,048, fixed by the seed.

    An assumption; chat traces show medians of 130 to 350 and tails of a few thousand.
    """
    uniform = (numbers(seed, 2) >> np.uint64(11)).astype(np.float64) / (1 << 53)
    normal = np.sqrt(-2.0 * np.log(1.0 - uniform[0])) * np.cos(2.0 * np.pi * uniform[1])
    return int(np.clip(200.0 * np.exp(0.7 * normal), 16, 2048))


@functools.cache
def _book() -> bytes:
    drawn = numbers(0, _BOOK_TOKENS)
    text = np.empty((_BOOK_TOKENS, BYTES_PER_TOKEN), dtype=np.uint8)
    text[:, 0] = ord(" ")
    text[:, 1] = _CONSONANTS[drawn >> np.uint64(60)]
    text[:, 2] = _VOWELS[(drawn >> np.uint64(58)) & np.uint64(3)]
    text[:, 3] = _CONSONANTS[(drawn >> np.uint64(54)) & np.uint64(15)]
    return text.tobytes()


def _padded(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return data + b"\0" * (-len(data) % BYTES_PER_TOKEN)


def _ids(data: bytes) -> TokenArray:
    return np.frombuffer(data, dtype="<u4")


def _splitmix(z: UInt64Array) -> UInt64Array:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def numbers(seed: int, count: int) -> UInt64Array:
    """The first `count` SplitMix64 numbers of a seed; number i does not depend on `count`."""
    start = np.uint64(seed & 0xFFFF_FFFF_FFFF_FFFF)
    return _splitmix(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _weights(seed: int, count: int) -> UInt64Array:
    """Odd factors, so that no bit of what they multiply is lost."""
    return _weight_table(seed, (count - 1).bit_length())[:count]


@functools.lru_cache(maxsize=64)
def _weight_table(seed: int, bits: int) -> UInt64Array:
    return numbers(seed, 1 << bits) | np.uint64(1)


def _fold(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


_CONSONANTS = np.frombuffer(b"bcdfghjklmnprstv", dtype=np.uint8)
_VOWELS = np.frombuffer(b"aeio", dtype=np.uint8)
