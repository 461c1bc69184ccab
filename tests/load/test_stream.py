from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from load.fake_openai import DONE, chunk, usage
from picker.load.stream import Answer, AnswerStream, WholeAnswer

ROLE = chunk("", role="assistant")
WHOLE = ROLE + chunk("one ") + chunk("two") + usage(40, 2, 16) + DONE


def fed(*parts: bytes) -> AnswerStream:
    """A stream that got part i at second i."""
    stream = AnswerStream()
    for now, part in enumerate(parts):
        stream.feed(part, float(now))
    return stream


@given(st.lists(st.integers(min_value=0, max_value=len(WHOLE)), max_size=8).map(sorted))
@settings(max_examples=100)
def test_an_answer_is_the_same_however_it_is_cut(cuts: list[int]) -> None:
    edges = [0, *cuts, len(WHOLE)]
    stream = fed(*(WHOLE[a:b] for a, b in itertools.pairwise(edges)))
    assert stream.answer() == Answer(complete=True, prompt_tokens=40, output_tokens=2, cached_tokens=16)
    assert stream.text() == "one two"
    first_content_ends = WHOLE.index(b"\n", WHOLE.index(b"one ")) + 1
    assert stream.first_at == next(i for i, edge in enumerate(edges[1:]) if edge >= first_content_ends)


def test_role_and_keep_alive_events_are_not_the_first_token() -> None:
    assert fed(ROLE, b": ping\n\n", chunk(""), chunk("x"), DONE).first_at == 3.0


def test_thinking_counts_as_the_first_token_but_is_not_carried_on() -> None:
    stream = fed(ROLE, chunk(reasoning="hm"), chunk(reasoning_content="hm"), chunk("yes"), DONE)
    assert stream.first_at == 1.0
    assert stream.text() == "yes"


def test_completions_are_read_as_chat_is() -> None:
    stream = fed(b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n', b'data: {"choices":[{"text":"b"}]}\n\n', DONE)
    assert (stream.first_at, stream.text(), stream.answer().complete) == (0.0, "ab", True)


def test_spaces_after_the_field_name_do_not_matter() -> None:
    stream = fed(b'data:{"choices":[{"delta":{"content":"a"}}]}\r\n\r\n', b"data:[DONE]\r\n\r\n")
    assert (stream.first_at, stream.answer().complete) == (0.0, True)


def test_a_stream_without_its_end_mark_is_not_complete() -> None:
    assert not fed(ROLE, chunk("x")).answer().complete


def test_an_answer_that_quotes_the_end_mark_is_not_complete() -> None:
    assert not fed(chunk("data: [DONE]")).answer().complete


def test_usage_without_cached_tokens_is_unknown_not_zero() -> None:
    assert fed(chunk("x"), usage(10, 1), DONE).answer().cached_tokens is None
    assert fed(chunk("x"), usage(10, 1, 0), DONE).answer().cached_tokens == 0


def test_the_last_of_continuous_usage_counts() -> None:
    stream = fed(chunk("a"), usage(10, 1), chunk("b"), usage(10, 2), DONE)
    assert stream.answer().output_tokens == 2


def test_an_error_inside_the_stream_is_reported() -> None:
    stream = fed(chunk("a"), b'data: {"error": {"message": "engine died", "code": 500}}\n\n', DONE)
    assert stream.answer().error == "engine died"
    assert fed(b'data: {"error": "bad"}\n\n', DONE).answer().error == "bad"


def test_gaps_lie_between_pieces_of_content_and_nothing_else() -> None:
    stream = AnswerStream()
    timed = [(0.0, ROLE), (5.0, chunk("a")), (5.5, chunk("b")), (6.0, b": ping\n\n"), (7.5, chunk(reasoning="c"))]
    for now, part in [*timed, (8.0, usage(4, 3) + DONE)]:
        stream.feed(part, now)
    assert list(stream.gaps()) == [0.5, 2.0]


def test_pieces_that_come_together_have_no_gap_and_a_stall_before_them_is_whole() -> None:
    assert list(fed(chunk("a"), chunk("b") + chunk("c") + chunk("d")).gaps()) == [1.0, 0.0, 0.0]


def test_a_piece_is_stamped_when_it_is_whole() -> None:
    whole = chunk("b")
    assert list(fed(chunk("a"), whole[:9], whole[9:]).gaps()) == [2.0]


def test_without_usage_the_pieces_are_counted() -> None:
    answer = fed(ROLE, chunk("a"), chunk("b"), DONE).answer()
    assert (answer.output_tokens, answer.prompt_tokens) == (2, 0)


def test_the_text_of_a_stream_is_kept_only_when_asked_for() -> None:
    stream = AnswerStream(keep=False)
    stream.feed(WHOLE, 1.0)
    assert (stream.text(), stream.answer().output_tokens) == ("", 2)


def whole_answer(body: bytes) -> WholeAnswer:
    answer = WholeAnswer()
    answer.feed(body[:7], 1.0)
    answer.feed(body[7:], 2.0)
    return answer


def test_an_answer_that_is_not_streamed_is_read_whole() -> None:
    counts = b'"usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}}'
    chat = whole_answer(b'{"choices": [{"message": {"role": "assistant", "content": "hi"}}], ' + counts + b"}")
    assert chat.answer() == Answer(complete=True, prompt_tokens=9, output_tokens=2, cached_tokens=8)
    assert (chat.text(), chat.first_at, list(chat.gaps())) == ("hi", None, [])
    completion = whole_answer(b'{"choices": [{"text": "hi"}]}')
    assert completion.answer().complete
    assert completion.text() == "hi"


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"[]", b'{"status": "ok"}'])
def test_a_body_that_is_no_answer_is_an_error(body: bytes) -> None:
    answer = whole_answer(body).answer()
    assert (answer.complete, answer.error is None) == (False, False)
