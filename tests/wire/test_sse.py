"""Observers of responses: what they tell must not depend on how the bytes were cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.types import Usage
from picker.wire import sse
from picker.wire.sse import JsonObserver, Observer, StreamObserver, observer_for

# Bytes of real pods (vLLM 0.32).
ROLE = b"""data: {"id":"chatcmpl-992af255092e042f","object":"chat.completion.chunk","created":1795202419,"model":"tiny","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}\n\n"""  # noqa: E501
TOKEN = b"""data: {"id":"chatcmpl-992af255092e042f","object":"chat.completion.chunk","created":1795202419,"model":"tiny","choices":[{"index":0,"delta":{"content":"ason"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n"""  # noqa: E501
LAST = b"""data: {"id":"chatcmpl-992af255092e042f","object":"chat.completion.chunk","created":1795202419,"model":"tiny","choices":[{"index":0,"delta":{"content":"plic"},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}],"system_fingerprint":"vllm-0.32.0-3f5380e7"}\n\n"""  # noqa: E501
USAGE = b"""data: {"id":"chatcmpl-9f79ad633b89a859","object":"chat.completion.chunk","created":1795202420,"model":"tiny","choices":[],"usage":{"prompt_tokens":14,"total_tokens":17,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":0}},"system_fingerprint":"vllm-0.32.0-3f5380e7"}\n\n"""  # noqa: E501
DONE = b"data: [DONE]\n\n"
TEXT = b"""data: {"id":"cmpl-a4c74194af1aec40","object":"text_completion","created":1795202420,"model":"tiny","choices":[{"index":0,"text":" items","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n"""  # noqa: E501
TEXT_USAGE = b"""data: {"id":"cmpl-a4c74194af1aec40","object":"text_completion","created":1795202420,"model":"tiny","choices":[],"usage":{"prompt_tokens":4,"total_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":0}},"system_fingerprint":"vllm-0.32.0-3f5380e7"}\n\n"""  # noqa: E501
CRASH = b"""data: {"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.", "type": "InternalServerError", "param": null, "code": 500}}\n\n"""  # noqa: E501
KEEP_ALIVE = b": keep-alive\n\n"


def named(kind: str, **fields: Any) -> bytes:
    """An event of the dialects that name their events: Anthropic Messages, Responses."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))


def counted(n: int) -> bytes:
    """The n-th token of a stream with continuous usage."""
    usage = b',"usage":{"prompt_tokens":14,"total_tokens":%d,"completion_tokens":%d,"completion_tokens_details":null}}'
    return TOKEN.replace(b"}]}\n\n", b"}]" + usage % (14 + n, n) + b"\n\n")


MESSAGES = [
    named("message_start", message={"id": "x", "usage": {"input_tokens": 14, "output_tokens": 0}}),
    named("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    named("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"}),
    named("content_block_stop", index=0),
    named("message_delta", delta={"stop_reason": "max_tokens"}, usage={"output_tokens": 3}),
    named("message_stop"),
]
RESPONSES = [
    named("response.created", response={"id": "r", "usage": None, "error": None}, sequence_number=0),
    named("response.in_progress", response={"id": "r", "usage": None}, sequence_number=1),
    named("response.output_item.added", item={"type": "message"}),
    named("response.output_text.delta", delta="a"),
    named("response.output_text.done", text="a"),
    named(
        "response.completed",
        response={
            "error": None,
            "usage": {"input_tokens": 14, "input_tokens_details": {"cached_tokens": 8}, "output_tokens": 3},
        },
    ),
]


def watch(*chunks: bytes, end: bool = True) -> StreamObserver:
    observer = StreamObserver()
    for chunk in chunks:
        observer.feed(chunk)
    if end:
        observer.feed(b"", end=True)
    return observer


def facts(observer: Observer) -> tuple[Any, ...]:
    told = (observer.first_token, observer.usage, observer.done, observer.error)
    return (*told, observer.empty_abort, observer.finish_reason)


# --- cutting ---

events = st.sampled_from(
    [
        *(ROLE, TOKEN, LAST, USAGE, DONE, TEXT, TEXT_USAGE, CRASH, KEEP_ALIVE, *MESSAGES, *RESPONSES),
        *(counted(1), counted(2), counted(3).replace(b'"finish_reason":null', b'"finish_reason":"stop"')),
        *(TOKEN.replace(b"}]}", b'}],"usage":null}'), b'data: {"a":\ndata: 1}\n\n', b"id: 1\nretry: 5\n\n"),
        *(b"\n", b"data: {\n\n"),
    ]
)


@given(
    st.lists(events, max_size=8).map(b"".join),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.lists(st.integers(0, 3000), max_size=12),
    st.integers(0, 40),
)
@settings(max_examples=300)
def test_the_same_is_told_however_the_bytes_are_cut(body: bytes, ending: bytes, cuts: list[int], lost: int) -> None:
    body = body[: len(body) - lost].replace(b"\n", ending)
    edges = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    pieces = [body[a:b] for a, b in pairwise(edges)]
    assert facts(watch(*pieces)) == facts(watch(body))


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("stream", [[ROLE, TOKEN, KEEP_ALIVE, LAST, USAGE, DONE], MESSAGES, RESPONSES])
def test_byte_by_byte_tells_the_same_as_all_at_once(stream: list[bytes], ending: bytes) -> None:
    body = b"".join(stream).replace(b"\n", ending)
    whole = facts(watch(body))
    assert facts(watch(*(body[i : i + 1] for i in range(len(body))))) == whole
    assert whole == facts(watch(*stream))
    assert whole[:3] == (True, whole[1], True)
    assert whole[1] is not None


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_no_bytes_whatsoever_raise(one: bytes, other: bytes) -> None:
    assert isinstance(facts(watch(b"data: " + one, other + b"\n\n", TOKEN, one)), tuple)


@pytest.mark.parametrize(
    "data",
    [
        b'{"error":{"code":"\xff"}}',
        b'{"object":"error","code":"\xff"}',
        b'{"type":"message_start","message":"\xff"}',
        b'{"type":"message_delta","delta":{"stop_reason":"\xff"}}',
        b'{"type":"\xff"}',
        b'{"choices":[{"finish_reason":"\\ud800"}]}',
        b"[" * 100_000,
    ],
)
def test_broken_events_do_not_raise(data: bytes) -> None:
    observer = watch(b"data: " + data + b"\n\n", TOKEN, USAGE, DONE)
    assert (observer.first_token, observer.usage, observer.done) == (True, Usage(14, 3, 0), True)


def test_usage_is_found_when_split_across_chunks() -> None:
    at = USAGE.index(b'"usage"') + 3
    assert watch(ROLE, TOKEN, USAGE[:at], USAGE[at:]).usage == Usage(14, 3, 0)


# --- first token ---


def first_tokens(*stream: bytes) -> list[bool]:
    observer, told = StreamObserver(), []
    for chunk in stream:
        observer.feed(chunk)
        told.append(observer.first_token)
    return told


def test_the_role_of_a_chat_is_no_token() -> None:
    assert first_tokens(KEEP_ALIVE, ROLE, TOKEN, DONE) == [False, False, True, True]


def test_the_text_of_a_completion_is_a_token() -> None:
    empty = TEXT.replace(b'" items"', b'""')
    assert first_tokens(empty, TEXT) == [False, True]


def test_the_first_token_is_told_before_its_chunk_ends() -> None:
    assert first_tokens(ROLE + TOKEN + TOKEN[:20]) == [True]


@pytest.mark.parametrize(
    ("delta", "output"),
    [
        (b'"content":"a"', True),
        (b'"reasoning":"hm"', True),
        (b'"reasoning_content":"hm"', True),
        (b'"tool_calls":[{"index":0,"function":{"name":"f"}}]', True),
        (b'"refusal":"no"', True),
        (b'"role":"assistant","content":null,"reasoning":"","tool_calls":[]', False),
        (b'"role":"assistant"', False),
    ],
)
def test_output_is_any_field_of_a_delta_that_is_not_empty(delta: bytes, output: bool) -> None:
    assert first_tokens(TOKEN.replace(b'"content":"ason"', delta)) == [output]


def test_token_ids_are_output() -> None:
    assert first_tokens(b'data: {"choices":[{"index":0,"token_ids":[697]}]}\n\n') == [True]


def test_an_answer_that_ends_at_once_has_had_its_first_token() -> None:
    ended = LAST.replace(b'"plic"', b'""').replace(b'"length"', b'"stop"')
    assert first_tokens(ROLE, ended) == [False, True]


def test_an_error_or_a_usage_chunk_is_no_token() -> None:
    assert first_tokens(CRASH, USAGE, DONE) == [False, False, False]


def test_the_first_event_of_an_unknown_dialect_is_a_token() -> None:
    assert first_tokens(KEEP_ALIVE, b"data: hello\n\n") == [False, True]
    assert first_tokens(b'data: {"token":"a"}\n\n') == [True]
    assert first_tokens(b'data: {"type":"novelty"}\n\n') == [True]
    assert first_tokens(b"data: [1]\n\n") == [True]


def test_the_first_delta_of_anthropic_and_responses_streams_is_a_token() -> None:
    assert first_tokens(*MESSAGES) == [False, False, True, True, True, True]
    assert first_tokens(*RESPONSES) == [False, False, False, True, True, True]


# --- usage ---


def test_usage_of_the_last_chunk_is_told() -> None:
    assert watch(ROLE, TOKEN, LAST, USAGE, DONE).usage == Usage(14, 3, 0)
    assert watch(TEXT, TEXT_USAGE, DONE).usage == Usage(4, 3, 0)


def test_without_usage_none_is_told() -> None:
    assert watch(ROLE, TOKEN, LAST, DONE).usage is None
    assert watch(TOKEN.replace(b"}]}", b'}],"usage":null}'), DONE).usage is None


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_continuous_usage_is_told_as_of_the_latest_event(ending: bytes) -> None:
    observer = watch(end=False)
    for n in range(1, 6):
        observer.feed(counted(n).replace(b"\n", ending))
        assert observer.usage == Usage(14, n)
    observer.feed((counted(6) + counted(7) + TOKEN).replace(b"\n", ending))
    assert observer.usage == Usage(14, 7)
    observer.feed(counted(8) + USAGE + DONE)
    assert observer.usage == Usage(14, 3, 0)


def test_continuous_counts_torn_by_a_blank_line_do_not_raise() -> None:
    assert watch(counted(1), counted(2).replace(b'"usage":{', b'"usage":\n\n{')).usage == Usage(14, 1)


def test_counts_that_come_with_the_finish_are_the_latest() -> None:
    finish = counted(4).replace(b'"finish_reason":null', b'"finish_reason":"stop"')
    assert watch(counted(1), counted(2), counted(3), finish, DONE).usage == Usage(14, 4)


def test_the_last_counts_stand_alone() -> None:
    assert watch(counted(1), USAGE + counted(2)).usage == Usage(14, 2)
    assert watch(USAGE, counted(1), TOKEN).usage == Usage(14, 1)


def test_data_over_several_lines_is_one_event_also_when_its_line_end_is_cut() -> None:
    head, tail = b'data: {"choices":[],\r', b'\ndata: "usage":{"prompt_tokens":5}}\r\n\r\n'
    assert watch(head + tail).usage == watch(head, tail).usage == Usage(5, 0)


def test_the_two_halves_of_anthropic_usage_are_joined() -> None:
    assert watch(*MESSAGES).usage == Usage(14, 3)


def test_anthropic_usage_with_cache_reads_counts_them_as_prompt() -> None:
    usage = {"input_tokens": 4, "output_tokens": 3, "cache_read_input_tokens": 10, "cache_creation_input_tokens": 0}
    assert watch(MESSAGES[0], named("message_delta", delta={}, usage=usage)).usage == Usage(14, 3, 10)


def test_usage_of_a_completed_response_is_told() -> None:
    assert watch(*RESPONSES).usage == Usage(14, 3, 8)


def test_generated_text_that_spells_the_marks_is_no_mark() -> None:
    spelled = 'x "usage": {"prompt_tokens": 1} [DONE] "error": 1 "finish_reason":"abort"'
    token = TOKEN.replace(b'"ason"', msgspec.json.encode(spelled))
    observer = watch(ROLE, TOKEN, token, token, LAST)
    assert facts(observer) == (True, None, False, None, False, "length")


# --- ends ---


def test_the_end_marker_ends_a_stream() -> None:
    assert not watch(ROLE, TOKEN, LAST).done
    assert watch(ROLE, TOKEN, LAST, DONE, end=False).done


@pytest.mark.parametrize("marker", [b"data:[DONE]\n\n", b"data: [DONE] \r\n\r\n", b"data: [DONE]", b"data: [DONE]\n"])
def test_the_end_marker_is_known_in_any_spelling(marker: bytes) -> None:
    assert watch(TOKEN, marker).done


def test_anthropic_and_responses_streams_end_without_done() -> None:
    assert [watch(*MESSAGES[:n]).done for n in (5, 6)] == [False, True]
    assert [watch(*RESPONSES[:n]).done for n in (5, 6)] == [False, True]
    assert watch(named("response.incomplete", response={"usage": None})).done


def test_a_stream_in_an_unknown_dialect_is_done_when_it_ends() -> None:
    assert not watch(b"data: hello\n\n", end=False).done
    assert watch(b"data: hello\n\n").done


@pytest.mark.parametrize("body", [b"", KEEP_ALIVE, b"data: hel", TOKEN[:50], ROLE, TOKEN + b"data: hello\n\n"])
def test_a_stream_that_breaks_off_is_not_done(body: bytes) -> None:
    assert not watch(body).done


def test_the_finish_reason_is_told() -> None:
    assert watch(ROLE, TOKEN, LAST).finish_reason == "length"
    assert watch(ROLE, TOKEN, LAST.replace(b'"finish_reason":', b'"finish_reason" : ')).finish_reason == "length"
    assert watch(*MESSAGES).finish_reason == "max_tokens"


# --- failures ---


def test_an_error_event_tells_its_status() -> None:
    observer = watch(ROLE, TOKEN, CRASH, DONE)
    assert (observer.error, observer.done, observer.empty_abort) == (500, True, False)
    assert watch(ROLE, CRASH.replace(b"500", b"503"), DONE).error == 503


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b'{"error":{"message":"x","code":"429"}}', 429),
        (b'{"error":{"message":"x","code":"rate_limit_exceeded"}}', 500),
        (b'{"error":{"message":"x","code":7}}', 500),
        (b'{"error":{"message":"x"}}', 500),
        (b'{"error":"x"}', 500),
        (b'{"object":"error","message":"x","type":"BadRequestError","code":400}', 400),
        (b'{"type":"error","error":{"type":"internal_error","message":"x"}}', 500),
        (b'{"type":"error","code":null,"message":"x"}', 500),
        (b'{"type":"response.failed","response":{"error":{"code":"server_error"}}}', 500),
    ],
)
@pytest.mark.parametrize("before", [b"", RESPONSES[3]])
def test_errors_are_known_in_every_dialect(before: bytes, data: bytes, status: int) -> None:
    observer = watch(before, b"data: " + data + b"\n\n")
    assert observer.error == status
    assert observer.first_token == bool(before)


def test_a_draining_pod_is_told_by_its_empty_stream() -> None:
    assert watch(DONE).empty_abort
    assert watch(KEEP_ALIVE, USAGE, DONE).empty_abort
    assert watch(MESSAGES[-1]).empty_abort


def test_an_abort_without_output_is_told() -> None:
    aborted = LAST.replace(b'"plic"', b'""').replace(b'"length"', b'"abort"')
    assert watch(ROLE, aborted, DONE).empty_abort
    assert not watch(ROLE, TOKEN, aborted, DONE).empty_abort


@pytest.mark.parametrize("stream", [[ROLE, DONE], [TEXT, DONE], [CRASH, DONE], [b""], MESSAGES, RESPONSES])
def test_other_streams_are_no_empty_aborts(stream: list[bytes]) -> None:
    assert not watch(*stream).empty_abort


# --- bounds ---


def test_an_event_that_is_too_long_is_skipped_without_being_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 400)
    observer = watch(ROLE, b"data: ", end=False)
    for _ in range(100):
        observer.feed(b"x" * 50)
        assert len(observer._pending) <= 401
    assert not observer.first_token
    observer.feed(b"\n")
    observer.feed(b"\n" + USAGE + DONE)
    assert facts(observer) == (True, Usage(14, 3, 0), True, None, False, None)


def test_an_event_that_is_too_long_is_skipped_in_one_piece_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 400)
    long = USAGE.replace(b'"tiny"', b'"' + b"x" * 400 + b'"')
    whole, pieces = watch(TOKEN + long), watch(TOKEN, *(long[i : i + 7] for i in range(0, len(long), 7)))
    assert facts(whole) == facts(pieces)
    assert whole.usage is None


def test_a_stream_that_ends_within_a_too_long_event_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 400)
    assert watch(b"data: " + b"x" * 500).first_token


# --- tokens that need not be fed ---------------------------------------------------------------------------


def shortened(*chunks: bytes) -> tuple[StreamObserver, list[bytes]]:
    """An observer that was fed only what it did not let pass, and what it did."""
    observer, passed = StreamObserver(), []
    for chunk in chunks:
        framed = b"1f\r\n" + chunk + b"\r\n"
        if observer.passes(framed, 4, len(framed) - 2):
            passed.append(chunk)
        else:
            observer.feed(chunk)
    observer.feed(b"", end=True)
    return observer, passed


def saying(text: str) -> bytes:
    return TOKEN.replace(b'"ason"', msgspec.json.encode(text))


def test_tokens_that_differ_in_their_text_alone_need_not_be_fed() -> None:
    stream = [ROLE, saying("one"), saying("two"), saying(" three"), saying("\u00e9\u6c34"), LAST, USAGE, DONE]
    observer, passed = shortened(*stream)
    assert passed == [saying(" three"), saying("\u00e9\u6c34")]
    assert facts(observer) == facts(watch(*stream))


@pytest.mark.parametrize("event", [TEXT, *(MESSAGES[2:3]), TOKEN.replace(b'"content"', b'"reasoning_content"')])
def test_they_are_known_in_every_dialect_that_repeats_itself(event: bytes) -> None:
    _, passed = shortened(event, event, event)
    assert passed == [event]


@pytest.mark.parametrize(
    "other",
    [
        saying('a"b'),
        saying("a\\"),  # the escape would make the end of the text a part of it
        saying("a\nb"),
        TOKEN[:-1],
        TOKEN[:-2] + b"x\n\n",
        TOKEN.replace(b"ason", b"a\n\ndata: [DONE]\n\ndata: "),
        TOKEN.replace(b'"finish_reason":null', b'"finish_reason":"stop"'),
        b"",
        b"data: ",
        TOKEN + TOKEN,
        TOKEN.replace(b"data", b"xata"),
        saying("")[len(b"data: ") :],
    ],
)
def test_whatever_else_differs_is_fed(other: bytes) -> None:
    _, passed = shortened(TOKEN, TOKEN, other)
    assert passed == []


def test_nothing_passes_before_the_first_token_or_within_an_event() -> None:
    assert shortened(ROLE, ROLE, ROLE)[1] == []
    assert shortened(TOKEN, TOKEN, TOKEN[:20], TOKEN)[1] == []


def test_counts_that_come_with_every_token_are_fed() -> None:
    observer, passed = shortened(*(counted(n) for n in range(1, 6)))
    assert passed == []
    assert observer.usage == Usage(14, 5)


@settings(max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([ROLE, TOKEN, TOKEN, LAST, USAGE, DONE, TEXT, CRASH, KEEP_ALIVE, counted(3), *MESSAGES]),
            st.text(max_size=8).map(saying),
            st.binary(max_size=6).map(lambda text: TOKEN.replace(b"ason", text)),
        ),
        max_size=12,
    ),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_what_is_let_pass_changes_nothing_of_what_is_told(stream: list[bytes], ending: bytes) -> None:
    chunks = [event.replace(b"\n", ending) for event in stream]
    assert facts(shortened(*chunks)[0]) == facts(watch(*chunks))


# --- one document ---

CHAT = b"""{"id":"chatcmpl-812bff066e8f5044","object":"chat.completion","created":1795202419,"model":"tiny","choices":[{"index":0,"message":{"role":"assistant","content":"asonOSplic","refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":"vllm-0.32.0-3f5380e7","usage":{"prompt_tokens":14,"total_tokens":17,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":0,"multimodal_tokens":null},"completion_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"""  # noqa: E501


def read(*chunks: bytes, **options: int) -> JsonObserver:
    observer = JsonObserver(**options)
    for chunk in chunks:
        observer.feed(chunk)
    observer.feed(b"", end=True)
    return observer


@given(st.lists(st.integers(0, len(CHAT)), max_size=5))
@settings(max_examples=30)
def test_a_document_tells_the_same_however_it_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(CHAT)]
    pieces = [CHAT[a:b] for a, b in pairwise(edges)]
    assert facts(read(*pieces)) == (True, Usage(14, 3, 0), True, None, False, "length")


def test_the_first_byte_of_a_document_is_its_first_token() -> None:
    observer = JsonObserver()
    observer.feed(b"")
    assert not observer.first_token
    observer.feed(b"{")
    assert (observer.first_token, observer.done, observer.usage) == (True, False, None)


def test_a_document_beyond_the_bound_goes_by_unread() -> None:
    assert read(CHAT, max_bytes=len(CHAT)).usage == Usage(14, 3, 0)
    observer = read(CHAT[:100], CHAT[100:], max_bytes=len(CHAT) - 1)
    assert (observer.usage, observer.done, observer.first_token) == (None, True, True)


@pytest.mark.parametrize("empty", [b'{"message":{"content":""},', b'{"message":{"content":null},', b'{"text":"",'])
def test_a_document_aborted_without_output_is_told(empty: bytes) -> None:
    body = b'{"choices":[' + empty + b'"finish_reason":"abort"}]}'
    assert read(body).empty_abort
    assert not read(body.replace(b'""', b'"a"').replace(b'content":null', b'content":"a"')).empty_abort
    assert not read(body.replace(b"abort", b"stop")).empty_abort


def test_an_error_document_tells_its_status() -> None:
    assert read(b'{"error":{"message":"x","type":"NotFoundError","param":null,"code":404}}').error == 404


def test_usage_survives_choices_of_an_unknown_shape() -> None:
    assert read(b'{"choices":"?","usage":{"prompt_tokens":5,"completion_tokens":1}}').usage == Usage(5, 1)


@pytest.mark.parametrize("body", [b"", b"[1]", b"\xff", b'{"usage":', b"[" * 100_000])
def test_a_document_we_cannot_read_tells_nothing(body: bytes) -> None:
    observer = read(body)
    assert (observer.usage, observer.error, observer.empty_abort, observer.done) == (None, None, False, True)


# --- choice ---


@pytest.mark.parametrize(
    ("content_type", "stream", "kind"),
    [
        ("text/event-stream; charset=utf-8", True, StreamObserver),
        ("Text/Event-Stream", False, StreamObserver),
        ("", True, StreamObserver),
        ("", False, JsonObserver),
        ("application/json", True, JsonObserver),
        ("application/problem+json", False, JsonObserver),
        ("audio/mpeg", True, JsonObserver),
    ],
)
def test_the_content_type_chooses_the_observer(content_type: str, stream: bool, kind: type[Observer]) -> None:
    assert type(observer_for(content_type, stream=stream)) is kind


def test_bodies_that_are_not_json_are_not_held() -> None:
    observer = observer_for("audio/mpeg", stream=False)
    observer.feed(CHAT)
    observer.feed(b"", end=True)
    assert (observer.first_token, observer.done, observer.usage) == (True, True, None)
