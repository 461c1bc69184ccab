"""The codec against an independent implementation of the same protobuf API (`envoy-data-plane`, betterproto2)."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker import exchange
from picker.errors import WireError
from picker.types import Decision, Endpoint, FailureReason
from picker.wire import extproc
from picker.wire.extproc import CONTROL_HEADERS, MAX_CHUNK_BYTES, Codec

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of pydantic, for how the package declares validators
    from envoy_data_plane.envoy.config.core import v3 as core
    from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as filters
    from envoy_data_plane.envoy.service.ext_proc import v3
    from envoy_data_plane.google.protobuf import Struct

OVERWRITE = core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
BEST = Endpoint("a", "10.0.0.1:8000")
SECOND = Endpoint("b", "[fd00::2]:8000")


def from_gateway(message: v3.ProcessingRequest) -> extproc.ProcessingRequest:
    return extproc.ProcessingRequest.FromString(bytes(message))


def as_gateway_reads(response: extproc.ProcessingResponse) -> v3.ProcessingResponse:
    """A reply in the other implementation's words; fails where that loses or changes a byte."""
    parsed = v3.ProcessingResponse.parse(response.SerializeToString())
    assert extproc.ProcessingResponse.FromString(bytes(parsed)) == response
    return parsed


def decode(message: v3.ProcessingRequest, codec: Codec | None = None) -> exchange.Event:
    return (codec or Codec()).decode(from_gateway(message))


def encode(action: exchange.Action, codec: Codec | None = None) -> list[v3.ProcessingResponse]:
    return [as_gateway_reads(response) for response in (codec or Codec()).encode(action)]


def headers(*pairs: tuple[str, str], end: bool = False) -> v3.HttpHeaders:
    lines = [core.HeaderValue(key=name, raw_value=value.encode()) for name, value in pairs]
    return v3.HttpHeaders(headers=core.HeaderMap(headers=lines), end_of_stream=end)


def metadata(namespace: str, value: dict[str, object]) -> core.Metadata:
    return core.Metadata(filter_metadata={namespace: Struct.from_dict(value)})


def subset_hint(value: object) -> core.Metadata:
    return metadata("envoy.lb.subset_hint", {"x-gateway-destination-endpoint-subset": value})


def sets(*pairs: tuple[str, str]) -> list[core.HeaderValueOption]:
    return [
        core.HeaderValueOption(
            header=core.HeaderValue(key=name, raw_value=value.encode()),
            append_action=OVERWRITE,
        )
        for name, value in pairs
    ]


def request_chunk(data: bytes, end: bool) -> v3.ProcessingResponse:
    return v3.ProcessingResponse(request_body=_streamed(data, end))


def response_chunk(data: bytes, end: bool) -> v3.ProcessingResponse:
    return v3.ProcessingResponse(response_body=_streamed(data, end))


def _streamed(data: bytes, end: bool) -> v3.BodyResponse:
    chunk = v3.StreamedBodyResponse(body=data, end_of_stream=end)
    return v3.BodyResponse(response=v3.CommonResponse(body_mutation=v3.BodyMutation(streamed_response=chunk)))


def verdict(destination: str, *more: tuple[str, str]) -> v3.ProcessingResponse:
    """The header reply that sends a request somewhere."""
    mutation = v3.HeaderMutation(
        set_headers=sets(("x-gateway-destination-endpoint", destination), *more),
        remove_headers=list(CONTROL_HEADERS),
    )
    return v3.ProcessingResponse(
        request_headers=v3.HeadersResponse(
            response=v3.CommonResponse(header_mutation=mutation, clear_route_cache=True)
        ),
        dynamic_metadata=Struct.from_dict({"envoy.lb": {"x-gateway-destination-endpoint": destination}}),
    )


# --- decoding ----------------------------------------------------------------------------------------------


def test_request_headers_become_a_head_with_lower_case_names() -> None:
    sent = headers((":method", "POST"), (":path", "/v1/chat/completions?x=1"), ("X-Session-Id", "s"))
    assert decode(v3.ProcessingRequest(request_headers=sent)) == exchange.RequestHead(
        method="POST",
        path="/v1/chat/completions?x=1",
        headers={":method": "POST", ":path": "/v1/chat/completions?x=1", "x-session-id": "s"},
        walked=True,
    )


def test_headers_without_raw_value_are_read_from_value() -> None:
    lines = [core.HeaderValue(key=":method", value="GET"), core.HeaderValue(key=":path", value="/health")]
    sent = v3.HttpHeaders(headers=core.HeaderMap(headers=lines), end_of_stream=True)
    event = decode(v3.ProcessingRequest(request_headers=sent))
    assert event == exchange.RequestHead(
        "GET", "/health", {":method": "GET", ":path": "/health"}, end=True, walked=True
    )


def test_header_bytes_that_are_not_text_are_kept() -> None:
    line = core.HeaderValue(key="x-session-id", raw_value=b"\xff\xe9")
    sent = v3.HttpHeaders(headers=core.HeaderMap(headers=[line]))
    event = decode(v3.ProcessingRequest(request_headers=sent))
    assert isinstance(event, exchange.RequestHead)
    assert event.headers["x-session-id"].encode("latin-1") == b"\xff\xe9"


@given(data=st.binary(max_size=200), end=st.booleans())
@settings(max_examples=20, deadline=None)
def test_body_chunks_of_both_directions_are_read(data: bytes, end: bool) -> None:
    body = v3.HttpBody(body=data, end_of_stream=end)
    assert decode(v3.ProcessingRequest(request_body=body)) == exchange.RequestBody(data, end)
    assert decode(v3.ProcessingRequest(response_body=body)) == exchange.ResponseBody(data, end)


def test_request_trailers_end_the_body() -> None:
    message = v3.ProcessingRequest(request_trailers=v3.HttpTrailers())
    assert decode(message) == exchange.RequestBody(b"", end=True)


def test_response_trailers_end_the_response() -> None:
    message = v3.ProcessingRequest(response_trailers=v3.HttpTrailers())
    assert decode(message) == exchange.ResponseBody(b"", end=True)


def test_response_headers_name_the_endpoint_that_served() -> None:
    message = v3.ProcessingRequest(
        response_headers=headers((":status", "200"), ("content-type", "text/event-stream")),
        metadata_context=metadata("envoy.lb", {"x-gateway-destination-endpoint-served": "10.0.0.1:8000"}),
    )
    assert decode(message) == exchange.ResponseHead(
        status=200,
        headers={":status": "200", "content-type": "text/event-stream"},
        served_by="10.0.0.1:8000",
    )


def test_response_headers_without_metadata_name_nobody() -> None:
    event = decode(v3.ProcessingRequest(response_headers=headers((":status", "503"), end=True)))
    assert event == exchange.ResponseHead(503, {":status": "503"}, end=True, served_by=None)


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (["10.0.0.1:8000", "10.0.0.2"], {"10.0.0.1:8000", "10.0.0.2"}),
        ("10.0.0.1:8000, 10.0.0.2", {"10.0.0.1:8000", "10.0.0.2"}),
        (["[fd00::1]:8000", "[fd00::2]"], {"[fd00::1]:8000", "fd00::2"}),
        ("[FD00:0::1]:8000,fd00:0:0::2", {"[fd00::1]:8000", "fd00::2"}),
        (["a:b:c", "pod-7:8000", 7], {"a:b:c", "pod-7:8000"}),
        ([], set()),
        ("", set()),
    ],
)
def test_subset_hint_is_read_from_a_list_or_a_string(hint: object, expected: set[str]) -> None:
    context = subset_hint(hint)
    head = decode(v3.ProcessingRequest(request_headers=headers((":path", "/")), metadata_context=context))
    body = decode(v3.ProcessingRequest(request_body=v3.HttpBody(body=b"x"), metadata_context=context))
    assert isinstance(head, exchange.RequestHead)
    assert isinstance(body, exchange.RequestBody)
    assert head.subset == body.subset == frozenset(expected)


@pytest.mark.parametrize(
    "context",
    [
        metadata("envoy.lb.subset_hint", {"something-else": "10.0.0.1"}),
        metadata("envoy.lb", {"x-gateway-destination-endpoint-subset": ["10.0.0.1"]}),
        subset_hint(7),
    ],
)
def test_metadata_that_is_no_subset_hint_restricts_nothing(context: core.Metadata) -> None:
    event = decode(v3.ProcessingRequest(request_headers=headers((":path", "/")), metadata_context=context))
    assert isinstance(event, exchange.RequestHead)
    assert event.subset is None


def modes(request: int, response: int) -> v3.ProcessingRequest:
    mode = filters.ProcessingModeBodySendMode
    config = v3.ProtocolConfiguration(request_body_mode=mode(request), response_body_mode=mode(response))
    return v3.ProcessingRequest(request_headers=headers((":path", "/")), protocol_config=config)


def test_a_gateway_that_streams_both_bodies_is_accepted() -> None:
    assert isinstance(decode(modes(4, 4)), exchange.RequestHead)


@pytest.mark.parametrize(("request_mode", "response_mode"), [(2, 4), (4, 2), (1, 1), (0, 0)])
def test_a_gateway_in_another_body_mode_is_told_which_it_needs(request_mode: int, response_mode: int) -> None:
    with pytest.raises(WireError, match="FULL_DUPLEX_STREAMED"):
        decode(modes(request_mode, response_mode))


def test_an_empty_message_breaks_the_protocol() -> None:
    with pytest.raises(WireError):
        decode(v3.ProcessingRequest())


def test_response_headers_without_a_status_break_the_protocol() -> None:
    with pytest.raises(WireError, match="status"):
        decode(v3.ProcessingRequest(response_headers=headers(("server", "x"))))


def test_a_stream_that_follows_requests_alone_takes_gateways_that_send_no_more() -> None:
    for response_mode in (4, 0):
        head = decode(modes(4, response_mode), Codec(mark="7-secret"))
        assert isinstance(head, exchange.RequestHead)
        assert not head.followed
    with pytest.raises(WireError, match="FULL_DUPLEX_STREAMED"):
        decode(modes(2, 0), Codec(mark="7-secret"))
    with pytest.raises(WireError, match="--mode lean"):
        decode(modes(4, 0))


@pytest.mark.parametrize("told", ["[fd00::1]:8000", "[FD00:0:0::1]:8000"])
def test_who_served_is_told_by_its_one_address_however_it_is_written(told: str) -> None:
    attributes = {"envoy.filters.http.ext_proc": Struct.from_dict({"upstream.address": told})}
    message = v3.ProcessingRequest(response_headers=headers((":status", "200")), attributes=attributes)
    event = decode(message)
    assert isinstance(event, exchange.ResponseHead)
    assert event.served_by == "[fd00::1]:8000"


def test_attributes_name_who_served_where_metadata_does_not() -> None:
    message = v3.ProcessingRequest(
        response_headers=headers((":status", "200")),
        attributes={"envoy.filters.http.ext_proc": Struct.from_dict({"upstream.address": "10.0.0.3:8000"})},
    )
    event = decode(message)
    assert isinstance(event, exchange.ResponseHead)
    assert event.served_by == "10.0.0.3:8000"


# --- encoding ----------------------------------------------------------------------------------------------


def test_forward_sets_the_destination_twice_and_gives_the_body_back() -> None:
    action = exchange.Forward(Decision(1, BEST), b'{"model":"m"}')
    assert encode(action) == [
        verdict("10.0.0.1:8000", ("content-length", "13")),
        request_chunk(b'{"model":"m"}', True),
    ]


def test_forward_lists_fallbacks_in_order() -> None:
    action = exchange.Forward(Decision(1, BEST, (SECOND,)), b"x")
    assert encode(action)[0] == verdict("10.0.0.1:8000,[fd00::2]:8000", ("content-length", "1"))


def test_forward_names_only_the_best_where_the_data_plane_takes_one_address() -> None:
    action = exchange.Forward(Decision(1, BEST, (SECOND,)), b"x")
    assert encode(action, Codec(fallbacks=False))[0] == verdict("10.0.0.1:8000", ("content-length", "1"))


def test_forward_names_an_address_once() -> None:
    ranks = [Endpoint(f"a#{rank}", BEST.address, rank=rank) for rank in range(2)]
    action = exchange.Forward(Decision(1, ranks[0], (ranks[1], SECOND)), b"x")
    assert encode(action)[0] == verdict("10.0.0.1:8000,[fd00::2]:8000", ("content-length", "1"))


def test_forward_carries_the_mark_for_the_access_log() -> None:
    action = exchange.Forward(Decision(1, BEST), b"x")
    marked = verdict("10.0.0.1:8000", ("x-picker-request-id", "7-secret"), ("content-length", "1"))
    assert encode(action, Codec(mark="7-secret"))[0] == marked


@pytest.mark.parametrize("old", ["x-gateway-inference-objective", "x-gateway-inference-fairness-id", "x-slo-ttft-ms"])
def test_words_to_the_picker_are_removed_by_their_old_and_new_names(old: str) -> None:
    new = "x-llm-d-" + old.removeprefix("x-gateway-").removeprefix("x-")
    assert {old, new, "x-picker-request-id", "x-picker-endpoint"} <= set(CONTROL_HEADERS)


def test_forward_sets_the_headers_of_the_exchange() -> None:
    action = exchange.Forward(Decision(1, BEST), b"x", (("x-data-parallel-rank", "3"),))
    assert encode(action)[0] == verdict("10.0.0.1:8000", ("x-data-parallel-rank", "3"), ("content-length", "1"))


def test_forward_never_removes_the_destination_it_sets() -> None:
    assert "x-gateway-destination-endpoint" not in CONTROL_HEADERS
    assert "x-prefiller-host-port" in CONTROL_HEADERS


def test_forward_without_a_body_is_the_header_reply_alone() -> None:
    action = exchange.Forward(Decision(1, BEST), b"", bodyless=True)
    assert encode(action) == [verdict("10.0.0.1:8000")]


def test_forward_of_an_empty_body_is_one_empty_last_chunk() -> None:
    assert encode(exchange.Forward(Decision(1, BEST), b"")) == [verdict("10.0.0.1:8000"), request_chunk(b"", True)]


def test_request_trailers_are_answered_after_a_body_without_end_mark() -> None:
    codec = Codec()
    decode(v3.ProcessingRequest(request_trailers=v3.HttpTrailers()), codec)
    replies = encode(exchange.Forward(Decision(1, BEST), b"abc"), codec)
    assert replies[1:] == [
        request_chunk(b"abc", False),
        v3.ProcessingResponse(request_trailers=v3.TrailersResponse()),
    ]


def test_pass_head_marks_the_response_and_sets_headers() -> None:
    mutation = v3.HeaderMutation(set_headers=sets(("x-went-into-resp-headers", "true"), ("x-picker-endpoint", "a")))
    assert encode(exchange.PassHead((("x-picker-endpoint", "a"),))) == [
        v3.ProcessingResponse(response_headers=v3.HeadersResponse(response=v3.CommonResponse(header_mutation=mutation)))
    ]


def test_response_chunks_come_back_as_they_are() -> None:
    assert encode(exchange.PassBody(b"data: x\n\n")) == [response_chunk(b"data: x\n\n", False)]
    assert encode(exchange.PassBody(b"", end=True)) == [response_chunk(b"", True)]


def test_response_trailers_are_answered_after_a_body_without_end_mark() -> None:
    codec = Codec()
    event = decode(v3.ProcessingRequest(response_trailers=v3.HttpTrailers()), codec)
    assert isinstance(event, exchange.ResponseBody)
    replies = encode(exchange.PassBody(event.data, event.end), codec)
    assert replies == [v3.ProcessingResponse(response_trailers=v3.TrailersResponse())]


def test_respond_is_an_immediate_response() -> None:
    sent = (("content-type", "application/json"), ("retry-after", "2"))
    (reply,) = encode(exchange.Respond(429, sent, b'{"error":{}}'))
    immediate = reply.immediate_response
    assert immediate is not None
    assert immediate.status is not None
    assert immediate.status.code == 429
    assert immediate.headers == v3.HeaderMutation(set_headers=sets(*sent))
    assert immediate.body == b'{"error":{}}'


def test_an_action_without_counterpart_is_refused() -> None:
    with pytest.raises(ValueError, match="Cut"):
        Codec().encode(exchange.Cut(FailureReason.RESET))


sizes = st.one_of(
    st.integers(0, 100),
    st.sampled_from([MAX_CHUNK_BYTES * n + d for n in (1, 2) for d in (-1, 0, 1)]),
)


@given(size=sizes)
@settings(max_examples=25, deadline=None)
def test_bodies_are_cut_into_legal_chunks_that_end_once(size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    requests = Codec().encode(exchange.Forward(Decision(1, BEST), body))[1:]
    chunks = [reply.request_body.response.body_mutation.streamed_response for reply in requests]
    echoes = Codec().encode(exchange.PassBody(body, end=True))
    assert [reply.response_body.response.body_mutation.streamed_response for reply in echoes] == chunks
    assert b"".join(chunk.body for chunk in chunks) == body
    assert all(len(chunk.body) <= 62_000 for chunk in chunks)
    assert [chunk.end_of_stream for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
