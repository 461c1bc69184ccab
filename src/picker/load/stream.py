"""One answer: when its pieces came, what usage it reported, how it ended.

Pure: bytes and times come in. Every event is parsed as it arrives, so that the time of each piece of content is known
and no burst of parsing at the end of an answer delays the others. Independent of `wire.sse`, so that a fault there does
not hide itself in our own measurements.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

# `data: [DONE]` with whatever white space around it; no chunk is as short.
_END_MARK_BYTES = 20


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None  # vLLM before 0.12, SGLang, DeepSeek
    reasoning: str | None = None  # vLLM since 0.12


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    message: _Delta | None = None  # of an answer that is not streamed
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
    """What a whole answer said. complete: a stream ended with `[DONE]`. error: an error object inside it.

    output_tokens: pieces of content where the server reports no usage.
    """

    complete: bool
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    error: str | None = None


class Reply(Protocol):
    """What takes the bytes of an answer: an `AnswerStream` or a `WholeAnswer`."""

    @property
    def content_type(self) -> str: ...
    @property
    def first_at(self) -> float | None: ...
    @property
    def last_at(self) -> float | None: ...
    def feed(self, data: bytes, now: float) -> None: ...
    def answer(self) -> Answer: ...
    def text(self) -> str: ...
    def gaps(self) -> array[float]: ...


class AnswerStream:
    """Takes the bytes of a streamed answer as they arrive, in pieces of any size.

    first_at, last_at: when the first non-empty content and the last bytes came. keep: remember the text.
    """

    __slots__ = (
        "_complete",
        "_content_at",
        "_error",
        "_gaps",
        "_head",
        "_keep",
        "_said",
        "_usage",
        "first_at",
        "last_at",
    )

    content_type = "text/event-stream"

    def __init__(self, *, keep: bool = True) -> None:
        self.first_at: float | None = None
        self.last_at: float | None = None
        self._keep = keep
        self._said: list[str] = []
        self._gaps: array[float] = array("f")
        self._content_at = 0.0
        self._usage: _Usage | None = None
        self._error: str | None = None
        self._complete = False
        self._head = b""  # unfinished line

    def feed(self, data: bytes, now: float) -> None:
        self.last_at = now
        lines = (self._head + data if self._head else data).split(b"\n")
        self._head = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line, now)

    def _take(self, line: bytes, now: float) -> None:
        if len(line) < _END_MARK_BYTES and line[5:].strip() == b"[DONE]":
            self._complete = True
            return
        try:
            event = _DECODER.decode(line[5:])
        except msgspec.MsgspecError:
            return  # not a chunk of ours
        if event.usage is not None:
            self._usage = event.usage
        if event.error is not None:
            self._error = self._error or _message(event.error)
        if event.choices and self._has_content(event.choices):
            self._note(now)

    def _has_content(self, choices: list[_Choice]) -> bool:
        """Whether these say anything; thinking does, and is not remembered, as clients do."""
        found = False
        for choice in choices:
            delta = choice.delta
            said = delta.content if delta is not None else choice.text
            if said:
                found = True
                if self._keep:
                    self._said.append(said)
            elif delta is not None and (delta.reasoning or delta.reasoning_content):
                found = True
        return found

    def _note(self, now: float) -> None:
        if self.first_at is None:
            self.first_at = now
        else:
            self._gaps.append(now - self._content_at)
        self._content_at = now

    def answer(self) -> Answer:
        """What the stream said, once no more bytes come."""
        if self._head.startswith(b"data:"):
            self._take(self._head, self.last_at or 0.0)  # the last line may lack its end
            self._head = b""
        pieces = 0 if self.first_at is None else 1 + len(self._gaps)
        return _answer(self._usage, complete=self._complete, error=self._error, pieces=pieces)

    def text(self) -> str:
        """All that the assistant said, for the next turn of a conversation."""
        return "".join(self._said)

    def gaps(self) -> array[float]:
        """Seconds from each piece of content to the next; those that came in one read came together."""
        return self._gaps


class WholeAnswer:
    """Takes the bytes of an answer that is not streamed: nobody sees its first token."""

    __slots__ = ("_event", "_parts", "last_at")

    content_type = "application/json"
    first_at: float | None = None

    def __init__(self) -> None:
        self.last_at: float | None = None
        self._parts: list[bytes] = []
        self._event: _Event | None = None

    def feed(self, data: bytes, now: float) -> None:
        self.last_at = now
        self._parts.append(data)

    def answer(self) -> Answer:
        try:
            self._event = _DECODER.decode(b"".join(self._parts))
        except msgspec.MsgspecError as error:
            return Answer(complete=False, error=f"the answer is not an OpenAI one: {error}")
        if not self._event.choices and self._event.error is None:
            return Answer(complete=False, error="the answer is not an OpenAI one: it has no choices")
        return _answer(self._event.usage, complete=True, error=_message(self._event.error))

    def text(self) -> str:
        choices = self._event.choices if self._event is not None else []
        return "".join((choice.message.content if choice.message else choice.text) or "" for choice in choices)

    def gaps(self) -> array[float]:
        return array("f")


def _answer(usage: _Usage | None, *, complete: bool, error: str | None, pieces: int = 0) -> Answer:
    if usage is None:
        return Answer(complete=complete, output_tokens=pieces, error=error)
    details = usage.prompt_tokens_details
    return Answer(
        complete=complete,
        prompt_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        cached_tokens=details.cached_tokens if details else None,
        error=error,
    )


def _message(error: Any) -> str | None:
    if error is None:
        return None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return str(error)
