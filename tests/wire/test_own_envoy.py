"""A request in one message, as Envoy sends it, and the verdict, as Envoy's own classes read it."""

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.errors import WireError
from picker.wire.own_envoy import CARRIED, attributes, decode, verdict

ProcessingRequest = external_processor_pb2.ProcessingRequest
ProcessingResponse = external_processor_pb2.ProcessingResponse


def message(body: bytes, told: dict[str, str], *, end: bool = True) -> bytes:
    made = ProcessingRequest()
    made.request_body.body = body
    made.request_body.end_of_stream = end
    made.metadata_context.SetInParent()
    for name, value in told.items():
        made.attributes["envoy.filters.http.ext_proc"].fields[name].string_value = value
    made.protocol_config.request_body_mode = 2
    return bytes(made.SerializeToString())


@given(st.binary(max_size=300), st.dictionaries(st.sampled_from(["a", "x-session-id"]), st.text(max_size=200)))
@settings(max_examples=30)
def test_a_request_is_read_with_the_headers_that_were_asked_for(body: bytes, headers: dict[str, str]) -> None:
    path, request_id, *names = attributes(headers)
    told = {path: "/v1/x?y=1", request_id: "mine"} | dict(zip(names, headers.values(), strict=True))
    whole = decode(message(body, told))
    assert whole is not None
    assert (whole.path, whole.body) == ("/v1/x?y=1", body)
    raw = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    assert whole.headers == raw | {"x-request-id": "mine"}


def test_a_header_that_is_no_text_is_read_all_the_same() -> None:
    sent = message(b"{}", {"request.path": "/", "request.headers['a']": "??"})
    whole = decode(sent.replace(b"??", b"\xff\xfe"))
    assert whole is not None
    assert whole.headers == {"a": "\xff\xfe"}


def test_what_is_not_a_whole_request_is_left_to_others() -> None:
    told = {"request.path": "/"}
    head = ProcessingRequest()
    head.request_headers.end_of_stream = True
    assert decode(head.SerializeToString()) is None
    assert decode(message(b"{}", told, end=False)) is None
    assert decode(message(b"{}", {})) is None
    assert decode(message(b"{}", {"request.id": "mine"})) is None
    assert decode(b"") is None


@given(st.data())
@settings(max_examples=50)
def test_a_message_that_breaks_off_is_refused_or_left(data: st.DataObject) -> None:
    whole = message(b"body" * 50, {"request.path": "/" * 200})
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        found = decode(cut)
    except WireError:
        return
    assert found is None or found.body == b"body" * 50


def test_a_length_beyond_the_message_is_an_error() -> None:
    for wrong in (b"\x22\xff", b"\x22\x03\x0a\x7fx", b"\x22\x02\x10\x01\x4a\x7f"):
        with pytest.raises(WireError):
            decode(wrong)


@given(st.text("abc.:,", max_size=400), st.text(min_size=1, max_size=200))
@settings(max_examples=30)
def test_envoy_reads_the_verdict_as_it_is_meant(destination: str, mark: str) -> None:
    read = ProcessingResponse.FromString(verdict(destination, [("x-picker-request-id", "17")]))
    told = read.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    assert {name: value.string_value for name, value in told.items()} == {
        "x-gateway-destination-endpoint": destination,
        "x-picker-request-id": "17",
    }
    assert read.WhichOneof("response") == "request_body"
    assert not read.request_body.HasField("response")


def test_another_body_goes_with_its_length() -> None:
    read = ProcessingResponse.FromString(verdict("a:1", [], b"x" * 300))
    told = read.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    assert told["content-length"].string_value == "300"
    assert read.request_body.response.body_mutation.body == b"x" * 300


def test_no_header_is_set_that_envoy_is_not_told_to_look_for() -> None:
    with pytest.raises(KeyError):
        verdict("a:1", [("x-anything", "1")])
    assert "content-length" in CARRIED
