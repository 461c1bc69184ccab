"""vLLM's block hashes bit for bit, so that events of simulated pods carry the numbers that an engine would.

Owns the digest of one block and of what its hash covers beside tokens. Knows no pool, no request and no event. Hashes
and keys are those of vLLM 0.32 (`v1/core/kv_cache_utils.py`, `utils/hashing.py`); the tests hold recorded ones.
"""

from __future__ import annotations

import enum
import hashlib
import pickle
from collections.abc import Sequence

# What vLLM hashes in the place of a parent when PYTHONHASHSEED is not set (PR 51875).
DEFAULT_SEED = "vllm-none-hash"

Key = tuple[str | int, ...]
Keys = tuple[Key, ...]


class HashAlgorithm(enum.Enum):
    """vLLM's `--prefix-caching-hash-algo`, those without a random seed."""

    SHA256 = "sha256"  # over pickle, which only Python can reproduce
    SHA256_CBOR = "sha256_cbor"


class BlockHasher:
    """Digests of blocks, each over its parent's digest, its token ids and its further keys.

    seed: PYTHONHASHSEED of the engine, if it has one.
    """

    def __init__(self, algorithm: HashAlgorithm = HashAlgorithm.SHA256, seed: str = DEFAULT_SEED) -> None:
        self._write = _pickled if algorithm is HashAlgorithm.SHA256 else cbor
        self.none_hash = self._digest(seed)

    def block(self, parent: bytes | None, tokens: Sequence[int], keys: Keys = ()) -> bytes:
        """The 32 bytes of one full block. parent: those of the block before it. tokens: plain ints, in order."""
        return self._digest((self.none_hash if parent is None else parent, tuple(tokens), keys or None))

    def _digest(self, value: object) -> bytes:
        return hashlib.sha256(self._write(value)).digest()


def extra_keys(index: int, *, adapter: str | None = None, path: str | None = None, salt: str | None = None) -> Keys:
    """What the hash of block `index` covers beside tokens: the adapter in every block, the salt in the first only.

    path: where the engine loaded the adapter from.
    """
    keys: list[Key] = []
    if adapter is not None:
        keys.append(("lora", adapter, path or ""))
    if salt is not None and index == 0:
        keys.append(("cache_salt", salt))
    return tuple(keys)


def told_keys(keys: Keys) -> tuple[str, ...] | None:
    """The same keys as an event tells them: without their tags, and an adapter without its path."""
    return tuple(str(key[1]) for key in keys) or None


def as_number(digest: bytes) -> int:
    """A hash as events carry it by default: its last 64 bits."""
    return int.from_bytes(digest[-8:], "big")


def cbor(value: object) -> bytes:
    """Canonical CBOR (RFC 8949, 4.2) of None, ints, text, bytes and sequences of those. Raises TypeError for others."""
    match value:
        case None:
            return b"\xf6"
        case int():
            return _cbor_head(0, value) if value >= 0 else _cbor_head(1, -1 - value)
        case bytes():
            return _cbor_head(2, len(value)) + value
        case str():
            data = value.encode()
            return _cbor_head(3, len(data)) + data
        case tuple() | list():
            return _cbor_head(4, len(value)) + b"".join(map(cbor, value))
        case _:
            raise TypeError(f"{type(value).__name__} is not part of a block hash")


def _cbor_head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes([major << 5 | number])
    width = next(width for width in range(4) if number < 1 << (8 << width))
    return bytes([major << 5 | 24 + width]) + number.to_bytes(1 << width, "big")


def _pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
