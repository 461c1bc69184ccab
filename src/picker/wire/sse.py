"""What a response says while it passes by: its first token, usage, end marker and errors.

An observer is fed the bytes that go to the client, in pieces of any size, and changes none of them. Events are taken
apart as the SSE standard says; before the first token each is decoded, after it only those that show a mark which
matters, so that a token costs a few substring searches. Nothing raises: a response that we cannot read is still the
client's. Compressed bodies are opaque here. No IO, no clock.
"""

from __future__ import annotations

import functools
import re

import msgspec
from msgspec import Raw

from picker.types import Usage
from picker.wire.openai import UsageFields, attempt, usage_from, usage_of

MAX_EVENT_BYTES = 1024 * 1024  # longer events are skipped unread; real ones are some 250 bytes
MAX_BODY_BYTES = 8 * 1024 * 1024  # a chat answer is a few KB; larger bodies (embeddings, audio) go by unread

_GAP = b"\n\n"  # line ends are made LF first
_LF = 0x0A
_ENDS = (_GAP, b"\r\n\r\n")
_DONE = b"[DONE]"
_EMPTY = frozenset((b"", b"null", b'""', b"[]", b"{}", b"false"))
_KNOWN_TYPES = ("response.", "message_", "content_block_", "ping")
_RESPONSE_ENDS = frozenset(("response.completed", "response.incomplete", "response.failed", "response.cancelled"))
_FRUITLESS = frozenset(("abort", "error"))  # finish reasons that do not prove a prefill

# Marks of an event that says more than "another token". Generated text cannot show the quoted ones, because quotes
# inside of JSON strings are escaped. Many engines send a null in every event: null is no mark.
_shows_usage = re.compile(rb'"usage"\s*:\s*\{').search
_shows_reason = re.compile(rb'_reason"\s*:\s*"').search
_shows_end = re.compile(rb'"type"\s*:\s*"(?:message_stop|response\.(?:completed|incomplete|failed|cancelled))"').search

# The text of a token, as far as its first escape, and text that ends neither its string, its line nor itself.
_text_of = re.compile(rb'"(?:content|text|reasoning|reasoning_content)"\s*:\s*"([^"\\\r\n]*)"').search
_is_text = re.compile(rb'[^"\\\r\n]*').fullmatch


# --- what engines send -------------------------------------------------------------------------------------


class _Output(msgspec.Struct):
    """A chat `delta` or `message`. Any field that is not empty is output; the role is not."""

    content: Raw = Raw()
    reasoning: Raw = Raw()
    reasoning_content: Raw = Raw()
    tool_calls: Raw = Raw()
    function_call: Raw = Raw()
    refusal: Raw = Raw()
    audio: Raw = Raw()

    def empty(self) -> bool:
        fields = (self.content, self.reasoning, self.reasoning_content, self.tool_calls)
        for raw in (*fields, self.function_call, self.refusal, self.audio):
            if raw and bytes(raw) not in _EMPTY:
                return False
        return True


class _Choice(msgspec.Struct):
    delta: _Output | None = None
    message: _Output | None = None
    text: Raw = Raw()
    token_ids: Raw = Raw()
    finish_reason: str | None = None

    def empty(self) -> bool:
        if bytes(self.text) not in _EMPTY or bytes(self.token_ids) not in _EMPTY:
            return False
        return (self.delta is None or self.delta.empty()) and (self.message is None or self.message.empty())


class _Inner(msgspec.Struct):
    """Anthropic's `message` in message_start, and a Responses object inside its events."""

    usage: UsageFields | None = None


class _Event(msgspec.Struct):
    """A streamed event or a whole JSON body, in any of the dialects."""

    type: str | None = None
    object: str | None = None
    choices: list[_Choice] | None = None
    usage: UsageFields | None = None
    error: Raw = Raw()
    code: Raw = Raw()
    message: Raw = Raw()
    delta: Raw = Raw()
    response: _Inner | None = None
    stop_reason: str | None = None


class _Stop(msgspec.Struct):
    stop_reason: str | None = None


class _Failure(msgspec.Struct):
    code: int | str | None = None


_event = msgspec.json.Decoder(_Event, strict=False)
_inner = msgspec.json.Decoder(_Inner, strict=False)
_stop = msgspec.json.Decoder(_Stop)
_failure = msgspec.json.Decoder(_Failure)
_code = msgspec.json.Decoder(int | str | None)


# --- observers ---------------------------------------------------------------------------------------------


class StreamObserver:
    """Watches a `text/event-stream` response.

    first_token: an event with real output has passed (not the role-only opening of a chat).
    usage: the last counts seen. finish_reason: the last one seen.
    done: the end marker has passed ([DONE], message_stop, response.completed and its kin); for a stream in a dialect
    that we do not know, its end. error: HTTP status of an error event, None without one.
    """

    __slots__ = (
        "_after_cr",
        "_began",
        "_continuous",
        "_known",
        "_late",
        "_pending",
        "_shape",
        "_skipping",
        "_typed",
        "_usage",
        "done",
        "error",
        "finish_reason",
        "first_token",
    )

    def __init__(self) -> None:
        self.first_token = False
        self.finish_reason: str | None = None
        self.done = False
        self.error: int | None = None
        self._usage: Usage | None = None
        self._continuous = False  # counts come with every token: only the last ones are worth decoding
        self._late = b""  # whole events, of which the last with counts has not been decoded
        self._pending = bytearray()  # the beginning of an event whose end has not come
        self._skipping = False  # inside an event that is too long: of it only the last byte is kept
        self._after_cr = False
        self._began = False  # an event of the answer proper has passed, with output or without
        self._known = False  # an event in a dialect whose end marker we know has passed
        self._typed = False  # and its events carry a `type`: Responses or Anthropic
        self._shape: tuple[bytes, bytes] | None = None  # what stands before and behind the text of another token

    @property
    def usage(self) -> Usage | None:
        """Token counts of the latest event that had any; decoding of continuous counts waits until somebody asks."""
        if self._late:
            events, self._late = _with_newlines(self._late).split(_GAP), b""
            event = attempt(_event, next((_payload(block) for block in reversed(events) if _shows_usage(block)), b""))
            self._use(None if event is None else event.usage)
        return self._usage

    @property
    def empty_abort(self) -> bool:
        """The engine gave up before any output, as draining ones do: the request may be sent elsewhere."""
        if self.first_token or self.error is not None:
            return False
        return self.finish_reason == "abort" or (self.done and not self._began)

    def passes(self, data: bytes, start: int, end: int) -> bool:
        """Whether data[start:end], the next bytes of the body, are no more than another token; else `feed` them.

        True where they differ from the event before them in nothing but the text: then they need not be fed.
        """
        shape = self._shape
        if shape is None or self._pending:
            return False
        before, after = shape
        return (
            data.startswith(before, start)
            and data.endswith(after, start, end)
            and _is_text(data, start + len(before), end - len(after)) is not None
        )

    def feed(self, data: bytes, *, end: bool = False) -> None:
        """Take the next bytes of the body. end: nothing follows them."""
        if self.first_token and not end and not self._pending and data.endswith(_ENDS) and self._passes_by(data):
            self._note_shape(data)
            return  # `_after_cr` may stay set: between events it can only swallow an empty line
        if self._after_cr or b"\r" in data:
            data = self._unified(data)
        if self._pending:
            data = self._resume(data)
        if data:
            # Whole events are the rule; then neither slice copies.
            cut = len(data) if data.endswith(_GAP) else _end_of(data.rfind(_GAP))
            self._events(data[:cut])
            if cut < len(data):
                self._hold(data[cut:])
        if end:
            self._close()

    # bytes to events

    def _unified(self, data: bytes) -> bytes:
        """Make all line ends LF, also where a CR LF is split between two calls."""
        if not data:
            return data
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = data.endswith(b"\r")
        return _with_newlines(data)

    def _resume(self, data: bytes) -> bytes:
        """Complete the pending event if its end is in data; returns what follows it. No byte is searched twice."""
        pending = self._pending
        across = pending[-1] == _LF and data.startswith(b"\n")
        cut = 1 if across else _end_of(data.find(_GAP))
        if not cut:
            self._hold(data)
            return b""
        if self._skipping:
            self._skipping = False
            self._skip()
        else:
            pending += data[:cut]
            self._events(bytes(pending))
        pending.clear()
        return data[cut:]

    def _hold(self, data: bytes) -> None:
        if self._skipping or len(self._pending) + len(data) > MAX_EVENT_BYTES + 1:
            self._skipping = True
            self._pending[:] = data[-1:] or self._pending[-1:]
        else:
            self._pending += data

    def _events(self, data: bytes) -> None:
        """data: whole events."""
        if self.first_token and self._passes_by(data):
            return
        for block in data.split(_GAP):
            if not block:
                continue  # what follows the last gap
            if len(block) > MAX_EVENT_BYTES:
                self._skip()
            elif not self.first_token or not self._passes_by(block):
                self._observe(_payload(block))

    def _passes_by(self, data: bytes) -> bool:
        """Whether events need no decoding (for now); all that runs for most of a stream."""
        if b"[DONE]" in data or _shows_reason(data) or b'"error"' in data:
            return False
        if self._typed and _shows_end(data):
            return False
        if not _shows_usage(data):
            return True
        if self._continuous:
            self._late = data
        return self._continuous

    def _note_shape(self, data: bytes) -> None:
        """Of events that were passed by for what they are: any that differ in this text alone may be."""
        text = None if self._continuous else _text_of(data)
        self._shape = None if text is None else (data[: text.start(1)], data[text.end(1) :])

    def _close(self) -> None:
        """The body is over. An event that lacks no more than its blank line counts; a fragment does not."""
        if self._skipping:
            self._skip()
        elif self._pending:
            payload = _payload(bytes(self._pending))
            if payload == _DONE or attempt(_event, payload) is not None:
                self._observe(payload)
        self._pending.clear()
        self._skipping = False
        self.done = self.done or (self._began and not self._known)

    # events to facts

    def _skip(self) -> None:
        self.first_token = self._began = True

    def _observe(self, payload: bytes) -> None:
        if not payload:
            return
        if payload == _DONE:
            self.done = True
            return
        event = attempt(_event, payload)
        if event is None:
            self._skip()
        elif (error := _error_status(event)) is not None:
            self.error = error
        else:
            self._take(event)

    def _take(self, event: _Event) -> None:
        self._use(event.usage)
        if event.choices is not None:
            self._known = True
            self._continuous = self._continuous or (event.usage is not None and len(event.choices) > 0)
            for choice in event.choices:
                self._began = True
                self._finish(choice.finish_reason)
                self.first_token = self.first_token or not choice.empty()
        elif event.type is not None and event.type.startswith(_KNOWN_TYPES):
            self._known = self._typed = True
            self._take_typed(event, event.type)
        elif event.usage is None:
            self._skip()

    def _take_typed(self, event: _Event, kind: str) -> None:
        self._began = self._began or kind not in ("ping", "message_stop")
        if kind == "content_block_delta" or kind.endswith(".delta"):
            self.first_token = True
        elif kind == "message_start":
            message = attempt(_inner, event.message)
            self._use(message.usage if message is not None else None)
        elif kind == "message_delta":
            delta = attempt(_stop, event.delta)
            self._finish(delta.stop_reason if delta is not None else None)
        elif kind == "message_stop":
            self.done = True
        elif kind in _RESPONSE_ENDS:
            self.done = True
            if event.response is not None:
                self._use(event.response.usage)
        if kind == "response.failed":
            self.error = 500

    def _use(self, fields: UsageFields | None) -> None:
        """Anthropic's stream tells input and output tokens in two events; elsewhere the last event tells all."""
        if fields is not None:
            self._late = b""
            self._usage = usage_from(fields, self._usage if self._typed else None) or self._usage

    def _finish(self, reason: str | None) -> None:
        """An engine that finished has prefilled, even if its only token was the invisible end of sequence."""
        if reason is not None:
            self.finish_reason = reason
            self.first_token = self.first_token or reason not in _FRUITLESS


class JsonObserver:
    """Watches a response that is one JSON document; the same attributes as `StreamObserver`, most of them at the end.

    first_token: the first byte has passed. A body of more than max_bytes goes by unread and leaves usage None.
    """

    __slots__ = ("_chunks", "_room", "done", "empty_abort", "error", "finish_reason", "first_token", "usage")

    def __init__(self, max_bytes: int = MAX_BODY_BYTES) -> None:
        self.first_token = False
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.done = False
        self.error: int | None = None
        self.empty_abort = False
        self._chunks: list[bytes] = []
        self._room = max_bytes

    def feed(self, data: bytes, *, end: bool = False) -> None:
        """Take the next bytes of the body. end: nothing follows them."""
        self.first_token = self.first_token or bool(data)
        self._room -= len(data)
        if self._room < 0:
            self._chunks.clear()
        elif data:
            self._chunks.append(data)
        if end:
            self.done = True
            self._read(b"".join(self._chunks))
            self._chunks.clear()

    def passes(self, data: bytes, start: int, end: int) -> bool:
        """As `StreamObserver.passes`: a document is read as a whole."""
        return False

    def _read(self, body: bytes) -> None:
        event = attempt(_event, body)
        if event is None:
            self.usage = usage_of(body)
            return
        self.error = _error_status(event)
        self.usage = None if event.usage is None else usage_from(event.usage, None)
        choices = event.choices or []
        self.finish_reason = next((choice.finish_reason for choice in choices), event.stop_reason)
        self.empty_abort = self.finish_reason == "abort" and all(choice.empty() for choice in choices)


Observer = StreamObserver | JsonObserver


def observer_for(content_type: str, *, stream: bool) -> Observer:
    """The observer for a response. stream: what the request asked for; it decides where the type is not given."""
    media = _media(content_type)
    if media == "text/event-stream" or (not media and stream):
        return StreamObserver()
    if not media or media == "application/json" or media.endswith("+json"):
        return JsonObserver()
    return JsonObserver(max_bytes=0)


@functools.lru_cache(maxsize=64)
def _media(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


# --- reading -----------------------------------------------------------------------------------------------


def _end_of(gap: int) -> int:
    """Where an event ends, from where its gap was found; 0 where none was."""
    return gap + len(_GAP) if gap >= 0 else 0


def _with_newlines(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _payload(block: bytes) -> bytes:
    """The data of one event, several data lines joined; comments, names and ids are dropped."""
    if block.startswith(b"data:") and b"\n" not in block:
        return block[5:].strip()
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines).strip()


def _error_status(event: _Event) -> int | None:
    """HTTP status of an error event; 500 where it names none."""
    nested = bool(event.error) and bytes(event.error) not in _EMPTY
    if not nested and event.object != "error" and event.type != "error":
        return None
    # A bare message in place of an object has no code either.
    failure = attempt(_failure, event.error) if nested else None
    code = attempt(_code, event.code) if failure is None else failure.code
    status = int(code) if code is not None and str(code).isdecimal() else 500
    return status if 400 <= status <= 599 else 500
