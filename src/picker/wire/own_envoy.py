"""A request in one message, and the answer to it: what picker and an Envoy of its own say to each other.

The message is ext-proc's for a body that is all there; what picker wants of the head stands beside it as attributes
(`attributes` names them). The answer is metadata alone. Both are plain ext-proc: only the round trip for the head is
left out, and what Envoy itself has taken from the head already. Requests that do not come so
(`decode` gives None) are `wire.extproc`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from picker.errors import WireError
from picker.wire.extproc import DESTINATION, LOAD_BALANCING

_PATH = "request.path"
_ID = "request.id"
_ID_HEADER = "x-request-id"
_BEGIN, _END = "request.headers['", "']"

# The first bytes of such a message: field 4 (`request_body`), and in it field 1 (`body`).
_REQUEST_BODY, _BODY = 0x22, 0x0A
_END_OF_STREAM = b"\x10\x01"
# Of the answer: `request_body` without a change, and with another body; `dynamic_metadata`; what a Struct is made of.
_CONTINUE = b"\x1a\x00"
_ANSWER, _COMMON, _BODY_MUTATION, _NEW_BODY = b"\x1a", b"\x0a", b"\x1a", b"\x0a"
_METADATA = b"\x42"
_FIELDS, _ENTRY_KEY, _ENTRY_VALUE = b"\x0a", b"\x0a", b"\x12"
_STRING, _STRUCT = b"\x1a", b"\x2a"


def _key(name: str) -> bytes:
    return _ENTRY_KEY + bytes((len(name),)) + name.encode()


_NAMESPACE, _NAME = _key(LOAD_BALANCING), _key(DESTINATION)

_LENGTH = "content-length"
CARRIED = ("x-picker-request-id", "x-data-parallel-rank", "x-envoy-max-retries", _LENGTH)
"""The headers that a verdict can set; see `carried`."""
_ENTRY_KEYS = {name: _key(name) for name in CARRIED}


def carried(name: str) -> str:
    """Where Envoy finds the value of a header that a verdict has set, in its own format; nothing where it has not."""
    return f"%DYNAMIC_METADATA({LOAD_BALANCING}:{name})%"


class Whole(NamedTuple):
    """A request. headers: those that were asked for, by name in lower case."""

    path: str
    headers: Mapping[str, str]
    body: bytes


def attributes(headers: Iterable[str]) -> list[str]:
    """What Envoy is to send of a request's head: its path, its id, and these headers where it has them."""
    return [_PATH, _ID, *(f"{_BEGIN}{name}{_END}" for name in headers)]


def decode(message: bytes) -> Whole | None:
    """The request, if it is all in this message, its body with it; None for any other.

    Raises WireError for bytes that are no message.
    """
    if not message or message[0] != _REQUEST_BODY:
        return None
    try:
        size, at = _varint(message, 1)
        body, end = _body(message, at, at + size)
        told = _Told.FromString(message[at + size :]).attributes
    except (DecodeError, IndexError):
        raise WireError("The data plane sent bytes that are no ext-proc message.") from None
    if not end or len(told) != 1:
        return None
    path, headers = None, {}
    for entry in told[0].value.fields:
        name, value = entry.key, entry.value.string_value.decode("latin-1")
        if name == _PATH:
            path = value
        elif name == _ID:
            headers[_ID_HEADER] = value
        else:
            headers[name[len(_BEGIN) : -len(_END)]] = value
    return None if path is None else Whole(path, headers, body)


def _told() -> Any:
    """The message's attributes as they come: what clients say may be no UTF-8, which a `Struct` must be."""
    file = descriptor_pb2.FileDescriptorProto(name="picker/own_envoy.proto", package="picker.own_envoy")
    text, octets, message = 9, 12, 11  # kinds of fields

    def add(name: str, **fields: tuple[int, int, str, bool]) -> None:
        made = file.message_type.add(name=name)
        for field, (number, kind, type_name, many) in fields.items():
            label = 3 if many else 1
            made.field.add(name=field, number=number, type=kind, type_name=type_name or None, label=label)

    own = ".picker.own_envoy."
    add("Value", string_value=(3, octets, "", False))
    add("Entry", key=(1, text, "", False), value=(2, message, own + "Value", False))
    add("Struct", fields=(1, message, own + "Entry", True))
    add("Attributes", key=(1, text, "", False), value=(2, message, own + "Struct", False))
    add("Told", attributes=(9, message, own + "Attributes", True))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("picker.own_envoy.Told"))


_Told = _told()


def _body(message: bytes, at: int, end: int) -> tuple[bytes, bool]:
    """The bytes of a body, copied once, and whether it is all of it."""
    body = b""
    if at < end and message[at] == _BODY:
        size, at = _varint(message, at + 1)
        body, at = message[at : at + size], at + size
    if at > end:
        raise IndexError
    return body, message.startswith(_END_OF_STREAM, at, end)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends. Raises IndexError."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def verdict(destination: str, headers: Iterable[tuple[str, str]], body: bytes | None = None) -> bytes:
    """The answer that sends a request on: to these addresses ("ip:port" between commas), with some of `CARRIED` set.

    body: another one; None: the one that Envoy has. Envoy takes no change of the head with a body whose head it has not
    shown, so that all goes as metadata: {"envoy.lb": {DESTINATION: destination, name of a header: its value}}.
    """
    if body is not None:
        headers = (*headers, (_LENGTH, str(len(body))))
    entries = [_NAME + _string(destination.encode())]
    entries += [_ENTRY_KEYS[name] + _string(value.encode("latin-1", "replace")) for name, value in headers]
    told = b"".join([_field(_FIELDS, entry) for entry in entries])
    namespace = _NAMESPACE + _field(_ENTRY_VALUE, _field(_STRUCT, told))
    change = _CONTINUE if body is None else _replacing(body)
    return change + _field(_METADATA, _field(_FIELDS, namespace))


def _replacing(body: bytes) -> bytes:
    return _field(_ANSWER, _field(_COMMON, _field(_BODY_MUTATION, _field(_NEW_BODY, body))))


def _string(value: bytes) -> bytes:
    return _field(_ENTRY_VALUE, _field(_STRING, value))


def _field(tag: bytes, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return tag + bytes((size,)) + content
    length = bytearray()
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return tag + bytes(length) + content
