"""Envoy's ext-proc messages to events of an `Exchange`, and its actions back to ext-proc messages.

Speaks the endpoint-picker protocol 1.0 of the Gateway API Inference Extension in full-duplex mode: one gRPC stream per
HTTP request; replies in the order headers, body, trailers for each direction; every body byte handed over comes back.
A stream that only follows the request (lean) speaks the first half of it.
What a request means, and in which phase an event is allowed, is the `Exchange`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2

from picker.errors import WireError
from picker.exchange import (
    ENDPOINT_HEADER,
    REQUEST_HEADER,
    Action,
    Event,
    Forward,
    Headers,
    PassBody,
    PassHead,
    RequestBody,
    RequestHead,
    Respond,
    ResponseBody,
    ResponseHead,
)
from picker.types import Decision
from picker.wire.addresses import plain_address

ProcessingRequest: TypeAlias = external_processor_pb2.ProcessingRequest
ProcessingResponse: TypeAlias = external_processor_pb2.ProcessingResponse
HttpHeaders: TypeAlias = external_processor_pb2.HttpHeaders
HeaderMutation: TypeAlias = external_processor_pb2.HeaderMutation

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"

DESTINATION = "x-gateway-destination-endpoint"
DESTINATION_SERVED = "x-gateway-destination-endpoint-served"
DESTINATION_SUBSET = "x-gateway-destination-endpoint-subset"
LOAD_BALANCING = "envoy.lb"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"

# Envoy takes up to 64 KiB in one streamed body reply; llm-d's endpoint picker stops at the same round number.
MAX_CHUNK_BYTES = 62_000

# Orders to an engine or its sidecar that only a picker may give, and words to the picker that no engine is meant to
# hear, by their old and new names. Envoy removes before it sets, so what an `Exchange` sets on purpose (a data-parallel
# rank) survives.
CONTROL_HEADERS = (
    DESTINATION_SUBSET,
    DESTINATION_SERVED,
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-data-parallel-rank",
    "x-kv-cache-source-host-port",
    "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
    "x-llm-d-inference-objective",
    "x-gateway-inference-objective",
    "x-llm-d-inference-ttl",
    "x-llm-d-model-name-rewrite",
    "x-gateway-model-name-rewrite",
    "x-llm-d-slo-ttft-ms",
    "x-slo-ttft-ms",
    "x-llm-d-slo-tpot-ms",
    "x-slo-tpot-ms",
    ENDPOINT_HEADER,
    REQUEST_HEADER,
)

# Envoy's name for the address that a request went to, among the attributes of a message.
_ATTRIBUTES = "envoy.filters.http.ext_proc"
UPSTREAM_ADDRESS = "upstream.address"

_NO_BODY = processing_mode_pb2.ProcessingMode.NONE
_BUFFERED = processing_mode_pb2.ProcessingMode.BUFFERED
_FULL_DUPLEX = processing_mode_pb2.ProcessingMode.FULL_DUPLEX_STREAMED
# Said, not left to the default, which has changed between versions of Envoy.
_OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def _forward_template(*, kept: bool) -> bytes:
    response = ProcessingResponse()
    common = (response.request_body if kept else response.request_headers).response
    common.clear_route_cache = True
    common.header_mutation.remove_headers.extend(CONTROL_HEADERS)
    return bytes(response.SerializeToString())


def _pass_template() -> bytes:
    response = ProcessingResponse()
    # llm-d's endpoint picker marks every response it has seen so; its tests and dashboards look for it.
    _set_headers(response.response_headers.response.header_mutation, (("x-went-into-resp-headers", "true"),))
    return bytes(response.SerializeToString())


def _set_headers(mutation: HeaderMutation, headers: Headers) -> None:
    for name, value in headers:
        option = mutation.set_headers.add()
        option.append_action = _OVERWRITE
        option.header.key = name
        option.header.raw_value = value.encode("latin-1", "replace")


_FORWARD = _forward_template(kept=False)
_FORWARD_KEPT = _forward_template(kept=True)
_PASS = _pass_template()


class Codec:
    """The messages of one stream. fallbacks: name the whole list of endpoints, else only the first.

    mark: the request is sent on with it as `x-picker-request-id`, for the data plane's access log to tell what became
    of the request; nothing of the response is seen then. None: the response is followed here.
    Remembers which directions end in trailers: the last chunk of such a body carries no end-of-stream mark.
    A list of endpoints is for data planes that walk it (Envoy's override_host); others take it for one address.
    addresses: "ip:port" of endpoints that are known by name; others go by their own address. whole: the data plane
    keeps bodies (BUFFERED) and sends each in one message, and gets none back.
    """

    __slots__ = ("_addresses", "_fallbacks", "_mark", "_request_trailers", "_response_trailers", "_whole")

    def __init__(
        self,
        *,
        fallbacks: bool = True,
        mark: str | None = None,
        addresses: Mapping[str, str] = MappingProxyType({}),
        whole: bool = False,
    ) -> None:
        self._addresses = addresses
        self._whole = whole
        self._fallbacks = fallbacks
        self._mark = mark
        self._request_trailers = False
        self._response_trailers = False

    def decode(self, message: ProcessingRequest) -> Event:
        """What a message from the data plane says; raises WireError on an empty one or an unusable mode."""
        match message.WhichOneof("request"):
            case "response_body":
                body = message.response_body
                return ResponseBody(body.body, body.end_of_stream)
            case "request_body":
                body = message.request_body
                return RequestBody(body.body, body.end_of_stream, _subset(message))
            case "request_headers":
                lean = self._mark is not None
                _check_modes(message, lean=lean, whole=self._whole)
                return _request_head(message, followed=not lean, walked=self._fallbacks)
            case "response_headers":
                return _response_head(message)
            case "request_trailers":
                self._request_trailers = True
                return RequestBody(b"", end=True, subset=_subset(message))
            case "response_trailers":
                self._response_trailers = True
                return ResponseBody(b"", end=True)
            case kind:
                raise WireError(f"The data plane sent an ext-proc message without content ({kind}).")

    def proceed(self) -> ProcessingResponse | None:
        """What a request's head is answered with before its body comes; None where nothing is said until it is all."""
        if not self._whole:
            return None
        response = ProcessingResponse()
        response.request_headers.SetInParent()
        return response

    def encode(self, action: Action) -> list[ProcessingResponse]:
        """The messages that carry out an action, to be sent in order; raises ValueError for what has none."""
        match action:
            case PassBody(data, end):
                replies = [_response_chunk(*chunk) for chunk in _chunks(data, end=end and not self._response_trailers)]
                return [*replies, _response_trailers()] if end and self._response_trailers else replies
            case Forward():
                return [self._verdict(action), *self._request_body(action)]
            case PassHead(set_headers, _, resized):
                response = ProcessingResponse.FromString(_PASS)
                mutation = response.response_headers.response.header_mutation
                _set_headers(mutation, set_headers)
                if resized:
                    mutation.remove_headers.append("content-length")
                return [response]
            case Respond():
                return [_immediate(action)]
            case _:
                raise ValueError(f"{type(action).__name__} has no counterpart in ext-proc")

    def destination(self, decision: Decision) -> str:
        """Where a request is to go, as the data plane is told: "ip:port", between commas where there are several."""
        destination = decision.endpoint.address
        if self._fallbacks and decision.fallbacks:
            # Ranks of one engine share its address, and whoever cannot reach it once cannot reach it twice.
            addresses = (destination, *(endpoint.address for endpoint in decision.fallbacks))
            return ",".join(dict.fromkeys(self._addresses.get(each, each) for each in addresses))
        return self._addresses.get(destination, destination)

    def _verdict(self, action: Forward) -> ProcessingResponse:
        destination = self.destination(action.decision)
        headers: Headers = ((DESTINATION, destination), *action.set_headers)
        if self._mark is not None:
            headers = (*headers, (REQUEST_HEADER, self._mark))
        kept = self._whole and not action.bodyless
        changed = kept and action.edit is not None
        if changed or (action.body and not kept):
            # Full-duplex mode drops the client's. Envoy drops ours too and sends the body in chunks; others do not. Of
            # a body that it keeps, Envoy takes no other with the old one's length.
            headers = (*headers, ("content-length", str(len(action.body))))
        response = ProcessingResponse.FromString(_FORWARD_KEPT if kept else _FORWARD)
        answered = response.request_body if kept else response.request_headers
        if changed:
            response.request_body.response.body_mutation.body = action.body
        _set_headers(answered.response.header_mutation, headers)
        verdict = response.dynamic_metadata.fields[LOAD_BALANCING].struct_value
        verdict.fields[DESTINATION].string_value = destination
        return response

    def _request_body(self, action: Forward) -> Iterator[ProcessingResponse]:
        if action.bodyless or self._whole:
            return
        for data, end in _chunks(action.body, end=not self._request_trailers):
            response = ProcessingResponse()
            streamed = response.request_body.response.body_mutation.streamed_response
            streamed.body = data
            streamed.end_of_stream = end
            yield response
        if self._request_trailers:
            response = ProcessingResponse()
            response.request_trailers.SetInParent()
            yield response


# --- decoding ----------------------------------------------------------------------------------------------


def _check_modes(message: ProcessingRequest, *, lean: bool, whole: bool) -> None:
    """Older data planes do not tell their modes; those that do must stream both bodies, or lean ones the request's."""
    if not message.HasField("protocol_config"):
        return
    config = message.protocol_config
    response = (_FULL_DUPLEX, _NO_BODY) if lean else (_FULL_DUPLEX,)
    if config.request_body_mode != (_BUFFERED if whole else _FULL_DUPLEX) or config.response_body_mode not in response:
        hint = "" if lean else " (with response_body_mode NONE picker must run with --mode lean)"
        raise WireError(
            f"ext-proc needs processing_mode request_body_mode and response_body_mode FULL_DUPLEX_STREAMED{hint}; "
            f"the data plane uses {config.request_body_mode} and {config.response_body_mode}."
        )


def _request_head(message: ProcessingRequest, *, followed: bool, walked: bool) -> RequestHead:
    http = message.request_headers
    headers = _headers(http)
    method, path = headers.get(":method", "GET"), headers.get(":path", "/")
    return RequestHead(method, path, headers, http.end_of_stream, _subset(message), followed, walked)


def _response_head(message: ProcessingRequest) -> ResponseHead:
    http = message.response_headers
    headers = _headers(http)
    status = headers.get(":status", "")
    if not status.isdigit():
        raise WireError("The data plane sent response headers without a :status.")
    return ResponseHead(int(status), headers, http.end_of_stream, _served_by(message))


def _headers(http: HttpHeaders) -> dict[str, str]:
    """By name in lower case, pseudo-headers too; of a repeated header the last line."""
    return {
        header.key.lower(): raw.decode("latin-1") if (raw := header.raw_value) else header.value
        for header in http.headers.headers
    }


def _subset(message: ProcessingRequest) -> frozenset[str] | None:
    """The addresses a request may go to: a list, or one string with commas; None where nothing is said.

    Entries keep their port; IPv6 addresses are given in their shortest form, in brackets where there is a port, as
    `plain_address` has them. An empty hint is an empty set and admits nobody.
    """
    if not message.HasField("metadata_context"):
        return None
    namespaces = message.metadata_context.filter_metadata
    if SUBSET_NAMESPACE not in namespaces or DESTINATION_SUBSET not in namespaces[SUBSET_NAMESPACE].fields:
        return None
    value = namespaces[SUBSET_NAMESPACE].fields[DESTINATION_SUBSET]
    match value.WhichOneof("kind"):
        case "list_value":
            entries = [item.string_value for item in value.list_value.values]
        case "string_value":
            entries = value.string_value.split(",")
        case _:
            return None
    return frozenset(plain_address(entry.strip()) for entry in entries if entry.strip())


def _served_by(message: ProcessingRequest) -> str | None:
    """The verdict's counterpart in metadata, else what Envoy says of the upstream where it is asked for it."""
    namespaces = message.metadata_context.filter_metadata
    if LOAD_BALANCING in namespaces and DESTINATION_SERVED in namespaces[LOAD_BALANCING].fields:
        return plain_address(namespaces[LOAD_BALANCING].fields[DESTINATION_SERVED].string_value) or None
    if _ATTRIBUTES in message.attributes and UPSTREAM_ADDRESS in message.attributes[_ATTRIBUTES].fields:
        return plain_address(message.attributes[_ATTRIBUTES].fields[UPSTREAM_ADDRESS].string_value) or None
    return None


# --- encoding ----------------------------------------------------------------------------------------------


def _chunks(data: bytes, *, end: bool) -> Iterator[tuple[bytes, bool]]:
    """(bytes, is the last of the body) in order; an empty body still needs one message to carry its end."""
    if len(data) <= MAX_CHUNK_BYTES:
        if data or end:
            yield data, end
        return
    for start in range(0, len(data), MAX_CHUNK_BYTES):
        yield data[start : start + MAX_CHUNK_BYTES], end and start + MAX_CHUNK_BYTES >= len(data)


def _response_chunk(data: bytes, end: bool) -> ProcessingResponse:
    response = ProcessingResponse()
    streamed = response.response_body.response.body_mutation.streamed_response
    streamed.body = data
    streamed.end_of_stream = end
    return response


def _response_trailers() -> ProcessingResponse:
    response = ProcessingResponse()
    response.response_trailers.SetInParent()
    return response


def _immediate(action: Respond) -> ProcessingResponse:
    response = ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = action.status
    immediate.body = action.body
    _set_headers(immediate.headers, action.headers)
    return response
