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

import msgspec
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
    EventsChanged,
    EventState,
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

# How lucky the noise on a run of steps may be before an end of a request is noticed late: once in 10^9 runs.
_SIGMAS = 6.0


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
    think: no answer leads to a next request sooner than this.
    """

    gateway: float = 0.002
    response: float = 0.001
    scrape_interval: float = 1.0
    think: float = 0.0
    event_delay: float = 0.005


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an endpoint that owes first tokens may say nothing at all, on any of its streams.

    seconds, and `times` what the router expected of the oldest request that waits there. Beyond that all who wait are
    decided again elsewhere, and the first of them stays behind, its booking too: what has been waiting so long keeps
    others away better than any penalty. Its answer, or any other, ends that.
    The time to a request's own first token is no measure: behind long prefills a pod at work looks like one that hangs.
    """

    seconds: float = 2.0
    times: float = 2.0


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
    failed_at: float = math.inf

    @property
    def ttft(self) -> float:
        return self.first_token_at - self.at

    @property
    def e2e(self) -> float:
        return self.ended_at - self.at

    @property
    def unsavable(self) -> bool:
        """It failed after its client had seen the first of it, so that nobody could have asked again elsewhere."""
        return self.failed and self.first_token_at < math.inf


@dataclass(slots=True)
class _Pod:
    """An engine in the cluster. at: when its next step may begin; busy: it has one to do.

    Nobody sees a step that ends nothing, so an engine is left behind and stepped when somebody is about to look. ends:
    by request that decodes, the number of steps after which it ends; left: of those preempted, the steps they lack.
    gauges: (time, load) after every step, for scrapes that look back.
    told_at: when its latest step that brought tokens ends. left_behind: a request that was asked again elsewhere.
    life: which process of the pod this is; whatever was scheduled for an earlier one is void.
    """

    engine: Engine
    phase: float
    at: float = 0.0
    busy: bool = False
    wakes_at: float = math.inf
    steps: int = 0
    ends: dict[int, int] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)
    factor: float = 1.0  # of a slow-down
    gauges: deque[tuple[float, LoadObserved]] = field(default_factory=deque)
    requests: dict[int, None] = field(default_factory=dict)  # sent there and not ended, in order
    life: int = 0
    dead_since: float = math.inf
    seen_dead: bool = False
    blind: bool = False
    hangs_until: float = -math.inf
    owed: dict[int, tuple[float, float]] = field(default_factory=dict)  # first tokens: asked when, expected seconds
    told_at: float = -math.inf
    left_behind: int | None = None

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
    `max_attempts` in all, as `exchange` does; after its first token it has failed. Without `patience` a request waits
    for a silent endpoint for as long as that takes.
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
        patience: Patience | None = None,
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
        self._patience = patience
        self._pods: dict[str, _Pod] = {}
        self._scrapes: list[tuple[float, str]] = []  # heap: the next scrape of each pod
        self._ids = itertools.count(1)
        self._all: list[Outcome] = []
        self._outcomes: dict[int, Outcome] = {}
        self._arrivals: dict[int, Arrival] = {}
        self._requests: dict[int, Request] = {}  # decided or waiting
        self._waiting: set[int] = set()
        self._source: Iterator[Arrival] = iter(())
        # An engine of a kind of its own is looked into by whoever made it (see `sim.bounds`): it is never left behind.
        self._watched = any(type(engine) is not Engine for engine in engines)
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
            self._outcomes[number].failed, self._outcomes[number].failed_at = True, self.kernel.now
        return self._all

    def _join(self, engine: Engine) -> None:
        now, interval = self.kernel.now, self.timing.scrape_interval
        pod = _Pod(engine, phase=float(self._rng.random()) * interval, at=now)
        self._pods[engine.name] = pod
        self._router.apply(EndpointAdded(Endpoint(engine.name, engine.name, self._models)), now)
        if self._wants_events:
            self._router.apply(EventsChanged(engine.name, EventState.WHOLE, "from the engine's start"), now)
        self._gauge(pod, now)
        heapq.heappush(self._scrapes, (math.floor(now / interval) * interval + pod.phase, engine.name))

    # --- arrivals ---

    def _fetch(self) -> None:
        """Schedule the next arrival of the source; one at a time, for there may be no end of them."""
        arrival = next(self._source, None)
        if arrival is not None:
            self.kernel.at(max(arrival.at, self.kernel.now), lambda: self._arrive_and_fetch(arrival))

    def _arrive_and_fetch(self, arrival: Arrival) -> None:
        self._fetch()
        self._arrive(arrival)

    def _arrive(self, arrival: Arrival) -> None:
        number = next(self._ids)
        self._arrivals[number] = arrival
        outcome = Outcome(arrival.at, arrival.prompt_tokens, arrival.output_tokens, arrival.session)
        self._outcomes[number] = outcome
        self._all.append(outcome)
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
        self._attend()
        self._scrape()
        self._requests[request.id] = request
        outcome = self._router.submit(request, self.kernel.now)
        if isinstance(outcome, Queued):
            self._waiting.add(request.id)
            self._attend()
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
        self._owe(pod, outcome)
        if pod.dead:
            life, refused_at = pod.life, now + self.timing.gateway
            self.kernel.at(refused_at, lambda: self._refuse(pod, life, number))
            return
        reaches_at = now + self.timing.gateway + pod.engine.profile.front_end(self._arrivals[number].prompt_tokens)
        life = pod.life
        self.kernel.at(reaches_at, lambda: self._reach(pod, life, number))

    def _reach(self, pod: _Pod, life: int, number: int) -> None:
        """The request gets from the front end into the engine's queue."""
        if life != pod.life or number not in pod.requests:
            return
        now, arrival = self.kernel.now, self._arrivals[number]
        self._catch_up(pod, now)
        if arrival.prompt_tokens + arrival.output_tokens > pod.engine.pool.usable * pod.engine.profile.block_size:
            # More than its whole KV cache holds: the engine says so (400), and so would every other.
            del pod.requests[number]
            pod.owed.pop(number, None)
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
            now,
        )
        if not pod.busy:
            pod.busy, pod.at = True, now
        self._rest(pod)

    # --- engines ---

    def _see_to(self, pod: _Pod, life: int, at: float) -> None:
        if life == pod.life and at == pod.wakes_at:  # and not overtaken by an earlier one
            pod.wakes_at = math.inf
            self._catch_up(pod, at)
            self._rest(pod)

    def _rest(self, pod: _Pod) -> None:
        """Leave the engine alone until the last instant before somebody might notice."""
        if not pod.busy:
            return
        pod.at = max(pod.at, pod.hangs_until)
        at = max(pod.at + self._quiet(pod), self.kernel.now)
        if at < pod.wakes_at:
            pod.wakes_at, life = at, pod.life
            self.kernel.at(at, lambda: self._see_to(pod, life, at))

    def _quiet(self, pod: _Pod) -> float:
        """Seconds, from the next step on, in which steps begin but certainly none ends that anyone sees."""
        engine = pod.engine
        if not pod.ends or len(pod.ends) != engine.num_running or engine.num_waiting:
            return 0.0
        if self._watched and self._waiting:
            return 0.0
        steps = min(pod.ends.values()) - pod.steps - 1
        if steps <= 0:
            return 0.0
        context = sum(self._arrivals[number].prompt_tokens for number in pod.ends)
        step = engine.profile.step_time(prefill_tokens=0, prefill_work=0.0, decodes=len(pod.ends), context=context)
        luck = max(0.0, 1.0 - _SIGMAS * engine.profile.noise_sd / math.sqrt(steps))
        return pod.factor * step * steps * luck

    def _attend(self) -> None:
        """Bring engines that somebody looks into up to now, before anyone decides."""
        for pod in self._pods.values() if self._watched else ():
            self._catch_up(pod, self.kernel.now)
            self._rest(pod)

    def _catch_up(self, pod: _Pod, until: float) -> None:
        """Do all steps that begin up to `until`, before which nothing has been added to the engine."""
        while pod.busy and pod.at <= until:
            self._step(pod, until)

    def _step(self, pod: _Pod, until: float) -> None:
        began = pod.at
        result = pod.engine.step(began, until)
        self._gauge(pod, began)
        if result is None:
            pod.busy = False
            return
        pod.at = began + result.duration
        if result.decoding or result.first_tokens or result.resumed:
            pod.told_at = pod.at
        self._count(pod, result)
        self._deliver(pod, result)

    def _count(self, pod: _Pod, result: StepResult) -> None:
        """Keep track of who ends after how many steps; whoever is preempted goes on where it was, later."""
        for number in result.preempted:
            # Not there when it was preempted before its first token, or again while it was computed again.
            if (end := pod.ends.pop(number, None)) is not None:
                pod.left[number] = end - pod.steps
        pod.steps += result.steps
        for number in result.first_tokens:
            if number in pod.requests:
                pod.ends[number] = pod.steps + self._arrivals[number].output_tokens - 1
        for number in result.resumed:
            if number in pod.left:
                pod.ends[number] = pod.steps + pod.left.pop(number) - 1
        for finished in result.finished:
            pod.ends.pop(finished.id, None)

    def _deliver(self, pod: _Pod, result: StepResult) -> None:
        life, now = pod.life, self.kernel.now
        heard_at = max(pod.at + self.timing.response, now)
        if self._wants_events and (result.stored or result.removed):
            told_at = max(pod.at + self.timing.event_delay, now)
            self.kernel.at(told_at, lambda: self._publish(pod, life, result))
        for number in result.first_tokens:
            self.kernel.at(heard_at, lambda number=number: self._begin(pod, life, number))  # type: ignore[misc]
        for finished in result.finished:
            self.kernel.at(heard_at, lambda finished=finished: self._finish(pod, life, finished))  # type: ignore[misc]

    def _publish(self, pod: _Pod, life: int, result: StepResult) -> None:
        if life != pod.life:
            return
        if result.removed:
            self._router.apply(BlocksRemoved(pod.name, result.removed), self.kernel.now)
        for blocks in result.stored:
            fact = BlocksStored(pod.name, blocks.hashes, blocks.parent, block_size=pod.engine.profile.block_size)
            self._router.apply(fact, self.kernel.now)

    def _begin(self, pod: _Pod, life: int, number: int) -> None:
        if life != pod.life:
            return
        self._forget_left_behind(pod, FailureReason.CLIENT_GONE)
        if number in pod.requests:  # and not aborted meanwhile
            self._outcomes[number].first_token_at = self.kernel.now
            pod.owed.pop(number, None)
            self._tell(FirstToken(number))

    def _finish(self, pod: _Pod, life: int, finished: FinishedRequest) -> None:
        number, now = finished.id, self.kernel.now
        if life != pod.life or number not in pod.requests:
            return
        del pod.requests[number], self._requests[number]
        self._forget_left_behind(pod, FailureReason.CLIENT_GONE)
        outcome, arrival = self._outcomes[number], self._arrivals.pop(number)
        outcome.ended_at = now
        outcome.cached_tokens = finished.usage.cached_tokens or 0
        self._tell(Finished(number, 200, finished.usage))
        self._follow(arrival)

    def _follow(self, arrival: Arrival) -> None:
        following = arrival.then(self.kernel.now) if arrival.then is not None else None
        if following is not None:
            at = max(following.at, self.kernel.now)
            self.kernel.at(at, lambda: self._arrive(following))

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
        self._catch_up(pod, now)
        match incident.trouble:
            case Trouble.KILL:
                self._kill(pod)
            case Trouble.REVIVE:
                pod.engine, pod.dead_since = self._new_engine(pod.name), math.inf
                pod.gauges.clear()
                self._gauge(pod, now)
                if self._wants_events:
                    self._router.apply(CacheCleared(pod.name), now)
            case Trouble.HANG:
                pod.hangs_until = now + incident.seconds
            case Trouble.SLOW:
                pod.factor = incident.factor
                pod.engine.slow_down(incident.factor)
            case Trouble.BLIND | Trouble.SEE:
                pod.blind = incident.trouble is Trouble.BLIND
        self._rest(pod)

    def _new_engine(self, name: str) -> Engine:
        if self._engine_of is None:
            raise ValueError(f"pod {name} needs a new engine, and nobody said how to make one")
        return self._engine_of(name, self.kernel.now)

    def _kill(self, pod: _Pod) -> None:
        pod.life += 1
        pod.dead_since = self.kernel.now
        pod.hangs_until = -math.inf
        pod.busy, pod.wakes_at, pod.steps, pod.factor = False, math.inf, 0, 1.0
        pod.ends.clear()
        pod.left.clear()
        self._forget_left_behind(pod, FailureReason.RESET)
        for number in tuple(pod.requests):
            self._break_off(pod, number, FailureReason.RESET)

    def _refuse(self, pod: _Pod, life: int, number: int) -> None:
        if life == pod.life:
            self._break_off(pod, number, FailureReason.CONNECT)

    def _break_off(self, pod: _Pod, number: int, reason: FailureReason) -> None:
        """The endpoint broke under a request, which goes elsewhere if its client has seen nothing of the answer."""
        del pod.requests[number]
        pod.owed.pop(number, None)
        self._tell(Failed(number, reason))
        record, request = self._outcomes[number], self._requests[number]
        if record.first_token_at < math.inf or record.attempts >= self._max_attempts:
            self._lose(number)
        else:
            self._submit(msgspec.structs.replace(request, exclude=request.exclude | {pod.name}))

    def _lose(self, number: int) -> None:
        """A failed turn ends its session."""
        self._outcomes[number].failed, self._outcomes[number].failed_at = True, self.kernel.now
        del self._requests[number], self._arrivals[number]

    # --- patience ---

    def _owe(self, pod: _Pod, decision: Decision) -> None:
        if self._patience is None:
            return
        pod.owed[decision.request_id] = self.kernel.now, _expected(decision)
        if len(pod.owed) == 1:
            self._listen(pod)

    def _listen(self, pod: _Pod) -> None:
        life = pod.life
        self.kernel.at(max(self._overdue_at(pod), self.kernel.now), lambda: self._hear(pod, life))

    def _overdue_at(self, pod: _Pod) -> float:
        assert self._patience is not None
        asked_at, expected = next(iter(pod.owed.values()))
        told_at = min(pod.told_at, self.kernel.now)
        return max(asked_at, told_at) + self._patience.seconds + self._patience.times * expected

    def _hear(self, pod: _Pod, life: int) -> None:
        """Nobody had to be told anything until here; whether there was anything to tell shows now."""
        if life != pod.life or not pod.owed:
            return
        self._catch_up(pod, self.kernel.now)
        self._rest(pod)
        if self._overdue_at(pod) > self.kernel.now:
            self._listen(pod)
        else:
            self._give_up(pod)

    def _give_up(self, pod: _Pod) -> None:
        owed = tuple(pod.owed)
        pod.owed.clear()
        for number in owed:
            if self._outcomes[number].attempts >= self._max_attempts or not self._others(pod, number):
                continue  # it may as well wait here
            if pod.left_behind is None:
                self._ask_again(pod, number)
            else:
                self._abort(pod, number)
                self._break_off(pod, number, FailureReason.TIMEOUT)

    def _others(self, pod: _Pod, number: int) -> bool:
        """Whether there is a pod that the request has not tried."""
        tried = self._requests[number].exclude | {pod.name}
        return any(not other.dead and other.name not in tried for other in self._pods.values())

    def _ask_again(self, pod: _Pod, number: int) -> None:
        """Under another id: the first one is still booked."""
        again, request = next(self._ids), self._requests.pop(number)
        pod.left_behind = number
        del pod.requests[number]
        self._outcomes[again], self._arrivals[again] = self._outcomes.pop(number), self._arrivals.pop(number)
        self._submit(msgspec.structs.replace(request, id=again, exclude=request.exclude | {pod.name}))

    def _forget_left_behind(self, pod: _Pod, reason: FailureReason) -> None:
        number, pod.left_behind = pod.left_behind, None
        if number is not None:
            self._abort(pod, number)
            self._tell(Failed(number, reason))

    def _abort(self, pod: _Pod, number: int) -> None:
        self._catch_up(pod, self.kernel.now)
        pod.engine.abort(number, self.kernel.now)
        pod.ends.pop(number, None)
        pod.left.pop(number, None)
        self._rest(pod)

    # --- the router's queue ---

    def _release(self) -> None:
        if not self._waiting:
            return
        self._attend()
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

    def _gauge(self, pod: _Pod, at: float) -> None:
        pod.gauges.append((at, pod.engine.load(at)))

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
        self._catch_up(pod, tick)
        while len(pod.gauges) > 1 and pod.gauges[1][0] <= tick:
            pod.gauges.popleft()
        self._router.apply(replace(pod.gauges[0][1], observed_at=tick), now)


def _expected(decision: Decision) -> float:
    """Seconds to the first token as the router saw it, 0 where it does not say."""
    ranking = decision.ranking
    if ranking is None or "queue" not in ranking.parts:
        return 0.0
    best = int(np.flatnonzero(ranking.names[ranking.rows] == decision.endpoint.name)[0])
    return float(ranking.parts["queue"][best] + ranking.parts["prefill"][best])
