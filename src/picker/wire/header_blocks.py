"""Header blocks of HTTP/2 requests (HPACK, RFC 7541), read for the one header that a gRPC server needs: the path."""

from __future__ import annotations

from collections.abc import Iterator

import hpack

MAX_HEADER_BLOCK = 65_536

_PATH_INDICES = (4, 5)  # of ":path" in the static table
_PATHS = 100  # remembered; a data plane calls two or three
_BLOCKS = 100  # remembered; a data plane calls with the same few headers every time
_USUAL_BYTES = 1024  # of a block worth remembering


class HeaderBlockError(Exception):
    """A header block that cannot be read; the connection's compression state is lost with it."""


class HeaderBlocks:
    """Reads header blocks for the one header that matters here, the path.

    Until the peer has acknowledged our settings it may use a table of headers that came before, and a full decoder
    follows it. After that every block stands for itself: fields are skipped by their lengths, nothing is decoded but
    the path, and that only when its bytes have not been seen before. Of blocks that come again not even that is done.
    """

    def __init__(self) -> None:
        self._decoder: hpack.Decoder | None = hpack.Decoder(max_header_list_size=MAX_HEADER_BLOCK)
        self._paths: dict[bytes, str] = {}
        self._blocks: dict[bytes, str | None] = {}

    def table_is_gone(self) -> None:
        self._decoder = None

    def path(self, block: bytes) -> str | None:
        """The `:path` of a block, or None where it has none; raises HeaderBlockError when it cannot be read."""
        if self._decoder is not None:
            return _full_path(self._decoder, block)
        if block in self._blocks:
            return self._blocks[block]
        path = self._path_alone(block)
        if len(self._blocks) < _BLOCKS and len(block) <= _USUAL_BYTES:
            self._blocks[block] = path
        return path

    def _path_alone(self, block: bytes) -> str | None:
        """Of a block that stands for itself."""
        try:
            raw = next((value for index, value in _fields(block) if index in _PATH_INDICES), None)
        except IndexError:
            raise HeaderBlockError("a header block that ends within a field") from None
        if raw is None:
            return _full_path(_stateless(), block)
        path = self._paths.get(raw)
        if path is None:
            path = _full_path(_stateless(), block)
            if path is not None and len(self._paths) < _PATHS:
                self._paths[raw] = path
        return path


def _stateless() -> hpack.Decoder:
    decoder = hpack.Decoder(max_header_list_size=MAX_HEADER_BLOCK)
    decoder.max_allowed_table_size = 0
    decoder.header_table_size = 0
    return decoder


def _full_path(decoder: hpack.Decoder, block: bytes) -> str | None:
    try:
        for field in decoder.decode(block, raw=True):
            if field[0] == b":path":
                return bytes(field[1]).decode("latin-1")
    except hpack.HPACKError as error:
        raise HeaderBlockError(f"a header block that cannot be read: {type(error).__name__}") from None
    return None


def _fields(block: bytes) -> Iterator[tuple[int, bytes]]:
    """(index of the name in the static table or 0, value as sent) of the literal fields of a block (RFC 7541, 6.2)."""
    at, end = 0, len(block)
    while at < end:
        first = block[at]
        if first & 0x80:
            _, at = _integer(block, at, 0x7F)
        elif first & 0xE0 == 0x20:
            _, at = _integer(block, at, 0x1F)
        else:
            index, at = _integer(block, at, 0x3F if first & 0x40 else 0x0F)
            if not index:
                length, at = _integer(block, at, 0x7F)
                at += length
            value_at = at  # with its length: that is where it says how the value is coded
            length, at = _integer(block, at, 0x7F)
            at += length
            yield index, block[value_at:at]
    if at > end:
        raise IndexError


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """An integer with a prefix of as many bits as the mask has, and where it ends (RFC 7541, 5.1)."""
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 28:
            raise HeaderBlockError("a number beyond all bounds")
