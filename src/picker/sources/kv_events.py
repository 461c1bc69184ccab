"""KV events of every endpoint, from the sockets that its engine publishes on.

One task per endpoint: finds out where to subscribe, subscribes, asks for replays, and connects again when that ends.
What a batch means and what is missing is decided by `kv_stream.Stream`. Follows the pool by the facts it is shown.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from picker.sources.kv_place import Where, configured, labelled, locate
from picker.sources.kv_stream import Mark, Resumed, Said, Stream, StreamStats
from picker.sources.scrape import Fetch
from picker.types import CacheCleared, Endpoint, EndpointAdded, EndpointRemoved, Fact
from picker.wire.kv_events import MAX_BATCH_BYTES

log = logging.getLogger(__name__)

JITTER = 0.2  # of a pause, both ways
TURN = 0.002  # seconds of one stream's work until everybody else has a turn
TURN_MESSAGES = 64
# What waits in ZeroMQ while a replay is read; beyond it the publisher drops, and the gap is replayed, too.
RCVHWM = 2000
REPLAYS_AT_ONCE = 8
REPLAY_LIMIT = 60.0  # seconds for one round, however lively
# Engines send a whole replay in one go: when it pauses, the rest was dropped.
REPLAY_PAUSE = 0.5  # seconds
STEADY = 5.0  # seconds that a connection must last to be tried again at once when it breaks
# ZeroMQ's own threads answer these: an engine busy with a step does not look dead.
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 10_000, 30_000
MAX_SOCKETS = 16_384  # two for every endpoint; ZeroMQ's default is 1,023

_END = b"\xff" * 8
_UP = zmq.Event.HANDSHAKE_SUCCEEDED
_DOWN = (
    zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


@dataclass(slots=True)
class _Follower:
    """One endpoint's stream. moved: what was known belongs to an address that is no longer its own."""

    endpoint: Endpoint
    stream: Stream
    moved: bool = False
    failures: int = 0
    steady: bool = False
    replay_at: float = float("-inf")
    task: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Sockets:
    sub: zmq.asyncio.Socket
    monitor: zmq.asyncio.Socket
    poller: zmq.asyncio.Poller = field(default_factory=zmq.asyncio.Poller)


class KvEventSource:
    """Subscribes to the KV events of the endpoints it was told of.

    fetch: e.g. `scrape.AiohttpFetch`, for GET /kv_event_sources. clock: the scheduler's; wall: unix seconds.
    secret: see `Stream`.
    events, replay: where engines publish that cannot be asked, as "tcp://{host}:5557"; an endpoint's labels `kv-events`
    and `kv-replay` come first. retry: seconds until a second attempt; grows to max_retry.
    connect_timeout, replay_timeout: seconds without a handshake, without another batch of a replay.
    """

    provides = ("kv_events",)

    def __init__(
        self,
        fetch: Fetch,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        wall: Callable[[], float] = time.time,
        secret: bytes = b"",
        events: str | None = None,
        replay: str | None = None,
        retry: float = 1.0,
        max_retry: float = 60.0,
        connect_timeout: float = 5.0,
        replay_timeout: float = 5.0,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._wall = wall
        self._secret = secret
        self._rng = rng
        self._events = events
        self._replay = replay
        self._retry = retry
        self._max_retry = max_retry
        self._connect_timeout = connect_timeout
        self._replay_timeout = replay_timeout
        self._sleep = sleep
        self._turn = asyncio.Lock()  # all streams together get one turn of the loop at a time
        self._replays = asyncio.Semaphore(REPLAYS_AT_ONCE)
        self._followers: dict[str, _Follower] = {}
        self._group: asyncio.TaskGroup | None = None
        self._context: zmq.asyncio.Context | None = None
        self._emit: Callable[[Fact], None] = _nowhere
        self._resumed: Callable[[str], None] = _nobody
        self._saved: set[str] = set()

    @property
    def stats(self) -> Mapping[str, StreamStats]:
        """Counts by endpoint name."""
        return {name: follower.stream.stats for name, follower in self._followers.items()}

    def observe(self, fact: Fact) -> None:
        """Follow the pool: to be shown every fact, reacts to endpoints that come and go."""
        match fact:
            case EndpointAdded(endpoint):
                self.add(endpoint)
            case EndpointRemoved(name):
                self.remove(name)
            case _:
                pass

    def add(self, endpoint: Endpoint) -> None:
        """Subscribe to this endpoint from now on; one known by the name starts anew when it moved."""
        known = self._followers.get(endpoint.name)
        if known is not None and _seat(known.endpoint) == _seat(endpoint):
            known.endpoint = endpoint
            return
        if known is not None:
            self.remove(endpoint.name)
        stats = known.stream.stats if known is not None else StreamStats()
        stream = Stream(endpoint.name, stats=stats, secret=self._secret)
        follower = _Follower(endpoint, stream, moved=known is not None)
        self._followers[endpoint.name] = follower
        self._start(follower)

    def remove(self, name: str) -> None:
        """Unsubscribe; nothing is emitted about this endpoint afterwards. Unknown names are ignored."""
        follower = self._followers.pop(name, None)
        if follower is not None and follower.task is not None:
            follower.task.cancel()

    def marks(self) -> Mapping[str, Mark]:
        """Where each stream has got to; all it says of what came before has been emitted. Call it within `quiet`."""
        marks = {name: follower.stream.mark() for name, follower in self._followers.items()}
        return {name: mark for name, mark in marks.items() if mark is not None}

    def resume(self, marks: Mapping[str, Mark], resumed: Callable[[str], None]) -> None:
        """Go on from marks, where engines have: then `resumed` is called with the name, else the stream begins anew.

        Before `run`; marks of endpoints that are not known are ignored.
        """
        self._resumed = resumed
        for name, mark in marks.items():
            if name in self._followers:
                self._followers[name].stream.resume(mark)
                self._saved.add(name)

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Nothing is emitted meanwhile, and all that was said of earlier batches has been. Be quick: they pile up."""
        async with self._turn:
            yield

    async def run(self, emit: Callable[[Fact], None]) -> None:
        """Follow until cancelled. Every endpoint has a task of its own in this group."""
        self._emit = emit
        self._context = zmq.asyncio.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        try:
            async with asyncio.TaskGroup() as self._group:
                for follower in self._followers.values():
                    self._start(follower)
                await asyncio.Event().wait()
        finally:
            self._group = None
            self._emit = _nowhere
            self._context.destroy(linger=0)
            self._context = None

    def _start(self, follower: _Follower) -> None:
        if self._group is not None:
            task = self._follow(follower)
            follower.task = self._group.create_task(task, name=f"KV events of {follower.endpoint.name}")

    # --- one endpoint ---

    async def _follow(self, follower: _Follower) -> None:
        if follower.moved:
            async with self._turn:
                await self._deliver(follower.stream.absent("it moved to another address"))
        while True:
            follower.steady = False
            try:
                reason = await self._session(follower)
            except zmq.ZMQError as error:
                reason = f"ZeroMQ cannot connect: {error.strerror or error}"
            except Exception as error:  # a bug met on one engine's events must not end those of the others
                log.exception("following the KV events of %s failed unexpectedly", follower.endpoint.name)
                reason = f"following its KV events failed: {type(error).__name__}"
            if follower.steady:
                follower.failures = 0
            else:
                async with self._turn:
                    await self._deliver(follower.stream.absent(reason))
            await self._sleep(self._pause(follower))

    def _pause(self, follower: _Follower) -> float:
        pause = self._retry * 2.0 ** min(follower.failures, 16)
        follower.failures += 1
        return min(pause, self._max_retry) * self._rng.uniform(1 - JITTER, 1 + JITTER)

    async def _session(self, follower: _Follower) -> str:
        """Subscribe and read until that ends; returns why it did."""
        where = await self._locate(follower.endpoint)
        if isinstance(where, str):
            return where
        began = self._clock()
        with self._subscribed(where) as sockets:
            if not await self._is_up(sockets):
                return f"no publisher answers at {where.events}"
            if follower.stream.rank is None:
                follower.stream.rank = where.rank
            async with self._turn:
                said = follower.stream.connected(replay=where.replay is not None, now=self._clock())
                await self._deliver(said)
            reason = await self._read(follower, where, sockets)
        follower.steady = self._clock() - began >= STEADY
        return reason

    async def _locate(self, endpoint: Endpoint) -> Where | str:
        said = labelled(endpoint)
        if said is not None:
            return said
        result = await self._fetch(f"{endpoint.scheme}://{endpoint.address}/kv_event_sources")
        if result.failure is None and result.status == 200:
            said = locate(result.body, endpoint)
        if said is not None:
            return said
        if self._events is not None:
            return configured(endpoint, self._events, self._replay)
        answer = result.failure.value if result.failure else f"status {result.status}"
        return f"it does not say where its KV events are ({answer})"

    async def _read(self, follower: _Follower, where: Where, sockets: _Sockets) -> str:
        """Live batches and, when some are missing, replays; until the connection breaks."""
        while True:
            if follower.stream.wants is not None:
                await self._catch_up(follower, where)
            ready = dict(await sockets.poller.poll())
            if sockets.sub in ready:
                await self._drain(follower, sockets.sub)
            elif sockets.monitor in ready and await _told(sockets.monitor) & _DOWN:
                return f"the connection to {where.events} broke"

    async def _drain(self, follower: _Follower, sub: zmq.asyncio.Socket) -> None:
        """Read what is there for one turn."""
        stream = follower.stream
        async with self._turn:
            until = self._clock() + TURN
            for _ in range(TURN_MESSAGES):
                try:
                    frames = await sub.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    return
                await self._deliver(self._received(stream, frames))
                if stream.wants is not None or self._clock() >= until:
                    break
            await asyncio.sleep(0)

    def _received(self, stream: Stream, frames: Sequence[bytes]) -> Sequence[Said]:
        """The facts of one message: topic, number, payload."""
        if len(frames) != 3 or len(frames[1]) != 8:
            stream.stats.bad += 1
            return ()
        return stream.receive(_number(frames[1]), frames[2], now=self._clock(), wall=self._wall())

    async def _deliver(self, said: Sequence[Said]) -> None:
        """Emit in order; a batch may take more than one turn. Whoever calls it has the turn."""
        until = self._clock() + TURN
        for fact in said:
            if fact.name in self._saved:
                self._note_resumption(fact)
            if not isinstance(fact, Resumed):
                self._emit(fact)
            if self._clock() >= until:
                await asyncio.sleep(0)
                until = self._clock() + TURN

    def _note_resumption(self, fact: Said) -> None:
        """The first word about a saved stream says what became of it."""
        if isinstance(fact, CacheCleared):
            return  # and why follows
        self._saved.discard(fact.name)
        if isinstance(fact, Resumed):
            log.info("%s: its KV events go on where they were saved", fact.name)
            self._resumed(fact.name)
        else:
            log.info("%s: what was saved of it is dropped: %s", fact.name, getattr(fact, "reason", "it began anew"))

    # --- replays ---

    async def _catch_up(self, follower: _Follower, where: Where) -> None:
        """Ask until the stream wants no more."""
        stream = follower.stream
        await self._sleep(max(0.0, follower.replay_at - self._clock()))
        async with self._replays:
            began = self._clock()
            while stream.wants is not None:
                complete = where.replay is not None and await self._ask(stream, where.replay)
                async with self._turn:
                    said = stream.replay_ended(complete=complete, now=self._clock(), wall=self._wall())
                    await self._deliver(said)
        # An engine that makes us ask all the time gets a fifth of the time.
        follower.replay_at = self._clock() + 4 * (self._clock() - began)

    async def _ask(self, stream: Stream, url: str) -> bool:
        """Read the answer to one request; whether its end was seen."""
        with self._socket(zmq.DEALER, url) as dealer:  # a fresh one: whoever answers late speaks to nobody
            dealer.connect(url)
            await dealer.send_multipart([b"", (stream.wants or 0).to_bytes(8, "big")])
            until = self._clock() + REPLAY_LIMIT
            patience = self._replay_timeout
            while self._clock() < until and not stream.spoiled:
                if not await dealer.poll(round(patience * 1000)):
                    return False
                if await self._drain_replay(stream, dealer):
                    return True
                patience = min(patience, REPLAY_PAUSE)
        return False

    async def _drain_replay(self, stream: Stream, dealer: zmq.asyncio.Socket) -> bool:
        """Read what is there for one turn; whether the end marker was seen."""
        async with self._turn:
            until = self._clock() + TURN
            for _ in range(TURN_MESSAGES):
                try:
                    frames = await dealer.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    return False
                if _is_end(frames):
                    return True
                await self._deliver(self._replayed(stream, frames))
                if stream.spoiled or self._clock() >= until:
                    break
            await asyncio.sleep(0)
        return False

    def _replayed(self, stream: Stream, frames: Sequence[bytes]) -> Sequence[Said]:
        """The facts of one reply: [topic,] number, payload, behind an empty frame."""
        if not 3 <= len(frames) <= 4 or len(frames[-2]) != 8:
            stream.stats.bad += 1
            return ()
        return stream.replayed(_number(frames[-2]), frames[-1], now=self._clock(), wall=self._wall())

    # --- sockets ---

    @contextmanager
    def _socket(self, kind: int, url: str) -> Iterator[zmq.asyncio.Socket]:
        if self._context is None:
            raise RuntimeError("KV events are followed outside of 'run'")
        socket = self._context.socket(kind)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, RCVHWM)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_BATCH_BYTES)
            socket.setsockopt(zmq.IPV6, int("[" in url))
            # An engine that comes back may be another, elsewhere: connecting again is for `_follow`.
            socket.setsockopt(zmq.RECONNECT_IVL, -1)
            socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
            yield socket
        finally:
            socket.close(linger=0)

    @contextmanager
    def _subscribed(self, where: Where) -> Iterator[_Sockets]:
        with self._socket(zmq.SUB, where.events) as sub:
            sub.setsockopt(zmq.SUBSCRIBE, b"")
            monitor = sub.get_monitor_socket(int(_UP | _DOWN))
            try:
                sockets = _Sockets(sub, monitor)
                sockets.poller.register(sub, zmq.POLLIN)
                sockets.poller.register(monitor, zmq.POLLIN)
                sub.connect(where.events)
                yield sockets
            finally:
                sub.disable_monitor()
                monitor.close(linger=0)

    async def _is_up(self, sockets: _Sockets) -> bool:
        try:
            async with asyncio.timeout(self._connect_timeout):
                return bool(await _told(sockets.monitor) & _UP)
        except TimeoutError:
            return False


async def _told(monitor: zmq.asyncio.Socket) -> int:
    return int(parse_monitor_message(await monitor.recv_multipart())["event"])


def _seat(endpoint: Endpoint) -> tuple[object, ...]:
    labels = endpoint.labels
    return endpoint.scheme, endpoint.address, endpoint.rank, labels.get("kv-events"), labels.get("kv-replay")


def _is_end(frames: Sequence[bytes]) -> bool:
    return len(frames) >= 3 and frames[-2] == _END and not frames[-1]


def _number(frame: bytes) -> int:
    return int.from_bytes(frame, "big")


def _nobody(name: str) -> None:
    """Whom resumed streams are told while nobody asked."""


def _nowhere(fact: Fact) -> None:
    """Where facts go while nobody runs the source."""
