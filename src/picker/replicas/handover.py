"""The prefix index in words, for a replica that has just come, and back. Pure.

A tree, piece by piece: what many prompts share is said once. Longest untouched first, so that whoever follows it learns
in the order in which endpoints forget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from picker.prefix.approximate import ApproximateIndex
from picker.replicas.words import Held, Node, blocks
from picker.types import PrefixHeld

MOST_BLOCKS = 8 * 1024 * 1024  # 64 MiB of hashes
_MOST_BYTES = 256 * 1024 * 1024  # of pieces that are kept until all is there


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
