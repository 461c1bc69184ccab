"""Where in a request's body the model's name stands, and another name in its place: every other byte stays as it is.

Of JSON the member `model` of the outermost object, however it is written and wherever it stands, of several the last:
that is the one that JSON readers keep, ours and the engines'. Of a form its field. Decides nothing and refuses nothing:
a body without such a place has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from msgspec import Raw

from picker.wire import multipart
from picker.wire.openai import attempt

_BLANKS = b" \t\r\n"


class _Named(msgspec.Struct):
    model: Raw = Raw()


_named = msgspec.json.Decoder(_Named)


@dataclass(frozen=True, slots=True)
class Edit:
    """These bytes in place of body[begin:end]. model: the name they bring."""

    begin: int
    end: int
    data: bytes
    model: str

    def applied(self, body: bytes) -> bytes:
        view = memoryview(body)
        return b"".join((view[: self.begin], self.data, view[self.end :]))


def model_edit(body: bytes, model: str, *, insert: bool) -> Edit | None:
    """What to change for a body to ask for this model; None where it cannot be changed.

    insert: whether an object that names no model is to get one, as its first member.
    """
    named = attempt(_named, body)
    if named is None:
        place = multipart.place_of(body, "model")
        return None if place is None else Edit(*place, model.encode(), model)
    data = msgspec.json.encode(model)
    if value := memoryview(named.model):
        begin = _address(value) - _address(memoryview(body))
        return Edit(begin, begin + len(value), data, model)
    return _inserted(body, data, model) if insert else None


def _inserted(body: bytes, data: bytes, model: str) -> Edit:
    begin = body.index(b"{") + 1
    alone = body[begin:].lstrip(_BLANKS).startswith(b"}")
    return Edit(begin, begin, b'"model":' + data + (b"" if alone else b","), model)


def _address(view: memoryview) -> int:
    """Where in memory it begins: a raw value is a view of the bytes that it was found in."""
    interface: dict[str, Any] = np.frombuffer(view, dtype=np.uint8).__array_interface__
    address: int = interface["data"][0]
    return address
