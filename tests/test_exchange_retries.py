"""What is asked of another endpoint before the client has seen a byte, and what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fakes import endpoint
from picker.exchange import (
    Closed,
    Cut,
    Decided,
    Exchange,
    Forward,
    Limits,
    PassBody,
    PassHead,
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
    Decision,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    Rejection,
    RejectReason,
    ResponseStarted,
)
from playbook import Like, Playbook, unasserted

ID = 7
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
SSE = {"content-type": "text/event-stream; charset=utf-8"}
BUSY = b'{"error":{"message":"The engine is currently busy","code":503}}'
DONE = b"data: [DONE]\n\n"
WORD = b'data: {"object":"chat.completion.chunk","choices":[{"delta":{"content":"Hi"}}]}\n\n'
ROLE = b'data: {"object":"chat.completion.chunk","choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
ABORT = json.dumps({"choices": [{"message": {"role": "assistant", "content": ""}, "finish_reason": "abort"}]}).encode()
ANSWER = json.dumps({"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]}).encode()
NOBODY = Rejection(ID, RejectReason.NO_MATCH, 503, "none")
SPENT = Rejection(ID, RejectReason.SATURATED, 503, "the budget is spent", retry_after=1.0)
FIRST = Report(FirstToken(ID))


@pytest.fixture(autouse=True)
def every_play_is_asserted() -> Iterator[None]:
    yield
    assert unasserted() == []


def forwarded(*, stream: bool = False, path: str = CHAT, again: bool = True, **limits: Any) -> Playbook:
    """A play up to the request on its way to endpoint `a`, of a front end that can send it again."""
    play = Playbook(Exchange(ID, Limits(name_endpoint=False, **limits)))
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "prompt": "x", "stream": stream})
    assert play >> RequestHead("POST", path, {}, again=again) >> RequestBody(body.encode(), end=True) << Submit
    assert play >> Decided(Decision(ID, endpoint("a"))) << Forward
    return play


def begun(headers: dict[str, str] = JSON, status: int = 200, **asked: Any) -> Playbook:
    """A play up to a response head of which nothing is passed on yet."""
    play = forwarded(stream=headers is SSE, **asked)
    assert play >> ResponseHead(status, headers) << Report(ResponseStarted(ID, status, "a:8000"))
    return play


def elsewhere() -> Like:
    return Like(Submit, exclude=frozenset({"a"}))


# --- what is held back, and for how long ---


def test_a_stream_goes_to_its_client_with_its_first_event() -> None:
    assert begun(SSE) >> ResponseBody(ROLE) << PassHead(()) << PassBody(ROLE) >> ResponseBody(WORD) << PassBody << FIRST


def test_a_comment_that_keeps_the_connection_alive_is_passed_on() -> None:
    assert begun(SSE) >> ResponseBody(b": keep-alive\n\n") << PassHead << PassBody


def test_an_answer_in_one_piece_goes_to_its_client_at_once() -> None:
    play = begun() >> ResponseBody(ANSWER, end=True) << PassHead(()) << PassBody(ANSWER, end=True) << FIRST
    assert play << Report(Finished(ID, 200))


def test_a_short_answer_in_pieces_arrives_whole_and_a_long_one_is_not_gathered() -> None:
    play = begun() >> ResponseBody(ANSWER[:20]) >> ResponseBody(ANSWER[20:], end=True)
    assert play << PassHead << PassBody(ANSWER, end=True) << FIRST << Report(Finished(ID, 200))
    long = b'{"choices":[{"text":"' + b"x" * 5000
    assert begun() >> ResponseBody(long) << PassHead << PassBody(long) << FIRST


def test_what_is_no_generation_is_passed_on_as_it_comes() -> None:
    assert begun(path="/v1/embeddings") >> ResponseBody(b'{"da') << PassHead << PassBody(b'{"da') << FIRST


def test_an_error_of_the_request_is_passed_on_with_its_head() -> None:
    play = forwarded() >> ResponseHead(400, JSON) << Report(ResponseStarted(ID, 400, "a:8000")) << PassHead
    assert play >> ResponseBody(b"{}", end=True) << PassBody << Report(Finished(ID, 400))


@pytest.mark.parametrize("status", [400, 404, 408, 429, 500, 501])
def test_these_answers_are_the_clients(status: int) -> None:
    assert forwarded() >> ResponseHead(status, JSON) << Report << PassHead


def test_a_front_end_that_cannot_ask_again_gets_everything_as_it_comes() -> None:
    assert forwarded(again=False) >> ResponseHead(503, JSON) << Report << PassHead
    play = forwarded(again=False, stream=True) >> ResponseHead(200, SSE) << Report << PassHead
    assert play >> ResponseBody(DONE) << PassBody


# --- what another endpoint may better ---


@pytest.mark.parametrize("status", [502, 503, 504])
def test_an_endpoint_that_cannot_serve_is_reported_and_another_is_asked(status: int) -> None:
    play = begun(JSON, status) >> ResponseBody(BUSY, end=True) << Report(Finished(ID, status)) << elsewhere()
    play >> Decided(Decision(ID, endpoint("b"))) << Like(Forward, decision=Like(Decision, endpoint=endpoint("b")))
    play >> ResponseHead(200, JSON) << Report(ResponseStarted(ID, 200, "b:8000"))
    assert play >> ResponseBody(ANSWER, end=True) << PassHead << PassBody << FIRST << Report(Finished(ID, 200))


@pytest.mark.parametrize("nobody", [NOBODY, SPENT])
def test_with_nobody_else_to_ask_the_client_gets_what_the_endpoint_said(nobody: Rejection) -> None:
    headers = JSON | {"retry-after": "3", "x-secret": "s"}
    play = forwarded() >> ResponseHead(503, headers) << Report >> ResponseBody(BUSY, end=True) << Report << Submit
    kept = (("content-type", "application/json"), ("retry-after", "3"))
    assert play >> Decided(nobody) << Respond(503, kept, BUSY)


def test_the_last_attempt_is_handed_on_whatever_it_is() -> None:
    assert forwarded(max_attempts=1) >> ResponseHead(503, JSON) << Report << PassHead


def test_which_statuses_are_tried_again_can_be_said() -> None:
    play = forwarded(retry_statuses=frozenset({500})) >> ResponseHead(500, JSON) << Report
    assert play >> ResponseBody(b"", end=True) << Report(Finished(ID, 500)) << elsewhere()
    assert forwarded(retry_statuses=frozenset()) >> ResponseHead(503, JSON) << Report << PassHead


def test_a_refusal_without_a_body_is_one() -> None:
    play = forwarded() >> ResponseHead(503, {}, end=True) << Report(ResponseStarted(ID, 503, "a:8000"))
    assert play << Report(Finished(ID, 503)) << elsewhere()


def test_a_refusal_too_long_to_keep_is_passed_on() -> None:
    assert begun(JSON, 503) >> ResponseBody(b"x" * 70_000) << PassHead << PassBody


def test_a_draining_engines_empty_answer_is_another_endpoints_to_better() -> None:
    gave_up = Report(Failed(ID, FailureReason.TRUNCATED))
    assert begun() >> ResponseBody(ABORT, end=True) << gave_up << elsewhere()
    assert begun(SSE) >> ResponseBody(DONE) << gave_up << elsewhere()
    assert begun(SSE) >> ResponseBody(DONE[:9]) >> ResponseBody(DONE[9:], end=True) << gave_up << elsewhere()


def test_a_generation_that_ends_with_nothing_is_none_and_other_answers_may_be_empty() -> None:
    for headers in (JSON, SSE):
        play = begun(headers) >> ResponseBody(b"", end=True) << Report(Failed(ID, FailureReason.TRUNCATED))
        assert play << elsewhere()
    assert begun(path="/v1/score") >> ResponseBody(b"", end=True) << PassHead << PassBody << Report(Finished(ID, 200))


def test_a_client_whose_engine_drains_and_is_the_only_one_is_told_to_come_back() -> None:
    play = begun() >> ResponseBody(ABORT, end=True) << Report << Submit
    assert play >> Decided(NOBODY) << Like(Respond, status=503)
    answer = play.exchange.receive(Closed())
    assert answer == []


def test_an_abort_after_output_is_the_clients() -> None:
    said = json.dumps({"choices": [{"message": {"content": "Hi"}, "finish_reason": "abort"}]}).encode()
    assert begun() >> ResponseBody(said, end=True) << PassHead << PassBody << FIRST << Report(Finished(ID, 200))


def test_an_error_event_before_any_output_counts_by_its_code() -> None:
    def event(code: int) -> bytes:
        return b'data: {"error": {"message": "m", "code": %d}}\n\n' % code

    assert begun(SSE) >> ResponseBody(event(503)) << Report(Finished(ID, 503)) << elsewhere()
    assert begun(SSE) >> ResponseBody(event(500)) << PassHead << PassBody


@pytest.mark.parametrize("reason", [FailureReason.RESET, FailureReason.CONNECT])
def test_an_endpoint_that_breaks_off_between_head_and_first_byte_loses_nothing(reason: FailureReason) -> None:
    assert begun(SSE) >> UpstreamFailed(reason) << Report(Failed(ID, reason)) << elsewhere()


def test_after_the_first_byte_nothing_is_tried_again() -> None:
    play = begun(SSE) >> ResponseBody(ROLE) << PassHead << PassBody
    reset = FailureReason.RESET
    assert play >> UpstreamFailed(reason=reset) << Cut(reset) << Report(Failed(ID, reset))


# --- hangs ---


def test_a_hanging_endpoint_is_left_for_another_and_one_that_is_only_slow_is_not() -> None:
    late = Report(Failed(ID, FailureReason.TIMEOUT))
    assert forwarded() >> UpstreamFailed(FailureReason.TIMEOUT, hung=True) << late << elsewhere()
    assert begun(SSE) >> UpstreamFailed(FailureReason.TIMEOUT, hung=True) << late << elsewhere()
    assert forwarded() >> UpstreamFailed(FailureReason.TIMEOUT) << late << Like(Respond, status=504)


# --- what may not be done twice ---


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/reset_prefix_cache", "/anything"])
def test_what_changes_an_engine_is_sent_again_only_if_it_never_arrived(path: str) -> None:
    reset, refused = FailureReason.RESET, FailureReason.CONNECT
    assert forwarded(path=path) >> UpstreamFailed(reset) << Report(Failed(ID, reset)) << Like(Respond, status=502)
    assert forwarded(path=path) >> UpstreamFailed(refused) << Report(Failed(ID, refused)) << elsewhere()
    assert forwarded(path=path) >> ResponseHead(503, JSON) << Report << PassHead


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/rerank?x=1", "/score"]
)
def test_what_only_computes_is_sent_again(path: str) -> None:
    reset = FailureReason.RESET
    assert forwarded(path=path) >> UpstreamFailed(reset) << Report(Failed(ID, reset)) << elsewhere()


# --- errors of ours ---


def test_messages_get_errors_in_anthropics_form() -> None:
    play = forwarded(path="/v1/messages") >> UpstreamFailed(FailureReason.TIMEOUT) << Report << Respond
    assert play
    (answer,) = [action for action in play.actions if isinstance(action, Respond)]
    error = json.loads(answer.body)
    assert (error["type"], error["error"]["type"]) == ("error", "timeout_error")
