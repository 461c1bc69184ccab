"""A request for another model than its client names: its body, its decision, its answer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import endpoint
from picker.exchange import (
    Action,
    Decided,
    Exchange,
    Forward,
    Limits,
    PassBody,
    PassHead,
    RequestBody,
    RequestHead,
    Respond,
    ResponseBody,
    ResponseHead,
    Submit,
    UpstreamFailed,
)
from picker.rewrites import HEADERS, Rewriting, build_rule
from picker.types import Decision, FailureReason, Rejection, RejectReason, Rewritten

ID = 7
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json", "content-length": "999"}
SSE = {"content-type": "text/event-stream"}
BODY = b'{"messages":[{"role":"user","content":"model"}], "model" : "chat", "n":1}'


def limits(*, general: bool = False, heeds_header: bool = False) -> Limits:
    rewriting = Rewriting(lambda: 0.0, ("configuration",), heeds_header=heeds_header)
    rewriting.put("configuration", [build_rule("canary", () if general else ("chat",), [("v2", 1)])])
    return Limits(rewriting=rewriting)


def asked(
    body: bytes = BODY,
    path: str = CHAT,
    *,
    given: Limits | None = None,
    cuts: Sequence[int] = (),
    headers: dict[str, str] | None = None,
    again: bool = False,
) -> tuple[Exchange, Submit]:
    exchange = Exchange(ID, given or limits())
    assert exchange.receive(RequestHead("POST", path, headers or {}, again=again)) == []
    edges = [0, *sorted(cuts), len(body)]
    for start, end in itertools.pairwise(edges):
        assert exchange.receive(RequestBody(body[start:end])) == []
    (action,) = exchange.receive(RequestBody(b"", end=True))
    assert isinstance(action, Submit)
    return exchange, action


def forwarded(body: bytes = BODY, path: str = CHAT, **more: Any) -> tuple[Exchange, Forward]:
    exchange, _ = asked(body, path, **more)
    (action,) = exchange.receive(Decided(Decision(ID, endpoint("a"))))
    assert isinstance(action, Forward)
    return exchange, action


def passed(actions: Sequence[Action]) -> bytes:
    return b"".join(action.data for action in actions if isinstance(action, PassBody))


# --- the request -------------------------------------------------------------------------------------------


def test_the_decision_and_the_body_are_for_the_target() -> None:
    exchange, submit = asked()
    call = submit.call
    assert (call.model, call.rewritten) == ("v2", Rewritten("chat", "canary"))
    assert call.body == BODY.replace(b'"chat"', b'"v2"')
    (forward,) = exchange.receive(Decided(Decision(ID, endpoint("a"))))
    assert isinstance(forward, Forward)
    assert forward.body == call.body
    assert forward.edit is not None
    assert forward.edit.applied(BODY) == forward.body


@given(st.lists(st.integers(0, len(BODY)), max_size=10))
def test_cuts_of_the_body_at_any_place_change_nothing(cuts: list[int]) -> None:
    assert forwarded(cuts=cuts)[1].body == BODY.replace(b'"chat"', b'"v2"')


def test_prompts_are_those_of_the_same_request_for_the_target() -> None:
    plain = asked(BODY.replace(b'"chat"', b'"v2"'))[1].call
    call = asked()[1].call
    assert (call.prompt, call.model, call.salt, call.body) == (plain.prompt, plain.model, plain.salt, plain.body)


def test_a_model_that_nobody_speaks_of_stays_and_so_does_every_byte() -> None:
    body = BODY.replace(b"chat", b"other")
    exchange, submit = asked(body)
    assert (submit.call.model, submit.call.rewritten) == ("other", None)
    (forward,) = exchange.receive(Decided(Decision(ID, endpoint("a"))))
    assert isinstance(forward, Forward)
    assert forward.body is submit.call.body
    assert forward.edit is None


def test_a_target_that_is_the_model_asked_for_changes_nothing_and_is_counted() -> None:
    given = limits()
    assert given.rewriting is not None
    given.rewriting.put("configuration", [build_rule("canary", ("chat",), [("chat", 1)])])
    _, forward = forwarded(given=given)
    assert (forward.body, forward.edit) == (BODY, None)
    assert given.rewriting.counts == {("canary", "chat", "chat"): 1}


@pytest.mark.parametrize("named", [b"", b',"model":null', b',"model":""'])
def test_a_request_that_names_no_model_gets_that_of_a_rule_for_all(named: bytes) -> None:
    body = b'{"messages":[{"role":"user","content":"x"}]' + named + b"}"
    assert asked(body)[1].call.model is None
    _, forward = forwarded(body, given=limits(general=True))
    assert json.loads(forward.body) == {"messages": [{"role": "user", "content": "x"}], "model": "v2"}


@pytest.mark.parametrize("body", [b'{"lora_name":"x"}', b"{}", b"[]", b"not json", b""])
def test_a_body_that_is_no_request_for_a_model_is_never_changed(body: bytes) -> None:
    given = limits(general=True)
    _, forward = forwarded(body, "/v1/load_lora_adapter", given=given)
    assert (forward.body, forward.edit) == (body, None)
    assert given.rewriting is not None
    assert given.rewriting.counts == {}


def test_embeddings_and_forms_get_their_target_too() -> None:
    _, forward = forwarded(b'{"input":"x","model":"chat"}', "/v1/embeddings")
    assert forward.body == b'{"input":"x","model":"v2"}'
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nchat\r\n--b--\r\n'
    exchange, submit = asked(form, "/v1/audio/transcriptions")
    assert submit.call.model == "v2"
    (forward,) = exchange.receive(Decided(Decision(ID, endpoint("a"))))  # type: ignore[assignment]
    assert forward.body == form.replace(b"chat", b"v2")


def test_a_header_wins_over_the_rules_where_it_is_heeded() -> None:
    headers = {HEADERS[1]: "v9"}
    _, forward = forwarded(headers=headers, given=limits(heeds_header=True))
    assert json.loads(forward.body)["model"] == "v9"
    _, forward = forwarded(headers=headers)
    assert json.loads(forward.body)["model"] == "v2"


def test_a_second_attempt_asks_for_the_same_target() -> None:
    exchange, _ = forwarded(again=True)
    assert exchange.limits.rewriting is not None
    exchange.limits.rewriting.put("configuration", [])
    *_, submit = exchange.receive(UpstreamFailed(FailureReason.CONNECT))
    assert isinstance(submit, Submit)
    assert (submit.call.model, set(submit.exclude)) == ("v2", {"a"})
    (forward,) = exchange.receive(Decided(Decision(ID, endpoint("b"))))
    assert isinstance(forward, Forward)
    assert json.loads(forward.body)["model"] == "v2"


def test_a_target_that_nobody_serves_is_told_with_the_way_there() -> None:
    exchange, _ = asked()
    words = "The model `v2` does not exist. Valid aliases: v1."
    (answer,) = exchange.receive(Decided(Rejection(ID, RejectReason.UNKNOWN_MODEL, 404, words)))
    assert isinstance(answer, Respond)
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["param"]) == (404, "model")
    assert error["message"] == f"{words} The request names `chat`; the rewrite 'canary' leads from there."


def test_other_refusals_are_told_as_ever() -> None:
    exchange, _ = asked()
    (answer,) = exchange.receive(Decided(Rejection(ID, RejectReason.SATURATED, 429, "Full.")))
    assert isinstance(answer, Respond)
    assert json.loads(answer.body)["error"]["message"] == "Full."


# --- the answer --------------------------------------------------------------------------------------------

ANSWER = b'{"id":"1","model":"v2","choices":[{"message":{"content":"\\"model\\":\\"v2\\""}}],"usage":null}'
EVENTS = (
    b'data: {"object":"chat.completion.chunk","model":"v2","choices":[{"delta":{"content":"Hi"}}]}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize(("headers", "answer"), [(JSON, ANSWER), (SSE, EVENTS)])
@pytest.mark.parametrize("again", [False, True])
@given(cuts=st.lists(st.integers(0, len(EVENTS)), max_size=8))
def test_the_answer_names_the_model_that_was_asked_for(
    headers: dict[str, str], answer: bytes, again: bool, cuts: list[int]
) -> None:
    exchange, _ = forwarded(again=again)
    actions = exchange.receive(ResponseHead(200, headers))
    assert not exchange.passes(answer, 0, len(answer))
    edges = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    for start, end in itertools.pairwise(edges):
        actions += exchange.receive(ResponseBody(answer[start:end]))
    actions += exchange.receive(ResponseBody(b"", end=True))
    assert passed(actions) == answer.replace(b'"model":"v2"', b'"model":"chat"', 1)
    (head,) = [action for action in actions if isinstance(action, PassHead)]
    assert head.resized


def test_no_part_of_a_stream_passes_unseen() -> None:
    exchange, _ = forwarded()
    exchange.receive(ResponseHead(200, SSE))
    event = EVENTS.partition(b"data: [DONE]")[0]
    for _ in range(3):
        exchange.receive(ResponseBody(event))
    assert not exchange.passes(event, 0, len(event))
    plain, _ = forwarded(BODY.replace(b"chat", b"v2"))
    plain.receive(ResponseHead(200, SSE))
    for _ in range(3):
        plain.receive(ResponseBody(event))
    assert plain.passes(event, 0, len(event))


def test_an_answer_to_an_unchanged_request_is_passed_as_it_is() -> None:
    exchange, _ = forwarded(BODY.replace(b"chat", b"v2"))
    _, head = exchange.receive(ResponseHead(200, SSE))
    assert isinstance(head, PassHead)
    assert not head.resized
    assert passed(exchange.receive(ResponseBody(EVENTS, end=True))) == EVENTS


def test_an_answer_that_is_no_clear_json_is_passed_as_it_is() -> None:
    for headers in ({"content-type": "audio/mpeg"}, JSON | {"content-encoding": "gzip"}):
        exchange, _ = forwarded()
        _, head = exchange.receive(ResponseHead(200, headers))
        assert isinstance(head, PassHead)
        assert not head.resized
        assert passed(exchange.receive(ResponseBody(ANSWER, end=True))) == ANSWER


def test_who_named_no_model_is_told_the_engines() -> None:
    body = b'{"messages":[{"role":"user","content":"x"}]}'
    exchange, _ = forwarded(body, given=limits(general=True))
    exchange.receive(ResponseHead(200, JSON))
    assert passed(exchange.receive(ResponseBody(ANSWER, end=True))) == ANSWER


def test_the_answer_of_a_second_endpoint_is_restored_from_its_own_first_byte() -> None:
    exchange, _ = forwarded(again=True)
    assert len(exchange.receive(ResponseHead(503, JSON))) == 1
    *_, submit = exchange.receive(ResponseBody(b'{"error":"busy","model":"v', end=True))
    assert isinstance(submit, Submit)
    exchange.receive(Decided(Decision(ID, endpoint("b"))))
    actions = exchange.receive(ResponseHead(200, JSON))
    actions += exchange.receive(ResponseBody(ANSWER, end=True))
    assert passed(actions) == ANSWER.replace(b'"model":"v2"', b'"model":"chat"', 1)
