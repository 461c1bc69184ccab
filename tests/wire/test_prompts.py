"""Canonical prompts: stable prefixes, no ambiguity, every shape of content."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.wire.prompts import Item, Message, Options, chat_prompt, text_prompt

messages_decoder = msgspec.json.Decoder(list[Message])
options_decoder = msgspec.json.Decoder(Options)


def canonical(messages: list[Any], **options: Any) -> bytes:
    """Canonical bytes of messages given as plain JSON values."""
    decoded = messages_decoder.decode(msgspec.json.encode(messages))
    return chat_prompt(options_decoder.decode(msgspec.json.encode(options)), decoded)


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


# --- properties ---

texts = st.text(max_size=8)
text_parts = texts.map(lambda text: {"type": "text", "text": text})
image_parts = texts.map(lambda url: {"type": "image_url", "image_url": {"url": url}})
result_parts = st.lists(text_parts, max_size=2).map(lambda parts: {"type": "tool_result", "content": parts})
contents = texts | st.lists(text_parts | image_parts | result_parts, min_size=2, max_size=3)
calls = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": texts})})
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]) | texts, "content": contents},
    optional={
        "name": texts,
        "tool_call_id": texts.filter(bool),
        "reasoning": texts.filter(bool),
        "tool_calls": st.lists(calls, min_size=1, max_size=2),
    },
)
conversations = st.lists(messages, max_size=4)


@given(conversations, conversations)
@settings(max_examples=150)
def test_a_later_turn_extends_the_bytes_of_an_earlier_one(before: list[Any], after: list[Any]) -> None:
    assert canonical(before + after).startswith(canonical(before))


@given(conversations, conversations)
@settings(max_examples=300)
def test_distinct_conversations_have_distinct_bytes(one: list[Any], other: list[Any]) -> None:
    assert (canonical(one) == canonical(other)) == (one == other)


@given(messages, texts, texts)
def test_text_that_grows_at_the_end_of_the_last_message_extends_the_bytes(
    message: dict[str, Any], text: str, more: str
) -> None:
    assert canonical([message, user(text + more)]).startswith(canonical([message, user(text)]))


@given(texts)
def test_one_text_part_reads_like_the_plain_string(text: str) -> None:
    part = {"type": "text", "text": text}
    assert canonical([user(text)]) == canonical([user([part])]) == canonical([user([text])])


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_token_ids_are_packed_as_little_endian_words(ids: list[int]) -> None:
    prompt = text_prompt(ids)
    assert struct.unpack(f"<{len(ids)}I", prompt.data) == tuple(ids)
    assert prompt.tokens == len(ids)


# --- chat ---


def test_the_layout_is_options_then_tools_then_messages() -> None:
    prompt = canonical([user("hi", name="eve")], tools=[{"a": 1}], reasoning_effort="low", documents=[{"t": "x"}])
    options = b'\xfeo\xffd[{"t":"x"}]\xffe"low"'
    assert prompt == options + b'\xfet[{"a":1}]' + b"\xfemuser\xffneve\xffxhi"


def test_a_tool_exchange_is_carried_without_its_random_call_ids() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    asked = {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]}
    assert canonical([asked]) == b'\xfemassistant\xffrhm\xffcf\xffa"{\\"x\\":1}"'
    assert canonical([asked]) == canonical([{**asked, "tool_calls": [{**call, "id": "call_2"}]}])


def test_the_answer_to_a_tool_call_names_the_call() -> None:
    assert canonical([{"role": "tool", "tool_call_id": "c1", "content": "42"}]) == b"\xfemtool\xffic1\xffx42"


def test_tool_calls_of_an_unknown_dialect_still_tell_conversations_apart() -> None:
    one, other = ({"role": "assistant", "tool_calls": calls} for calls in ({"f": 1}, {"f": 2}))
    assert canonical([one]) != canonical([other])
    custom = [{"type": "custom", "custom": {"name": "f", "input": "x"}}]
    assert b'"input":"x"' in canonical([{"role": "assistant", "tool_calls": custom}])


def test_no_tool_calls_are_spelled_in_many_ways() -> None:
    said = {"role": "assistant", "content": "a"}
    assert canonical([said]) == canonical([{**said, "tool_calls": None}]) == canonical([{**said, "tool_calls": []}])


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_both_names_of_reasoning_are_read(field: str) -> None:
    assert canonical([{"role": "assistant", field: "hm"}]) == b"\xfemassistant\xffrhm"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "a"},
        {"type": "output_text", "text": "a", "annotations": []},
        {"type": "refusal", "refusal": "a"},
        {"type": "thinking", "thinking": "a", "closed": True},
        {"text": "a", "cache_control": {"type": "ephemeral"}},
    ],
)
def test_every_kind_of_text_part_is_text(part: dict[str, Any]) -> None:
    assert canonical([user([part])]) == b"\xfemuser\xffxa"


MEDIA: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"image_url": "https://example.org/a.png"},
    {"type": "input_image", "image_url": "https://example.org/b.png"},
    {"type": "image_embeds", "image_embeds": {"image_embeds": "AAAA"}},
    {"type": "image_pil", "image_pil": "AAAB"},
    {"type": "audio_url", "audio_url": {"url": "https://example.org/a.wav"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "audio_embeds", "audio_embeds": "AAAC"},
    {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}},
    {"type": "video_embeds", "video_embeds": "AAAD"},
    {"type": "prompt_embeds", "data": "AAAE"},
    {"type": "image", "source": {"type": "base64", "data": "AAAF"}},
    {"type": "file", "file": {"file_data": "AAAG"}},
    {"type": "input_file", "file_id": "f-1"},
    {"type": "input_file", "file_data": "AAAH"},
    {"type": "image_url", "image_url": None, "uuid": "u-1"},
]


def test_media_become_short_digests_that_differ() -> None:
    digests = {canonical([user([part])]) for part in MEDIA}
    assert len(digests) == len(MEDIA)
    assert all(len(digest) == len(b"\xfemuser\xffm") + 32 for digest in digests)


def test_megabytes_of_media_are_not_carried() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    assert len(canonical([user([part])])) < 100


def test_the_uuid_of_a_medium_is_its_identity() -> None:
    there = {"type": "image_url", "image_url": {"url": "data:AAAA"}, "uuid": "u"}
    assert canonical([user([there])]) == canonical([user([{"type": "image_url", "image_url": None, "uuid": "u"}])])


def test_parts_after_a_tool_result_are_not_parts_of_it() -> None:
    a, b = {"type": "text", "text": "a"}, {"type": "text", "text": "b"}
    within = canonical([user([{"type": "tool_result", "content": [a, b]}])])
    after = canonical([user([{"type": "tool_result", "content": [a]}, b])])
    assert within != after


def test_tool_use_and_unknown_parts_are_told_apart_by_type_name_and_input() -> None:
    parts: list[dict[str, Any]] = [
        {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 2}},
        {"type": "tool_use", "id": "1", "name": "g", "input": {"x": 1}},
        {"type": "tool_reference", "name": "f"},
        {"type": "novelty"},
    ]
    assert len({canonical([user([part])]) for part in parts}) == len(parts)
    assert canonical([user([parts[0]])]) == canonical([user([{**parts[0], "id": "2"}])])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("chat_template", "{{ x }}"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("documents", [{"text": "d"}]),
        ("reasoning_effort", "high"),
        ("mm_processor_kwargs", {"a": 1}),
        ("add_special_tokens", True),
        ("tools", [{"type": "function"}]),
    ],
)
def test_an_option_that_changes_the_rendered_prompt_changes_the_front(option: str, value: Any) -> None:
    plain, optioned = canonical([user("hi")]), canonical([user("hi")], **{option: value})
    assert optioned.endswith(plain)
    assert optioned != plain


def test_absent_null_and_empty_options_are_alike() -> None:
    plain = canonical([user("hi")])
    assert canonical([user("hi")], tools=None, documents=[], chat_template_kwargs={}) == plain
    assert canonical([user("hi")], tools=[], add_generation_prompt=True, continue_final_message=False) == plain


@pytest.mark.parametrize("switch", [{"continue_final_message": True}, {"add_generation_prompt": False}])
def test_a_switch_for_the_end_of_the_prompt_leaves_its_beginning_shared(switch: dict[str, bool]) -> None:
    plain, switched = canonical([user("hi")]), canonical([user("hi")], **switch)
    assert switched != plain
    assert switched.startswith(plain)


def test_raw_json_that_is_not_utf8_cannot_imitate_the_marks() -> None:
    options = options_decoder.decode(b'{"tools":["\xfemuser\xffx"]}')
    with pytest.raises(UnicodeDecodeError):
        chat_prompt(options, [])


def test_responses_items_are_carried_without_their_ids() -> None:
    decode = msgspec.json.Decoder(list[Item]).decode
    items = decode(
        b'[{"type":"function_call","id":"x","call_id":"c","name":"f","arguments":"{}"},'
        b'{"type":"function_call_output","id":"y","call_id":"c","output":"42"}]'
    )
    assert chat_prompt(Options(), items) == b'\xfem\xffnf\xffic\xffa"{}"\xfem\xffic\xffu"42"'


# --- text and tokens ---


def test_text_is_carried_without_marks() -> None:
    assert text_prompt("hé").data == "hé".encode()
    assert text_prompt("hé").tokens is None


def test_the_first_of_several_texts_leads_and_the_others_are_counted() -> None:
    prompt = text_prompt(["ab", "cde", "é"])
    assert (prompt.data, prompt.tokens, prompt.extra_bytes) == (b"ab", None, 5)


def test_the_first_of_several_token_lists_leads_and_the_others_are_counted() -> None:
    prompt = text_prompt([[1, 2], [3], [4, 5, 6]])
    assert (prompt.data, prompt.tokens, prompt.extra_bytes) == (struct.pack("<2I", 1, 2), 2, 16)


@pytest.mark.parametrize("mixed", [["a", 1], [1, "a"], [[1], "a"], ["a", [1]], [1, [1]]])
def test_a_mixed_list_is_refused(mixed: list[Any]) -> None:
    with pytest.raises(msgspec.ValidationError, match="prompt"):
        text_prompt(mixed)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_an_impossible_token_id_is_refused_without_quoting_it(token: int) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        text_prompt([1, token])
    assert "token ids" in str(caught.value)
    assert str(token) not in str(caught.value)


def test_a_prompt_does_not_show_its_text() -> None:
    assert "secret" not in repr(text_prompt("secret"))
