"""The messages to a data plane that keeps bodies and shows each in one piece, and endpoints that are known by name."""

from picker.exchange import Forward, PassHead
from picker.types import Decision, Endpoint
from picker.wire.extproc import DESTINATION, LOAD_BALANCING, Codec, ProcessingResponse
from picker.wire.model_span import Edit

BEST, SECOND = Endpoint("a:80", "a:80"), Endpoint("10.0.0.2:80", "10.0.0.2:80")


def codec(**options: object) -> Codec:
    return Codec(mark="7", whole=True, **options)  # type: ignore[arg-type]


def destination(message: ProcessingResponse) -> str:
    return str(message.dynamic_metadata.fields[LOAD_BALANCING].struct_value.fields[DESTINATION].string_value)


def test_the_verdict_answers_the_body_and_brings_nothing_of_it_back() -> None:
    (reply,) = codec().encode(Forward(Decision(1, BEST), b"x" * 200_000))
    assert reply.WhichOneof("response") == "request_body"
    assert reply.ByteSize() < 2_000
    common = reply.request_body.response
    assert not common.HasField("body_mutation")
    assert common.clear_route_cache
    names = [option.header.key for option in common.header_mutation.set_headers]
    assert names == [DESTINATION, "x-picker-request-id"]
    assert "x-picker-endpoint" in common.header_mutation.remove_headers
    assert destination(reply) == "a:80"


def test_a_body_that_was_changed_takes_the_place_of_the_one_that_is_kept() -> None:
    edit = Edit(0, 1, b"y", "y")
    (reply,) = codec().encode(Forward(Decision(1, BEST), b"yx", edit=edit))
    assert reply.request_body.response.body_mutation.body == b"yx"
    options = reply.request_body.response.header_mutation.set_headers
    assert ("content-length", b"2") in [(option.header.key, option.header.raw_value) for option in options]


def test_a_response_of_another_length_goes_without_the_old_one() -> None:
    (reply,) = codec().encode(PassHead((), resized=True))
    assert list(reply.response_headers.response.header_mutation.remove_headers) == ["content-length"]
    (reply,) = codec().encode(PassHead(()))
    assert not reply.response_headers.response.header_mutation.remove_headers


def test_a_request_without_a_body_is_answered_by_its_head() -> None:
    (reply,) = codec().encode(Forward(Decision(1, BEST), b"", bodyless=True))
    assert reply.WhichOneof("response") == "request_headers"


def test_a_head_is_told_to_go_on_only_where_the_body_waits_for_it() -> None:
    going = codec().proceed()
    assert going is not None
    assert going.WhichOneof("response") == "request_headers"
    assert Codec(mark="7").proceed() is None


def test_endpoints_go_by_the_addresses_of_their_names() -> None:
    addresses: dict[str, str] = {}
    known = codec(addresses=addresses)
    addresses["a:80"] = "10.0.0.1:80"  # live
    (reply,) = known.encode(Forward(Decision(1, BEST, (SECOND,)), b"x"))
    assert destination(reply) == "10.0.0.1:80,10.0.0.2:80"
    (reply,) = known.encode(Forward(Decision(1, BEST), b"x"))
    assert destination(reply) == "10.0.0.1:80"
