"""Prefixes of a prompt as numbers, and tokens as the bytes they stand for: what lets blocks be matched as text.

A keyed hash of every prefix of a text (or of a list of token ids) at once, and a table from token id to bytes. Both
sides of exact matching use the same two: blocks as an engine announces them, and prompts as they arrive. Nothing here
knows where a vocabulary comes from or what a chat template is.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from picker.types import Int64Array, UInt64Array

MAX_UNITS = 8 << 20  # the longest prompt that is hashed, in bytes or tokens: its keys take 64 MiB
_CHUNK = 1 << 16  # keys made at a time: half a megabyte
_UNKNOWN = -1
_FEW = 64  # ids
_ALL = (1 << 64) - 1
_BYTE = np.dtype(np.uint8)


class PrefixHasher:
    """Hashes of all prefixes of a run of units under one secret; a unit is a byte or a token id.

    Position i has a secret 64-bit key k_i, and H(n) = H(0) + sum over i < n of unit_i * k_i mod 2^64: a multilinear
    hash (Lemire & Kaser, "Strongly universal string hashing is fast", 2014), which needs one multiplication and one
    running sum. Two different texts of one length share it with probability at most 2^-56 over the secret, whatever a
    client chooses (token ids: 2^-64 times the largest power of two that divides a difference of ids). Texts of
    different lengths may share one (units of zero add nothing), so a hash means something only with its position.
    """

    def __init__(self, secret: bytes, max_units: int = MAX_UNITS) -> None:
        self.max_units = max_units
        self._secret = hashlib.blake2b(secret, digest_size=32, person=b"spelling").digest()
        self._keys: UInt64Array = np.empty(0, dtype=np.uint64)
        self.start = int.from_bytes(hashlib.blake2b(b"start", digest_size=8, key=self._secret).digest(), "little")

    def hashes(self, data: bytes) -> UInt64Array:
        """(n + 1,) hashes of the first 0..n bytes. Raises ValueError beyond `max_units`."""
        return self._running(np.frombuffer(data, dtype=np.uint8))

    def hashes_of_ids(self, ids: Sequence[int] | Int64Array) -> UInt64Array:
        """(n + 1,) hashes of the first 0..n token ids. Raises ValueError beyond `max_units`."""
        return self._running(np.asarray(ids, dtype=np.int64).astype(np.uint64))

    def extend(
        self, start: int, position: int, data: bytes | Int64Array, ends: Int64Array | Sequence[int]
    ) -> UInt64Array | None:
        """Continue a chain: hashes at `ends` of units that begin at an absolute position.

        start: hash of the first `position` units (`self.start` at 0). data: the units that follow, bytes or token ids.
        ends: (b,) counted from the beginning of `data`, 0..len(data). None where the chain would pass `max_units`.
        """
        units = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data.astype(np.uint64)
        after = position + len(units)
        if after > self.max_units:
            return None
        keys = self._keys_to(after)[position:after]
        return self._summed(units, keys, start)[np.asarray(ends, dtype=np.int64)]

    def extend_by_one(self, start: int, position: int, data: bytes) -> int | None:
        """As `extend`, the hash at the end of all of `data` alone: several times as fast, for generated blocks."""
        after = position + len(data)
        if after > self.max_units:
            return None
        added: int = np.vdot(np.frombuffer(data, _BYTE), self._keys_to(after)[position:after]).item()
        return start + added & _ALL

    def _running(self, units: NDArray[np.uint8] | UInt64Array) -> UInt64Array:
        if len(units) > self.max_units:
            raise ValueError(f"a prompt of {len(units)} units is longer than {self.max_units}")
        return self._summed(units, self._keys_to(len(units)), self.start)

    def _summed(self, units: NDArray[np.uint8] | UInt64Array, keys: UInt64Array, start: int) -> UInt64Array:
        running = np.empty(len(units) + 1, dtype=np.uint64)
        running[0] = start
        products = running[1:]
        products[:] = units  # first, because numpy multiplies two types more slowly
        products *= keys[: len(units)]
        return np.cumsum(running, out=running)

    def _keys_to(self, count: int) -> UInt64Array:
        """At least `count` keys. Two threads that grow them at once make the same ones, and either may stay."""
        keys = self._keys
        if count > keys.size:
            first = keys.size // _CHUNK
            chunks = range(first, max(-(-count // _CHUNK), min(2 * first, -(-self.max_units // _CHUNK))))
            keys = np.concatenate([keys, *(self._chunk(index) for index in chunks)])
            self._keys = keys
        return keys

    def _chunk(self, index: int) -> UInt64Array:
        stream = hashlib.shake_256(self._secret + b"units" + index.to_bytes(8, "little")).digest(8 * _CHUNK)
        return np.frombuffer(stream, dtype="<u8").astype(np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class Spelling:
    """The bytes that token ids stand for, and where the tokens end in them.

    ends: positions in `data`, counted from its beginning, of every `every`-th token (see `Vocabulary.spell`).
    """

    data: bytes = field(repr=False)
    ends: Int64Array


class Vocabulary:
    """What each token id spells; None where that is not known.

    A token need not be whole characters: byte-level vocabularies cut them anywhere. One writer may `learn` while others
    spell. unspelled: how many runs of ids could not be spelled.
    """

    def __init__(self, table: Sequence[bytes | None] = ()) -> None:
        self._table: list[bytes | None] = list(table)
        self._lengths = _lengths(self._table)
        self.unspelled = 0

    def __len__(self) -> int:
        return len(self._table)

    @property
    def known(self) -> int:
        """Ids whose spelling is known."""
        return int(np.count_nonzero(self._lengths != _UNKNOWN))

    def spells(self, token: int) -> bytes | None:
        """What one id stands for, if that is known."""
        return self._table[token] if 0 <= token < len(self._table) else None

    def missing(self, ids: Sequence[int]) -> list[int]:
        """The ids among these that are not known, each once, in order."""
        return [token for token in dict.fromkeys(ids) if self.spells(token) is None]

    def spell(self, ids: Sequence[int], every: int = 1) -> Spelling | None:
        """Join what ids stand for; `ends` are those of each full run of `every` tokens. None: an id is not known."""
        if len(ids) <= _FEW:
            return self._spell_few(ids, every)
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= len(self._lengths)):
            self.unspelled += 1
            return None
        lengths = self._lengths[tokens]
        if tokens.size and lengths.min() == _UNKNOWN:
            self.unspelled += 1
            return None
        table = self._table
        data = b"".join([table[token] for token in tokens.tolist()])
        return Spelling(data, np.cumsum(lengths)[every - 1 :: every])

    def _spell_few(self, ids: Sequence[int], every: int) -> Spelling | None:
        """The same in plain Python, which is faster on lists this short (2 us for a block of 16, numpy 8)."""
        table, known = self._table, len(self._table)
        pieces = [table[token] if 0 <= token < known else None for token in ids]
        if None in pieces:
            self.unspelled += 1
            return None
        ends = list(itertools.accumulate(map(len, pieces)))  # type: ignore[arg-type]  # none is None: see above
        return Spelling(b"".join(pieces), np.array(ends[every - 1 :: every], dtype=np.int64))  # type: ignore[arg-type]

    def spell_blocks(self, ids: Sequence[int], size: int) -> tuple[bytes, list[int]] | None:
        """Join what ids stand for, and where each run of `size` of them ends in that; None: an id is not known.

        As `spell`, five times as fast. ids: not negative, full runs of them and at least one.
        """
        try:
            pieces = itemgetter(*ids)(self._table)
            if len(ids) == size:
                data = b"".join(pieces) if size > 1 else pieces[:]
                return data, [len(data)]
            runs = [b"".join(pieces[at : at + size]) for at in range(0, len(ids), size)]
            return b"".join(runs), list(itertools.accumulate(map(len, runs)))
        except (IndexError, TypeError):  # beyond the table, or None in it
            self.unspelled += 1
            return None

    def learn(self, token: int, data: bytes) -> None:
        """Note what an id stands for. Raises ValueError for a negative id."""
        if token < 0:
            raise ValueError("a token id is not negative")
        if token >= len(self._table):
            grown = max(token + 1, 2 * len(self._table))
            self._table += [None] * (grown - len(self._table))
            self._lengths = _lengths(self._table)
        self._table[token] = data
        self._lengths[token] = len(data)


def _lengths(table: Sequence[bytes | None]) -> Int64Array:
    return np.array([_UNKNOWN if data is None else len(data) for data in table], dtype=np.int64)
