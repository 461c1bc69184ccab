"""The messages of ext-proc as a gateway writes them, and their short names in evidence. Pure; keeps no conversation.

Written out here rather than shared with picker's own codec: a checker that reads by the rules of the checked one sees
none of its mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2

ProcessingRequest: TypeAlias = external_processor_pb2.ProcessingRequest
ProcessingResponse: TypeAlias = external_processor_pb2.ProcessingResponse
HeaderMutation: TypeAlias = external_processor_pb2.HeaderMutation

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
PROCESS = f"/{SERVICE}/Process"

DESTINATION = "x-gateway-destination-endpoint"
SERVED = "x-gateway-destination-endpoint-served"
SUBSET = "x-gateway-destination-endpoint-subset"
LB_NAMESPACE = "envoy.lb"
_ATTRIBUTES = "envoy.filters.http.ext_proc"
_UPSTREAM = "upstream.address"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"

# Orders to an engine, its sidecar or the picker that only a picker may give.
ORDER_HEADERS = (
    SUBSET,
    SERVED,
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
)
_FULL_DUPLEX = processing_mode_pb2.ProcessingMode.FULL_DUPLEX_STREAMED

Subset = Sequence[str] | str | None


def request_headers(
    path: str,
    *,
    end: bool = False,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
    subset: Subset = None,
) -> ProcessingRequest:
    """The first message of a stream. subset: a list, one string with commas, or None for no hint."""
    message = ProcessingRequest()
    fields = {":method": method, ":path": path, ":authority": "check", ":scheme": "http", **(headers or {})}
    _headers(message.request_headers.headers, fields.items())
    message.request_headers.end_of_stream = end
    message.protocol_config.request_body_mode = _FULL_DUPLEX
    message.protocol_config.response_body_mode = _FULL_DUPLEX
    return _hinted(message, subset)


def request_body(data: bytes, *, end: bool, subset: Subset = None) -> ProcessingRequest:
    message = ProcessingRequest()
    message.request_body.body = data
    message.request_body.end_of_stream = end
    return _hinted(message, subset)


def request_trailers(*, subset: Subset = None) -> ProcessingRequest:
    message = ProcessingRequest()
    _headers(message.request_trailers.trailers, [("x-check-trailer", "1")])
    return _hinted(message, subset)


def response_headers(
    status: int = 200, *, content_type: str = "application/json", end: bool = False, served: str | None = None
) -> ProcessingRequest:
    """served: the endpoint that answered, as a gateway reports it."""
    message = ProcessingRequest()
    _headers(message.response_headers.headers, [(":status", str(status)), ("content-type", content_type)])
    message.response_headers.end_of_stream = end
    if served is not None:
        message.metadata_context.filter_metadata[LB_NAMESPACE].fields[SERVED].string_value = served
    return message


def response_body(data: bytes, *, end: bool) -> ProcessingRequest:
    message = ProcessingRequest()
    message.response_body.body = data
    message.response_body.end_of_stream = end
    return message


def response_trailers() -> ProcessingRequest:
    message = ProcessingRequest()
    _headers(message.response_trailers.trailers, [("grpc-status", "0")])
    return message


def _headers(block: object, fields: Iterable[tuple[str, str]]) -> None:
    for name, value in fields:
        block.headers.add(key=name, raw_value=value.encode())  # type: ignore[attr-defined]


def _hinted(message: ProcessingRequest, subset: Subset) -> ProcessingRequest:
    if subset is None:
        return message
    value = message.metadata_context.filter_metadata[SUBSET_NAMESPACE].fields[SUBSET]
    if isinstance(subset, str):
        value.string_value = subset
    else:
        value.list_value.SetInParent()
        for entry in subset:
            value.list_value.values.add(string_value=entry)
    return message


# --- reading -----------------------------------------------------------------------------------------------


def subset_of(message: ProcessingRequest) -> list[str] | None:
    """The hint a message carries, either form; None where it carries none."""
    if SUBSET_NAMESPACE not in message.metadata_context.filter_metadata:
        return None
    fields = message.metadata_context.filter_metadata[SUBSET_NAMESPACE].fields
    if SUBSET not in fields:
        return None
    value = fields[SUBSET]
    if value.WhichOneof("kind") == "list_value":
        return [item.string_value for item in value.list_value.values]
    return [entry.strip() for entry in value.string_value.split(",") if entry.strip()]


def served_of(message: ProcessingRequest) -> str | None:
    """Who answered, as told by the gateway with the response headers: by metadata, else by an attribute."""
    if LB_NAMESPACE in message.metadata_context.filter_metadata:
        fields = message.metadata_context.filter_metadata[LB_NAMESPACE].fields
        if SERVED in fields:
            return str(fields[SERVED].string_value)
    attributes = message.attributes[_ATTRIBUTES].fields if _ATTRIBUTES in message.attributes else {}
    return str(attributes[_UPSTREAM].string_value) if _UPSTREAM in attributes else None


def header_fields(block: object) -> dict[str, str]:
    """Of a HeaderMap, by name."""
    return {one.key: (one.raw_value or one.value.encode()).decode("latin-1") for one in block.headers}  # type: ignore[attr-defined]


def set_headers(mutation: object) -> dict[str, str]:
    """What a HeaderMutation sets, names in lower case; of a repeated one the last."""
    options = mutation.set_headers  # type: ignore[attr-defined]
    return {o.header.key.lower(): (o.header.raw_value or o.header.value.encode()).decode("latin-1") for o in options}


def chunk(message: ProcessingResponse) -> tuple[bytes, bool] | None:
    """(bytes, is the last) of a streamed body reply of either direction; None where it is no such reply."""
    kind = message.WhichOneof("response")
    if kind not in ("request_body", "response_body"):
        return None
    mutation = getattr(message, kind).response.body_mutation
    if mutation.WhichOneof("mutation") != "streamed_response":
        return None
    return mutation.streamed_response.body, mutation.streamed_response.end_of_stream


# --- words -------------------------------------------------------------------------------------------------


def told_request(message: ProcessingRequest) -> str:
    """A message to the picker, in a few words."""
    kind = message.WhichOneof("request") or "nothing"
    hint = subset_of(message)
    words = [kind]
    if kind.endswith("_body"):
        body = getattr(message, kind)
        words.append(f"{len(body.body)} B" + (", end" if body.end_of_stream else ""))
    if kind == "request_headers":
        head = message.request_headers
        told = header_fields(head.headers)
        words.append(f"{told.get(':method')} {told.get(':path')}" + (", end" if head.end_of_stream else ""))
    if hint is not None:
        words.append(f"subset={hint}")
    if (served := served_of(message)) is not None:
        words.append(f"served={served}")
    return " ".join(words)


def told_reply(message: ProcessingResponse) -> str:
    """A reply of the picker, in a few words."""
    kind = message.WhichOneof("response") or "nothing"
    match kind:
        case "immediate_response":
            return f"immediate {message.immediate_response.status.code}"
        case "request_headers":
            named = set_headers(message.request_headers.response.header_mutation).get(DESTINATION)
            return f"request_headers {DESTINATION}={named}"
        case "request_body" | "response_body":
            streamed = chunk(message)
            if streamed is None:
                return f"{kind} without a streamed mutation"
            return f"{kind} {len(streamed[0])} B" + (", end" if streamed[1] else "")
        case _:
            return kind
