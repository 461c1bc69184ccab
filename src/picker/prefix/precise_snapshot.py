"""An index as bytes, for a warm restart. Holds numbers and keyed hashes: no text, no token ids, no salts.

Whether the engines have gone on since it was made is for the caller to know (by the sequence numbers of their events).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from picker.prefix.block_placing import Row
from picker.prefix.block_tree import ROOT
from picker.prefix.precise import PreciseIndex
from picker.prefix.row_sets import EMPTY, TIERS

_MAGIC = b"picker-blocks\x00\x02"  # the last byte is the version
_DIGEST = 16
_LENGTH = 8  # bytes of a piece's length
_COLUMNS = 6  # of a tree
_SETS = 4096  # sets in a piece: a millisecond's work

Piece = bytes | memoryview


class _KeptRow(msgspec.Struct, array_like=True):
    """copies: hash -> tier -> further copies."""

    name: str
    copies: dict[int, dict[int, int]]
    orphans: int
    truncated: bool


class _Head(msgspec.Struct, array_like=True):
    """What the other pieces are: columns of the tree, `sets` parts of the sets, two for each row, and last this one.

    members: bytes of a set in one tier, with a bit for each of the rows in their order here.
    """

    note: bytes
    roots: list[tuple[bytes, int, int]]
    sets: int
    rows: list[_KeptRow]
    numbers: list[int]
    width: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A snapshot that was found whole. note: the caller's own."""

    note: bytes
    pieces: Sequence[Piece]
    head: _Head


def copied(index: PreciseIndex, names: Mapping[int, str], note: bytes = b"") -> Iterator[bytes]:
    """Everything that is known of the rows named here, a few milliseconds' work at a time.

    The index must not change until the last piece is there. note: handed back by `unsealed`.
    """
    rows, sets = sorted(names), index.sets.numbers()
    yield from index.tree.dump()
    starts = range(0, len(sets), _SETS)
    for start in starts:
        part = sets[start : start + _SETS]
        yield msgspec.msgpack.encode({number: _as_bytes(index.sets.bits(number)) for number in part})
    for row in rows:
        hashes, blocks = index.rows[row].table.held()
        yield hashes.astype("<u8", copy=False).tobytes()
        yield blocks.astype("<u4", copy=False).tobytes()
    roots = [(name, tokens, block) for name, found in index.tree.roots.items() for tokens, block in found.items()]
    kept = [_keep(index.rows[row], names[row]) for row in rows]
    yield msgspec.msgpack.encode(_Head(note, roots, len(starts), kept, rows, index.sets.width))


def sealed(pieces: Sequence[bytes], secret: bytes) -> Iterator[bytes]:
    """What to write of `copied`, in order. secret: the one that keys were made with."""
    lengths = [len(piece).to_bytes(_LENGTH, "little") for piece in pieces]
    body = [part for pair in zip(lengths, pieces, strict=True) for part in pair]
    yield _MAGIC + _digest(secret, b"secret") + _digest(secret, b"body", *body)
    yield from body


def unsealed(data: bytes, secret: bytes) -> Saved:
    """Read what `sealed` made.

    Raises ValueError where the data is no snapshot, damaged, of another version or made under another secret.
    """
    body = _verified(data, secret)
    pieces, at = [], 0
    while at < len(body):
        length = int.from_bytes(body[at : at + _LENGTH], "little")
        pieces.append(body[at + _LENGTH : at + _LENGTH + length])
        at += _LENGTH + length
    head = msgspec.msgpack.decode(pieces.pop(), type=_Head)
    return Saved(head.note, pieces, head)


def save(index: PreciseIndex, names: Mapping[int, str], secret: bytes, note: bytes = b"") -> bytes:
    """All of it at once."""
    return b"".join(sealed(list(copied(index, names, note)), secret))


def load(index: PreciseIndex, data: bytes | Saved, rows: Mapping[str, int], secret: bytes) -> None:
    """Fill an index that knows nothing. rows: of endpoints by name; what was known of others is dropped.

    Raises ValueError as `unsealed` does.
    """
    if index.blocks:
        raise ValueError("a snapshot is loaded into an index that knows nothing yet")
    saved = data if isinstance(data, Saved) else unsealed(data, secret)
    head, pieces = saved.head, iter(saved.pieces)
    places = [rows.get(row.name) for row in head.rows]
    index.grow_rows(max([place + 1 for place in places if place is not None], default=0))
    index.tree.restore([bytes(next(pieces)) for _ in range(_COLUMNS)], head.roots)
    sets: dict[int, bytes] = {}
    for _ in range(head.sets):
        sets |= msgspec.msgpack.decode(next(pieces), type=dict[int, bytes])
    _restore_sets(index, head, sets, places)
    for row, place in zip(head.rows, places, strict=True):
        hashes, blocks = next(pieces), next(pieces)
        if place is not None:
            _restore_row(index.rows[place], row, hashes, blocks)
    index.tree.prune_many(np.flatnonzero((index.tree.held == EMPTY) & (index.tree.up != 0) & (index.tree.up != ROOT)))
    index.settle()


def _verified(data: bytes, secret: bytes) -> memoryview:
    start = len(_MAGIC)
    if data[:start] != _MAGIC:
        raise ValueError("not a snapshot of blocks, or one of another version")
    view = memoryview(data)
    theirs, check = view[start : start + _DIGEST], view[start + _DIGEST : start + 2 * _DIGEST]
    if not hmac.compare_digest(theirs, _digest(secret, b"secret")):
        raise ValueError("the snapshot was made under another secret")
    body = view[start + 2 * _DIGEST :]
    if not hmac.compare_digest(check, _digest(secret, b"body", body)):
        raise ValueError("the snapshot is damaged")
    return body


def _digest(secret: bytes, purpose: bytes, *data: Piece) -> bytes:
    key = hashlib.blake2b(secret, digest_size=32, person=b"blocks").digest()
    digest = hashlib.blake2b(digest_size=_DIGEST, key=key, person=purpose)
    for piece in data:
        digest.update(piece)
    return digest.digest()


def _as_bytes(bits: int) -> bytes:
    return bits.to_bytes(-(-bits.bit_length() // 8), "little")


def _keep(row: Row, name: str) -> _KeptRow:
    copies: dict[int, dict[int, int]] = {}
    for key, count in row.copies.items():
        copies.setdefault(key >> 2, {})[key & 3] = count
    return _KeptRow(name, copies, row.orphans, row.truncated)


def _restore_sets(index: PreciseIndex, head: _Head, sets: Mapping[int, bytes], places: Sequence[int | None]) -> None:
    """Give every block its holders among the rows that are still there; several sets may have become one."""
    moved = [
        (1 << tier * head.width + number, index.sets.bit(place, TIERS[tier]))
        for number, place in zip(head.numbers, places, strict=True)
        if place is not None
        for tier in range(len(TIERS))
    ]
    new = np.zeros(max(sets, default=0) + 1, dtype=np.int64)
    for number, kept in sets.items():
        bits = int.from_bytes(kept, "little")
        new[number] = index.sets.move(EMPTY, sum([to for bit, to in moved if bits & bit]), 1)
    held = new[index.tree.held]
    index.tree.held[:] = held
    index.sets.recount(held)


def _restore_row(mine: Row, row: _KeptRow, hashes: Piece, blocks: Piece) -> None:
    mine.table.restore(
        np.frombuffer(hashes, dtype="<u8").astype(np.uint64), np.frombuffer(blocks, dtype="<u4").astype(np.uint32)
    )
    mine.copies = {number << 2 | tier: count for number, tiers in row.copies.items() for tier, count in tiers.items()}
    mine.orphans, mine.truncated = row.orphans, row.truncated
