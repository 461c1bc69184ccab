"""One streamed answer: when its first token came, what usage it reported, how it ended.

Pure: bytes and times come in. Until the first token every event is parsed; after that chunks are only kept, and the
last of them parsed at the end, because at thousands of chunks a second parsing each one is what limits a load
generator. Independent of `wire.sse`, so that a fault there does not hide itself in our own measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None  # vLLM before 0.12, SGLang, DeepSeek
    reasoning: str | None = None  # vLLM since 0.12

    @property
    def text(self) -> str:
        return (self.reasoning_content or "") + (self.reasoning or "") + (self.content or "")


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None  # of /v1/completions


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Event)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a whole stream said. complete: it ended with `[DONE]`. error: an error object inside the stream."""

    complete: bool
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    error: str | None = None


class AnswerStream:
    """Takes the bytes of one answer as they arrive, in pieces of any size.

    first_at, last_at: when the first non-empty content and the last bytes came. longest_gap: seconds between two
    arrivals after the first content.
    """

    __slots__ = ("_head", "_parts", "first_at", "last_at", "longest_gap")

    def __init__(self) -> None:
        self.first_at: float | None = None
        self.last_at: float | None = None
        self.longest_gap = 0.0
        self._parts: list[bytes] = []
        self._head = b""  # unfinished line, while the first content is still to come

    def feed(self, data: bytes, now: float) -> None:
        self._parts.append(data)
        if self.first_at is None:
            self._look_for_content(data, now)
        elif self.last_at is not None:
            self.longest_gap = max(self.longest_gap, now - self.last_at)
        self.last_at = now

    def _look_for_content(self, data: bytes, now: float) -> None:
        *lines, self._head = (self._head + data).split(b"\n")
        for line in lines:
            event = _event(line)
            if event is not None and _text(event):
                self.first_at = now
                self._head = b""
                return

    def answer(self) -> Answer:
        """What the stream said, once no more bytes come."""
        lines = self._lines()
        complete = any(line.startswith(b"data:") and line[5:].strip() == b"[DONE]" for line in lines[-8:])
        error = None
        # Usage comes with one of the last events (or with each of them): backwards it is found at once.
        for event in filter(None, map(_event, reversed(lines))):
            error = error or _message(event.error)
            if event.usage is not None:
                return _with_usage(event.usage, complete=complete, error=error)
        return Answer(complete=complete, error=error)

    def text(self) -> str:
        """All that the assistant said, for the next turn of a conversation; thinking is left out, as clients do."""
        return "".join(_said(event) for event in filter(None, map(_event, self._lines())))

    def _lines(self) -> list[bytes]:
        return b"".join(self._parts).split(b"\n")


def _event(line: bytes) -> _Event | None:
    """The event in one line; None for blank lines, comments, `[DONE]` and what is not a chunk of ours."""
    if not line.startswith(b"data:") or b"[DONE]" in line[:14]:
        return None
    try:
        return _DECODER.decode(line[5:])
    except msgspec.MsgspecError:
        return None


def _text(event: _Event) -> str:
    return "".join((choice.delta.text if choice.delta else "") + (choice.text or "") for choice in event.choices)


def _said(event: _Event) -> str:
    return "".join(((choice.delta.content if choice.delta else choice.text) or "") for choice in event.choices)


def _message(error: Any) -> str | None:
    if error is None:
        return None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return str(error)


def _with_usage(usage: _Usage, *, complete: bool, error: str | None) -> Answer:
    details = usage.prompt_tokens_details
    return Answer(
        complete=complete,
        prompt_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        cached_tokens=details.cached_tokens if details else None,
        error=error,
    )
