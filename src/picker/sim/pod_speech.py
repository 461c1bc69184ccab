"""What a simulated pod with a model's own tokenizer says: answers that are ids first and text after, as in an engine.

Takes the place of `pod_response.plan` and `pod_call.Line`, whose tokens are four bytes each. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from picker.sim import tokens
from picker.sim.pod_call import Call, Line, SparseLine
from picker.sim.pod_http import chunk
from picker.sim.pod_request import Ask
from picker.sim.pod_response import Answer
from picker.sim.pod_tokenizer import PodTokenizer
from picker.sim.tokens import BYTES_PER_TOKEN, TokenArray


@dataclass(frozen=True, slots=True, eq=False)
class SpokenAnswer(Answer):
    """An answer in the tokens of a model. ids: what was sampled, (tokens,). pieces: the text of each, ASCII."""

    ids: TokenArray = field(default_factory=lambda: np.empty(0, dtype="<u4"), repr=False)
    pieces: tuple[str, ...] = field(default=(), repr=False)

    def piece(self, start: int, stop: int) -> str:
        return "".join(self.pieces[start:stop])


class SpokenLine(Line):
    """One answer of a stream whose tokens differ in length."""

    __slots__ = ()

    def say(self, count: int, *, ends: bool) -> None:
        call, answer, start = self.call, self.answer, self.said
        if not start and (role := call.wording.role(answer)) is not None:
            call.out.append(chunk(role))
        self.said = start + count
        plain = self.said - 1 if ends else self.said
        call.out += (chunk(call.wording.token(answer, number)) for number in range(start, plain))
        if ends:
            call.out.append(chunk(call.wording.last(answer)))


def plan(ask: Ask, max_model_len: int, tokenizer: PodTokenizer) -> list[Answer]:
    """One answer for each prompt and choice, fixed by the prompt alone."""
    answers: list[Answer] = []
    for number, prompt in enumerate(ask.prompts):
        for choice in range(ask.choices):
            seed = tokens.fingerprint(prompt) + choice
            index, room = number * ask.choices + choice, max_model_len - len(prompt)
            answers.append(_answer(ask, prompt, index, seed, room, tokenizer))
    return answers


def said(answer: Answer, choices: int) -> TokenArray:
    """The ids of an answer, (answer.tokens,), those of a part that a stop string cut off too: the engine made them.

    choices: how many answers its prompt gets.
    """
    if isinstance(answer, SpokenAnswer):
        return answer.ids
    text = answer.text
    if len(text) != answer.tokens * BYTES_PER_TOKEN:
        text = tokens.answer(tokens.fingerprint(answer.prompt) + answer.index % choices, answer.tokens)
    return np.frombuffer(text, dtype="<u4")


def line(call: Call, answer: Answer, interval: int = 1) -> Line:
    """What streams this answer, `interval` tokens at a time."""
    if interval > 1:
        return SparseLine(call, answer, interval)
    return SpokenLine(call, answer) if isinstance(answer, SpokenAnswer) else Line(call, answer)


def _answer(ask: Ask, prompt: TokenArray, index: int, seed: int, room: int, tokenizer: PodTokenizer) -> SpokenAnswer:
    count, reason = min(ask.max_tokens or room, room), "length"
    if ask.max_tokens is None and not ask.ignore_eos:
        own = max(tokens.answer_length(seed), ask.min_tokens)
        count, reason = min(own, room), "stop" if own <= room else "length"
    spoken = tokenizer.answer(seed, count, ends=reason == "stop")
    text = "".join(spoken.pieces)
    allowed = len("".join(spoken.pieces[: ask.min_tokens]))
    found = [(at, stop) for stop in ask.stop if (at := text.find(stop, allowed)) >= 0]
    if not found:
        return SpokenAnswer(index, prompt, count, text.encode(), reason, None, spoken.ids, spoken.pieces)
    at, stop = min(found)
    count = _tokens_up_to(spoken.pieces, at + len(stop))
    kept = text[: at + len(stop) if ask.keep_stop else at]
    pieces = _cut(spoken.pieces[:count], len(kept))
    return SpokenAnswer(index, prompt, count, kept.encode(), "stop", stop, spoken.ids[:count], pieces)


def _tokens_up_to(pieces: Sequence[str], end: int) -> int:
    """How many tokens it takes to say the first `end` characters."""
    return next(count for count, length in enumerate(itertools.accumulate(map(len, pieces)), start=1) if length >= end)


def _cut(pieces: Sequence[str], length: int) -> tuple[str, ...]:
    """The pieces up to `length` characters, the rest of them empty."""
    starts = itertools.accumulate(map(len, pieces), initial=0)
    return tuple(piece[: max(length - start, 0)] for piece, start in zip(pieces, starts, strict=False))
