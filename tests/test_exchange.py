import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import endpoint
from picker.errors import WireError
from picker.exchange import (
    Action,
    Closed,
    Cut,
    Decided,
    Event,
    Exchange,
    Forward,
    Limits,
    PassBody,
    PassHead,
    Phase,
    Report,
    RequestBody,
    RequestHead,
    Respond,
    ResponseBody,
    ResponseHead,
    Submit,
    UpstreamFailed,
)
from picker.types import (
    CallKind,
    Decision,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    Rejection,
    RejectReason,
    ResponseStarted,
    Usage,
)
from picker.wire.openai import parse_call
from playbook import Like, Playbook, unasserted

ID = 7
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
SSE = {"content-type": "text/event-stream; charset=utf-8"}
NAMED = (("x-picker-endpoint", "a"), ("x-picker-request-id", "7"))

ANSWER = json.dumps(
    {
        "object": "chat.completion",
        "choices": [{"message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
    }
).encode()
ANSWER_USAGE = Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=4)

ROLE = b'data: {"object":"chat.completion.chunk","choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
WORD = b'data: {"object":"chat.completion.chunk","choices":[{"delta":{"content":"Hi"}}]}\n\n'
STOP = b'data: {"object":"chat.completion.chunk","choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def every_play_is_asserted() -> Iterator[None]:
    yield
    assert unasserted() == []


def exchange(**limits: Any) -> Exchange:
    return Exchange(ID, Limits(**limits))


def chat(text: str = "Hello", **fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **fields}).encode()


def head(path: str = CHAT, headers: Mapping[str, str] | None = None, **changes: Any) -> RequestHead:
    return RequestHead("POST", path, headers or {}, **changes)


def to(name: str = "a", **changes: Any) -> Decision:
    return Decision(ID, endpoint(name, **changes))


def failed(reason: FailureReason) -> Report:
    return Report(Failed(ID, reason))


def asked(body: bytes | None = None, **limits: Any) -> Playbook:
    """A play up to the question where to go."""
    play = Playbook(exchange(**limits))
    assert play >> head() >> RequestBody(chat() if body is None else body, end=True) << Submit
    return play


def upstream(body: bytes | None = None, **limits: Any) -> Playbook:
    """A play up to the request on its way to endpoint `a`."""
    play = asked(body, **limits)
    assert play >> Decided(to("a")) << Forward
    return play


def responding(headers: Mapping[str, str] = JSON, *, stream: bool = False, status: int = 200) -> Playbook:
    """A play up to the head of the response of endpoint `a`."""
    play = upstream(chat(stream=stream))
    assert play >> ResponseHead(status, headers) << Report(ResponseStarted(ID, status, "a:8000")) << PassHead(NAMED)
    return play


def error_of(respond: Respond) -> dict[str, Any]:
    assert dict(respond.headers)["content-type"] == "application/json"
    error: dict[str, Any] = json.loads(respond.body)["error"]
    return error


# --- the playbook itself ---


def test_a_play_that_goes_otherwise_shows_the_difference() -> None:
    play = asked()
    with pytest.raises(AssertionError) as caught:
        assert play >> Decided(to("a")) << Like(Forward, bodyless=True)
    assert "- << Forward(bodyless=True, ...)" in str(caught.value)
    assert "+ << Forward(decision=Decision(" in str(caught.value)


@pytest.mark.parametrize("expected", [(Forward, Forward), ()])
def test_a_play_fails_for_an_action_missing_or_too_many(expected: tuple[type, ...]) -> None:
    play = asked() >> Decided(to("a"))
    for action in expected:
        play << action
    with pytest.raises(AssertionError, match="went otherwise"):
        assert play


def test_a_play_that_nobody_asserts_is_noticed() -> None:
    assert Playbook(exchange()) >> head()
    forgotten = Playbook(exchange()) >> head()
    assert unasserted() == [forgotten]
    assert unasserted() == []


# --- a request that goes well ---


def test_a_plain_chat() -> None:
    assert (
        Playbook(exchange())
        >> head(headers={"content-length": str(len(chat()))})
        >> RequestBody(chat(), end=True)
        << Like(Submit, call=parse_call(CHAT, chat()))
        >> Decided(to("a"))
        << Forward(to("a"), chat())
        >> ResponseHead(200, JSON)
        << Report(ResponseStarted(ID, 200, "a:8000"))
        << PassHead(NAMED)
        >> ResponseBody(ANSWER, end=True)
        << PassBody(ANSWER, end=True)
        << Report(FirstToken(ID))
        << Report(Finished(ID, 200, ANSWER_USAGE))
    )


def test_a_streamed_chat_tells_its_first_token_when_it_passes_and_its_usage_at_the_end() -> None:
    assert (
        responding(SSE, stream=True)
        >> ResponseBody(ROLE)
        << PassBody(ROLE)
        >> ResponseBody(WORD)
        << PassBody(WORD)
        << Report(FirstToken(ID))
        >> ResponseBody(WORD + STOP)
        << PassBody(WORD + STOP)
        >> ResponseBody(USAGE + DONE)
        << PassBody(USAGE + DONE)
        >> ResponseBody(b"", end=True)
        << PassBody(b"", end=True)
        << Report(Finished(ID, 200, Usage(9, 1)))
    )


def test_a_response_comes_to_its_client_as_it_came_to_us() -> None:
    play = responding(SSE, stream=True)
    body = ROLE + WORD + STOP + DONE
    for number in range(len(body)):
        play.exchange.receive(ResponseBody(body[number : number + 1]))
    assert play >> ResponseBody(b"", end=True) << PassBody << Report(Finished(ID, 200))


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, len(chat("Grüße " * 9))), max_size=6), declared=st.booleans())
def test_a_body_in_pieces_is_the_body_as_a_whole(cuts: list[int], declared: bool) -> None:
    body = chat("Grüße " * 9)
    edges = [0, *sorted(cuts), len(body)]
    pieces = [body[start:end] for start, end in itertools.pairwise(edges)]
    play = Playbook(exchange())
    assert play >> head(headers={"content-length": str(len(body))} if declared else {})
    for piece in pieces:
        assert play >> RequestBody(piece)
    assert (
        play
        >> RequestBody(b"", end=True)
        << Like(Submit, call=parse_call(CHAT, body))
        >> Decided(to())
        << Forward(to(), body)
    )


def test_a_request_without_a_body_goes_on_without_one() -> None:
    assert (
        Playbook(exchange())
        >> RequestHead("GET", "/v1/models", {}, end=True)
        << Like(Submit, call=Like(object, kind=CallKind.OTHER, model=None, prompt=b""))
        >> Decided(to())
        << Forward(to(), b"", bodyless=True)
        >> ResponseHead(200, JSON)
        << Report(ResponseStarted(ID, 200, "a:8000"))
        << PassHead(NAMED)
        >> ResponseBody(b"{}", end=True)
        << PassBody
        << Report(FirstToken(ID))
        << Report(Finished(ID, 200))
    )


@pytest.mark.parametrize("headers", [{}, JSON, {"content-length": "0"}, {"content-type": "text/plain"}])
def test_a_response_that_ends_with_its_head_is_complete(headers: dict[str, str]) -> None:
    assert (
        Playbook(exchange())
        >> RequestHead("GET", "/health", {}, end=True)
        << Submit
        >> Decided(to())
        << Forward
        >> ResponseHead(200, headers, end=True)
        << Report(ResponseStarted(ID, 200, "a:8000"))
        << PassHead(NAMED, end=True)
        << Report(Finished(ID, 200))
    )


def test_a_path_we_do_not_know_is_never_refused_for_its_body() -> None:
    play = Playbook(exchange()) >> head("/v1/audio/transcriptions") >> RequestBody(b"\x00\xff not json", end=True)
    assert play << Submit >> Decided(to()) << Forward(to(), b"\x00\xff not json")


def test_an_error_of_the_engine_is_handed_on_finished_with_its_status_and_has_no_token() -> None:
    body = b'{"error": {"message": "too long", "code": 400}}'
    assert (
        responding(status=400) >> ResponseBody(body, end=True) << PassBody(body, end=True) << Report(Finished(ID, 400))
    )


def test_an_error_event_within_a_stream_is_the_status_it_finished_with() -> None:
    error = b'data: {"error": {"message": "EngineDead", "type": "InternalServerError", "code": 500}}\n\n'
    assert (
        responding(SSE, stream=True)
        >> ResponseBody(error + DONE, end=True)
        << PassBody(error + DONE, end=True)
        << Report(Finished(ID, 500))
    )


# --- what the decision depends on ---


def test_the_session_comes_from_the_body_or_from_a_header_which_wins() -> None:
    body = chat(session_id="of the body")
    assert (
        Playbook(exchange())
        >> head()
        >> RequestBody(body, end=True)
        << Like(Submit, call=Like(object, session="of the body"))
    )
    headers = {"session-id": "second", "x-session-id": "first", "x-other": "x"}
    assert (
        Playbook(exchange())
        >> head(headers=headers)
        >> RequestBody(body, end=True)
        << Like(Submit, call=Like(object, session="first"))
    )
    assert (
        Playbook(exchange())
        >> RequestHead("GET", "/", headers, end=True)
        << Like(Submit, call=Like(object, session="first"))
    )


def test_a_subset_may_come_with_the_head_or_later_with_the_body() -> None:
    early, late = frozenset({"10.0.0.1"}), frozenset({"10.0.0.2"})
    assert Playbook(exchange()) >> head(subset=early) >> RequestBody(chat(), end=True) << Like(Submit, subset=early)
    assert (
        Playbook(exchange())
        >> head(subset=early)
        >> RequestBody(chat()[:9], subset=late)
        >> RequestBody(chat()[9:], end=True)
        << Like(Submit, subset=late)
    )


def test_the_data_parallel_rank_is_pinned_by_a_header() -> None:
    assert asked() >> Decided(to("a", rank=0)) << Like(Forward, set_headers=(("x-data-parallel-rank", "0"),))


# --- what the client is told ---


def test_a_client_is_told_the_endpoint_that_served_it_also_when_that_is_another() -> None:
    moved = (("x-picker-endpoint", "b:8000"), ("x-picker-request-id", "7"))
    served = Report(ResponseStarted(ID, 200, "b:8000"))
    assert upstream() >> ResponseHead(200, JSON, served_by="b:8000") << served << PassHead(moved)
    served = Report(ResponseStarted(ID, 200, "a:8000"))
    assert upstream() >> ResponseHead(200, JSON, served_by="a:8000") << served << PassHead(NAMED)


def test_who_served_is_left_open_where_the_data_plane_may_have_gone_to_a_fallback() -> None:
    play = Playbook(exchange())
    assert play >> head(walked=True) >> RequestBody(chat(), end=True) << Submit >> Decided(to("a")) << Forward
    assert play >> ResponseHead(200, JSON) << Report(ResponseStarted(ID, 200, None)) << PassHead(NAMED)


# --- priorities ---


@pytest.mark.parametrize(
    ("headers", "priority"),
    [
        ({"x-gateway-inference-objective": "chat"}, 10),
        ({"x-llm-d-inference-objective": "batch", "x-gateway-inference-objective": "chat"}, -5),
        ({"x-llm-d-inference-objective": "unheard-of"}, 0),
        ({}, 3),
    ],
)
def test_an_objective_named_in_a_header_gives_its_priority(headers: dict[str, str], priority: int) -> None:
    play = Playbook(exchange(objectives={"chat": 10, "batch": -5}))
    call, body = parse_call(CHAT, chat(priority=3)), chat(priority=3)
    expected = Like(Submit, call=msgspec.structs.replace(call, priority=priority))
    assert play >> head(headers=headers) >> RequestBody(body, end=True) << expected


def test_without_objectives_a_header_changes_nothing() -> None:
    play, body = Playbook(exchange()), chat(priority=3)
    asked = head(headers={"x-gateway-inference-objective": "chat"})
    assert play >> asked >> RequestBody(body, end=True) << Like(Submit, call=parse_call(CHAT, body))


def test_a_client_is_told_nothing_where_that_is_not_wanted() -> None:
    assert upstream(name_endpoint=False) >> ResponseHead(200, JSON) << Report << PassHead(())


# --- refusals ---


def test_a_body_that_says_it_is_too_large_is_refused_unread() -> None:
    play = Playbook(exchange(max_body_bytes=10))
    assert play >> head(headers={"content-length": "11"}) << Like(Respond, status=413)
    assert "10 bytes" in error_of(play.last(Respond))["message"]
    assert play >> RequestBody(b"x" * 11, end=True)
    assert play.exchange.phase is Phase.DONE


def test_a_body_that_turns_out_too_large_is_refused_when_it_does() -> None:
    play = Playbook(exchange(max_body_bytes=10))
    assert (
        play >> head() >> RequestBody(b"x" * 10) >> RequestBody(b"x") << Like(Respond, status=413) >> RequestBody(b"x")
    )


def test_a_body_of_the_largest_size_is_taken() -> None:
    size = len(chat())
    play = Playbook(exchange(max_body_bytes=size)) >> head(headers={"content-length": str(size)})
    assert play >> RequestBody(chat(), end=True) << Submit


@pytest.mark.parametrize("length", ["", "many", "-1", "1e3", "²", "٣"])
def test_a_length_that_is_no_number_is_left_to_be_counted(length: str) -> None:
    play = Playbook(exchange(max_body_bytes=1000)) >> head(headers={"content-length": length})
    assert play >> RequestBody(chat(), end=True) << Submit


def test_a_length_of_any_number_of_digits_is_too_large() -> None:
    assert Playbook(exchange()) >> head(headers={"content-length": "9" * 5000}) << Like(Respond, status=413)


def test_a_body_that_is_no_chat_is_400_without_quoting_it() -> None:
    play = Playbook(exchange()) >> head() >> RequestBody(b'{"messages": "SECRET', end=True) << Like(Respond, status=400)
    assert play
    error = error_of(play.last(Respond))
    assert error["code"] == 400
    assert "SECRET" not in json.dumps(error)


def test_a_wrong_field_is_named_in_the_error() -> None:
    play = Playbook(exchange()) >> head() >> RequestBody(b'{"messages": []}', end=True) << Like(Respond, status=400)
    assert play
    assert error_of(play.last(Respond))["param"] == "body.messages"


@pytest.mark.parametrize(("retry_after", "header"), [(None, None), (0.2, "1"), (2.6, "3")])
def test_a_rejection_is_answered_with_its_status_and_when_to_come_again(
    retry_after: float | None, header: str | None
) -> None:
    rejection = Rejection(ID, RejectReason.SATURATED, 429, "Full.", retry_after)
    play = asked() >> Decided(rejection) << Like(Respond, status=429)
    assert play
    assert error_of(play.last(Respond))["message"] == "Full."
    assert dict(play.last(Respond).headers).get("retry-after") == header


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        (RejectReason.SATURATED, "rejected-saturated"),
        (RejectReason.NO_ENDPOINTS, "rejected-no-endpoints"),
        (RejectReason.NO_MATCH, "rejected-no-endpoints"),
        (RejectReason.EXPIRED, "rejected-ttl-expired"),
        (RejectReason.SHUTDOWN, "rejected-shutting-down"),
        (RejectReason.UNKNOWN_MODEL, None),
    ],
)
def test_a_rejection_says_why_in_the_words_of_llm_ds_endpoint_picker(reason: RejectReason, word: str | None) -> None:
    play = asked() >> Decided(Rejection(ID, reason, 503, "No.")) << Like(Respond, status=503)
    assert play
    assert dict(play.last(Respond).headers).get("x-llm-d-request-dropped-reason") == word


@pytest.mark.parametrize("followed", [True, False])
def test_a_stream_counts_as_one_only_where_its_first_token_will_be_seen(followed: bool) -> None:
    play = Playbook(exchange())
    assert play >> head(followed=followed) >> RequestBody(chat(stream=True), end=True) << Submit
    assert play.last(Submit).call.stream is followed


# --- endpoints that fail ---


@pytest.mark.parametrize("reason", [FailureReason.CONNECT, FailureReason.RESET])
def test_an_endpoint_that_fails_before_its_first_byte_is_replaced(reason: FailureReason) -> None:
    call = parse_call(CHAT, chat())
    assert (
        upstream()
        >> UpstreamFailed(reason)
        << failed(reason)
        << Like(Submit, call=call, exclude=frozenset({"a"}))
        >> Decided(to("b"))
        << Forward(to("b"), chat())
        >> UpstreamFailed(reason)
        << failed(reason)
        << Like(Submit, call=call, exclude=frozenset({"a", "b"}))
        >> Decided(to("c"))
        << Forward(to("c"), chat())
        >> ResponseHead(200, JSON)
        << Report(ResponseStarted(ID, 200, "c:8000"))
        << PassHead((("x-picker-endpoint", "c"), ("x-picker-request-id", "7")))
        >> ResponseBody(ANSWER, end=True)
        << PassBody
        << Report(FirstToken(ID))
        << Report(Finished(ID, 200, ANSWER_USAGE))
    )


def test_a_retry_keeps_the_subset() -> None:
    subset = frozenset({"10.0.0.1"})
    play = Playbook(exchange()) >> head(subset=subset) >> RequestBody(chat(), end=True) << Submit
    play = play >> Decided(to()) << Forward >> UpstreamFailed(FailureReason.CONNECT) << Report
    assert play << Like(Submit, subset=subset, exclude=frozenset({"a"}))


def test_when_the_attempts_are_used_up_the_answer_is_502() -> None:
    play = upstream(max_attempts=2)
    assert play >> UpstreamFailed(FailureReason.CONNECT) << failed(FailureReason.CONNECT) << Submit
    assert play >> Decided(to("b")) << Forward
    assert play >> UpstreamFailed(FailureReason.CONNECT) << failed(FailureReason.CONNECT) << Like(Respond, status=502)
    assert "2 tried" in error_of(play.last(Respond))["message"]


def test_when_nobody_else_is_left_to_try_the_failure_is_the_answer() -> None:
    play = upstream() >> UpstreamFailed(FailureReason.CONNECT) << failed(FailureReason.CONNECT) << Submit
    assert play >> Decided(Rejection(ID, RejectReason.NO_MATCH, 503, "Nobody.")) << Like(Respond, status=502)
    assert "connect" in error_of(play.last(Respond))["message"]


def test_a_retry_may_be_refused_for_other_reasons() -> None:
    play = upstream() >> UpstreamFailed(FailureReason.CONNECT) << failed(FailureReason.CONNECT) << Submit
    assert play >> Decided(Rejection(ID, RejectReason.NO_ENDPOINTS, 503, "Nobody.")) << Like(Respond, status=503)


def test_a_request_nobody_may_take_is_503() -> None:
    assert asked() >> Decided(Rejection(ID, RejectReason.NO_MATCH, 503, "Nobody.")) << Like(Respond, status=503)


def test_an_unknown_model_is_404_and_names_the_field() -> None:
    play = asked() >> Decided(Rejection(ID, RejectReason.UNKNOWN_MODEL, 404, "No such model."))
    assert play << Like(Respond, status=404)
    assert error_of(play.last(Respond)) == {
        "message": "No such model.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


@pytest.mark.parametrize(
    ("reason", "status"),
    [(FailureReason.TIMEOUT, 504), (FailureReason.SHUTDOWN, 503), (FailureReason.TRUNCATED, 502)],
)
def test_other_failures_are_answered_without_a_retry(reason: FailureReason, status: int) -> None:
    assert upstream() >> UpstreamFailed(reason) << failed(reason) << Like(Respond, status=status)


def test_a_failure_amid_the_response_cuts_the_client_off() -> None:
    play = responding() >> ResponseBody(ANSWER[:9]) << PassBody(ANSWER[:9]) << Report(FirstToken(ID))
    assert play >> UpstreamFailed(FailureReason.RESET) << Cut(FailureReason.RESET) << failed(FailureReason.RESET)
    assert play.exchange.phase is Phase.DONE


@pytest.mark.parametrize("body", [b"", ROLE, ROLE + WORD, ROLE + WORD + STOP[:-9]])
def test_a_stream_that_ends_without_its_end_marker_is_truncated(body: bytes) -> None:
    play = responding(SSE, stream=True)
    play.exchange.receive(ResponseBody(body))
    assert play >> ResponseBody(b"", end=True) << PassBody(b"", end=True) << failed(FailureReason.TRUNCATED)


def test_an_answer_the_engine_gave_up_before_any_output_is_no_answer() -> None:
    body = b'{"choices": [{"message": {"role": "assistant", "content": null}, "finish_reason": "abort"}]}'
    play = responding() >> ResponseBody(body, end=True) << PassBody << Report(FirstToken(ID))
    assert play << failed(FailureReason.TRUNCATED)


# --- clients that leave ---


@pytest.mark.parametrize("reason", [FailureReason.CLIENT_GONE, FailureReason.SHUTDOWN])
def test_a_client_that_leaves_is_reported_once_if_a_decision_was_asked_for(reason: FailureReason) -> None:
    assert Playbook(exchange()) >> Closed(reason) >> Closed(reason)
    assert Playbook(exchange()) >> head() >> Closed(reason) >> RequestBody(chat(), end=True)
    assert asked() >> Closed(reason) << failed(reason) >> Decided(to()) >> Closed(reason)
    assert upstream() >> Closed(reason) << failed(reason) >> ResponseHead(200, JSON) >> Closed(reason)
    assert responding() >> Closed(reason) << failed(reason) >> ResponseBody(ANSWER, end=True)
    play = upstream() >> UpstreamFailed(FailureReason.CONNECT) << failed(FailureReason.CONNECT) << Submit
    assert play >> Closed(reason) << failed(reason)


def test_a_client_that_leaves_after_the_end_changes_nothing() -> None:
    play = responding() >> ResponseBody(ANSWER, end=True) << PassBody << Report(FirstToken(ID)) << Report
    assert play >> Closed() >> ResponseBody(b"late") >> UpstreamFailed(FailureReason.RESET) >> head()
    assert asked() >> Decided(Rejection(ID, RejectReason.EXPIRED, 429, "")) << Respond >> Closed()


# --- data planes that break the protocol ---

EVENTS: dict[str, Event] = {
    "head": head(),
    "body": RequestBody(b"{}"),
    "decided": Decided(to()),
    "failed": UpstreamFailed(FailureReason.RESET),
    "response": ResponseHead(200, JSON),
    "chunk": ResponseBody(b"{}"),
}
LEGAL = {
    Phase.HEAD: {"head"},
    Phase.BODY: {"body"},
    Phase.DECIDING: {"decided"},
    Phase.UPSTREAM: {"failed", "response"},
    Phase.RESPONSE: {"failed", "chunk"},
}


def at(phase: Phase) -> Playbook:
    match phase:
        case Phase.DECIDING:
            return asked()
        case Phase.UPSTREAM:
            return upstream()
        case Phase.RESPONSE:
            return responding()
    play = Playbook(exchange())
    assert play if phase is Phase.HEAD else play >> head()
    return play


@pytest.mark.parametrize("phase", LEGAL)
def test_an_event_out_of_order_is_an_error_that_loses_no_report(phase: Phase) -> None:
    for name in EVENTS.keys() - LEGAL[phase]:
        play = at(phase)
        with pytest.raises(WireError, match="broke the protocol") as caught:
            play.exchange.receive(EVENTS[name])
        assert caught.value.status == 500
        play = play >> Closed()
        assert play << failed(FailureReason.CLIENT_GONE) if phase not in (Phase.HEAD, Phase.BODY) else play


# --- the promise, whatever happens ---


def shell_event(data: st.DataObject, subject: Exchange) -> Event:
    """One event that a correct data plane could send at this point, or one it could not."""
    match subject.phase:
        case Phase.HEAD:
            legal = st.sampled_from([head(), head("/v1/other", {"content-length": "50"}), head(end=True)])
        case Phase.BODY:
            legal = st.sampled_from([RequestBody(chat()), RequestBody(b"", end=True), RequestBody(b"x" * 200)])
        case Phase.DECIDING:
            no = Rejection(ID, RejectReason.NO_ENDPOINTS, 503, "")
            legal = st.sampled_from([Decided(to("a")), Decided(to("b")), Decided(to("c", rank=1)), Decided(no)])
        case Phase.UPSTREAM:
            legal = st.one_of(
                st.builds(UpstreamFailed, st.sampled_from(FailureReason)),
                st.builds(
                    ResponseHead,
                    status=st.sampled_from([200, 204, 400, 500]),
                    headers=st.sampled_from([JSON, SSE, {}]),
                    end=st.booleans(),
                    served_by=st.sampled_from([None, "a:8000", "b:8000"]),
                ),
            )
        case _:
            legal = st.one_of(
                st.builds(UpstreamFailed, st.sampled_from(FailureReason)),
                st.builds(ResponseBody, st.sampled_from([b"", ROLE, WORD, DONE, ANSWER, b"\xff"]), end=st.booleans()),
            )
    rare = st.one_of(st.builds(Closed, st.sampled_from(FailureReason)), st.sampled_from(list(EVENTS.values())))
    return data.draw(rare if data.draw(st.integers(0, 9)) == 0 else legal)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_happens_every_decision_is_reported_ended_exactly_once(data: st.DataObject) -> None:
    subject = exchange(max_body_bytes=150)
    open_asks = 0  # decisions asked for and neither reported ended nor rejected
    answered = cut = 0
    for _ in range(30):
        if subject.phase is Phase.DONE:
            break
        event = shell_event(data, subject)
        asking = subject.phase is Phase.DECIDING
        try:
            actions = subject.receive(event)
        except WireError:
            continue
        if asking and isinstance(event, Decided) and isinstance(event.outcome, Rejection):
            open_asks -= 1
        for action in actions:
            open_asks += step(action, open_asks)
        answered += sum(isinstance(action, Respond | PassHead) for action in actions)
        cut += sum(isinstance(action, Cut) for action in actions)
    for action in subject.receive(Closed()):
        open_asks += step(action, open_asks)
    assert open_asks == 0
    assert answered <= 1
    assert cut <= 1
    assert subject.receive(Closed()) == []
    assert subject.phase is Phase.DONE


def step(action: Action, open_asks: int) -> int:
    """How an action changes the number of open questions and decisions; a fact needs one to be about."""
    match action:
        case Submit():
            assert open_asks == 0
            return 1
        case Report(Finished() | Failed()):
            assert open_asks == 1
            return -1
        case Report() | Forward() | PassHead() | PassBody():
            # The body's last bytes and its reports come in one list, the terminal report last.
            assert open_asks == 1
    return 0


def test_what_people_and_engines_say_is_in_no_repr() -> None:
    decision = Decision(1, endpoint("a"))
    for told in (
        RequestBody(b"SECRET"),
        ResponseBody(b"SECRET", end=True),
        PassBody(b"SECRET"),
        Forward(decision, b"SECRET"),
    ):
        assert "SECRET" not in repr(told)
    assert repr(ResponseBody(b"SECRET", end=True)) == "ResponseBody(end=True)"


def test_events_and_actions_cannot_be_changed_and_are_equal_only_to_their_kind() -> None:
    with pytest.raises(AttributeError):
        RequestBody(b"x").end = True  # type: ignore[misc]
    assert PassBody(b"x") == PassBody(b"x")
    assert PassBody(b"x") != ResponseBody(b"x")  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("again", [False, True])
def test_a_response_that_passes_holds_no_request(again: bool) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "long"}], "stream": True}).encode()
    mine = sys.getrefcount(body)
    talk = Exchange(ID, Limits())
    talk.receive(RequestHead("POST", CHAT, {}, again=again))
    talk.receive(RequestBody(body, end=True))
    talk.receive(Decided(Decision(ID, endpoint("a"))))
    talk.receive(ResponseHead(200, SSE))
    talk.receive(ResponseBody(WORD))
    assert sys.getrefcount(body) == mine


def test_tokens_pass_once_their_like_has_been_seen_and_none_before_a_response() -> None:
    talk = Exchange(ID, Limits())
    assert not talk.passes(WORD, 0, len(WORD))
    talk.receive(RequestHead("POST", CHAT, {}, again=True))
    talk.receive(RequestBody(b'{"messages":[{"role":"user","content":"x"}],"stream":true}', end=True))
    talk.receive(Decided(Decision(ID, endpoint("a"))))
    talk.receive(ResponseHead(200, SSE))
    for expected in (False, False, True):
        assert talk.passes(WORD, 0, len(WORD)) is expected
        talk.receive(ResponseBody(WORD))
    assert not talk.passes(DONE, 0, len(DONE))
