"""Request bodies to calls, errors to bodies, response bodies to usage."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import openai as sdk
import pytest

from picker.errors import WireError
from picker.types import Call, CallKind, Usage
from picker.wire.openai import error_body, error_body_for, error_kind, parse_call, repeatable, usage_of

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def call(path: str, **fields: Any) -> Call:
    return parse_call(path, json.dumps(fields).encode())


def refusal(path: str, body: bytes) -> WireError:
    with pytest.raises(WireError) as caught:
        parse_call(path, body)
    return caught.value


# --- what is read ---


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completions", CallKind.CHAT),
        ("/v1/chat/completions?a=/embeddings", CallKind.CHAT),
        ("/prefix/v1/completions", CallKind.COMPLETION),
        ("/v1/embeddings", CallKind.OTHER),
        ("/v1/chat/completions/batch", CallKind.OTHER),
        ("/v1/embeddings?next=/chat/completions", CallKind.OTHER),
    ],
)
def test_the_path_decides_the_kind(path: str, kind: CallKind) -> None:
    assert call(path, messages=HI, prompt="hi").kind is kind


def test_every_field_of_a_chat_is_read() -> None:
    got = call(
        CHAT,
        model="m",
        messages=HI,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        cache_salt="salt",
        session_id="s",
        priority=-3,
        temperature=0.5,
        unknown={"nested": [1]},
    )
    assert got == Call(
        kind=CallKind.CHAT,
        model="m",
        prompt=b"\xfemuser\xffxhi",
        max_tokens=5,
        stream=True,
        include_usage=True,
        salt="salt",
        session="s",
        priority=-3,
    )


def test_every_field_of_a_completion_is_read() -> None:
    got = call(COMPLETIONS, model="m", prompt="hé", max_tokens=7, suffix="x", echo=True)
    assert got == Call(kind=CallKind.COMPLETION, model="m", prompt="hé".encode(), max_tokens=7)


def test_absent_fields_are_absent() -> None:
    assert call(CHAT, messages=HI) == Call(kind=CallKind.CHAT, model=None, prompt=b"\xfemuser\xffxhi")


def test_null_is_absent() -> None:
    nulls = dict.fromkeys(("model", "max_tokens", "stream", "stream_options", "cache_salt", "session_id", "priority"))
    assert call(CHAT, messages=HI, vllm_xargs=None, tools=None, **nulls) == call(CHAT, messages=HI)


def test_an_empty_model_is_the_default_model() -> None:
    assert call(CHAT, model="", messages=HI).model is None


def test_max_completion_tokens_beats_max_tokens() -> None:
    assert call(CHAT, messages=HI, max_tokens=5, max_completion_tokens=9).max_tokens == 9


@pytest.mark.parametrize(("sent", "read"), [(0, 0), (-1, None), (10**30, 2**31 - 1), ("5", 5), (5.0, 5)])
def test_odd_limits_are_left_to_the_engine(sent: Any, read: int | None) -> None:
    assert call(CHAT, messages=HI, max_tokens=sent).max_tokens == read


def test_the_session_in_the_body_beats_the_one_in_vllm_xargs() -> None:
    xargs = {"session_id": "inner", "kv_cache_report_mode": "full"}
    assert call(CHAT, messages=HI, vllm_xargs=xargs).session == "inner"
    assert call(CHAT, messages=HI, vllm_xargs={"session_id": 7}).session == "7"
    assert call(CHAT, messages=HI, session_id="outer", vllm_xargs=xargs).session == "outer"


def test_types_are_coerced_as_vllm_coerces_them() -> None:
    got = call(CHAT, messages=HI, stream="true", stream_options={"include_usage": 1}, priority="2", model="null")
    assert (got.stream, got.include_usage, got.priority, got.model) == (True, True, 2, "null")


@pytest.mark.parametrize(
    ("prompt", "data", "tokens", "extra"),
    [
        ("ab", b"ab", None, 0),
        (["ab", "cde"], b"ab", None, 3),
        ([1, 258], b"\x01\0\0\0\x02\x01\0\0", 2, 0),
        ([[1], [2, 3]], b"\x01\0\0\0", 1, 8),
    ],
)
def test_every_shape_of_a_completion_prompt(prompt: Any, data: bytes, tokens: int | None, extra: int) -> None:
    got = call(COMPLETIONS, prompt=prompt)
    assert (got.prompt, got.prompt_tokens, got.extra_bytes) == (data, tokens, extra)


def test_prompt_embeds_replace_the_prompt() -> None:
    got = call(COMPLETIONS, prompt_embeds="AAAA", model="m")
    assert (got.prompt, got.prompt_tokens, got.model) == (b"", None, "m")


def test_a_call_does_not_show_its_prompt() -> None:
    assert "secret" not in repr(call(COMPLETIONS, prompt="secret"))


# --- other paths ---


def test_responses_are_read_like_a_chat() -> None:
    got = call("/v1/responses", model="m", instructions="be brief", input="hi", max_output_tokens=4, stream=True)
    assert got.prompt == b"\xfemsystem\xffxbe brief\xfemuser\xffxhi"
    assert (got.max_tokens, got.stream, got.model) == (4, True, "m")
    items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    assert call("/v1/responses", instructions="be brief", input=items).prompt == got.prompt


def test_anthropic_messages_are_read_like_a_chat() -> None:
    got = call("/v1/messages", system=[{"type": "text", "text": "s"}], messages=HI, max_tokens=3, tools=[{"name": "f"}])
    assert got.prompt == b'\xfet[{"name": "f"}]\xfemsystem\xffxs\xfemuser\xffxhi'
    assert got.max_tokens == 3


def test_a_batch_of_chats_leads_with_its_first() -> None:
    got = call("/v1/chat/completions/batch", messages=[HI, [*HI, *HI]])
    assert got.prompt == b"\xfemuser\xffxhi"
    assert got.extra_bytes == 2 * len(got.prompt)


@pytest.mark.parametrize(
    ("path", "fields", "prompt", "extra"),
    [
        ("/v1/embeddings", {"input": "ab"}, b"ab", 0),
        ("/v1/embeddings", {"input": ["ab", "cde"]}, b"ab", 3),
        ("/v1/embeddings", {"input": [1]}, b"\x01\0\0\0", 0),
        ("/pooling", {"input": [[1], [2]]}, b"\x01\0\0\0", 4),
        ("/tokenize", {"prompt": "ab"}, b"ab", 0),
        ("/tokenize", {"messages": HI}, b"\xfemuser\xffxhi", 0),
        ("/inference/v1/generate", {"token_ids": [1]}, b"\x01\0\0\0", 0),
        ("/v1/rerank", {"query": "q", "documents": ["d"]}, b"q", 5),
        ("/v1/score", {"text_1": "q", "text_2": "dd"}, b"q", 4),
        ("/v1/other", {"documents": ["d", "e"]}, b"d", 1),
        ("/v1/other", {"system": "s"}, b"\xfemsystem\xffxs", 0),
        ("/v1/other", {"input": {"x": 1}}, b"", 0),
        ("/v1/other", {"messages": "x"}, b"", 0),
        ("/v1/other", {"input": [1, "a"]}, b"", 0),
        ("/v1/other", {}, b"", 0),
    ],
)
def test_the_prompt_of_other_paths_is_found_where_they_keep_it(
    path: str, fields: dict[str, Any], prompt: bytes, extra: int
) -> None:
    got = call(path, model="m", **fields)
    assert (got.kind, got.model, got.prompt, got.extra_bytes) == (CallKind.OTHER, "m", prompt, extra)


@pytest.mark.parametrize("body", [b"", b"--boundary\r\n\xff\xfe", b"[1]", b'{"model":5}', b'{"a":' + b"[" * 100_000])
def test_other_paths_never_fail(body: bytes) -> None:
    assert parse_call("/v1/audio/transcriptions", body) == Call(kind=CallKind.OTHER, model=None)


def test_the_model_survives_other_fields_of_a_wrong_type() -> None:
    assert call("/v1/embeddings", model="m", max_tokens="many").model == "m"


# --- refusals ---

SECRET = "attack at dawn"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        (b"", "body.0", "JSON"),
        (b'{"model":', "body.9", "truncated"),
        (b"{'model': 1}", "body.1", "keys must be strings"),
        (b'{"model":"a"} x', "body.15", "trailing"),
        (b'{"model":"a\xff"}', "body", "UTF-8"),
        (b'{"model":"\\ud800"}', "body.18", "JSON"),
        (b'{"x":' + b"[" * 100_000, "body", "nested"),
        (b"[1]", "body", "Expected object, got array"),
        (b"null", "body", "Expected object, got null"),
        (b'"x"', "body", "Expected object, got str"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(path: str, body: bytes, param: str, word: str) -> None:
    error = refusal(path, body)
    assert (error.status, error.kind, error.param) == (400, "Bad Request", param)
    assert word in error.message
    assert "one JSON object in UTF-8" in error.message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "body.messages", ["Field required", "non-empty list"]),
        ({"messages": None}, "body.messages", ["Field required"]),
        ({"messages": []}, "body.messages", ["at least 1", "non-empty list"]),
        ({"messages": SECRET}, "body.messages", ["array", "got str"]),
        ({"messages": [SECRET]}, "body.messages.0", ["Expected object", '"role"']),
        ({"messages": [{"content": SECRET}]}, "body.messages.0.role", ["Field required"]),
        ({"messages": [{"role": 1}]}, "body.messages.0.role", ["Expected str, got int"]),
        ({"messages": [{"role": "user", "content": 5}]}, "body.messages.0.content", ["got int"]),
        ({"messages": [{"role": "user", "content": [{"text": 5}]}]}, "body.messages.0.content.0.text", ["got int"]),
        ({"messages": HI, "model": [SECRET]}, "body.model", ["got array", '"model" as a string']),
        ({"messages": HI, "max_tokens": SECRET}, "body.max_tokens", ["got str", "whole number"]),
        ({"messages": HI, "max_completion_tokens": 1.5}, "body.max_completion_tokens", ["got float", "whole number"]),
        ({"messages": HI, "stream": SECRET}, "body.stream", ["bool", "true or false"]),
        ({"messages": HI, "stream_options": 1}, "body.stream_options", ["include_usage"]),
        ({"messages": HI, "priority": SECRET}, "body.priority", ["whole number"]),
        ({"messages": HI, "cache_salt": 1}, "body.cache_salt", ["got int", 'Correct "cache_salt"']),
        ({"messages": HI, "vllm_xargs": {"session_id": []}}, "body.vllm_xargs.session_id", ["got array"]),
    ],
)
def test_a_chat_that_cannot_be_routed_is_refused_by_field(fields: Any, param: str, words: list[str]) -> None:
    error = refusal(CHAT, json.dumps(fields).encode())
    assert (error.status, error.kind, error.param) == (400, "Bad Request", param)
    assert error.message.startswith("1 validation error:\n")
    assert all(word in error.message for word in words), error.message
    assert SECRET not in error.message


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "must be provided and non-empty"),
        ({"prompt": None, "prompt_embeds": None}, "must be provided and non-empty"),
        ({"prompt": ""}, "must be provided and non-empty"),
        ({"prompt": []}, "must be provided and non-empty"),
        ({"prompt": {"text": SECRET}}, "got object"),
        ({"prompt": [SECRET, 1]}, "all texts"),
        ({"prompt": [-7]}, "token ids"),
        ({"prompt": [1.5]}, "got float"),
        ({"prompt": [[1, SECRET]]}, "got str"),
    ],
)
def test_a_completion_without_a_usable_prompt_is_refused(fields: Any, word: str) -> None:
    error = refusal(COMPLETIONS, json.dumps(fields).encode())
    assert (error.status, error.kind) == (400, "Bad Request")
    assert error.param is not None
    assert error.param.startswith("body.prompt")
    assert word in error.message
    assert "list of token ids" in error.message
    assert SECRET not in error.message
    assert "-7" not in error.message


def test_raw_parts_that_are_not_utf8_are_refused() -> None:
    body = b'{"tools":["\xff"],"messages":[{"role":"user","content":"hi"}]}'
    assert "UTF-8" in refusal(CHAT, body).message


# --- error bodies ---


def test_an_error_prints_as_vllm_prints_it() -> None:
    assert error_body(503, "Busy.") == (
        b'{"error":{"message":"Busy.","type":"Service Unavailable","param":null,"code":503}}'
    )


def test_a_wire_error_brings_its_own_parts() -> None:
    body = msgspec.json.decode(error_body(WireError("no", status=413, kind="K", param="body")))
    assert body == {"error": {"message": "no", "type": "K", "param": "body", "code": 413}}


def test_kind_param_and_code_can_be_given() -> None:
    body = msgspec.json.decode(error_body(400, "no", kind="K", param="p", code=418))
    assert body == {"error": {"message": "no", "type": "K", "param": "p", "code": 418}}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "BadRequestError"),
        (404, "NotFoundError"),
        (429, "RateLimitError"),
        (500, "InternalServerError"),
        (503, "Service Unavailable"),
        (418, "BadRequestError"),
        (599, "InternalServerError"),
    ],
)
def test_every_status_has_a_kind(status: int, kind: str) -> None:
    assert error_kind(status) == kind


@pytest.mark.parametrize(
    ("status", "raised"),
    [
        (400, sdk.BadRequestError),
        (404, sdk.NotFoundError),
        (413, sdk.APIStatusError),
        (429, sdk.RateLimitError),
        (500, sdk.InternalServerError),
        (503, sdk.InternalServerError),
    ],
)
def test_the_official_client_raises_its_own_class_with_our_message(
    status: int, raised: type[sdk.APIStatusError]
) -> None:
    answer = httpx.Response(status, content=error_body(status, "mend it so"))
    http: Any = httpx.Client(transport=httpx.MockTransport(lambda request: answer))
    client = sdk.OpenAI(api_key="x", base_url="http://test/v1", http_client=http, max_retries=0)
    with client, pytest.raises(raised, match="mend it so") as caught:
        client.completions.create(model="m", prompt="hi")
    assert caught.value.type == error_kind(status)


# --- usage ---

CHAT_RESPONSE = b"""{"id":"chatcmpl-812bff066e8f5044","object":"chat.completion","created":1795202419,"model":"tiny","choices":[{"index":0,"message":{"role":"assistant","content":"asonOSplic","refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":"vllm-0.32.0-3f5380e7","usage":{"prompt_tokens":14,"total_tokens":17,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":0,"multimodal_tokens":null},"completion_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"""  # noqa: E501
COMPLETION_RESPONSE = b"""{"id":"cmpl-9af3033bf46b7258","object":"text_completion","created":1795202420,"model":"tiny","choices":[{"index":0,"text":" items another items","logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":"vllm-0.32.0-3f5380e7","usage":{"prompt_tokens":4,"total_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":null,"multimodal_tokens":null},"completion_tokens_details":null},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"""  # noqa: E501
ANTHROPIC_RESPONSE = b"""{"id":"chatcmpl-1","type":"message","role":"assistant","content":[{"type":"text","text":"..."}],"model":"tiny","stop_reason":"max_tokens","usage":{"input_tokens":14,"output_tokens":3,"cache_creation_input_tokens":0,"cache_read_input_tokens":32}}"""  # noqa: E501


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (CHAT_RESPONSE, Usage(14, 3, 0)),
        (COMPLETION_RESPONSE, Usage(4, 3, 0)),
        # Anthropic counts cached tokens beside input_tokens.
        (ANTHROPIC_RESPONSE, Usage(46, 3, 32)),
        (b'{"usage":{"input_tokens":14,"output_tokens":3}}', Usage(14, 3)),
        (
            b'{"object":"response","usage":{"input_tokens":14,"input_tokens_details":{"cached_tokens":8},'
            b'"output_tokens":3,"output_tokens_details":{"reasoning_tokens":0},"total_tokens":17}}',
            Usage(14, 3, 8),
        ),
        (b'{"object":"list","data":[],"usage":{"prompt_tokens":5,"total_tokens":5}}', Usage(5, 0)),
        (b'{"usage":{"prompt_tokens":5,"completion_tokens":1,"prompt_tokens_details":null}}', Usage(5, 1)),
        (b'{"usage":{}}', None),
        (b'{"usage":null}', None),
        (b'{"usage":7}', None),
        (b'{"choices":[]}', None),
        (b"[]", None),
        (b"", None),
        (b"\xff", None),
        (b"[" * 100_000, None),
    ],
)
def test_usage_is_found_in_every_dialect_and_never_raises(body: bytes, usage: Usage | None) -> None:
    assert usage_of(body) == usage


# --- who is answered how, and what may be done twice ---


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens"])
def test_messages_have_errors_in_anthropics_form(path: str) -> None:
    body = msgspec.json.decode(error_body_for(path, 429, "later", kind="K", param="p"))
    assert body == {"type": "error", "error": {"type": "rate_limit_error", "message": "later"}}
    kinds = {status: msgspec.json.decode(error_body_for(path, status, ""))["error"]["type"] for status in (418, 502)}
    assert kinds == {418: "invalid_request_error", 502: "api_error"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages/batches", "/health", ""])
def test_everything_else_has_them_in_openais(path: str) -> None:
    assert error_body_for(path, 429, "later") == error_body(429, "later")


def test_what_only_computes_may_be_done_twice() -> None:
    for path in ("/v1/chat/completions", "/v1/embeddings?x=y", "/v1/audio/transcriptions", "/tokenize"):
        assert repeatable("POST", path)
    for path in ("/v1/load_lora_adapter", "/sleep", "/v1/files", "/v1/responses/r1/cancel"):
        assert not repeatable("POST", path)
        assert repeatable("GET", path)
