"""The tokens that an engine has counted, as an Envoy that has read its answer tells of them in the access log.

Envoy copies what stands at some places of an answer into metadata: of events the whole `usage`, as text, the last one
that there was; of other JSON, of which it copies no objects, each count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from picker.types import Usage
from picker.wire.openai import UsageFields, attempt, usage_from

NAMESPACE = "picker.usage"

IN_EVENTS: Mapping[str, tuple[str, ...]] = {
    "message": ("message", "usage"),  # Anthropic's first event, which its last ones add to
    "response": ("response", "usage"),
    "usage": ("usage",),
}
"""What Envoy is to copy of events: under which name, from where; in the order in which they are to be read."""

_DETAILS = ("prompt_tokens_details", "input_tokens_details")
_COUNTS = tuple(name for name in UsageFields.__struct_fields__ if name not in _DETAILS)
_CACHED = "cached_tokens"

IN_JSON: Mapping[str, tuple[str, ...]] = {
    **{name: ("usage", name) for name in _COUNTS},
    **{name: ("usage", name, _CACHED) for name in _DETAILS},
}
"""What it is to copy of other answers."""

_decoder = msgspec.json.Decoder(UsageFields, strict=False)


def usage_told(told: Mapping[str, Any]) -> Usage | None:
    """Token counts from the values (`google.protobuf.Value`) of the namespace; None where there are none."""
    texts = [told[name].string_value for name in IN_EVENTS if name in told]
    if not texts:
        fields = _counted(told)
        return None if fields is None else usage_from(fields, None)
    usage = None
    for text in texts:
        fields = attempt(_decoder, text.encode())
        usage = usage if fields is None else usage_from(fields, usage) or usage
    return usage


def _counted(told: Mapping[str, Any]) -> UsageFields | None:
    numbers = {name: each.number_value for name, each in told.items() if each.HasField("number_value")}
    found: dict[str, Any] = {name: numbers[name] for name in _COUNTS if name in numbers}
    found |= {name: {_CACHED: numbers[name]} for name in _DETAILS if name in numbers}
    try:
        return msgspec.convert(found, UsageFields, strict=False)  # its numbers are doubles
    except msgspec.ValidationError:
        return None
