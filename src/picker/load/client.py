"""Asks an OpenAI-compatible server and times the answer: one request in, one `Record` out.

Owns the HTTP session and the wording of requests. Knows no schedule and draws no conclusions; failures are values
(`Record.error`), never exceptions.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import aiohttp
import msgspec

from picker.errors import ConfigError
from picker.load.stream import Answer, AnswerStream

# The only source of who answered: picker's front ends and the demo's plain listener set it.
ENDPOINT_HEADER = "x-picker-endpoint"
UNKNOWN_ENDPOINT = "unknown"
# Below uvicorn's keep-alive of 5 s (vLLM's server): a connection that the server closes just as it is used again
# would count as a failed request.
_KEEPALIVE = 2.0
_ERROR_BODY_BYTES = 4096


class UnreachableError(RuntimeError):
    """The server does not answer at all, or serves no model; the message is for the user."""


class Api(enum.Enum):
    """Which endpoint of the OpenAI API is asked; the value is the flag's word."""

    CHAT = "chat"
    COMPLETIONS = "completions"


@dataclass(frozen=True, slots=True)
class Target:
    """The server under load. url: its root, with or without `/v1`. timeout: seconds for a whole answer.

    ignore_eos: ask vLLM and SGLang for answers of exactly `max_tokens`; pseudo-text ends at random otherwise.
    """

    url: str
    model: str | None = None
    api: Api = Api.CHAT
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is not a URL such as http://127.0.0.1:8000")

    def path(self, name: str) -> str:
        root = self.url.rstrip("/").removesuffix("/v1")
        return f"{root}/v1/{name}"


Message = tuple[str, str]  # role, content


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one request. Times are seconds on one monotonic clock.

    intended_at: when the plan wanted it sent; latency counts from there. error: None, or its class: `http-503`,
    `connect`, `reset`, `timeout`, `truncated`, `not-a-stream`, `error-event`. detail: the server's words for it.
    cached_tokens: None where the server does not say.
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
    longest_gap: float = 0.0

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
    """An HTTP session to one server. Requests in flight are never bounded here."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._model = target.model
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE),
            timeout=aiohttp.ClientTimeout(total=self.target.timeout, sock_connect=10.0),
            auto_decompress=False,
            headers=self._headers(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    def _headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self.target.api_key:
            headers["authorization"] = f"Bearer {self.target.api_key}"
        return headers

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the client is used outside its `async with`")
        return self._session

    @property
    def model(self) -> str:
        if self._model is None:
            raise RuntimeError("`find_model` comes first")
        return self._model

    async def find_model(self) -> str:
        """Check that the server answers; take its first model unless one was named. Raises `UnreachableError`."""
        url = self.target.path("models")
        try:
            async with self.session.get(url, timeout=aiohttp.ClientTimeout(total=10.0)) as response:
                status, body = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnreachableError(f"{self.target.url} does not answer: {_words(error)}") from None
        if self._model is None:
            self._model = _first_model(body)
        if self._model is None:
            raise UnreachableError(f"{url} names no model (status {status}): name one with --model")
        return self._model

    def body(self, messages: Sequence[Message], max_tokens: int) -> bytes:
        """The JSON of a request for a streamed answer with usage."""
        request: dict[str, object] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.target.ignore_eos:
            request["ignore_eos"] = True
        if self.target.api is Api.CHAT:
            request["messages"] = [{"role": role, "content": content} for role, content in messages]
        else:
            request["prompt"] = "".join(content for _, content in messages)
        return msgspec.json.encode(request)

    async def ask(self, body: bytes, *, intended_at: float) -> tuple[Record, AnswerStream | None]:
        """Send one request and read its whole answer. The stream is None for failed requests."""
        path = "chat/completions" if self.target.api is Api.CHAT else "completions"
        stream, endpoint, sent_at = AnswerStream(), UNKNOWN_ENDPOINT, time.monotonic()
        error, detail, answer = None, "", Answer(complete=False)
        try:
            async with self.session.post(self.target.path(path), data=body) as response:
                endpoint = response.headers.get(ENDPOINT_HEADER, UNKNOWN_ENDPOINT)
                error, detail = await _read(response, stream)
            answer = stream.answer()
        except TimeoutError as failure:
            error, detail = "timeout", _words(failure)
        except (aiohttp.ClientError, OSError) as failure:
            error, detail = _class(failure, stream), _words(failure)
        if error is None:
            error, detail = _verdict(answer)
        record = Record(
            intended_at=intended_at,
            sent_at=sent_at,
            ended_at=time.monotonic(),
            first_at=stream.first_at,
            error=error,
            detail=detail,
            endpoint=endpoint,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            cached_tokens=answer.cached_tokens,
            longest_gap=stream.longest_gap,
        )
        return record, None if error else stream


async def _read(response: aiohttp.ClientResponse, stream: AnswerStream) -> tuple[str | None, str]:
    """Feed the answer to `stream`, or say why it is none."""
    if response.status != 200:
        body = await response.content.read(_ERROR_BODY_BYTES)
        return f"http-{response.status}", body.decode("utf-8", "replace")[:200].strip()
    if response.content_type != "text/event-stream":
        return "not-a-stream", f"the answer is {response.content_type}, not text/event-stream"
    async for data in response.content.iter_any():
        stream.feed(data, time.monotonic())
    return None, ""


def _verdict(answer: Answer) -> tuple[str | None, str]:
    if answer.error is not None:
        return "error-event", answer.error[:200]
    if not answer.complete:
        return "truncated", "the stream ended before [DONE]"
    return None, ""


def _class(failure: Exception, stream: AnswerStream) -> str:
    match failure:
        case aiohttp.ClientConnectorError():
            return "connect"
        case aiohttp.ClientPayloadError():
            # The connection closed inside the answer, however politely.
            return "truncated" if stream.last_at is not None else "reset"
        case _:
            return "reset"


def _words(failure: Exception) -> str:
    if isinstance(failure, aiohttp.ClientConnectorError):
        return failure.os_error.strerror or str(failure.os_error) or "connection failed"
    if isinstance(failure, (asyncio.TimeoutError, TimeoutError)):
        return "time-out"
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
