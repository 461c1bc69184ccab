"""Three ways to say where a stored block ends in a prompt, and the hash of the prompt up to there.

An index is built in one of them: in bytes (exact without tokenising requests), in tokens (the reference), or in the
blocks themselves, where requests come with the engines' own hashes (virtual time).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from picker.prefix.spelling import PrefixHasher, Vocabulary
from picker.types import BlocksStored, Int64Array, Reading, Request, UInt64Array


class Place(NamedTuple):
    """A point of a prompt: so many units from its beginning, and the hash of all before."""

    position: int
    key: int


class Spelled(NamedTuple):
    """Blocks as an index takes them. ends: (b,) absolute positions in units. keys: (b,) prefix hashes there."""

    ends: Int64Array | Sequence[int]
    keys: UInt64Array | Sequence[int]


class Speller(Protocol):
    """origin: the place before any block."""

    @property
    def origin(self) -> Place: ...

    def spell(self, fact: BlocksStored, start: Place) -> Spelled | None:
        """Where blocks that go on from `start` end; None where the speller cannot say."""
        ...

    def read(self, request: Request) -> Reading | None:
        """A request's own reading, where it needs no text to make one."""
        ...


class ByBytes:
    """In bytes of the text that the engine tokenises. vocabulary_of: endpoint name -> what its token ids spell."""

    def __init__(self, hasher: PrefixHasher, vocabulary_of: Callable[[str], Vocabulary | None]) -> None:
        self.origin = Place(0, hasher.start)
        self._hasher = hasher
        self._vocabulary_of = vocabulary_of

    def spell(self, fact: BlocksStored, start: Place) -> Spelled | None:
        vocabulary = self._vocabulary_of(fact.name)
        if vocabulary is None or not _is_full(fact):
            return None
        spelling = vocabulary.spell_blocks(fact.tokens, fact.block_size)
        if spelling is None:
            return None
        data, ends = spelling
        position, key = start
        if len(ends) == 1:
            last = self._hasher.extend_by_one(key, position, data)
            return None if last is None else Spelled((position + len(data),), (last,))
        counted = np.array(ends)
        keys = self._hasher.extend(key, position, data, counted)
        return None if keys is None else Spelled(counted + position, keys)

    def read(self, request: Request) -> Reading | None:
        return None


class ByTokens:
    """In token ids: needs no vocabulary, but every prompt tokenised."""

    def __init__(self, hasher: PrefixHasher) -> None:
        self.origin = Place(0, hasher.start)
        self._hasher = hasher

    def spell(self, fact: BlocksStored, start: Place) -> Spelled | None:
        if not _is_full(fact):
            return None
        ends = np.arange(1, len(fact.hashes) + 1, dtype=np.int64) * fact.block_size
        keys = self._hasher.extend(start.key, start.position, np.array(fact.tokens, dtype=np.int64), ends)
        return None if keys is None else Spelled(ends + start.position, keys)

    def read(self, request: Request) -> Reading | None:
        return None


def _is_full(fact: BlocksStored) -> bool:
    """Whether the ids fill the blocks, as those of an engine that tells the truth do."""
    return 0 < len(fact.tokens) == len(fact.hashes) * fact.block_size


_NOTHING = np.zeros(1, dtype=np.uint64)


class ByHash:
    """In blocks, whose hashes are those that requests come with."""

    origin = Place(0, 0)

    def spell(self, fact: BlocksStored, start: Place) -> Spelled | None:
        ends = np.arange(1, len(fact.hashes) + 1, dtype=np.int64) + start.position
        return Spelled(ends, np.array(fact.hashes, dtype=np.uint64))

    def read(self, request: Request) -> Reading | None:
        # One unit more for what follows the last full block; where nothing does, that block is one too many.
        return Reading(np.concatenate([_NOTHING, request.block_hashes, _NOTHING]))
