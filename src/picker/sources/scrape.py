"""Load, health and models of every endpoint, asked for over HTTP at a steady pace.

One loop per server address; the data-parallel ranks behind it share its page. A scrape that brings nothing is said to
have brought nothing: no value is made up, kept alive or set to zero here. Follows the pool by the facts it is shown.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import logging
import random
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
from yarl import URL

from picker.errors import WireError
from picker.types import Endpoint, EndpointAdded, EndpointRemoved, Fact, HealthObserved, LoadObserved, ScrapeFailed
from picker.wire.metrics_text import MetricsReader, decode_models

log = logging.getLogger(__name__)

JITTER = 0.2  # of the interval, both ways: scrapes of many pods do not march in step
MAX_BACKOFF = 5  # times the interval
# vLLM closes a connection idle for 5 s; leaving a second of margin avoids most races with that close.
KEEP_ALIVE = 4.0
MAX_BODY_BYTES = 2 << 20  # a page is 60 to 100 kB; eight ranks make half a megabyte

_NEVER = float("-inf")
# A server that says so on every route cannot serve now (vLLM while it rescales), or its sidecar has lost the engine.
_UNAVAILABLE = frozenset({502, 503, 504})


# --- fetching ----------------------------------------------------------------------------------------------


class FetchFailure(enum.Enum):
    """Why no complete answer came; the value is shown to people."""

    TIMEOUT = "timeout"
    REFUSED = "connection refused"
    RESET = "connection reset"
    UNREACHABLE = "unreachable"  # no route, no such host
    TLS = "TLS handshake failed"
    NOT_TLS = "it does not speak TLS: is its address http:// and not https://?"
    NOT_HTTP = "not HTTP"
    TOO_LARGE = "body too large"


# Behind the other failures somebody listens: our settings may be wrong, while the data plane's are right.
_LOSSES = frozenset({FetchFailure.TIMEOUT, FetchFailure.REFUSED, FetchFailure.RESET, FetchFailure.UNREACHABLE})
# Where requests are sent with the same settings of TLS, they get no further either.
_SHARED_LOSSES = frozenset({FetchFailure.TLS, FetchFailure.NOT_TLS})


@dataclass(frozen=True, slots=True)
class FetchResult:
    """An answer (status and body), or a failure with status 0. shared: see `Manner`."""

    status: int = 0
    body: bytes = field(default=b"", repr=False)
    failure: FetchFailure | None = None
    shared: bool = False

    @property
    def lost(self) -> bool:
        """Nobody who could serve a request is there, as far as this fetch can tell."""
        if self.failure is None:
            return self.status in _UNAVAILABLE
        return self.failure in _LOSSES or (self.shared and self.failure in _SHARED_LOSSES)

    @property
    def problem(self) -> str:
        """Why it is no page, in words, and what to do about it where that is known."""
        if self.failure is None:
            return f"status {self.status}"
        if self.failure is FetchFailure.TLS and self.shared:
            return f"{self.failure.value}: is its certificate to be trusted (--endpoint-ca, upstream.server_name)?"
        return self.failure.value


Fetch = Callable[[str], Awaitable[FetchResult]]


@dataclass(frozen=True, slots=True)
class Manner:
    """How an endpoint is asked. key: sent as a bearer token (vLLM wants it for /v1/models, not for /metrics).

    tls: False to accept any certificate, as pods' self-signed ones. server_name: that the certificate must bear, where
    it is not the address's. shared: requests go there in this manner, too, so that what fails for us fails for them;
    otherwise somebody else sends them, who may go by other certificates.
    """

    key: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | bool = True
    server_name: str | None = None
    shared: bool = False

    def arguments(self, root: str) -> dict[str, Any]:
        """What a request of aiohttp's to this root ("https://host:port") is to be given."""
        given: dict[str, Any] = {}
        if self.key is not None:
            given["headers"] = {"Authorization": f"Bearer {self.key}"}
        if root.startswith("https:"):
            given |= {"ssl": self.tls, "server_hostname": self.server_name}
        return given


Manners = Callable[[str], Manner]
"""By the root of an endpoint's URL; asked with every request, so that what changes is in force with the next."""


def plainly(root: str) -> Manner:
    """The manner where nothing is set: no key, and certificates verified as the system does."""
    return _PLAIN


_PLAIN = Manner()


def root_of(endpoint: Endpoint) -> str:
    """Of its URLs, without a slash at the end."""
    return f"{endpoint.scheme}://{endpoint.address}"


class AiohttpFetch:
    """GET over kept-alive connections, with a time limit for the whole answer and a bound on its size.

    Use as `async with AiohttpFetch(...) as fetch`. timeout: seconds; it may exceed the scrape interval, as scrapes of
    one server never overlap, and be changed. manners: how each endpoint is asked.
    """

    def __init__(
        self,
        *,
        timeout: float = 1.0,
        max_body_bytes: int = MAX_BODY_BYTES,
        manners: Manners = plainly,
    ) -> None:
        self.set_timeout(timeout)
        self._max_body_bytes = max_body_bytes
        self._manners = manners
        # No compression: deflating 60 kB costs the engine's API process more than sending them.
        self._headers = {
            "User-Agent": "picker",
            "Accept": "text/plain;version=0.0.4, application/json",
            "Accept-Encoding": "identity",
        }
        self._session: aiohttp.ClientSession | None = None

    def set_timeout(self, seconds: float) -> None:
        """For fetches from here on."""
        self._timeout = aiohttp.ClientTimeout(total=seconds)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            read_bufsize=self._max_body_bytes,  # a page arrives without pausing the transport
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None

    async def __call__(self, url: str) -> FetchResult:
        if self._session is None:
            raise RuntimeError("AiohttpFetch is used outside of its 'async with'")
        root, manner = _root(url), _PLAIN
        try:
            manner = self._manners(root)
            given = manner.arguments(root)
            get = self._session.get(_parsed(url), allow_redirects=False, timeout=self._timeout, **given)
            async with get as response:
                body = await self._body(response)
        except (aiohttp.ClientError, OSError) as error:  # OSError: TimeoutError is one
            return FetchResult(failure=_failure(error), shared=manner.shared)
        if body is None:
            return FetchResult(failure=FetchFailure.TOO_LARGE)
        return FetchResult(response.status, body)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes | None:
        chunks: list[bytes] = []
        size = response.content_length or 0
        if size <= self._max_body_bytes:
            size = 0
            async for chunk in response.content.iter_any():
                chunks.append(chunk)
                size += len(chunk)
                if size > self._max_body_bytes:
                    break
        if size > self._max_body_bytes:
            response.close()  # the rest stays unread, so the connection is spent
            return None
        return b"".join(chunks)


def _root(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


@functools.lru_cache(maxsize=4096)
def _parsed(url: str) -> URL:
    """Parsing an address takes a tenth of fetching a page."""
    return URL(url)


def _failure(error: aiohttp.ClientError | OSError) -> FetchFailure:
    match error:
        case TimeoutError():
            return FetchFailure.TIMEOUT
        case aiohttp.ClientSSLError():
            return FetchFailure.NOT_TLS if "WRONG_VERSION_NUMBER" in str(error) else FetchFailure.TLS
        case aiohttp.ClientConnectorError():
            refused = isinstance(error.os_error, ConnectionRefusedError)
            return FetchFailure.REFUSED if refused else FetchFailure.UNREACHABLE
        case aiohttp.ClientResponseError():
            return FetchFailure.NOT_HTTP
        case aiohttp.InvalidURL():
            return FetchFailure.UNREACHABLE
        case _:  # disconnected, broken off inside the body
            return FetchFailure.RESET


# --- following the pool ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Member:
    """An endpoint behind a server. healthy: what the scheduler was last told."""

    rank: int | None
    healthy: bool = True


@dataclass(slots=True)
class _Server:
    """One address that is scraped. failures, losses: consecutive scrapes without a page, without anybody there.

    idle: the latest page was good and showed no request.
    """

    url: str
    reader: MetricsReader = field(default_factory=MetricsReader)
    members: dict[str, _Member] = field(default_factory=dict)
    failures: int = 0
    losses: int = 0
    scraped: bool = False
    idle: bool = False
    models_asked_at: float = _NEVER
    problem: str | None = None
    task: asyncio.Task[None] | None = None


class ScrapeSource:
    """Scrapes `/metrics`, and now and then `/v1/models`, of the endpoints it was told of.

    fetch: e.g. an `AiohttpFetch`. clock: the scheduler's. interval: seconds between the end of a scrape and the start
    of the next, give or take `JITTER`; after `unhealthy_after` failures in a row it grows up to `MAX_BACKOFF` times.
    busy: whether an endpoint, by name, has been sent requests that are not over; of those that have none and showed
    none, every other scrape is left out. concurrency: how many fetches run at once. models_interval: seconds between
    two looks at the model list.
    """

    # Where an endpoint tells whether it is well; None: by its metrics page.
    health_path: str | None = None

    provides = (
        "waiting",
        "running",
        "kv_usage",
        "block_size",
        "kv_capacity_tokens",
        "queries",
        "hits",
        "started_at",
        "adapters",
        "max_adapters",
        "sleep",
        "models",
        "healthy",
    )

    def __init__(
        self,
        fetch: Fetch,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        interval: float = 1.0,
        unhealthy_after: int = 3,
        concurrency: int = 64,
        models_interval: float = 60.0,
        busy: Callable[[str], bool] = lambda name: True,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._rng = rng
        self.interval = interval
        self._unhealthy_after = unhealthy_after
        self._models_interval = models_interval
        self._busy = busy
        self._sleep = sleep
        self._slots = asyncio.Semaphore(concurrency)
        self._servers: dict[str, _Server] = {}
        self._server_of: dict[str, _Server] = {}
        self._group: asyncio.TaskGroup | None = None
        self._emit: Callable[[Fact], None] = _nowhere

    def observe(self, fact: Fact) -> None:
        """Follow the pool: to be shown every fact, reacts to endpoints that come and go."""
        match fact:
            case EndpointAdded(endpoint):
                self.add(endpoint)
            case EndpointRemoved(name):
                self.remove(name)
            case _:
                pass

    def set_interval(self, seconds: float) -> None:
        """Scrape at another pace, from a scrape of everybody at once on: nobody waits for the end of an old pause."""
        self.interval = seconds
        for server in self._servers.values():
            if server.task is not None:
                server.task.cancel()
            server.scraped = False
            self._start(server)

    def add(self, endpoint: Endpoint) -> None:
        """Scrape this endpoint from now on; one known by the name already moves to its new address or rank."""
        url = root_of(endpoint)
        server = self._server_of.get(endpoint.name)
        if server is not None and server.url == url:
            server.members[endpoint.name].rank = endpoint.rank
            return
        member = self._detach(endpoint.name) or _Member(endpoint.rank)
        member.rank = endpoint.rank
        server = self._servers.get(url)
        if server is None:
            server = self._servers[url] = _Server(url)
            self._start(server)
        server.members[endpoint.name] = member
        server.models_asked_at = _NEVER
        self._server_of[endpoint.name] = server

    def remove(self, name: str) -> None:
        """Stop scraping this endpoint; nothing is emitted about it afterwards. Unknown names are ignored."""
        self._detach(name)

    async def run(self, emit: Callable[[Fact], None]) -> None:
        """Scrape until cancelled. Every server has a task of its own in this group, which ends with its last member."""
        self._emit = emit
        try:
            async with asyncio.TaskGroup() as self._group:
                for server in self._servers.values():
                    self._start(server)
                await asyncio.Event().wait()
        finally:
            self._group = None
            self._emit = _nowhere

    def _start(self, server: _Server) -> None:
        if self._group is not None:
            server.task = self._group.create_task(self._follow(server), name=f"scrape {server.url}")

    def _detach(self, name: str) -> _Member | None:
        server = self._server_of.pop(name, None)
        if server is None:
            return None
        member = server.members.pop(name)
        if not server.members:
            del self._servers[server.url]
            if server.task is not None:
                server.task.cancel()
        return member

    async def _follow(self, server: _Server) -> None:
        while True:
            try:
                await self._scrape(server)
            except Exception:  # a bug met on one server's page must not end the scraping of the others
                log.exception("scraping %s failed unexpectedly", server.url)
                server.failures += 1
            await self._sleep(self._pause(server))
            if self._may_rest(server):
                await self._sleep(self._pause(server))

    def _may_rest(self, server: _Server) -> bool:
        """Whether nothing can have happened there that we would have to know now: one scrape in two is left out.

        Asked when it is due, so that an endpoint that has been given a request is seen as often as any other.
        """
        return server.idle and not any(map(self._busy, server.members))

    def _pause(self, server: _Server) -> float:
        if not server.scraped:  # endpoints often come all at once: spread them evenly over the interval
            server.scraped = True
            return self._rng.uniform(0.0, self.interval)
        doublings = min(max(0, server.failures - self._unhealthy_after), MAX_BACKOFF)
        return self.interval * min(1 << doublings, MAX_BACKOFF) * self._rng.uniform(1 - JITTER, 1 + JITTER)

    async def _scrape(self, server: _Server) -> None:
        if self.health_path is not None:
            self._note_health(server, await self._get(server.url + self.health_path), asked=True)
        result = await self._get(server.url + "/metrics")
        now = self._clock()
        if self.health_path is None:
            self._note_health(server, result)
        if result.failure is None and result.status == 200:
            self._note_page(server, result.body, now)
        else:
            self._note_failure(server, result.problem, now)
        if result.lost:
            server.models_asked_at = _NEVER  # whoever comes back may serve something else
        elif now - server.models_asked_at >= self._models_interval:
            server.models_asked_at = now
            await self._ask_models(server)

    async def _get(self, url: str) -> FetchResult:
        async with self._slots:
            return await self._fetch(url)

    def _note_page(self, server: _Server, body: bytes, now: float) -> None:
        try:
            page = server.reader.read(body)
        except WireError as error:
            self._note_failure(server, f"not metrics: {error}", now)
            return
        problem, idle = None, True
        for name, member in list(server.members.items()):
            try:
                load = page.load(name=name, observed_at=now, rank=member.rank)
            except WireError as error:
                self._emit(ScrapeFailed(name, now, f"not metrics: {error}"))
                idle = False
                continue
            idle = idle and load.running == 0.0 and load.waiting == 0.0
            problem = problem or _unshown(load)
            self._emit(load)
        self._note_problem(server, problem)
        server.failures, server.idle = 0, idle

    def _note_failure(self, server: _Server, reason: str, now: float) -> None:
        server.failures += 1
        server.idle = False
        self._note_problem(server, reason)
        for name in list(server.members):
            self._emit(ScrapeFailed(name, now, reason))

    def _note_problem(self, server: _Server, problem: str | None) -> None:
        if problem != server.problem:
            log.info("scraping %s: %s", server.url, problem or "good again")
        server.problem = problem

    def _note_health(self, server: _Server, result: FetchResult, *, asked: bool = False) -> None:
        """asked: this was what the endpoint tells of its health, so that whatever is no good answer is a bad one."""
        lost = result.lost or (asked and (result.failure is not None or result.status >= 400))
        server.losses = server.losses + 1 if lost else 0
        if 0 < server.losses < self._unhealthy_after:
            return
        healthy = server.losses == 0
        reason = "" if healthy else result.problem
        for name, member in list(server.members.items()):
            if member.healthy != healthy:
                member.healthy = healthy
                log.warning("endpoint %s is %s", name, "healthy again" if healthy else f"unhealthy: {reason}")
                self._emit(HealthObserved(name, healthy, reason))

    async def _ask_models(self, server: _Server) -> None:
        result = await self._get(server.url + "/v1/models")
        if result.failure is not None or result.status != 200:
            return
        for name in list(server.members):
            try:
                models = decode_models(result.body, name=name)
            except WireError:  # not every server lists its models; then any model may go there
                return
            self._emit(models)


def _unshown(load: LoadObserved) -> str | None:
    """What every engine shows and this page does not, in words."""
    wanted = {"waiting requests": load.waiting, "running requests": load.running, "KV cache usage": load.kv_usage}
    missing = [what for what, value in wanted.items() if value is None]
    return f"its metrics do not show {', '.join(missing)}: were they renamed?" if missing else None


def _nowhere(fact: Fact) -> None:
    """Where facts go while nobody runs the source."""
