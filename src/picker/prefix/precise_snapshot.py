"""An index as bytes, for a warm restart. Holds numbers and keyed hashes: no text, no token ids, no salts.

Whether the engines have gone on since it was made is for the caller to know (by the sequence numbers of their events).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np

from picker.prefix.block_placing import Row
from picker.prefix.block_tree import ROOT
from picker.prefix.precise import PreciseIndex
from picker.prefix.row_sets import EMPTY, TIERS

_MAGIC = b"picker-blocks\x00\x01"  # the last byte is the version
_DIGEST = 16


class _KeptRow(msgspec.Struct, array_like=True):
    """hashes, blocks: of its table, oldest first. copies: hash -> tier -> further copies."""

    name: str
    hashes: bytes
    blocks: bytes
    copies: dict[int, dict[int, int]]
    orphans: int
    truncated: bool


class _Kept(msgspec.Struct, array_like=True):
    """sets: number -> (index of a kept row, tier) of its members."""

    columns: list[bytes]
    roots: list[tuple[bytes, int, int]]
    sets: dict[int, list[tuple[int, int]]]
    rows: list[_KeptRow]


def save(index: PreciseIndex, names: Mapping[int, str], secret: bytes) -> bytes:
    """Everything that is known of the rows named here. secret: the one that keys were made with."""
    rows = sorted(names)
    sets = {number: list(_members(index, number, rows)) for number in index.sets.numbers()}
    kept = _Kept(
        columns=index.tree.dump(),
        roots=[(name, tokens, block) for name, found in index.tree.roots.items() for tokens, block in found.items()],
        sets=sets,
        rows=[_keep(index.rows[row], names[row]) for row in rows],
    )
    body = msgspec.msgpack.encode(kept)
    return _MAGIC + _digest(secret, b"secret", b"") + _digest(secret, b"body", body) + body


def load(index: PreciseIndex, data: bytes, rows: Mapping[str, int], secret: bytes) -> None:
    """Fill an index that knows nothing. rows: of endpoints by name; what was known of others is dropped.

    Raises ValueError where the data is no snapshot, damaged, of another version or made under another secret.
    """
    if index.blocks:
        raise ValueError("a snapshot is loaded into an index that knows nothing yet")
    kept = msgspec.msgpack.decode(_verified(data, secret), type=_Kept)
    places = [rows.get(row.name) for row in kept.rows]
    index.grow_rows(max([place + 1 for place in places if place is not None], default=0))
    index.tree.restore(kept.columns, kept.roots)
    _restore_sets(index, kept, places)
    for row, place in zip(kept.rows, places, strict=True):
        if place is not None:
            _restore_row(index.rows[place], row)
    index.tree.prune_many(np.flatnonzero((index.tree.held == EMPTY) & (index.tree.up != 0) & (index.tree.up != ROOT)))
    index.settle()


def _verified(data: bytes, secret: bytes) -> bytes:
    start = len(_MAGIC)
    if data[:start] != _MAGIC:
        raise ValueError("not a snapshot of blocks, or one of another version")
    theirs, check, body = data[start : start + _DIGEST], data[start + _DIGEST : start + 2 * _DIGEST], data[start:]
    if not hmac.compare_digest(theirs, _digest(secret, b"secret", b"")):
        raise ValueError("the snapshot was made under another secret")
    body = body[2 * _DIGEST :]
    if not hmac.compare_digest(check, _digest(secret, b"body", body)):
        raise ValueError("the snapshot is damaged")
    return body


def _digest(secret: bytes, purpose: bytes, data: bytes) -> bytes:
    key = hashlib.blake2b(secret, digest_size=32, person=b"blocks").digest()
    return hashlib.blake2b(data, digest_size=_DIGEST, key=key, person=purpose).digest()


def _members(index: PreciseIndex, number: int, rows: list[int]) -> Iterator[tuple[int, int]]:
    for tier, bits in enumerate(index.sets.by_tier(number)):
        for place, row in enumerate(rows):
            if bits >> row & 1:
                yield place, tier


def _keep(row: Row, name: str) -> _KeptRow:
    hashes, blocks = row.table.held()
    copies: dict[int, dict[int, int]] = {}
    for key, count in row.copies.items():
        copies.setdefault(key >> 2, {})[key & 3] = count
    return _KeptRow(
        name, hashes.astype("<u8").tobytes(), blocks.astype("<u4").tobytes(), copies, row.orphans, row.truncated
    )


def _restore_sets(index: PreciseIndex, kept: _Kept, places: list[int | None]) -> None:
    """Give every block its holders among the rows that are still there; several sets may have become one."""
    new = np.zeros(max(kept.sets, default=0) + 1, dtype=np.int64)
    for number, members in kept.sets.items():
        bits = sum(index.sets.bit(row, TIERS[tier]) for place, tier in members if (row := places[place]) is not None)
        new[number] = index.sets.move(EMPTY, bits, 1)
    held = new[index.tree.held]
    index.tree.held[:] = held
    index.sets.recount(held)


def _restore_row(mine: Row, row: _KeptRow) -> None:
    mine.table.restore(
        np.frombuffer(row.hashes, dtype="<u8").astype(np.uint64),
        np.frombuffer(row.blocks, dtype="<u4").astype(np.uint32),
    )
    mine.copies = {number << 2 | tier: count for number, tiers in row.copies.items() for tier, count in tiers.items()}
    mine.orphans, mine.truncated = row.orphans, row.truncated
