"""Answers that name the model their client asked for, where the engine was asked for another one.

In JSON, and in events of JSON, every member `"model": "TARGET"` gets the name that was asked for: at any depth, because
Responses and Messages have it within an object. Text cannot be meant by mistake, as quotes within a JSON string are
escaped. A name that is cut in two by the end of a chunk waits for the rest of it; nothing else waits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache

import msgspec

_KEYS = (b'"model":', b'"model": ')  # as JSON writers put it, without blanks and with one


class Restorer:
    """Works on one response, from its first byte to its last. target: the name that is in it; asked: that is to be."""

    __slots__ = ("_held", "_name", "_spelling")

    def __init__(self, target: str, asked: str) -> None:
        self._spelling = _spelling(target)
        self._name = msgspec.json.encode(asked)
        self._held = b""

    def feed(self, data: bytes, *, end: bool) -> bytes:
        """What may go to the client now; with `end` all that is left."""
        if self._held:
            data, self._held = self._held + data, b""
        if data.endswith(b"\n\n"):  # whole events, which is the rule
            end = True
        found = self._spelling.search(data)
        if found is None and end:
            return data
        pieces, at = list[bytes](), 0
        while found is not None:
            pieces += (data[at : found.end(1)], self._name)
            at = found.end()
            found = self._spelling.search(data, at)
        until = len(data) if end else self._spelling.unfinished(data, at)
        self._held = data[until:]
        pieces.append(data[at:until])
        return b"".join(pieces)


class _Spelling:
    """The ways in which a name may be written. search: the next of them, its key as the first group."""

    def __init__(self, name: str) -> None:
        # Python's own writer escapes what is not ASCII, others do not.
        values = dict.fromkeys((msgspec.json.encode(name), json.dumps(name).encode()))
        spelt = [key + value for key in _KEYS for value in values]
        self.search = re.compile(b'("model": ?)(?:%b)' % b"|".join(map(re.escape, values))).search
        self._beginnings = frozenset(each[:length] for each in spelt for length in range(1, len(each)))
        self._longest = max(map(len, spelt))

    def unfinished(self, data: bytes, since: int) -> int:
        """Where what may be the beginning of one begins, at the end of the data; else the data's end."""
        at = data.find(b'"', max(since, len(data) - self._longest))
        while at >= 0 and data[at:] not in self._beginnings:
            at = data.find(b'"', at + 1)
        return len(data) if at < 0 else at


_spelling = lru_cache(maxsize=256)(_Spelling)  # rules have few targets


def restorable(headers: Mapping[str, str]) -> bool:
    """Whether a response is JSON, or events of it, in clear text."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind in ("application/json", "text/event-stream") and not headers.get("content-encoding")
