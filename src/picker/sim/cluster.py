"""A cluster in virtual time: arrivals -> the real scheduler -> engines, with the delays in between.

Whatever decides speaks the scheduler's verbs (`Router`), so the policy under test is the very code that serves traffic.
Everything is a function of the inputs and the seeds in them: no clock, no IO, no global generator.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from picker.sim.engine import Engine, EngineRequest, FinishedRequest, StepResult
from picker.sim.kernel import Kernel
from picker.types import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    Decision,
    Endpoint,
    EndpointAdded,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    HealthObserved,
    LoadObserved,
    Queued,
    Rejection,
    Request,
    ScrapeFailed,
    UInt64Array,
)

# A prompt's size in bytes where only its tokens are known; the scheduler starts from the same ratio.
BYTES_PER_TOKEN = 4


class Router(Protocol):
    """What decides: `core.scheduler.Scheduler`, or a peer's policy.

    One with a true attribute `wants_events` is also told what enters and leaves the engines' prefix caches.
    """

    def submit(self, request: Request, now: float) -> Decision | Rejection | Queued: ...

    def apply(self, fact: Fact, now: float) -> None: ...

    def poll(self, now: float) -> list[Decision | Rejection]: ...

    def next_wakeup(self) -> float | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """A request before anyone has decided anything.

    block_hashes: (b,) chained hashes of the prompt's full blocks, of the engines' block size. hash_of: hash of block i
    beyond them, where the output is to be cached. then: the next turn of its session, given when this one ended.
    prompt_bytes: size of the prompt's text, where there is one; the scheduler then has to guess the tokens, as it does
    on the wire. Without it, it is told the tokens. lora: the adapter asked for, which is then the request's model.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    block_hashes: UInt64Array
    hash_of: Callable[[int], int] | None = None
    session: str | None = None
    then: Callable[[float], Arrival | None] | None = None
    prompt_bytes: int | None = None
    lora: str | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Delays between the parts, in seconds.

    gateway: from a client to the engine's front end, deciding included. response: from the engine to client and
    gateway. scrape_interval: how old the scheduler's view of an engine may be; each engine has a phase of its own.
    event_delay: from a change of an engine's prefix cache to a router that wants KV events; of steps that are merged,
    all changes come at their end.
    think: no answer leads to a next request sooner than this; a larger bound lets engines run further in one go.
    """

    gateway: float = 0.002
    response: float = 0.001
    scrape_interval: float = 1.0
    think: float = 0.0
    event_delay: float = 0.005


class Trouble(enum.Enum):
    """What may happen to a pod; the value is the word in scenario files."""

    KILL = "kill"  # connections are reset; refused until it is back, with an empty cache
    REVIVE = "revive"
    HANG = "hang"  # takes requests and computes nothing for a while
    SLOW = "slow"  # every step takes `factor` times as long
    BLIND = "blind"  # its metrics cannot be read, though it serves
    SEE = "see"
    JOIN = "join"  # a new pod, its cache empty


@dataclass(frozen=True, slots=True)
class Incident:
    """At `at` seconds this happens to `pod`. seconds: how long a hang lasts. factor: of a slow-down, 1 ends it."""

    at: float
    trouble: Trouble
    pod: str
    seconds: float = 0.0
    factor: float = 1.0


@dataclass(slots=True)
class Outcome:
    """What became of one request; times are those its client sees. attempts: endpoints it was sent to."""

    at: float
    prompt_tokens: int
    output_tokens: int
    session: str | None
    endpoint: str | None = None
    first_token_at: float = math.inf
    ended_at: float = math.inf
    cached_tokens: int = 0
    failed: bool = False
    attempts: int = 0

    @property
    def ttft(self) -> float:
        return self.first_token_at - self.at

    @property
    def e2e(self) -> float:
        return self.ended_at - self.at


@dataclass(slots=True)
class _Pod:
    """An engine in the cluster. gauges: (time, load) after every step, for scrapes that look back.

    life: which process of the pod this is; whatever was scheduled for an earlier one is void.
    """

    engine: Engine
    phase: float
    busy: bool = False
    pending: list[float] = field(default_factory=list)  # when requests on their way will reach the engine
    gauges: deque[tuple[float, LoadObserved]] = field(default_factory=deque)
    requests: dict[int, None] = field(default_factory=dict)  # sent there and not ended, in order
    life: int = 0
    dead_since: float = math.inf
    seen_dead: bool = False
    blind: bool = False
    hangs_until: float = -math.inf

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def dead(self) -> bool:
        return self.dead_since < math.inf


EngineFactory = Callable[[str, float], Engine]
"""(name, when its process starts) -> a new engine with an empty cache."""


class Cluster:
    """Runs a workload through a router and engines; `run` returns one `Outcome` a request, in order of arrival.

    adapters: LoRA adapters that every pod serves. incidents: what happens to pods meanwhile; engine_of makes the
    engines of pods that come back or join.
    A request whose endpoint breaks before its first token is decided again without the endpoints it has tried, up to
    `max_attempts` in all, as `exchange` does; after its first token it has failed.
    """

    def __init__(
        self,
        router: Router,
        engines: Sequence[Engine],
        *,
        timing: Timing,
        model: str = "model",
        seed: int = 0,
        adapters: Iterable[str] = (),
        incidents: Iterable[Incident] = (),
        engine_of: EngineFactory | None = None,
        max_attempts: int = 3,
    ) -> None:
        self.kernel = Kernel()
        self.timing = timing
        self.model = model
        self._models = frozenset({model, *adapters})
        self._rng = np.random.default_rng(seed)
        self._router = router
        self._wants_events = bool(getattr(router, "wants_events", False))
        self._armed_for = math.inf
        self._engine_of = engine_of
        self._max_attempts = max_attempts
        self._pods: dict[str, _Pod] = {}
        self._scrapes: list[tuple[float, str]] = []  # heap: the next scrape of each pod
        self._ids = itertools.count(1)
        self._outcomes: dict[int, Outcome] = {}
        self._arrivals: dict[int, Arrival] = {}
        self._requests: dict[int, Request] = {}  # decided or waiting
        self._waiting: set[int] = set()
        self._source: Iterator[Arrival] = iter(())
        self._next_arrival = math.inf
        self._due: list[float] = []  # heap: times of submissions to come, other than the source's
        self._incidents = deque(sorted(incidents, key=lambda incident: incident.at))
        for engine in engines:
            self._join(engine)
        for incident in self._incidents:
            self.kernel.at(incident.at, self._befall)

    def run(self, arrivals: Iterable[Arrival], until: float | None = None) -> list[Outcome]:
        """Serve all arrivals, which must be in order of time, to their ends or up to `until`.

        What has not ended by then has no `ended_at`, and counts as failed.
        """
        self._source = iter(arrivals)
        self._fetch()
        self.kernel.run(until)
        for number in self._arrivals:
            self._outcomes[number].failed = True
        return list(self._outcomes.values())

    def _join(self, engine: Engine) -> None:
        now, interval = self.kernel.now, self.timing.scrape_interval
        pod = _Pod(engine, phase=float(self._rng.random()) * interval)
        self._pods[engine.name] = pod
        self._router.apply(EndpointAdded(Endpoint(engine.name, engine.name, self._models)), now)
        self._gauge(pod)
        heapq.heappush(self._scrapes, (math.floor(now / interval) * interval + pod.phase, engine.name))

    # --- arrivals ---

    def _fetch(self) -> None:
        """Schedule the next arrival of the source; one at a time, so that its time bounds how far engines may run."""
        arrival = next(self._source, None)
        self._next_arrival = math.inf if arrival is None else max(arrival.at, self.kernel.now)
        if arrival is not None:
            self.kernel.at(self._next_arrival, lambda: self._arrive_and_fetch(arrival))

    def _arrive_and_fetch(self, arrival: Arrival) -> None:
        self._fetch()
        self._arrive(arrival)

    def _arrive(self, arrival: Arrival) -> None:
        number = next(self._ids)
        self._arrivals[number] = arrival
        self._outcomes[number] = Outcome(arrival.at, arrival.prompt_tokens, arrival.output_tokens, arrival.session)
        self._submit(
            Request(
                id=number,
                model=arrival.lora or self.model,
                arrived_at=self.kernel.now,
                block_hashes=arrival.block_hashes,
                prompt_bytes=arrival.prompt_bytes or arrival.prompt_tokens * BYTES_PER_TOKEN,
                prompt_tokens=arrival.prompt_tokens if arrival.prompt_bytes is None else None,
                session=arrival.session,
            )
        )

    def _submit(self, request: Request) -> None:
        self._scrape()
        self._requests[request.id] = request
        outcome = self._router.submit(request, self.kernel.now)
        if isinstance(outcome, Queued):
            self._waiting.add(request.id)
            self._arm()
        else:
            self._settle(outcome)

    def _settle(self, outcome: Decision | Rejection) -> None:
        number, now = outcome.request_id, self.kernel.now
        if isinstance(outcome, Rejection):
            self._lose(number)
            return
        pod, record = self._pods[outcome.endpoint.name], self._outcomes[number]
        record.endpoint = pod.name
        record.attempts += 1
        pod.requests[number] = None
        if pod.dead:
            life, refused_at = pod.life, now + self.timing.gateway
            heapq.heappush(self._due, refused_at)
            self.kernel.at(refused_at, lambda: self._refuse(pod, life, number))
            return
        reaches_at = now + self.timing.gateway + pod.engine.profile.front_end(self._arrivals[number].prompt_tokens)
        pod.pending.append(reaches_at)
        life = pod.life
        self.kernel.at(reaches_at, lambda: self._reach(pod, life, number, reaches_at))

    def _reach(self, pod: _Pod, life: int, number: int, at: float) -> None:
        """The request gets from the front end into the engine's queue."""
        if life != pod.life:
            return
        pod.pending.remove(at)
        arrival = self._arrivals[number]
        if arrival.prompt_tokens + arrival.output_tokens > pod.engine.pool.usable * pod.engine.profile.block_size:
            # More than its whole KV cache holds: the engine says so (400), and so would every other.
            del pod.requests[number]
            self._lose(number)
            self._tell(Finished(number, 400))
            return
        pod.engine.add(
            EngineRequest(
                id=number,
                prompt_tokens=arrival.prompt_tokens,
                output_tokens=arrival.output_tokens,
                block_hashes=arrival.block_hashes,
                hash_of=arrival.hash_of,
                arrived_at=arrival.at,
                lora=arrival.lora,
            ),
            at,
        )
        if not pod.busy:
            self._step(pod, life)

    # --- engines ---

    def _step(self, pod: _Pod, life: int) -> None:
        now = self.kernel.now
        if life != pod.life:
            return
        if now < pod.hangs_until:
            pod.busy = True
            self.kernel.at(pod.hangs_until, lambda: self._step(pod, life))
            return
        result = pod.engine.step(now, self._horizon(pod))
        pod.busy = result is not None
        self._gauge(pod)
        if result is None:
            return
        ends = now + result.duration
        self.kernel.at(ends, lambda: self._step(pod, life))
        if self._wants_events and (result.stored or result.removed):
            self.kernel.at(ends + self.timing.event_delay, lambda: self._publish(pod, life, result))
        heard_at = ends + self.timing.response
        for number in result.first_tokens:
            self.kernel.at(heard_at, lambda number=number: self._begin(pod, life, number))  # type: ignore[misc]
        for finished in result.finished:
            self.kernel.at(heard_at, lambda finished=finished: self._finish(pod, life, finished))  # type: ignore[misc]

    def _publish(self, pod: _Pod, life: int, result: StepResult) -> None:
        if life != pod.life:
            return
        if result.removed:
            self._router.apply(BlocksRemoved(pod.name, result.removed), self.kernel.now)
        if result.stored:
            stored = tuple(itertools.chain.from_iterable(blocks.hashes for blocks in result.stored))
            self._router.apply(BlocksStored(pod.name, stored), self.kernel.now)

    def _horizon(self, pod: _Pod) -> float | None:
        """The earliest instant at which something may be added to this engine; None: at any time."""
        if self._waiting:
            return None
        timing, now = self.timing, self.kernel.now
        on_the_way = timing.gateway + pod.engine.profile.front_end_s
        due = self._due[0] if self._due else math.inf
        horizon = min(self._next_arrival, due, now + timing.think) + on_the_way
        if self._incidents:
            horizon = min(horizon, self._incidents[0].at)
        return min(*pod.pending, horizon) if pod.pending else horizon

    def _begin(self, pod: _Pod, life: int, number: int) -> None:
        if life == pod.life:
            self._outcomes[number].first_token_at = self.kernel.now
            self._tell(FirstToken(number))

    def _finish(self, pod: _Pod, life: int, finished: FinishedRequest) -> None:
        if life != pod.life:
            return
        number, now = finished.id, self.kernel.now
        del pod.requests[number], self._requests[number]
        outcome, arrival = self._outcomes[number], self._arrivals.pop(number)
        outcome.ended_at = now
        outcome.cached_tokens = finished.usage.cached_tokens or 0
        self._tell(Finished(number, 200, finished.usage))
        self._follow(arrival)

    def _follow(self, arrival: Arrival) -> None:
        following = arrival.then(self.kernel.now) if arrival.then is not None else None
        if following is not None:
            at = max(following.at, self.kernel.now)
            heapq.heappush(self._due, at)
            self.kernel.at(at, lambda: self._turn(following))

    def _turn(self, arrival: Arrival) -> None:
        heapq.heappop(self._due)  # they come in order of time, so it is this one's
        self._arrive(arrival)

    def _tell(self, fact: Fact) -> None:
        self._router.apply(fact, self.kernel.now)
        self._release()

    # --- trouble ---

    def _befall(self) -> None:
        incident, now = self._incidents.popleft(), self.kernel.now
        if incident.trouble is Trouble.JOIN:
            self._join(self._new_engine(incident.pod))
            return
        pod = self._pods[incident.pod]
        match incident.trouble:
            case Trouble.KILL:
                self._kill(pod)
            case Trouble.REVIVE:
                pod.engine, pod.dead_since = self._new_engine(pod.name), math.inf
                pod.gauges.clear()
                self._gauge(pod)
                if self._wants_events:
                    self._router.apply(CacheCleared(pod.name), now)
            case Trouble.HANG:
                pod.hangs_until = now + incident.seconds
            case Trouble.SLOW:
                pod.engine.slow_down(incident.factor)
            case Trouble.BLIND | Trouble.SEE:
                pod.blind = incident.trouble is Trouble.BLIND

    def _new_engine(self, name: str) -> Engine:
        if self._engine_of is None:
            raise ValueError(f"pod {name} needs a new engine, and nobody said how to make one")
        return self._engine_of(name, self.kernel.now)

    def _kill(self, pod: _Pod) -> None:
        pod.life += 1
        pod.dead_since = self.kernel.now
        pod.hangs_until = -math.inf
        pod.busy = False
        pod.pending.clear()
        for number in tuple(pod.requests):
            self._break_off(pod, number, FailureReason.RESET)

    def _refuse(self, pod: _Pod, life: int, number: int) -> None:
        heapq.heappop(self._due)
        if life == pod.life:
            self._break_off(pod, number, FailureReason.CONNECT)

    def _break_off(self, pod: _Pod, number: int, reason: FailureReason) -> None:
        """The endpoint broke under a request, which goes elsewhere if its client has seen nothing of the answer."""
        del pod.requests[number]
        self._tell(Failed(number, reason))
        record, request = self._outcomes[number], self._requests[number]
        if record.first_token_at < math.inf or record.attempts >= self._max_attempts:
            self._lose(number)
        else:
            self._submit(replace(request, exclude=request.exclude | {pod.name}))

    def _lose(self, number: int) -> None:
        """A failed turn ends its session."""
        self._outcomes[number].failed = True
        del self._requests[number], self._arrivals[number]

    # --- the router's queue ---

    def _release(self) -> None:
        if not self._waiting:
            return
        self._scrape()
        for outcome in self._router.poll(self.kernel.now):
            self._waiting.remove(outcome.request_id)
            self._settle(outcome)
        if self._waiting:
            self._arm()

    def _arm(self) -> None:
        wakeup = self._router.next_wakeup()
        if wakeup is not None and (at := max(wakeup, self.kernel.now)) < self._armed_for:
            self._armed_for = at
            self.kernel.at(at, lambda: self._wake(at))

    def _wake(self, at: float) -> None:
        if at == self._armed_for:  # and not overtaken by an earlier one
            self._armed_for = math.inf
            self._release()

    # --- scrapes ---

    def _gauge(self, pod: _Pod) -> None:
        pod.gauges.append((self.kernel.now, pod.engine.load(self.kernel.now)))

    def _scrape(self) -> None:
        """Tell the router what each engine showed at its latest scrape: only decisions look, so only they ask."""
        interval, now = self.timing.scrape_interval, self.kernel.now
        while self._scrapes[0][0] <= now:
            expected, name = self._scrapes[0]
            pod = self._pods[name]
            # Rounding must not bring back a tick that has been.
            tick = max(expected, math.floor((now - pod.phase) / interval) * interval + pod.phase)
            heapq.heapreplace(self._scrapes, (tick + interval, name))
            self._observe(pod, tick)

    def _observe(self, pod: _Pod, tick: float) -> None:
        now = self.kernel.now
        if pod.blind or pod.dead_since <= tick:
            self._router.apply(ScrapeFailed(pod.name, tick, "metrics cannot be read"), now)
            if pod.dead_since <= tick - self.timing.scrape_interval and not pod.seen_dead:
                pod.seen_dead = True  # the second scrape that found nobody
                self._router.apply(HealthObserved(pod.name, False, "refused"), now)
            return
        if pod.seen_dead:
            pod.seen_dead = False
            self._router.apply(HealthObserved(pod.name, True), now)
        while len(pod.gauges) > 1 and pod.gauges[1][0] <= tick:
            pod.gauges.popleft()
        self._router.apply(replace(pod.gauges[0][1], observed_at=tick), now)
