"""What the simulated pod answers: made-up texts, and vLLM 0.32's JSON and SSE around them, byte for byte.

Pure. Field order, nulls and spacing are those of recorded answers. Knows no engine and no connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from picker.errors import WireError
from picker.sim import tokens
from picker.sim.pod_request import Ask
from picker.sim.tokens import BYTES_PER_TOKEN, TokenArray
from picker.types import CallKind, Usage

DONE = b"data: [DONE]\n\n"
FINGERPRINT = "vllm-0.32.0-5178c0de"


@dataclass(frozen=True, slots=True)
class Answer:
    """What will be said to one prompt. text: 4 bytes a token, unless a stop string cut it. reason: stop or length."""

    index: int
    prompt: TokenArray
    tokens: int
    text: bytes
    reason: str
    stop_reason: str | None = None

    def piece(self, start: int, stop: int) -> str:
        """The text of tokens start..stop-1."""
        return self.text[start * BYTES_PER_TOKEN : stop * BYTES_PER_TOKEN].decode("ascii")


def plan(ask: Ask, max_model_len: int) -> list[Answer]:
    """What the "model" will say: one answer for each prompt and choice, fixed by the prompt alone."""
    answers = []
    for number, prompt in enumerate(ask.prompts):
        for choice in range(ask.choices):
            seed = tokens.fingerprint(prompt) + choice
            answers.append(_answer(ask, prompt, number * ask.choices + choice, seed, max_model_len - len(prompt)))
    return answers


def error_body(error: WireError) -> bytes:
    """vLLM's error object."""
    fields = {"message": error.message, "type": error.kind, "param": error.param, "code": error.status}
    return msgspec.json.encode({"error": fields})


def total_usage(usages: Sequence[Usage], choices: int, cached: int | None) -> Usage:
    """The usage of a body of several prompts and choices: each prompt counts once, each answer in full."""
    return Usage(
        sum(u.prompt_tokens for u in usages[::choices]), sum(u.completion_tokens for u in usages), cached_tokens=cached
    )


class Wording:
    """The JSON of one request's answer, complete or streamed.

    name: id without its prefix. created: unix seconds. details: tell cached tokens.
    """

    def __init__(self, ask: Ask, *, name: str, created: int, details: bool) -> None:
        self._ask = ask
        self._chat = ask.kind is CallKind.CHAT
        self._details = details
        prefix, kind = ("chatcmpl", "chat.completion") if self._chat else ("cmpl", "text_completion")
        streamed = "chat.completion.chunk" if self._chat else kind
        named = f'"id":{_text(f"{prefix}-{name}")},"object":'
        about = f',"created":{created},"model":{_text(ask.model)},"choices":['
        self._complete = f'{{{named}"{kind}"{about}'
        self._event = f'data: {{{named}"{streamed}"{about}'

    def complete(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        """The body of a non-streaming answer."""
        choices = ",".join(self._choice(answer) for answer in answers)
        extra = '"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,' if self._chat else ""
        return (
            f'{self._complete}{choices}],"service_tier":null,"system_fingerprint":"{FINGERPRINT}",'
            f'"usage":{self._usage(usage)},{extra}'
            '"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'
        ).encode()

    def role(self, answer: Answer) -> bytes | None:
        """The event before the first token; completions have none."""
        if not self._chat:
            return None
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        usage = self._running_usage(answer, 0)
        end = ',"prompt_token_ids":null,"prompt_text":null}\n\n'
        return f'{self._event}{{"index":{answer.index},{delta}{usage}{end}'.encode()

    def around(self, answer: Answer) -> tuple[bytes, bytes]:
        """What comes before and after the text in every event but the last, where usage is not continuous."""
        if self._chat:
            head, tail = '"delta":{"content":"', '"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
        else:
            head, nothing = '"text":"', '"prompt_token_ids":null,"token_ids":null'
            tail = f'","logprobs":null,"finish_reason":null,"stop_reason":null,{nothing}}}]}}\n\n'
        return f'{self._event}{{"index":{answer.index},{head}'.encode(), tail.encode()

    def token(self, answer: Answer, number: int) -> bytes:
        """The event of token `number`, counted from 0, with usage so far if that was asked for."""
        return self.some(answer, number, number + 1)

    def some(self, answer: Answer, start: int, stop: int) -> bytes:
        """The event of the tokens `start` to `stop` - 1, of which none is the last."""
        head, tail = self.around(answer)
        text = answer.piece(start, stop).encode()
        usage = self._running_usage(answer, stop).encode()
        return head + text + tail.removesuffix(b"}\n\n") + usage + b"}\n\n"

    def last(self, answer: Answer, start: int | None = None) -> bytes:
        """The event of the last token, and of those before it from `start` on, with the reason for the end."""
        text = _text(answer.piece(answer.tokens - 1 if start is None else start, answer.tokens))
        why = f'"finish_reason":"{answer.reason}","stop_reason":{_maybe(answer.stop_reason)}'
        if self._chat:
            choice = f'"delta":{{"content":{text}}},"logprobs":null,{why},"token_ids":null}}]'
        else:
            choice = f'"text":{text},"logprobs":null,{why},"prompt_token_ids":null,"token_ids":null}}]'
        usage = self._running_usage(answer, answer.tokens)
        fingerprint = "" if self._ask.include_usage else f',"system_fingerprint":"{FINGERPRINT}"'
        return f'{self._event}{{"index":{answer.index},{choice}{usage}{fingerprint}}}\n\n'.encode()

    def usage(self, usage: Usage) -> bytes:
        """The event before [DONE] under `include_usage`."""
        details = ""
        if self._details:
            created = ',"created_cache_tokens":0' if self._chat else ""
            details = f',"prompt_tokens_details":{{"cached_tokens":{usage.cached_tokens or 0}{created}}}'
        counts = _counts(usage.prompt_tokens, usage.completion_tokens)
        return f'{self._event}],"usage":{{{counts}{details}}},"system_fingerprint":"{FINGERPRINT}"}}\n\n'.encode()

    def _choice(self, answer: Answer) -> str:
        why = f'"finish_reason":"{answer.reason}","stop_reason":{_maybe(answer.stop_reason)},"token_ids":null'
        text = _text(answer.text.decode("ascii"))
        if not self._chat:
            nothing = '"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null'
            return f'{{"index":{answer.index},"text":{text},"logprobs":null,{why},{nothing}}}'
        nothing = '"refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null'
        message = f'"message":{{"role":"assistant","content":{text},{nothing}}}'
        return f'{{"index":{answer.index},{message},"logprobs":null,{why},"routed_experts":null}}'

    def _usage(self, usage: Usage) -> str:
        details = "null"
        if self._details:
            created = "0" if self._chat else "null"
            cached = usage.cached_tokens or 0
            details = f'{{"cached_tokens":{cached},"created_cache_tokens":{created},"multimodal_tokens":null}}'
        counts = _counts(usage.prompt_tokens, usage.completion_tokens)
        return f'{{{counts},"prompt_tokens_details":{details},"completion_tokens_details":null}}'

    def _running_usage(self, answer: Answer, said: int) -> str:
        if not self._ask.continuous_usage:
            return ""
        details = ',"completion_tokens_details":null' if self._chat else ""
        return f',"usage":{{{_counts(len(answer.prompt), said)}{details}}}'


def _answer(ask: Ask, prompt: TokenArray, index: int, seed: int, room: int) -> Answer:
    count, reason = min(ask.max_tokens or room, room), "length"
    if ask.max_tokens is None and not ask.ignore_eos:
        own = max(tokens.answer_length(seed), ask.min_tokens)
        count, reason = min(own, room), "stop" if own <= room else "length"
    text = tokens.answer(seed, count)
    found = [(at, stop) for stop in ask.stop if (at := text.find(stop.encode(), ask.min_tokens * BYTES_PER_TOKEN)) >= 0]
    if not found:
        return Answer(index, prompt, count, text, reason)
    at, stop = min(found)
    end = at + len(stop.encode())
    kept = text[: end if ask.keep_stop else at]
    return Answer(index, prompt, -(-end // BYTES_PER_TOKEN), kept, "stop", stop)


def _counts(prompt: int, completion: int) -> str:
    return f'"prompt_tokens":{prompt},"total_tokens":{prompt + completion},"completion_tokens":{completion}'


def _text(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _maybe(text: str | None) -> str:
    return "null" if text is None else _text(text)
