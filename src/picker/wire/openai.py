"""OpenAI-style HTTP bodies: what a call asks for, how an error looks, what a response says it used.

A call is decoded once, into typed fields, and everything else in it is skipped: the engine judges what we do not need.
We refuse only what leaves nothing to route by (no JSON object, no messages, no prompt, a field of the wrong type), in
vLLM's shape and without quoting the body. Paths that are not chat or completions are never refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import msgspec
from msgspec import Raw

from picker.errors import WireError
from picker.types import Call, CallKind, Usage
from picker.wire import multipart
from picker.wire.prompts import Content, Item, Message, Options, Prompt, chat_prompt, text_prompt

T = TypeVar("T")

# Sizes beyond this have no meaning in an engine, and would not fit the integer columns that load is counted in.
_MAX_INT = 2**31 - 1


# --- what clients send -------------------------------------------------------------------------------------


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _ExtraArguments(msgspec.Struct):
    session_id: str | int | None = None


class _Fields(Options, kw_only=True):
    """What chat, completions and their relatives have in common. A null is an absent field, as in vLLM."""

    model: str | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    vllm_xargs: _ExtraArguments | None = None
    priority: int | None = None


class _Chat(_Fields, kw_only=True):
    messages: list[Message] | None = None
    max_completion_tokens: int | None = None


class _Completion(_Fields, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None
    prompt_embeds: Raw = Raw()


class _Other(_Fields, kw_only=True):
    """Any other body: typed where a wrong type is as good as a wrong body, raw where the routes differ."""

    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    messages: Raw = Raw()
    system: Raw = Raw()
    instructions: Raw = Raw()
    input: Raw = Raw()
    prompt: Raw = Raw()
    token_ids: Raw = Raw()
    query: Raw = Raw()
    text_1: Raw = Raw()
    text_2: Raw = Raw()


class _Named(msgspec.Struct):
    model: str | None = None


# Lenient like pydantic: vLLM takes "5" for 5 and 1 for true, and a gateway must not refuse what the engine serves.
_chat = msgspec.json.Decoder(_Chat, strict=False)
_completion = msgspec.json.Decoder(_Completion, strict=False)
_other = msgspec.json.Decoder(_Other, strict=False)
_named = msgspec.json.Decoder(_Named)
_conversation = msgspec.json.Decoder(list[Item | list[Item]])
_input = msgspec.json.Decoder(str | list[str | int | list[int] | Item])
_content = msgspec.json.Decoder(Content)


# --- calls -------------------------------------------------------------------------------------------------


def parse_call(path: str, body: bytes) -> Call:
    """Read a request body once. path: as in the request line; its query is ignored.

    Chat and completions raise `WireError` (400) for a body that cannot be routed. Every other path gives a call of kind
    OTHER, with model and prompt as far as they can be made out, and never an error.
    """
    route = path.partition("?")[0]
    if route.endswith("/chat/completions"):
        return _refusing(_parse_chat, body)
    if route.endswith("/completions"):
        return _refusing(_parse_completion, body)
    return _parse_other(route, body)


# What engines do for these changes nothing there: done twice, it costs time and no more.
_REPEATABLE = (
    *("/completions", "/embeddings", "/messages", "/count_tokens", "/responses", "/rerank", "/score", "/pooling"),
    *("/classify", "/tokenize", "/detokenize", "/render", "/derender", "/transcriptions", "/translations", "/speech"),
    *("/generate", "/generative_scoring", "/moderations", "/invocations", "/batch", "/models", "/health"),
)
_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))


@functools.lru_cache(maxsize=256)
def repeatable(method: str, path: str) -> bool:
    """Whether a request that may have been carried out may be sent to another engine all the same.

    Anything that only computes an answer may; what loads an adapter, resets a cache or is not known may not.
    """
    return method in _SAFE_METHODS or path.partition("?")[0].endswith(_REPEATABLE)


def _parse_chat(body: bytes) -> Call:
    fields = _chat.decode(body)
    if fields.messages is None:
        raise _refusal("missing", ("messages",), "Field required")
    if not fields.messages:
        raise _refusal("too_short", ("messages",), "List should have at least 1 item, not 0")
    limit = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
    return _call(CallKind.CHAT, fields, Prompt(chat_prompt(fields, fields.messages)), limit, body)


def _parse_completion(body: bytes) -> Call:
    fields = _completion.decode(body)
    if fields.prompt:
        prompt = text_prompt(fields.prompt)
    elif bytes(fields.prompt_embeds) not in (b"", b"null", b'""', b"[]"):
        prompt = Prompt()
    else:
        problem = "missing" if fields.prompt is None else "too_short"
        raise _refusal(problem, ("prompt",), "Either prompt or prompt_embeds must be provided and non-empty")
    return _call(CallKind.COMPLETION, fields, prompt, fields.max_tokens, body)


def _parse_other(route: str, body: bytes) -> Call:
    fields = attempt(_other, body)
    if fields is None:
        named = attempt(_named, body)
        return _parse_form(body) if named is None else Call(kind=CallKind.OTHER, model=named.model or None)
    try:
        prompt = _other_prompt(fields, conversational=route.endswith(("/responses", "/responses/render")))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        prompt = Prompt()
    limits = (fields.max_completion_tokens, fields.max_output_tokens, fields.max_tokens)
    return _call(CallKind.OTHER, fields, prompt, next((limit for limit in limits if limit is not None), None))


def _parse_form(body: bytes) -> Call:
    """A form with files, of which the size is all that is understood; or nothing that we know."""
    fields = multipart.fields_of(body)
    if fields is None:
        return Call(kind=CallKind.OTHER, model=None)
    stream = fields.get("stream", "").strip().lower() in ("true", "1")
    model = fields.get("model", "").strip() or None
    return Call(kind=CallKind.OTHER, model=model, extra_bytes=multipart.text_bytes(len(body)), stream=stream)


def _other_prompt(fields: _Other, *, conversational: bool) -> Prompt:
    """The first thing in the body that looks like a prompt: messages, input, prompt, token ids, query, text."""
    opening = [
        Item(role="system", content=_content.decode(raw)) for raw in (fields.instructions, fields.system) if _given(raw)
    ]
    if _given(fields.messages):
        return _conversations(fields, opening, _conversation.decode(fields.messages))
    sources = (fields.input, fields.prompt, fields.token_ids, fields.query, fields.text_1, fields.documents)
    given = next((_input.decode(raw) for raw in sources if _given(raw)), "")
    if conversational and isinstance(given, str):
        return Prompt(chat_prompt(fields, [*opening, Item(role="user", content=given)]))
    items = [item for item in given if isinstance(item, Item)]
    if opening or items:
        return Prompt(chat_prompt(fields, opening + items))
    if _given(fields.query) or _given(fields.text_1):  # scored against each of these, one engine request a pair
        return replace(text_prompt(given), extra_bytes=len(bytes(fields.documents)) + len(bytes(fields.text_2)))
    return text_prompt(given)


def _conversations(fields: _Other, opening: list[Item], messages: list[Item | list[Item]]) -> Prompt:
    """One conversation, or a batch of which the first leads."""
    batch = [entry for entry in messages if isinstance(entry, list)]
    if not batch:
        return Prompt(chat_prompt(fields, opening + [entry for entry in messages if isinstance(entry, Item)]))
    first, *others = (chat_prompt(fields, opening + conversation) for conversation in batch)
    return Prompt(first, extra_bytes=sum(map(len, others)))


def _call(kind: CallKind, fields: _Fields, prompt: Prompt, max_tokens: int | None, body: bytes = b"") -> Call:
    session = fields.session_id
    if not session and fields.vllm_xargs is not None and fields.vllm_xargs.session_id is not None:
        session = str(fields.vllm_xargs.session_id)
    return Call(
        kind=kind,
        # An absent, null or empty model means the engine's first served name.
        model=fields.model or None,
        prompt=prompt.data,
        extra_bytes=prompt.extra_bytes,
        prompt_tokens=prompt.tokens,
        # A negative limit is refused by the engine; until then it is no limit.
        max_tokens=None if max_tokens is None or max_tokens < 0 else min(max_tokens, _MAX_INT),
        stream=bool(fields.stream),
        include_usage=bool(fields.stream_options and fields.stream_options.include_usage),
        salt=fields.cache_salt or None,
        session=session or None,
        priority=max(-_MAX_INT, min(fields.priority or 0, _MAX_INT)),
        body=body,
    )


def _given(raw: Raw) -> bool:
    return bytes(raw) not in (b"", b"null")


def attempt(decoder: msgspec.json.Decoder[T], data: bytes | Raw) -> T | None:
    """Decode what may well be something else; None where it is."""
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


# --- errors ------------------------------------------------------------------------------------------------

# vLLM's names where it has one; official clients choose their exception class by the status.
_ERROR_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "ConflictError",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}

_SCHEMA_ERROR = (
    "Bad Request"  # vLLM's type for a body that fails validation, unlike the BadRequestError of later checks
)
_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<where>.*)`)?$", re.DOTALL)
_STEP = re.compile(r"\w+")
_BYTE = re.compile(r"\(byte (\d+)\)$")

_REMEDIES = {
    "messages": 'Send "messages" as a non-empty list of objects like {"role": "user", "content": "..."}.',
    "prompt": 'Send "prompt" as a string, a list of strings, a list of token ids or a list of lists of token ids.',
    "model": 'Send "model" as a string, or leave it out for the default model.',
    "max_tokens": 'Send "max_tokens" as a whole number, or leave it out.',
    "max_completion_tokens": 'Send "max_completion_tokens" as a whole number, or leave it out.',
    "stream": 'Send "stream" as true or false, or leave it out.',
    "stream_options": 'Send "stream_options" as an object like {"include_usage": true}, or leave it out.',
    "priority": 'Send "priority" as a whole number, or leave it out.',
}


def error_kind(status: int) -> str:
    """The `type` of an error object for an HTTP status."""
    return _ERROR_KINDS.get(status) or ("BadRequestError" if status < 500 else "InternalServerError")


def error_body(
    error: WireError | int,
    message: str = "",
    *,
    kind: str | None = None,
    param: str | None = None,
    code: int | None = None,
) -> bytes:
    """The JSON body of an error response, as vLLM prints it. error: what was raised, or an HTTP status and a message.

    code is the status unless given. A `WireError` brings its own message, kind and param.
    """
    if isinstance(error, WireError):
        return error_body(error.status, error.message, kind=error.kind, param=error.param, code=code)
    details = {"message": message, "type": kind or error_kind(error), "param": param, "code": code or error}
    return msgspec.json.encode({"error": details})


# Anthropic's names; its clients, too, choose their exception class by the status.
_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def error_body_for(path: str, status: int, message: str, *, kind: str | None = None, param: str | None = None) -> bytes:
    """The JSON body of an error in the dialect of the path: Anthropic's for Messages, else OpenAI's."""
    if not _is_messages(path):
        return error_body(status, message, kind=kind, param=param)
    known = _ANTHROPIC_KINDS.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    return msgspec.json.encode({"type": "error", "error": {"type": known, "message": message}})


def _is_messages(path: str) -> bool:
    return path.partition("?")[0].endswith(("/v1/messages", "/v1/messages/count_tokens"))


def _refusing(parse: Callable[[bytes], Call], body: bytes) -> Call:
    """Run a parser; what is wrong with the body becomes a WireError that names the place and never its content."""
    try:
        return parse(body)
    except msgspec.ValidationError as error:
        raise _mistyped(str(error)) from None
    except msgspec.DecodeError as error:
        raise _malformed(str(error), len(body)) from None
    except UnicodeDecodeError:
        raise _refusal("json_invalid", (), "The body is not valid UTF-8") from None
    except RecursionError:
        raise _refusal("json_invalid", (), "The body is nested too deeply") from None


def _mistyped(complaint: str) -> WireError:
    found = _AT.match(complaint)
    assert found is not None
    what, where = found["what"], tuple(_STEP.findall(found["where"] or ""))
    if (missing := re.fullmatch(r"Object missing required field `(\w+)`", what)) is not None:
        return _refusal("missing", (*where, missing[1]), "Field required")
    return _refusal("type_error", where, what.replace("`", ""))


def _malformed(complaint: str, length: int) -> WireError:
    at = _BYTE.search(complaint)
    return _refusal("json_invalid", (at[1] if at else str(length),), f"JSON decode error: {complaint}")


def _refusal(problem: str, where: tuple[str, ...], what: str) -> WireError:
    location = ".".join(("body", *where))
    entry = f"{{'type': '{problem}', 'loc': '{location}', 'msg': '{what}'}}"
    remedy = "Send the body as one JSON object in UTF-8."
    if where and problem != "json_invalid":
        remedy = _REMEDIES.get(where[0], f'Correct "{where[0]}", or leave it out.')
    return WireError(f"1 validation error:\n  {entry}\n{remedy}", kind=_SCHEMA_ERROR, param=location)


# --- usage -------------------------------------------------------------------------------------------------


class _CacheDetails(msgspec.Struct):
    cached_tokens: int | None = None


class UsageFields(msgspec.Struct):
    """The `usage` object of Chat Completions, Completions, Embeddings, Responses and Anthropic Messages."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _CacheDetails | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _CacheDetails | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Used(msgspec.Struct):
    usage: UsageFields | None = None


_used = msgspec.json.Decoder(_Used, strict=False)


def usage_of(body: bytes) -> Usage | None:
    """Token counts of a complete, non-streamed JSON response; None where it names none. Never raises."""
    used = attempt(_used, body)
    return None if used is None or used.usage is None else usage_from(used.usage, None)


def usage_from(fields: UsageFields, before: Usage | None) -> Usage | None:
    """Token counts as one `Usage`. before: counts seen earlier in a stream, kept where these name none.

    Anthropic counts cached tokens beside `input_tokens` (vLLM follows, PR 40912), everyone else within.
    """
    prompt = fields.prompt_tokens if fields.prompt_tokens is not None else fields.input_tokens
    output = fields.completion_tokens if fields.completion_tokens is not None else fields.output_tokens
    details = fields.prompt_tokens_details or fields.input_tokens_details
    cached = details.cached_tokens if details is not None else fields.cache_read_input_tokens
    if prompt is not None and fields.cache_read_input_tokens is not None and details is None:
        prompt += fields.cache_read_input_tokens + (fields.cache_creation_input_tokens or 0)
    if prompt is None:
        if before is None:
            return None
        prompt = before.prompt_tokens
    if cached is None and before is not None:
        cached = before.cached_tokens
    if output is None:
        output = before.completion_tokens if before is not None else 0
    return Usage(prompt, output, cached)
