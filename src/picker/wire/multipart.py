"""What a form with files (multipart/form-data) asks for: its few short fields, however large its files are.

Audio and images come this way. Only the first and the last of a body are looked at, because fields stand before or
behind the files; nothing is decoded, refused or kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_LOOKED_AT = 16 * 1024  # bytes at either end
_LONGEST_DELIMITER = 2 + 70  # RFC 2046 section 5.1.1
# An audio encoder makes 50 tokens of a second, which is 32,000 bytes of 16-bit sound at 16 kHz, at four bytes a token.
_BYTES_OF_FILE_PER_BYTE_OF_TEXT = 160

_named = re.compile(
    rb'^content-disposition:[^\r\n]*?[ ;]name="?(\w{1,64})"?(?:;|\s*$)', re.IGNORECASE | re.MULTILINE
).search
_is_file = re.compile(rb"^content-disposition:[^\r\n]*?[ ;]filename", re.IGNORECASE | re.MULTILINE).search


def fields_of(body: bytes) -> Mapping[str, str] | None:
    """The short text fields, by name; None where the body is no form. Of fields that repeat the first counts."""
    end = body.find(b"\r\n", 0, _LONGEST_DELIMITER + 2)
    if end < 3 or not body.startswith(b"--"):
        return None
    delimiter = b"\r\n" + body[:end]
    found: dict[str, str] = {}
    for part in _outer(body).split(delimiter)[1:]:
        head, ended, value = part.partition(b"\r\n\r\n")
        name = _named(head.replace(b"\r", b""))
        if name is not None and ended and _is_file(head) is None:
            found.setdefault(name[1].decode(), value.decode(errors="replace"))
    return found


def text_bytes(size: int) -> int:
    """Bytes of text that are as much work as a form of this size."""
    return size // _BYTES_OF_FILE_PER_BYTE_OF_TEXT


def _outer(body: bytes) -> bytes:
    """The beginning and the end; the first delimiter looks like the others."""
    if len(body) <= 2 * _LOOKED_AT:
        return b"\r\n" + body
    return b"\r\n" + body[:_LOOKED_AT] + body[-_LOOKED_AT:]
