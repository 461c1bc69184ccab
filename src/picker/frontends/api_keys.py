"""Asks callers of a gRPC server for a key: `authorization: Bearer KEY`, as a call's headers have it.

A call without it is led to a handler of its own, so that the key is looked at once a call and before any message of it.
"""

from __future__ import annotations

import hmac
from collections.abc import Container

import hpack

from picker.frontends.grpc_server import Call, Code
from picker.wire.header_blocks import MAX_HEADER_BLOCK, HeaderBlockError, HeaderBlocks

# No call can have this path: it does not begin with a slash.
KEYLESS = "keyless"
_REMEMBERED = 64  # blocks; callers send the same few
_USUAL = 1024  # bytes of a block worth remembering


async def refuse(call: Call) -> None:
    """The handler of calls that come without the key."""
    call.end(Code.UNAUTHENTICATED, "send authorization: Bearer KEY")


class KeyedHeaderBlocks(HeaderBlocks):
    """Reads paths, of calls that carry the key or need none. open_to_all: paths of the latter."""

    def __init__(self, key: str, open_to_all: Container[str]) -> None:
        super().__init__()
        self._key = key.encode()
        self._open = open_to_all
        self._fields: hpack.Decoder = hpack.Decoder(max_header_list_size=MAX_HEADER_BLOCK)
        self._alone = False
        self._known: dict[bytes, str] = {}

    def table_is_gone(self) -> None:
        """From here on equal blocks mean the same."""
        self._alone = True

    def path(self, block: bytes) -> str | None:
        """The path of a block, `KEYLESS` without the key, or None where there is no path. Raises HeaderBlockError."""
        known = self._known.get(block)
        if known is not None:
            return known
        path = self._read(block)
        if path not in (None, KEYLESS) and self._alone and len(self._known) < _REMEMBERED and len(block) <= _USUAL:
            self._known[block] = path
        return path

    def _read(self, block: bytes) -> str | None:
        path, given = None, b""
        try:
            for name, value in (field[:2] for field in self._fields.decode(block, raw=True)):
                if name == b":path":
                    path = bytes(value).decode("latin-1")
                elif name == b"authorization":
                    given = bytes(value)
        except hpack.HPACKError as error:
            raise HeaderBlockError(f"a header block that cannot be read: {type(error).__name__}") from None
        return path if path is None or path in self._open or self._fits(given) else KEYLESS

    def _fits(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
