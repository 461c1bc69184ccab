"""What a request asks of the simulated pod: OpenAI bodies, as vLLM reads them, to prompts of token ids and limits.

Pure. Knows no engine, no connection and no answer. Refusals are `WireError`s with the words and statuses of vLLM 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from picker.errors import WireError
from picker.sim import tokens
from picker.sim.pod_tokenizer import PodTokenizer
from picker.sim.tokens import Message, TokenArray
from picker.types import CallKind

T = TypeVar("T")

_DEFAULT_COMPLETION_TOKENS = 16
_MAX_PROMPTS = 1024
_MAX_STOPS = 4
_MAX_SALT = 128


@dataclass(frozen=True, slots=True)
class Serving:
    """What the pod serves: model names (the first is reported), adapters, context length in tokens, engines.

    tokenizer: None for the one of `sim.tokens`.
    """

    models: tuple[str, ...]
    adapters: tuple[str, ...]
    max_model_len: int
    ranks: int = 1
    tokenizer: PodTokenizer | None = None


class FromHeaders(NamedTuple):
    """What headers say of a request beside its body. rank: the data-parallel rank asked for."""

    id: str | None = None
    priority: int | None = None
    rank: int | None = None
    session: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One generate request. id: what the client calls it, if it does. model: the name to report.

    max_tokens None: until the answer ends by itself. rank None: any.
    """

    kind: CallKind
    id: str | None
    model: str
    adapter: str | None
    prompts: tuple[TokenArray, ...]
    choices: int
    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    stop: tuple[str, ...]
    keep_stop: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    salt: str | None
    priority: int
    rank: int | None
    session: str | None


# --- bodies ------------------------------------------------------------------------------------------------


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class _ChatMessage(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[Any] | None = None


class _Body(msgspec.Struct):
    model: str | None = None
    n: int | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = False
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = False
    temperature: float | None = None
    priority: int | None = 0
    cache_salt: str | None = None
    request_id: str | None = None
    session_id: str | None = None
    kv_transfer_params: dict[str, Any] | None = None


class _ChatBody(_Body, kw_only=True):
    messages: list[_ChatMessage]
    tools: list[Any] | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = True
    add_special_tokens: bool | None = False


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = False
    add_special_tokens: bool | None = True


class _TokenizeBody(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    messages: list[_ChatMessage] | None = None
    tools: list[Any] | None = None
    add_generation_prompt: bool | None = True
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False


class _DetokenizeBody(msgspec.Struct):
    tokens: list[int]
    model: str | None = None


_chat = msgspec.json.Decoder(_ChatBody)
_completion = msgspec.json.Decoder(_CompletionBody)
_tokenize = msgspec.json.Decoder(_TokenizeBody)
_detokenize = msgspec.json.Decoder(_DetokenizeBody)


def parse_chat(body: bytes, serving: Serving, headers: FromHeaders = FromHeaders()) -> Ask:
    """A /v1/chat/completions body; what headers say beats it. Raises WireError."""
    parsed = _decode(_chat, body)
    limit = parsed.max_tokens if parsed.max_completion_tokens is None else parsed.max_completion_tokens
    model, adapter = _served(parsed.model, serving)
    given = _given_ids(parsed, serving)
    prompt = _conversation(parsed, body, serving, model) if given is None else given
    return _ask(CallKind.CHAT, parsed, serving, (prompt,), (model, adapter), limit, headers)


def parse_completion(body: bytes, serving: Serving, headers: FromHeaders = FromHeaders()) -> Ask:
    """A /v1/completions body: a text, texts, ids, or lists of ids. Raises WireError."""
    parsed = _decode(_completion, body)
    served = _served(parsed.model, serving)
    if parsed.echo:
        raise WireError("echo is not simulated", param="echo")
    given = _given_ids(parsed, serving)
    prompts = tuple(_prompts(parsed, serving)) if given is None else (given,)
    limit = _DEFAULT_COMPLETION_TOKENS if parsed.max_tokens is None else parsed.max_tokens
    return _ask(CallKind.COMPLETION, parsed, serving, prompts, served, limit, headers)


def tokenize(body: bytes, serving: Serving) -> bytes:
    """The answer to POST /tokenize. Raises WireError."""
    parsed = _decode(_tokenize, body)
    model, _ = _served(parsed.model, serving)
    if parsed.messages is not None:
        ids = _conversation(parsed, body, serving, model)
    elif parsed.prompt is not None:
        ids = _encoded(parsed.prompt, serving, special=parsed.add_special_tokens is not False)
    else:
        raise _invalid("missing", "body.prompt", "Field required", body)
    names = _token_names(ids, serving) if parsed.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": serving.max_model_len, "tokens": ids.tolist(), "token_strs": names}
    return msgspec.json.encode(answer)


def detokenize(body: bytes, serving: Serving) -> bytes:
    """The answer to POST /detokenize. Raises WireError."""
    parsed = _decode(_detokenize, body)
    _served(parsed.model, serving)
    ids = _token_ids(parsed.tokens, serving)
    text = tokens.decode(ids) if serving.tokenizer is None else serving.tokenizer.decode(ids)
    return msgspec.json.encode({"prompt": text})


def rendered(ask: Ask, serving: Serving, name: str) -> bytes:
    """The answer of the render route that a request came by: an object for a chat, a list of them for prompts.

    name: the request's id without its prefix. Of the sampling parameters only those that the simulator knows.
    """
    requests = [_rendered(ask, serving, name, prompt) for prompt in ask.prompts]
    return msgspec.json.encode(requests[0] if ask.kind is CallKind.CHAT else requests)


def _rendered(ask: Ask, serving: Serving, name: str, prompt: TokenArray) -> dict[str, Any]:
    room = serving.max_model_len - len(prompt)
    sampling = {
        "n": ask.choices,
        "stop": ask.stop,
        "ignore_eos": ask.ignore_eos,
        "max_tokens": min(ask.max_tokens or room, room),
        "min_tokens": ask.min_tokens,
        "include_stop_str_in_output": ask.keep_stop,
        "output_kind": 2,
        "skip_clone": True,
    }
    return {
        "request_id": f"{'chatcmpl' if ask.kind is CallKind.CHAT else 'cmpl'}-{name}",
        "token_ids": prompt.tolist(),
        "token_offsets": None,
        "features": None,
        "content_parts": None,
        "sampling_params": sampling,
        "model": ask.model,
        "reasoning_ended": None,
        "reasoning_parser_kwargs": None,
        "return_token_ids": None,
        "output_mode": "tokens",
        "stream": ask.stream,
        "stream_options": {"include_usage": ask.include_usage} if ask.include_usage else None,
        "cache_salt": ask.salt,
        "priority": ask.priority,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
    }


def _decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _schema_error(str(error), body) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        where = re.search(r"byte (\d+)", str(error))
        location = f"body.{where[1] if where else len(body)}"
        raise _invalid("json_invalid", location, "JSON decode error", body) from None


def _schema_error(message: str, body: bytes) -> WireError:
    """msgspec's words in pydantic's shape."""
    what, _, path = message.partition(" - at `$")
    location = "body" + re.sub(r"\[(\d+|\.\.\.)\]", r".\1", path.rstrip("`"))
    missing = re.search(r"missing required field `(\w+)`", what)
    if missing:
        return _invalid("missing", f"{location}.{missing[1]}", "Field required", body)
    return _invalid("type_error", location, what, body)


def _invalid(kind: str, location: str, why: str, body: bytes) -> WireError:
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        decoded = {}
    size = f"<dict of {len(decoded)} items>" if isinstance(decoded, dict) else f"<{type(decoded).__name__}>"
    entry = {"type": kind, "loc": location, "msg": why, "input": size}
    return WireError(f"1 validation error:\n  {entry}", kind="Bad Request", param=location)


def _served(model: str | None, serving: Serving) -> tuple[str, str | None]:
    """The name to report, and the adapter behind it."""
    if not model or model in serving.models:
        return serving.models[0], None
    if model in serving.adapters:
        return model, model
    aliases = ", ".join((*serving.models, *serving.adapters))
    raise WireError(
        f"The model `{model}` does not exist. Valid aliases: {aliases}.",
        status=404,
        kind="NotFoundError",
        param="model",
    )


def _conversation(parsed: _ChatBody | _TokenizeBody, body: bytes, serving: Serving, model: str) -> TokenArray:
    said = [Message(m.role, _content(m, model)) for m in parsed.messages or ()]
    if serving.tokenizer is not None:
        # Templates write special tokens themselves, so nothing is added unless the body wants it.
        return serving.tokenizer.encode_chat(msgspec.json.decode(body), special=bool(parsed.add_special_tokens))
    preamble = "# Tools\n" + msgspec.json.encode(parsed.tools).decode() if parsed.tools else ""
    return tokens.encode_chat(said, preamble=preamble, open_answer=parsed.add_generation_prompt is not False)


def _content(message: _ChatMessage, model: str) -> str:
    text = message.content if isinstance(message.content, str) else _joined(message.content or (), model)
    return text + (msgspec.json.encode(message.tool_calls).decode() if message.tool_calls else "")


def _joined(parts: Iterable[dict[str, Any]], model: str) -> str:
    texts = []
    for part in parts:
        text = next((part[key] for key in ("text", "refusal", "thinking") if isinstance(part.get(key), str)), None)
        if text is None:
            raise WireError(f"{model} is not a multimodal model")
        texts.append(text)
    return "\n".join(texts)


def _prompts(parsed: _CompletionBody, serving: Serving) -> Iterable[TokenArray]:
    prompt, special = parsed.prompt, parsed.add_special_tokens is not False
    if isinstance(prompt, str):
        return (_encoded(prompt, serving, special=special),)
    if prompt and isinstance(prompt[0], int):
        return (_token_ids(prompt, serving),)
    if len(prompt) > _MAX_PROMPTS:
        raise WireError(f"at most {_MAX_PROMPTS} prompts in one request", param="prompt")
    return (
        _encoded(part, serving, special=special) if isinstance(part, str) else _token_ids(part, serving)
        for part in prompt
    )


def _given_ids(parsed: _Body, serving: Serving) -> TokenArray | None:
    """A prompt that the gateway has tokenized already, in the place of the text."""
    given = (parsed.kv_transfer_params or {}).get("prompt_token_ids")
    return None if given is None else _token_ids(given, serving)


def _encoded(text: str, serving: Serving, *, special: bool) -> TokenArray:
    return tokens.encode(text) if serving.tokenizer is None else serving.tokenizer.encode(text, special=special)


def _token_names(ids: TokenArray, serving: Serving) -> list[str]:
    if serving.tokenizer is not None:
        return serving.tokenizer.names(ids)
    return [tokens.decode(ids[at : at + 1]) for at in range(len(ids))]


def _token_ids(ids: Any, serving: Serving) -> TokenArray:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise WireError("token ids must be a list of integers")
    size = tokens.VOCABULARY if serving.tokenizer is None else serving.tokenizer.vocabulary
    for extreme in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= extreme < size:
            raise WireError(f"Token id {extreme} is out of vocabulary")
    return np.array(ids, dtype="<u4")


def _ask(
    kind: CallKind,
    body: _Body,
    serving: Serving,
    prompts: tuple[TokenArray, ...],
    served: tuple[str, str | None],
    max_tokens: int | None,
    headers: FromHeaders,
) -> Ask:
    options = body.stream_options
    if options is not None and not body.stream:
        raise _invalid(
            "value_error", "body", "Value error, Stream options can only be defined when `stream=True`.", b""
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    choices = 1 if body.n is None else body.n
    _check(body, serving, prompts, stop, choices, max_tokens)
    return Ask(
        kind=kind,
        id=headers.id or body.request_id or None,
        model=served[0],
        adapter=served[1],
        prompts=prompts,
        choices=choices,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        stop=stop,
        keep_stop=bool(body.include_stop_str_in_output),
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        salt=body.cache_salt,
        priority=(body.priority or 0) if headers.priority is None else headers.priority,
        rank=headers.rank,
        session=body.session_id or headers.session,
    )


def _check(
    body: _Body,
    serving: Serving,
    prompts: tuple[TokenArray, ...],
    stop: tuple[str, ...],
    choices: int,
    max_tokens: int | None,
) -> None:
    limit = serving.max_model_len
    if choices < 1 or (choices > 1 and body.temperature == 0):
        raise _parameter(f"n must be 1 when using greedy sampling, got {choices}.", "n", choices)
    if len(stop) > _MAX_STOPS or "" in stop:
        raise _parameter(f"stop takes up to {_MAX_STOPS} non-empty strings.", "stop", len(stop))
    if body.cache_salt is not None and not (0 < len(body.cache_salt) <= _MAX_SALT and _plain(body.cache_salt)):
        raise WireError("cache_salt must be 1 to 128 characters without '@', '/', '\\' and NUL", param="cache_salt")
    if max_tokens is not None and max_tokens < 1:
        raise _parameter(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens", max_tokens)
    if max_tokens is not None and max_tokens > limit:
        why = (
            f"max_tokens={max_tokens} cannot be greater than max_model_len={limit}. Please request fewer output tokens."
        )
        raise _parameter(why, "max_tokens", max_tokens)
    for prompt in prompts or (np.empty(0, dtype="<u4"),):
        _check_length(len(prompt), limit)


def _check_length(length: int, limit: int) -> None:
    if length == 0:
        raise WireError("The decoder prompt cannot be empty")
    if length > limit:
        why = (
            f"This model's maximum context length is {limit} tokens. However, your prompt contains {length} input "
            "tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt."
        )
        raise _parameter(why, "input_tokens", length)
    if length == limit:
        raise _parameter("max_tokens must be at least 1, got 0.", "max_tokens", 0)


def _parameter(why: str, name: str, value: int) -> WireError:
    return WireError(f"{why} (parameter={name}, value={value})", param=name)


def _plain(salt: str) -> bool:
    return not any(character in salt for character in "@/\\\0")
