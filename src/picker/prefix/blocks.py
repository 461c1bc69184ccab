"""Chained hashes of a prompt's blocks: equal hashes mean equal prefixes. All blocks of a prompt are hashed at once.

Keyed by a secret of the process, so that a client cannot craft two prompts that seem to share a prefix.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from picker.types import NO_BLOCKS, UInt64Array

_C1 = np.uint64(0xFF51AFD7ED558CCD)
_C2 = np.uint64(0xC4CEB9FE1A85EC53)
_S33 = np.uint64(33)
_S32 = np.uint64(32)
_HIGH = np.uint64(0xFFFFFFFF00000000)
_ROOTS = 4096  # (model, salt) pairs remembered
# Up to so many blocks, plain integers are faster than thirty calls into numpy on arrays this short (6 us instead of 15
# or more with four blocks; as fast with about sixteen).
_FEW = 12
_ALL = (1 << 64) - 1


class BlockHasher:
    """Hashes prompts under one secret. block_bytes: bytes per block, a multiple of 4.

    A block's words w_j are hashed by two independent sums of w_j * k_j mod 2^64 with secret 64-bit keys, of which the
    upper halves are kept: strongly universal (Lemire & Kaser, "Strongly universal string hashing is fast", 2014), so
    that any two blocks collide with probability 2^-64 over the secret, whatever a client chooses. Each value is mixed
    with a secret of its position, and prefix i is the running sum up to i, mixed with the chain's root: an additive
    message hash in counter mode (Bellare & Micciancio, "A new paradigm for collision-free hashing", 1997), which needs
    no sequential pass.
    """

    def __init__(self, secret: bytes, block_bytes: int = 256) -> None:
        if block_bytes < 4 or block_bytes % 4:
            raise ValueError(f"block_bytes must be a positive multiple of 4, got {block_bytes}")
        self.block_bytes = block_bytes
        self._secret = hashlib.blake2b(secret, digest_size=32).digest()
        self._words = block_bytes // 4
        self._keys = self._stream(b"words", 2 * self._words).reshape(2, self._words)
        self._positions = self._stream(b"positions", 256)
        self._first_positions: list[int] = self._positions[:_FEW].tolist()
        self._roots: dict[tuple[str | None, str | None], int] = {}

    def root(self, model: str | None, salt: str | None) -> int:
        """Where the chain of a model (or adapter) and cache salt starts; different pairs share no prefix."""
        root = self._roots.get((model, salt))
        if root is None:
            parts = [b"\0" if part is None else b"\1" + part.encode("utf-8", "surrogatepass") for part in (model, salt)]
            text = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
            root = int.from_bytes(hashlib.blake2b(text, digest_size=8, key=self._secret).digest(), "little")
            if len(self._roots) >= _ROOTS:
                self._roots.clear()
            self._roots[model, salt] = root
        return root

    def hash(self, prompt: bytes, *, root: int) -> UInt64Array:
        """(b,) hashes of the prefixes ending with each full block, oldest first; a partial last block has none."""
        blocks = len(prompt) // self.block_bytes
        if blocks == 0:
            return NO_BLOCKS
        if blocks > self._positions.size:
            self._positions = self._stream(b"positions", 2 * blocks)
        words = np.frombuffer(prompt, dtype="<u4", count=blocks * self._words).reshape(blocks, self._words)
        if blocks <= _FEW:
            return self._hash_few(words, root)
        wide = words.astype(np.uint64)
        # For integers a third faster than `dot` on long prompts.
        values, low = np.einsum("bw,kw->kb", wide, self._keys)
        values &= _HIGH
        low >>= _S32
        values |= low
        values ^= self._positions[:blocks]
        chain = _mixed(values).cumsum(dtype=np.uint64)
        chain += np.uint64(root)
        return _mixed(chain)

    def _hash_few(self, words: NDArray[np.uint32], root: int) -> UInt64Array:
        """The same for a few blocks: words are (blocks, words of a block)."""
        values, low = self._keys.dot(words.T).tolist()
        chain, found = root, []
        for value, rest, position in zip(values, low, self._first_positions, strict=False):
            chain = chain + _mixed_int((value & 0xFFFFFFFF00000000 | rest >> 32) ^ position) & _ALL
            found.append(_mixed_int(chain))
        return np.array(found, dtype=np.uint64)

    def _stream(self, purpose: bytes, count: int) -> UInt64Array:
        """Secret 64-bit numbers for a purpose; a longer stream begins with the shorter one."""
        return np.frombuffer(hashlib.shake_256(self._secret + purpose).digest(8 * count), dtype="<u8").astype(np.uint64)


def _mixed(values: UInt64Array) -> UInt64Array:
    """Scatter 64-bit values in place, one to one (MurmurHash3's finaliser)."""
    values ^= values >> _S33
    values *= _C1
    values ^= values >> _S33
    values *= _C2
    values ^= values >> _S33
    return values


def _mixed_int(value: int) -> int:
    """The same for one value."""
    value ^= value >> 33
    value = value * 0xFF51AFD7ED558CCD & _ALL
    value ^= value >> 33
    value = value * 0xC4CEB9FE1A85EC53 & _ALL
    return value ^ value >> 33
