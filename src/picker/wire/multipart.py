"""What a form with files (multipart/form-data) asks for: its few short fields, however large its files are.

Audio and images come this way. Only the first and the last of a body are looked at, because fields stand before or
behind the files; nothing is decoded, refused or kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

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
    delimiter = _delimiter(body)
    if delimiter is None:
        return None
    outer, found = _outer(body), dict[str, str]()
    for name, begin, end in _texts(outer, delimiter):
        found.setdefault(name, outer[begin:end].decode(errors="replace"))
    return found


def place_of(body: bytes, name: str) -> tuple[int, int] | None:
    """(begin, end) of a short text field's value in the body; None where there is none."""
    delimiter = _delimiter(body)
    if delimiter is None:
        return None
    outer = _outer(body)
    behind = 2 + _LOOKED_AT if len(outer) < 2 + len(body) else len(outer)  # what follows is the body's end
    skipped = 2 + len(body) - len(outer)
    for found, begin, end in _texts(outer, delimiter):
        if found == name:
            across = begin <= behind < end
            moved = skipped - 2 if begin > behind else -2
            return None if across else (begin + moved, end + moved)
    return None


def _delimiter(body: bytes) -> bytes | None:
    end = body.find(b"\r\n", 0, _LONGEST_DELIMITER + 2)
    return None if end < 3 or not body.startswith(b"--") else b"\r\n" + body[:end]


def _texts(outer: bytes, delimiter: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, begin, end) of the value of every field that is no file."""
    begin = outer.find(delimiter)
    while begin >= 0:
        begin += len(delimiter)
        after = outer.find(delimiter, begin)
        end = len(outer) if after < 0 else after
        head, ended, value = outer[begin:end].partition(b"\r\n\r\n")
        named = _named(head.replace(b"\r", b""))
        if named is not None and ended and _is_file(head) is None:
            yield named[1].decode(), end - len(value), end
        begin = after


def text_bytes(size: int) -> int:
    """Bytes of text that are as much work as a form of this size."""
    return size // _BYTES_OF_FILE_PER_BYTE_OF_TEXT


def _outer(body: bytes) -> bytes:
    """The beginning and the end; the first delimiter looks like the others."""
    if len(body) <= 2 * _LOOKED_AT:
        return b"\r\n" + body
    return b"\r\n" + body[:_LOOKED_AT] + body[-_LOOKED_AT:]
