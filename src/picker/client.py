"""A client of picker's gRPC API: ask where a request should go, send it there, say how it went.

    async with Client("127.0.0.1:9004") as client:
        async with client.pick(body, path="/v1/chat/completions") as picked:
            ...  # send `body` to `picked.endpoint.url`
            picked.first_token()
            picked.finished(Usage(prompt_tokens=900, completion_tokens=80, cached_tokens=512))

Needs nothing of picker but its messages, and `grpcio`. Reports are sent in the background, in order, in one stream;
what is told while picker cannot be reached is kept for a while. Nothing here delays or fails a request but `pick`.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from picker.wire.pb import picker_pb2 as pb

_SERVICE = "/picker.v1.Picker/"
_KEPT = 10_000  # reports that wait to be sent; older ones give way
_AGAIN = 0.2  # seconds until a broken report stream is made anew; picker waits a few
_PARTING = 2.0  # seconds that the last reports may take
# gRPC's own pauses grow to two minutes, in which every pick would fail.
_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2000))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a request may go. address: "host:port". rank: data-parallel, where the engine has several."""

    name: str
    address: str
    scheme: str = "http"
    rank: int | None = None

    @property
    def url(self) -> str:
        """Without a path: "http://10.0.0.1:8000"."""
        return f"{self.scheme or 'http'}://{self.address}"


@dataclass(frozen=True, slots=True)
class EndpointState:
    """An endpoint as picker sees it; None where nothing is known. See `EndpointState` in picker.proto."""

    endpoint: Endpoint
    models: frozenset[str]
    role: str
    healthy: bool
    draining: bool
    resting: bool
    inflight_requests: int
    backlog_tokens: int
    waiting: float | None
    running: float | None
    kv_usage: float | None
    kv_capacity_tokens: float | None
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Candidate:
    """Why: an endpoint's score (higher wins) and the parts of it."""

    endpoint: str
    total: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as the engine reported them; cached_tokens is None where it does not say."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """Hashes of a prompt's leading full blocks, each of everything up to its end; blocks of so many tokens or bytes."""

    hashes: Sequence[int]
    block_tokens: int = 0
    block_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Features:
    """What is known of a request whose body stays with the gateway. prompt: its beginning, or `Blocks` of it."""

    model: str = ""
    prompt: bytes | Blocks = field(default=b"", repr=False)
    prompt_bytes: int = 0
    prompt_tokens: int = 0
    max_tokens: int | None = None
    priority: int = 0
    session: str = ""
    cache_salt: str = field(default="", repr=False)


class Failure(enum.Enum):
    """Why a request has no complete answer. UNKNOWN and CLIENT_GONE are not held against the endpoint."""

    UNKNOWN = pb.FAILURE_REASON_UNSPECIFIED
    CLIENT_GONE = pb.FAILURE_REASON_CLIENT_GONE
    CONNECT = pb.FAILURE_REASON_CONNECT
    RESET = pb.FAILURE_REASON_RESET
    TIMEOUT = pb.FAILURE_REASON_TIMEOUT
    TRUNCATED = pb.FAILURE_REASON_TRUNCATED


class Explain(enum.Enum):
    """Which candidates a pick explains."""

    CHOSEN = pb.EXPLAIN_CHOSEN
    ALL = pb.EXPLAIN_ALL
    NONE = pb.EXPLAIN_NONE


class RefusedError(Exception):
    """Picker says what to answer the client with: status, headers and body (an OpenAI error object).

    reason: a word for programs ("saturated"). retry_after: seconds.
    """

    def __init__(self, refusal: Any) -> None:
        super().__init__(f"{refusal.status} {refusal.reason}: {refusal.message}")
        self.status = int(refusal.status)
        self.reason = str(refusal.reason)
        self.message = str(refusal.message)
        self.retry_after = float(refusal.retry_after_s) if refusal.HasField("retry_after_s") else None
        self.headers: dict[str, str] = dict(refusal.headers)
        self.body = bytes(refusal.body)


class Picked:
    """Where one request goes, and how it went: call `started`, `first_token`, then `finished` or `failed`.

    Each counts once, and none waits. endpoint first, then `fallbacks` in order. headers: to be set on the request to
    `endpoint`. model: to be asked for instead of the client's, see `body`; None: the client's. matched_blocks of
    total_blocks are believed to be cached there.
    """

    def __init__(self, message: Any, reports: _Reports) -> None:
        self.id = str(message.id)
        self.endpoint = _endpoint(message.endpoint)
        self.fallbacks = tuple(map(_endpoint, message.fallbacks))
        self.headers: dict[str, str] = dict(message.set_headers)
        self._rewrite = message.rewrite if message.HasField("rewrite") else None
        self.model = None if self._rewrite is None else str(self._rewrite.model)
        self.matched_blocks = int(message.matched_blocks)
        self.total_blocks = int(message.total_blocks)
        self.matched_tokens = float(message.matched_tokens)
        self.prompt_tokens = float(message.prompt_tokens)
        self.waited = float(message.waited_s)
        self.candidates = tuple(Candidate(c.endpoint, c.total, dict(c.parts)) for c in message.candidates)
        self._reports = reports
        self._told: set[str] = set()

    def body(self, body: bytes) -> bytes:
        """The body that was shown to picker as `endpoint` is to get it: with `model`, where there is one."""
        if self._rewrite is None or not self._rewrite.data:
            return body
        return b"".join((body[: self._rewrite.begin], self._rewrite.data, body[self._rewrite.end :]))

    @property
    def over(self) -> bool:
        """Its end has been told."""
        return "end" in self._told

    def started(self, status: int, endpoint: Endpoint | None = None) -> None:
        """Response headers came. endpoint: who answered, where it is not the one picked first."""
        name = (endpoint or self.endpoint).address
        self._tell("started", pb.Outcome(pick_id=self.id, started=pb.Started(status=status, endpoint=name)))

    def first_token(self) -> None:
        """Output has begun; may be called with every chunk."""
        if "token" not in self._told:
            self._tell("token", pb.Outcome(pick_id=self.id, first_token=pb.FirstToken()))

    def finished(self, usage: Usage | None = None, *, status: int = 0) -> None:
        """The response ended as it should. status: 0 for that of `started`, or 200."""
        finished = pb.Finished(status=status)
        if usage is not None:
            counts = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
            finished.usage.CopyFrom(
                pb.Usage(prompt_tokens=counts[0], completion_tokens=counts[1], cached_tokens=counts[2])
            )
        self._tell("end", pb.Outcome(pick_id=self.id, finished=finished))

    def failed(self, reason: Failure) -> None:
        """There is no complete answer."""
        self._tell("end", pb.Outcome(pick_id=self.id, failed=pb.Failed(reason=reason.value)))

    def _tell(self, what: str, outcome: Any) -> None:
        if what not in self._told and not self.over:
            self._told.add(what)
            self._reports.put(outcome)


class Client:
    """Picks by one picker; an async context manager, used from one event loop.

    target: "host:port". key: the server's, if it asks for one. credentials: of `grpc.ssl_channel_credentials`; None:
    clear text.
    """

    def __init__(self, target: str, *, key: str | None = None, credentials: Any = None) -> None:
        self._target = target
        self._credentials = credentials
        self._metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        self._reporter = secrets.token_hex(8)
        self._stack = contextlib.AsyncExitStack()
        self._reports: _Reports
        self._reporting: asyncio.Task[None]
        self._pick: Any
        self._watch: Any

    async def __aenter__(self) -> Client:
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(self._target, options=_OPTIONS)
        else:
            channel = grpc.aio.secure_channel(self._target, self._credentials, options=_OPTIONS)
        self._pick = channel.unary_unary(
            f"{_SERVICE}Pick", pb.PickRequest.SerializeToString, pb.PickResponse.FromString
        )
        self._watch = channel.unary_stream(
            f"{_SERVICE}WatchEndpoints", pb.WatchEndpointsRequest.SerializeToString, pb.EndpointsUpdate.FromString
        )
        self._reports = _Reports(channel, self._metadata, self._reporter)
        await self._stack.enter_async_context(channel)
        tasks = await self._stack.enter_async_context(asyncio.TaskGroup())
        self._reporting = tasks.create_task(self._reports.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send the last reports while that is possible, then close."""
        self._reports.close()
        try:
            await asyncio.wait([self._reporting], timeout=_PARTING)
        finally:
            self._reporting.cancel()
            await self._stack.aclose()

    @contextlib.asynccontextmanager
    async def pick(
        self,
        request: bytes | Features,
        *,
        path: str = "/v1/chat/completions",
        headers: Mapping[str, str] | None = None,
        subset: Iterable[str] = (),
        exclude: Iterable[str] = (),
        first_token: bool = True,
        explain: Explain = Explain.CHOSEN,
        timeout: float | None = None,
    ) -> AsyncIterator[Picked]:
        """Where a request should go. request: its body as the client sent it, to be read for `path`, or its features.

        headers: those that concern routing. subset: addresses to choose from. exclude: names of endpoints that failed
        it already. first_token: it will be told. timeout: seconds, waiting in picker's queue included.

        Raises RefusedError for what is to be answered at once, and `grpc.aio.AioRpcError` when picker cannot be asked.
        What leaves the block without having told its end has finished; an error that leaves it tells what went wrong.
        """
        picked = await self.ask(
            request,
            path=path,
            headers=headers,
            subset=subset,
            exclude=exclude,
            first_token=first_token,
            explain=explain,
            timeout=timeout,
        )
        try:
            yield picked
        except BaseException as error:
            picked.failed(_blame(error))
            raise
        picked.finished()

    async def ask(
        self,
        request: bytes | Features,
        *,
        path: str = "/v1/chat/completions",
        headers: Mapping[str, str] | None = None,
        subset: Iterable[str] = (),
        exclude: Iterable[str] = (),
        first_token: bool = True,
        explain: Explain = Explain.CHOSEN,
        timeout: float | None = None,
    ) -> Picked:
        """As `pick`, for those who tell the end elsewhere: it is theirs to call `finished` or `failed`."""
        message = pb.PickRequest(
            subset=subset,
            exclude=exclude,
            reporter=self._reporter,
            reports_first_token=first_token,
            explain=explain.value,
        )
        if isinstance(request, Features):
            message.features.CopyFrom(_features(request, headers or {}))
        else:
            message.http.CopyFrom(pb.HttpRequest(path=path, body=request, headers=headers or {}))
        answer = await self._pick(message, metadata=self._metadata, timeout=timeout)
        if answer.WhichOneof("outcome") == "refusal":
            raise RefusedError(answer.refusal)
        return Picked(answer.picked, self._reports)

    async def watch(self, *, interval: float = 1.0) -> AsyncIterator[Mapping[str, EndpointState]]:
        """All endpoints by name, again after every change. interval: seconds, for changes of load.

        Raises `grpc.aio.AioRpcError` when picker cannot be asked any more.
        """
        known: dict[str, EndpointState] = {}
        request = pb.WatchEndpointsRequest(interval_ms=round(interval * 1000))
        call = self._watch(request, metadata=self._metadata)
        try:
            async for update in call:
                for name in update.removed:
                    known.pop(name, None)
                known.update((state.endpoint.name, _state(state)) for state in update.changed)
                yield dict(known)
        finally:
            call.cancel()


class _Reports:
    """Sends outcomes in order; a stream that breaks is made anew. Belongs to one task, which `close` ends."""

    def __init__(self, channel: Any, metadata: Sequence[tuple[str, str]], reporter: str) -> None:
        self._report = channel.stream_unary(
            f"{_SERVICE}Report", pb.Outcome.SerializeToString, pb.ReportSummary.FromString
        )
        self._metadata = metadata
        self._hello = pb.Outcome(hello=pb.Hello(reporter=reporter))
        self._waiting: deque[Any] = deque(maxlen=_KEPT)
        self._news = asyncio.Event()
        self._closed = False

    def put(self, outcome: Any) -> None:
        self._waiting.append(outcome)
        self._news.set()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    async def run(self) -> None:
        while not self._closed:
            # Supervision: a report that cannot be sent is picker's loss, not the caller's.
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self._stream()
            if not self._closed:
                await asyncio.sleep(_AGAIN)

    async def _stream(self) -> None:
        call = self._report(metadata=self._metadata, wait_for_ready=True)
        call.add_done_callback(lambda _: self._news.set())
        try:
            await call.write(self._hello)
            while not call.done():
                self._news.clear()
                while self._waiting:
                    await call.write(self._waiting[0])
                    self._waiting.popleft()
                if self._closed:
                    await call.done_writing()
                    await call
                else:
                    await self._news.wait()
        finally:
            call.cancel()


def _blame(error: BaseException) -> Failure:
    match error:
        case TimeoutError():
            return Failure.TIMEOUT
        case ConnectionRefusedError():
            return Failure.CONNECT
        case OSError():
            return Failure.RESET
        case asyncio.CancelledError() | GeneratorExit():
            return Failure.CLIENT_GONE
        case _:
            return Failure.UNKNOWN


def _features(features: Features, headers: Mapping[str, str]) -> Any:
    message = pb.Features(
        model=features.model,
        prompt_bytes=features.prompt_bytes,
        prompt_tokens=features.prompt_tokens,
        max_tokens=features.max_tokens,
        priority=features.priority,
        session=features.session,
        cache_salt=features.cache_salt,
        headers=headers,
    )
    match features.prompt:
        case Blocks(hashes, tokens, size):
            unit = {"block_bytes": size} if size else {"block_tokens": tokens}
            message.blocks.CopyFrom(pb.BlockHashes(hashes=hashes, **unit))
        case bytes(text):
            message.prompt = text
    return message


def _endpoint(message: Any) -> Endpoint:
    rank = message.rank if message.HasField("rank") else None
    return Endpoint(message.name, message.address, message.scheme, rank)


def _state(message: Any) -> EndpointState:
    optional = ("waiting", "running", "kv_usage", "kv_capacity_tokens")
    return EndpointState(
        endpoint=_endpoint(message.endpoint),
        models=frozenset(message.models),
        role=message.role,
        healthy=message.healthy,
        draining=message.draining,
        resting=message.resting,
        inflight_requests=message.inflight_requests,
        backlog_tokens=message.backlog_tokens,
        **{name: getattr(message, name) if message.HasField(name) else None for name in optional},
        labels=dict(message.labels),
    )
