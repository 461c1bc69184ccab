"""One secret that replicas share: who knows it may speak and understand, nobody else.

Every message is encrypted and authenticated (ChaCha20-Poly1305, RFC 8439) under a key of its direction and connection,
with its number as nonce: nothing can be read, made up, repeated or left out unnoticed within a connection.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

LEAST = 16  # bytes of a secret
_TAG = 16


def derive(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    """32 bytes for a purpose; parts: what else they depend on, each of a fixed length."""
    key = hashlib.blake2b(secret).digest()
    return hashlib.blake2b(b"".join(parts), digest_size=32, key=key, person=purpose.encode()[:16]).digest()


class Seal:
    """One direction of one connection. Both ends count the messages."""

    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._count = 0

    @property
    def count(self) -> int:
        """Of messages so far: the number of the next."""
        return self._count

    def close(self, data: bytes) -> bytes:
        """Seal the next message."""
        return self._cipher.encrypt(self._nonce(), data, None)

    def open(self, data: bytes) -> bytes:
        """Open the next message; raises ValueError where it is not that."""
        if len(data) < _TAG:
            raise ValueError("a message is too short to be sealed")
        try:
            return self._cipher.decrypt(self._nonce(), data, None)
        except InvalidTag:
            raise ValueError("a message is not sealed with our secret, or is out of turn") from None

    def skip_to(self, count: int) -> None:
        """Go on with a later message; raises ValueError for one that has been."""
        if count < self._count:
            raise ValueError("a message comes again")
        self._count = count

    def _nonce(self) -> bytes:
        nonce = self._count.to_bytes(12, "little")
        self._count += 1
        return nonce
