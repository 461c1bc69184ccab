"""A cluster in virtual time: arrivals -> the real scheduler -> engines, with the delays in between.

Whatever decides speaks the scheduler's verbs (`Router`), so the policy under test is the very code that serves traffic.
Everything is a function of the inputs and the seeds in them: no clock, no IO, no global generator.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from picker.sim.engine import Engine, EngineRequest, FinishedRequest
from picker.sim.kernel import Kernel
from picker.types import (
    Decision,
    Endpoint,
    EndpointAdded,
    Fact,
    Finished,
    FirstToken,
    LoadObserved,
    Queued,
    Rejection,
    Request,
    UInt64Array,
)

# A prompt's size in bytes where only its tokens are known; the scheduler starts from the same ratio.
BYTES_PER_TOKEN = 4


class Router(Protocol):
    """What decides: `core.scheduler.Scheduler`, or a peer's policy."""

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
    on the wire. Without it, it is told the tokens.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    block_hashes: UInt64Array
    hash_of: Callable[[int], int] | None = None
    session: str | None = None
    then: Callable[[float], Arrival | None] | None = None
    prompt_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Delays between the parts, in seconds.

    gateway: from a client to the engine's front end, deciding included. response: from the engine to client and
    gateway. scrape_interval: how old the scheduler's view of an engine may be; each engine has a phase of its own.
    think: no answer leads to a next request sooner than this; a larger bound lets engines run further in one go.
    """

    gateway: float = 0.002
    response: float = 0.001
    scrape_interval: float = 1.0
    think: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What became of one request; times are those its client sees."""

    at: float
    prompt_tokens: int
    output_tokens: int
    session: str | None
    endpoint: str | None = None
    first_token_at: float = math.inf
    ended_at: float = math.inf
    cached_tokens: int = 0
    failed: bool = False

    @property
    def ttft(self) -> float:
        return self.first_token_at - self.at

    @property
    def e2e(self) -> float:
        return self.ended_at - self.at


@dataclass(slots=True)
class _Pod:
    """An engine in the cluster. gauges: (time, load) after every step, for scrapes that look back."""

    engine: Engine
    phase: float
    busy: bool = False
    pending: list[float] = field(default_factory=list)  # when requests on their way will reach the engine
    gauges: deque[tuple[float, LoadObserved]] = field(default_factory=deque)
    scraped_at: float = -math.inf


class Cluster:
    """Runs a workload through a router and engines; `run` returns one `Outcome` a request, in order of arrival."""

    def __init__(
        self, router: Router, engines: Sequence[Engine], *, timing: Timing, model: str = "model", seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.kernel = Kernel()
        self.timing = timing
        self.model = model
        self._router = router
        self._pods = {
            engine.name: _Pod(engine, phase=float(rng.random()) * timing.scrape_interval) for engine in engines
        }
        self._ids = itertools.count(1)
        self._outcomes: dict[int, Outcome] = {}
        self._arrivals: dict[int, Arrival] = {}
        self._waiting: dict[int, Request] = {}
        self._source: Iterator[Arrival] = iter(())
        self._next_arrival = math.inf
        self._turns: list[float] = []  # times of next turns already due
        for engine in engines:
            router.apply(EndpointAdded(Endpoint(engine.name, engine.name, frozenset({model}))), 0.0)
            self._gauge(self._pods[engine.name])

    def run(self, arrivals: Iterable[Arrival], until: float | None = None) -> list[Outcome]:
        """Serve all arrivals, which must be in order of time, to their ends or up to `until`."""
        self._source = iter(arrivals)
        self._fetch()
        self.kernel.run(until)
        return list(self._outcomes.values())

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
        now, number = self.kernel.now, next(self._ids)
        self._arrivals[number] = arrival
        self._outcomes[number] = Outcome(arrival.at, arrival.prompt_tokens, arrival.output_tokens, arrival.session)
        request = Request(
            id=number,
            model=self.model,
            arrived_at=now,
            block_hashes=arrival.block_hashes,
            prompt_bytes=arrival.prompt_bytes or arrival.prompt_tokens * BYTES_PER_TOKEN,
            prompt_tokens=arrival.prompt_tokens if arrival.prompt_bytes is None else None,
            session=arrival.session,
        )
        self._scrape()
        outcome = self._router.submit(request, now)
        if isinstance(outcome, Queued):
            self._waiting[number] = request
            self._arm()
        else:
            self._settle(outcome)

    def _settle(self, outcome: Decision | Rejection) -> None:
        if isinstance(outcome, Rejection):
            self._outcomes[outcome.request_id].failed = True
            return
        arrival = self._arrivals[outcome.request_id]
        pod = self._pods[outcome.endpoint.name]
        self._outcomes[outcome.request_id].endpoint = outcome.endpoint.name
        reaches_at = self.kernel.now + self.timing.gateway + pod.engine.profile.front_end(arrival.prompt_tokens)
        pod.pending.append(reaches_at)
        self.kernel.at(reaches_at, lambda: self._reach(pod, outcome.request_id, reaches_at))

    def _reach(self, pod: _Pod, number: int, at: float) -> None:
        """The request gets from the front end into the engine's queue."""
        pod.pending.remove(at)
        arrival = self._arrivals[number]
        pod.engine.add(
            EngineRequest(
                id=number,
                prompt_tokens=arrival.prompt_tokens,
                output_tokens=arrival.output_tokens,
                block_hashes=arrival.block_hashes,
                hash_of=arrival.hash_of,
                arrived_at=arrival.at,
            ),
            at,
        )
        if not pod.busy:
            self._step(pod)

    # --- engines ---

    def _step(self, pod: _Pod) -> None:
        now = self.kernel.now
        result = pod.engine.step(now, self._horizon(pod))
        pod.busy = result is not None
        self._gauge(pod)
        if result is None:
            return
        ends = now + result.duration
        self.kernel.at(ends, lambda: self._step(pod))
        heard_at = ends + self.timing.response
        for number in result.first_tokens:
            self._outcomes[number].first_token_at = heard_at
            self.kernel.at(heard_at, lambda number=number: self._tell(FirstToken(number)))  # type: ignore[misc]
        for finished in result.finished:
            self.kernel.at(heard_at, lambda finished=finished: self._finish(finished))  # type: ignore[misc]

    def _horizon(self, pod: _Pod) -> float | None:
        """The earliest instant at which something may be added to this engine; None: at any time."""
        if self._waiting:
            return None
        timing = self.timing
        on_the_way = timing.gateway + pod.engine.profile.front_end_s
        sources = (self._next_arrival, min(self._turns, default=math.inf), self.kernel.now + timing.think)
        return min(*pod.pending, min(sources) + on_the_way) if pod.pending else min(sources) + on_the_way

    def _finish(self, finished: FinishedRequest) -> None:
        number, now = finished.id, self.kernel.now
        outcome, arrival = self._outcomes[number], self._arrivals.pop(number)
        outcome.ended_at = now
        outcome.cached_tokens = finished.usage.cached_tokens or 0
        self._tell(Finished(number, 200, finished.usage))
        following = arrival.then(now) if arrival.then is not None else None
        if following is not None:
            at = max(following.at, now)
            self._turns.append(at)
            self.kernel.at(at, lambda: self._turn(following, at))

    def _turn(self, arrival: Arrival, at: float) -> None:
        self._turns.remove(at)
        self._arrive(arrival)

    def _tell(self, fact: Fact) -> None:
        self._router.apply(fact, self.kernel.now)
        self._release()

    # --- the router's queue ---

    def _release(self) -> None:
        if not self._waiting:
            return
        self._scrape()
        for outcome in self._router.poll(self.kernel.now):
            del self._waiting[outcome.request_id]
            self._settle(outcome)

    def _arm(self) -> None:
        wakeup = self._router.next_wakeup()
        if wakeup is not None:
            self.kernel.at(max(wakeup, self.kernel.now), self._release)

    # --- scrapes ---

    def _gauge(self, pod: _Pod) -> None:
        pod.gauges.append((self.kernel.now, pod.engine.load(self.kernel.now)))

    def _scrape(self) -> None:
        """Tell the router what each engine showed at its latest scrape: only decisions look, so only they ask."""
        interval, now = self.timing.scrape_interval, self.kernel.now
        for pod in self._pods.values():
            tick = math.floor((now - pod.phase) / interval) * interval + pod.phase
            if tick <= pod.scraped_at or tick < 0:
                continue
            while len(pod.gauges) > 1 and pod.gauges[1][0] <= tick:
                pod.gauges.popleft()
            pod.scraped_at = tick
            self._router.apply(replace(pod.gauges[0][1], observed_at=tick), now)
