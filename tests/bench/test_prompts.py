"""The requests of a benchmark."""

import json

import pytest

from picker.bench.prompts import GROUPS, Prompts
from picker.bench.upstream import Ask, Upstream, mark, streamed
from picker.wire.openai import parse_call


def ask(chunks: int = 3) -> Ask:
    return Upstream().expect(streamed(chunks, prompt_tokens=8), chunks=chunks, gap=None)


@pytest.mark.parametrize("prompt_bytes", [64, 1024, 5001])
def test_messages_have_the_size_that_was_asked_for(prompt_bytes: int) -> None:
    messages = json.loads(Prompts(prompt_bytes).body(ask(), stream=True))["messages"]
    assert sum(len(message["content"]) for message in messages) == prompt_bytes


def test_a_body_is_a_chat_that_picker_understands() -> None:
    call = parse_call("/v1/chat/completions", Prompts(1024).body(ask(chunks=7), stream=True))
    assert (call.model, call.stream, call.include_usage, call.max_tokens) == ("bench", True, True, 7)
    assert len(call.prompt) >= 1024


def test_a_body_asks_for_no_stream_when_none_is_wanted() -> None:
    assert json.loads(Prompts(1024).body(ask(), stream=False))["stream"] is False


def test_prompts_share_their_first_half_within_a_group_and_are_never_the_same() -> None:
    prompts, upstream, response = Prompts(4096), Upstream(), streamed(1, prompt_tokens=8)
    asks = [upstream.expect(response, chunks=1, gap=None) for _ in range(2 * GROUPS)]
    bodies = [json.loads(prompts.body(each, stream=True))["messages"] for each in asks]
    heads = [head["content"] for head, _ in bodies]
    assert heads[:GROUPS] == heads[GROUPS:]
    assert len(set(heads)) == GROUPS
    assert {len(head) for head in heads} == {2048}
    assert len({tail["content"] for _, tail in bodies}) == 2 * GROUPS


def test_the_mark_is_the_first_of_its_kind_in_the_body_and_survives_without_the_user_field() -> None:
    asking = ask()
    body = Prompts(1024).body(asking, stream=True)
    assert body.index(b"#") == body.index(mark(asking).encode())
    assert mark(asking) in json.loads(body)["messages"][1]["content"]
