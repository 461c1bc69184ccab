"""The prefix index in words, and what was learned, for a replica that has just come; and back. Pure.

The index is a tree, piece by piece: what many prompts share is said once. Longest untouched first, so that whoever
follows it learns in the order in which endpoints forget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from picker.prefix.approximate import ApproximateIndex
from picker.replicas.words import Held, Node, Taught, blocks
from picker.types import EndpointLessons, FloatArray, Lessons, PrefixHeld

MOST_BLOCKS = 8 * 1024 * 1024  # 64 MiB of hashes
_MOST_BYTES = 256 * 1024 * 1024  # of pieces that are kept until all is there
_WIDTHS = {"prefill": 5, "decode": 4}  # numbers of a sample
_SIZES, _SAMPLES = 64, 1024  # of samples, in powers of two of seconds; and how many of each


def offer(
    index: ApproximateIndex, name_of: Callable[[int], str | None], most: int = MOST_BLOCKS
) -> Iterator[Node | Held]:
    """What is cached where. name_of: the endpoint of a row."""
    told: dict[int, int] = {}  # by number: bytes that were told of the piece, which may have grown since
    for row, prompt in index.holdings(most):
        name, parent = name_of(row), 0
        if name is None:
            continue
        for number, hashes in prompt:
            if told.get(number) != len(hashes):
                told[number] = len(hashes)
                yield Node(number, parent, hashes)
            parent = number
        yield Held(name, parent)


class Receiver:
    """Puts prompts together again. Raises ValueError for what does not fit together, or is too much."""

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[int, bytes]] = {}
        self._bytes = 0

    def take(self, word: Node | Held) -> PrefixHeld | None:
        """What follows from a word, if it is not only the ground for others."""
        if isinstance(word, Held):
            return PrefixHeld(word.name, blocks(self._prompt(word.number)))
        if word.parent != 0 and word.parent not in self._pieces:
            raise ValueError("a piece goes on from one that nobody has told")
        _, before = self._pieces.get(word.number, (0, b""))
        self._bytes += len(word.hashes) - len(before)
        if self._bytes > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes of hashes")
        self._pieces[word.number] = word.parent, word.hashes
        return None

    def _prompt(self, number: int) -> bytes:
        parts: list[bytes] = []
        while number:
            if number not in self._pieces or len(parts) > len(self._pieces):
                raise ValueError("a prompt leads nowhere")
            number, hashes = self._pieces[number]
            parts.append(hashes)
        return b"".join(reversed(parts))


# --- what was learned --------------------------------------------------------------------------------------


def taught(lessons: Lessons) -> Taught:
    """Lessons in a word."""
    return Taught(
        prefill=_packed(lessons.prefill),
        decode=_packed(lessons.decode),
        ratios=dict(lessons.ratios),
        rates=dict(lessons.rates),
        endpoints=[
            (each.name, *each.prefill, *each.decode, each.trust, each.announced, each.effective, each.recent)
            for each in lessons.endpoints
        ],
    )


def lessons_of(word: Taught) -> Lessons:
    """The fact. Raises ValueError for numbers that nobody can have learned."""
    for pairs in (word.ratios, word.rates):
        _check(number for pair in pairs.values() for number in pair)
    for _, *numbers in word.endpoints:
        _check(0.0 if number == math.inf else number for number in numbers)
    return Lessons(
        prefill=_unpacked(word.prefill, _WIDTHS["prefill"]),
        decode=_unpacked(word.decode, _WIDTHS["decode"]),
        ratios=word.ratios,
        rates=word.rates,
        endpoints=tuple(
            EndpointLessons(name, (expected, took), (decoded, lasted), *more)
            for name, expected, took, decoded, lasted, *more in word.endpoints
        ),
    )


def _packed(samples: Mapping[int, FloatArray]) -> dict[int, bytes]:
    return {size: each.astype("<f8", copy=False).tobytes() for size, each in samples.items()}


def _unpacked(samples: Mapping[int, bytes], width: int) -> dict[int, FloatArray]:
    return {size: _samples(size, each, width) for size, each in samples.items()}


def _samples(size: int, packed: bytes, width: int) -> FloatArray:
    found = np.frombuffer(packed, dtype="<f8").astype(np.float64, copy=False)
    if abs(size) > _SIZES or found.size % width or found.size > _SAMPLES * width:
        raise ValueError("samples of no size")
    if not (np.isfinite(found) & (found >= 0.0)).all():
        raise ValueError("samples that nobody can have taken")
    return found.reshape(-1, width)


def _check(numbers: Iterable[float]) -> None:
    if not all(math.isfinite(number) and number >= 0.0 for number in numbers):
        raise ValueError("a number that nobody can have learned")
