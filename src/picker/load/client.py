"""Asks an OpenAI-compatible server and times the answer: one request in, one `Record` out.

Owns the wording of requests and what counts as a failure. Knows no schedule and draws no conclusions; failures are
values (`Record.error`), never exceptions.
"""

from __future__ import annotations

import asyncio
import enum
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec

from picker.errors import ConfigError
from picker.load.connection import Address, Connections, Exchange, ExchangeError
from picker.load.stream import Answer, AnswerStream, Reply, WholeAnswer

# The only source of who answered: picker's front ends and the demo's plain listener set it.
ENDPOINT_HEADER = "x-picker-endpoint"
UNKNOWN_ENDPOINT = "unknown"
_ERROR_BODY_BYTES = 4096
_PROBE_SECONDS = 10.0
_PORTS = {"http": 80, "https": 443}


class UnreachableError(RuntimeError):
    """The server does not answer at all, or serves no model; the message is for the user."""


class Api(enum.Enum):
    """Which endpoint of the OpenAI API is asked; the value is the flag's word."""

    CHAT = "chat"
    COMPLETIONS = "completions"


_PATHS = {Api.CHAT: "chat/completions", Api.COMPLETIONS: "completions"}


@dataclass(frozen=True, slots=True)
class Target:
    """The server under load. url: its root, with or without `/v1`. timeout: seconds for a whole answer.

    ignore_eos: ask vLLM and SGLang for answers of exactly `max_tokens`; pseudo-text ends at random otherwise.
    stream: ask for streamed answers; without, nobody sees a first token.
    """

    url: str
    model: str | None = None
    api: Api = Api.CHAT
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    ignore_eos: bool = True
    stream: bool = True

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is not a URL such as http://127.0.0.1:8000")

    def path(self, name: str) -> str:
        root = self.url.rstrip("/").removesuffix("/v1")
        return f"{root}/v1/{name}"

    @property
    def address(self) -> Address:
        parts = urlsplit(self.url)
        return Address(parts.hostname or "", parts.port or _PORTS[parts.scheme], tls=parts.scheme == "https")


Message = tuple[str, str]  # role, content


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one request. Times are seconds on one monotonic clock.

    intended_at: when the plan wanted it sent; latency counts from there. error: None, or its class: `http-503`,
    `connect`, `reset`, `timeout`, `truncated`, `not-a-stream`, `not-an-answer`, `error-event`. detail: the server's
    words for it.
    cached_tokens: None where the server does not say. first_at: of the first content; None of answers that are not
    streamed. gaps: seconds from each piece of content to the next, 0 for pieces that came together; a piece is a token
    unless the engine sent several at once. conversation, turn: place in the plan, from 0; conversation -1: in none.
    """

    intended_at: float
    sent_at: float
    ended_at: float
    first_at: float | None = None
    error: str | None = None
    detail: str = ""
    endpoint: str = UNKNOWN_ENDPOINT
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    gaps: array[float] = field(default_factory=lambda: array("f"), repr=False)
    conversation: int = -1
    turn: int = 0

    @property
    def longest_gap(self) -> float:
        return max(self.gaps, default=0.0)

    @property
    def ttft(self) -> float | None:
        return None if self.error or self.first_at is None else self.first_at - self.intended_at

    @property
    def e2e(self) -> float | None:
        return None if self.error else self.ended_at - self.intended_at

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for answers of one token and failed ones."""
        if self.error or self.first_at is None or self.output_tokens < 2:
            return None
        return (self.ended_at - self.first_at) / (self.output_tokens - 1)

    @property
    def delay(self) -> float:
        """Seconds that we were late."""
        return self.sent_at - self.intended_at


class Client:
    """Connections to one server. Requests in flight are never bounded here. clock: monotonic seconds."""

    def __init__(self, target: Target, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.target = target
        self.clock = clock
        self._model = target.model
        self._connections = Connections(target.address, clock)
        self._post = {api: _head(target, "POST", urlsplit(target.path(_PATHS[api])).path) for api in Api}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connections.close()

    @property
    def model(self) -> str:
        if self._model is None:
            raise RuntimeError("`find_model` comes first")
        return self._model

    async def find_model(self) -> str:
        """Check that the server answers; take its first model unless one was named. Raises `UnreachableError`."""
        url, parts = self.target.path("models"), list[bytes]()
        try:
            exchange = await self._exchange(
                _head(self.target, "GET", urlsplit(url).path) % 0, lambda data, _: parts.append(data), _PROBE_SECONDS
            )
        except (ExchangeError, OSError) as error:
            raise UnreachableError(f"{self.target.url} does not answer: {_words(error)}") from None
        if self._model is None:
            self._model = _first_model(b"".join(parts))
        if self._model is None:
            raise UnreachableError(f"{url} names no model (status {exchange.status}): name one with --model")
        return self._model

    def body(self, messages: Sequence[Message], max_tokens: int, *, model: str | None = None) -> bytes:
        """The JSON of a request, with usage if it is streamed. model: instead of the target's."""
        request: dict[str, object] = {
            "model": model or self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": self.target.stream,
        }
        if self.target.stream:
            request["stream_options"] = {"include_usage": True}
        if self.target.ignore_eos:
            request["ignore_eos"] = True
        if self.target.api is Api.CHAT:
            request["messages"] = [{"role": role, "content": content} for role, content in messages]
        else:
            request["prompt"] = "".join(content for _, content in messages)
        return msgspec.json.encode(request)

    def adapted(self, raw: bytes) -> tuple[bytes, Api]:
        """A request of somebody's own, with the run's model and streaming, and the endpoint that it is for."""
        request = msgspec.json.decode(raw, type=dict[str, Any])
        request["model"] = self.target.model or request.get("model") or self.model
        request["stream"] = self.target.stream
        request.pop("stream_options", None)
        if self.target.stream:
            request["stream_options"] = {"include_usage": True}
        return msgspec.json.encode(request), Api.CHAT if "messages" in request else Api.COMPLETIONS

    async def ask(
        self,
        body: bytes,
        *,
        intended_at: float,
        api: Api | None = None,
        keep: bool = True,
        conversation: int = -1,
        turn: int = 0,
    ) -> tuple[Record, Reply | None]:
        """Send one request and read its whole answer. The reply is None for failed requests.

        api: instead of the target's. keep: remember the text of a stream. conversation, turn: for the record.
        """
        asked = _Asked(AnswerStream(keep=keep) if self.target.stream else WholeAnswer())
        request = self._post[api or self.target.api] % len(body) + body
        sent_at = self.clock()
        error, detail = await self._answer(request, asked)
        ended_at, answer = self.clock(), asked.reply.answer()
        if error is None:
            error, detail = _verdict(answer, stream=self.target.stream)
        if error is None and asked.reply.last_at is not None:
            ended_at = asked.reply.last_at  # not when this task came to know
        record = Record(
            intended_at=intended_at,
            sent_at=sent_at,
            ended_at=ended_at,
            first_at=asked.reply.first_at,
            error=error,
            detail=detail,
            endpoint=asked.endpoint,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            cached_tokens=answer.cached_tokens,
            gaps=asked.reply.gaps(),
            conversation=conversation,
            turn=turn,
        )
        return record, None if error else asked.reply

    async def _answer(self, request: bytes, asked: _Asked) -> tuple[str | None, str]:
        """Have `asked` filled; class and words of what went wrong."""
        try:
            await self._exchange(request, asked.take, self.target.timeout, asked)
        except TimeoutError as failure:
            return "timeout", _words(failure)
        except ExchangeError as failure:
            return "truncated" if asked.reply.last_at is not None else "reset", _words(failure)
        except OSError as failure:
            return "connect", _words(failure)
        return asked.refusal()

    async def _exchange(
        self, request: bytes, take: Callable[[bytes, float], None], seconds: float, asked: _Asked | None = None
    ) -> Exchange:
        """One request on a connection of its own while it lasts. Raises ExchangeError, TimeoutError and OSError."""
        exchange, connection = Exchange(take), None
        if asked is not None:
            asked.exchange = exchange
        try:
            async with asyncio.timeout(seconds):
                connection = await self._connections.get()
                await connection.ask(request, exchange)
        except BaseException:
            if connection is not None:
                connection.abort()
            raise
        self._connections.put_back(connection)
        return exchange


def _head(target: Target, method: str, path: str) -> bytes:
    """The head of a request, with a place for the length of its body."""
    host = f"[{target.address.host}]" if ":" in target.address.host else target.address.host
    lines = [
        f"{method} {path} HTTP/1.1",
        f"host: {host}:{target.address.port}",
        "user-agent: picker-load",
        "accept: */*",
        "accept-encoding: identity",
        "content-type: application/json",
        *([f"authorization: Bearer {target.api_key}"] if target.api_key else []),
    ]
    return "\r\n".join(lines).replace("%", "%%").encode() + b"\r\ncontent-length: %d\r\n\r\n"


class _Asked:
    """An answer on its way: only what has the right status and type is fed to the reply."""

    __slots__ = ("_other", "exchange", "reply")

    exchange: Exchange

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self._other: bytes = b""

    def take(self, data: bytes, now: float) -> None:
        if self.exchange.status == 200 and self._of_right_type:
            self.reply.feed(data, now)
        elif len(self._other) < _ERROR_BODY_BYTES:
            self._other += data

    @property
    def content_type(self) -> str:
        return self.exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")

    @property
    def _of_right_type(self) -> bool:
        return self.content_type == self.reply.content_type

    @property
    def endpoint(self) -> str:
        return self.exchange.headers.get(ENDPOINT_HEADER.encode(), UNKNOWN_ENDPOINT.encode()).decode("latin-1")

    def refusal(self) -> tuple[str | None, str]:
        """Class and words of an answer that is none."""
        if self.exchange.status != 200:
            return f"http-{self.exchange.status}", self._other.decode("utf-8", "replace")[:200].strip()
        if not self._of_right_type:
            kind = "not-a-stream" if self.reply.content_type == AnswerStream.content_type else "not-an-answer"
            return kind, f"the answer is {self.content_type or 'of no type'}, not {self.reply.content_type}"
        return None, ""


def _verdict(answer: Answer, *, stream: bool) -> tuple[str | None, str]:
    if answer.error is not None:
        return "error-event" if stream or answer.complete else "not-an-answer", answer.error[:200]
    if not answer.complete:
        return "truncated", "the stream ended before [DONE]"
    return None, ""


def _words(failure: Exception) -> str:
    if isinstance(failure, TimeoutError):
        return "time-out"
    if isinstance(failure, OSError):
        return failure.strerror or str(failure) or "connection failed"
    return str(failure) or type(failure).__name__


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _first_model(body: bytes) -> str | None:
    try:
        models = msgspec.json.decode(body, type=_Models).data
    except msgspec.MsgspecError:
        return None
    return models[0].id if models else None
