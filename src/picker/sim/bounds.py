"""What no policy can beat, and what a good one should come near: floors, ceilings and a pooled reference.

    floor        bound      per request: nobody else is there, and whatever anyone ever sent is cached everywhere
    pooled_fcfs  reference  one cache and one queue in front of all pods; good, not optimal: it can be beaten
    greedy       reference  each request where it is served first, all being known: `sim.greedy_oracle`; can be beaten
    hit ratios   ceilings   of one cache of so many blocks: without limit, clairvoyant (MIN), and LRU for comparison

Pure functions of arrivals. Traces that answer (`Arrival.then`) are followed in the first two; the hit ratios need a
list. Troubles and adapter slots are left out: nothing befalls an ideal.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from picker.sim.blocks import BlockPool
from picker.sim.cluster import BYTES_PER_TOKEN, Arrival, Cluster, Outcome, Timing
from picker.sim.engine import Engine, StepResult
from picker.sim.greedy_oracle import greedy_oracle
from picker.sim.latency import Profile
from picker.types import (
    Decision,
    Endpoint,
    EndpointAdded,
    Fact,
    Failed,
    Finished,
    FirstToken,
    Queued,
    Rejection,
    Request,
)

# How soon a pod looks again whether there is room for the first of its queue, others having given back memory.
_BEAT = StepResult(0.005, 1, 0, (), (), (), (), (), (), ())


# --- the floor ---------------------------------------------------------------------------------------------------


def floor(arrivals: Iterable[Arrival], profiles: Sequence[Profile], timing: Timing) -> list[Outcome]:
    """Each request alone on the fastest of the pods, with one infinite cache that holds all earlier prompts at once.

    Exact times, no noise. A turn that follows an answer follows the floor's answer.
    """
    cache = _Endless(profiles[0].block_size)
    pending = [(arrival.at, number, arrival) for number, arrival in enumerate(arrivals)]
    numbers = itertools.count(len(pending))
    heapq.heapify(pending)
    outcomes = []
    while pending:
        at, _, arrival = heapq.heappop(pending)
        outcome = _alone(arrival, at, cache.admit(arrival), profiles, timing)
        outcomes.append(outcome)
        following = arrival.then(outcome.ended_at) if arrival.then is not None else None
        if following is not None:
            heapq.heappush(pending, (max(following.at, outcome.ended_at), next(numbers), following))
    return outcomes


class _Endless:
    """A cache that forgets nothing."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._hashes: set[int] = set()

    def admit(self, arrival: Arrival) -> int:
        """Cached tokens of this prompt; all of it and of its answer is cached from here on."""
        size, hashes = self._block_tokens, arrival.block_hashes.tolist()
        limit = (arrival.prompt_tokens - 1) // size
        found = sum(1 for _ in itertools.takewhile(self._hashes.__contains__, hashes[:limit]))
        if arrival.hash_of is not None:
            full = (arrival.prompt_tokens + arrival.output_tokens - 1) // size
            hashes += [arrival.hash_of(i) for i in range(len(hashes), full)]
        self._hashes.update(hashes)
        return found * size


def _alone(arrival: Arrival, at: float, cached: int, profiles: Sequence[Profile], timing: Timing) -> Outcome:
    times = [_times_alone(profile, arrival, cached) for profile in profiles]
    begins = at + timing.gateway + timing.response + min(prefill for prefill, _ in times)
    return Outcome(
        at=arrival.at,
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=arrival.output_tokens,
        session=arrival.session,
        first_token_at=begins,
        ended_at=begins + min(decode for _, decode in times),
        cached_tokens=cached,
        attempts=1,
    )


def _times_alone(profile: Profile, arrival: Arrival, cached: int) -> tuple[float, float]:
    """(seconds of front end and prefill, seconds of decoding) in an idle pod."""
    tokens, uncached = arrival.prompt_tokens, arrival.prompt_tokens - cached
    work = uncached * (cached + uncached / 2)
    chunks = -(-uncached // profile.max_num_batched_tokens)
    prefill = profile.step_time(prefill_tokens=uncached, prefill_work=work, decodes=0, context=0)
    prefill += (chunks - 1) * profile.c0 + profile.front_end(tokens)
    steps = arrival.output_tokens - 1
    decode = steps * profile.step_time(prefill_tokens=0, prefill_work=0.0, decodes=1, context=tokens)
    return prefill, decode + profile.c_kv * steps * (steps - 1) / 2


# --- one cache, one queue ----------------------------------------------------------------------------------------


def pooled_fcfs(arrivals: Iterable[Arrival], profiles: Sequence[Profile], timing: Timing) -> list[Outcome]:
    """All pods on one cache of their joint size, fed first come first served from one queue behind the front ends.

    Steps take what the pods' steps take, without noise. A pod gets at most about one step's tokens ahead, always the
    one that will be done first.
    """
    pool = BlockPool(sum(profile.num_blocks for profile in profiles))
    engines = [
        _PooledEngine(replace(profile, front_end_s=0.0, front_end_per_token_s=0.0), pool, name=f"pooled-{i}")
        for i, profile in enumerate(profiles)
    ]
    queue = CentralQueue({engine.name: profiles[i] for i, engine in enumerate(engines)}, pool, timing.gateway)
    undelayed = replace(timing, gateway=0.0, scrape_interval=3600.0)
    return Cluster(queue, engines, timing=undelayed).run(arrivals)


class _PooledEngine(Engine):
    """An engine whose blocks others use too: room may come back without its own doing, and go."""

    def __init__(self, profile: Profile, pool: BlockPool, *, name: str) -> None:
        super().__init__(profile, name=name)
        self.pool = pool

    def step(self, now: float, horizon: float | None = None) -> StepResult | None:
        self._stalled = False
        first = self._first_waiting()
        if first is not None and not self._running and self._fitting_hit(first[1]) is None:
            return _BEAT
        return super().step(now, None if first is not None else horizon)


@dataclass(slots=True)
class _Server:
    """One pod as the queue sees it. outstanding: uncached tokens sent there, of requests without a first token."""

    endpoint: Endpoint
    profile: Profile
    outstanding: int = 0
    inflight: int = 0

    @property
    def open(self) -> bool:
        budget = self.profile.max_num_batched_tokens
        return self.outstanding < budget and self.inflight < self.profile.max_num_seqs


class CentralQueue:
    """A router that knows everything of the pods and holds requests until one of them can take the first.

    profiles: by endpoint name, with their front ends, which requests pass here instead, in parallel.
    """

    def __init__(self, profiles: Mapping[str, Profile], pool: BlockPool, gateway_s: float) -> None:
        self._profiles = profiles
        self._pool = pool
        self._gateway_s = gateway_s
        self._servers: dict[str, _Server] = {}
        self._queue: list[tuple[float, int, Request]] = []  # heap: when it is through the front end
        self._booked: dict[int, tuple[_Server, int]] = {}  # tokens still outstanding
        self._polled_at = -math.inf

    def submit(self, request: Request, now: float) -> Decision | Rejection | Queued:
        profile = next(iter(self._profiles.values()))
        ready_at = request.arrived_at + self._gateway_s + profile.front_end(_tokens(request))
        heapq.heappush(self._queue, (ready_at, request.id, request))
        return Queued(request.id)

    def apply(self, fact: Fact, now: float) -> None:
        match fact:
            case EndpointAdded(endpoint):
                self._servers[endpoint.name] = _Server(endpoint, self._profiles[endpoint.name])
            case FirstToken(request_id):
                self._prefilled(request_id)
            case Finished(request_id) | Failed(request_id):
                self._prefilled(request_id)
                server, _ = self._booked.pop(request_id)
                server.inflight -= 1
            case _:
                pass

    def poll(self, now: float) -> list[Decision | Rejection]:
        self._polled_at = now
        outcomes: list[Decision | Rejection] = []
        while self._queue and self._queue[0][0] <= now:
            request = self._queue[0][2]
            uncached = self._uncached(request)
            server = self._soonest(uncached)
            if server is None:
                break
            heapq.heappop(self._queue)
            server.outstanding += uncached
            server.inflight += 1
            self._booked[request.id] = (server, uncached)
            outcomes.append(Decision(request.id, server.endpoint))
        return outcomes

    def next_wakeup(self) -> float | None:
        """When the first is through the front end; after that only a pod that gets free changes anything."""
        return self._queue[0][0] if self._queue and self._queue[0][0] > self._polled_at else None

    def _soonest(self, uncached: int) -> _Server | None:
        able = [server for server in self._servers.values() if server.open]
        done_in = [((s.outstanding + uncached) * s.profile.c_pf, s.inflight) for s in able]
        return able[min(range(len(able)), key=done_in.__getitem__)] if able else None

    def _prefilled(self, request_id: int) -> None:
        server, tokens = self._booked[request_id]
        server.outstanding -= tokens
        self._booked[request_id] = (server, 0)

    def _uncached(self, request: Request) -> int:
        size, tokens = next(iter(self._profiles.values())).block_size, _tokens(request)
        return tokens - size * len(self._pool.match(request.block_hashes.tolist(), (tokens - 1) // size))


def _tokens(request: Request) -> int:
    estimated = request.prompt_bytes // BYTES_PER_TOKEN
    return max(1, estimated if request.prompt_tokens is None else request.prompt_tokens)


Reference = Callable[[Iterable[Arrival], Sequence[Profile], Timing], list[Outcome]]
"""(arrivals, the pods' profiles at their real speeds, delays) -> what would have become of each request."""

REFERENCES: Mapping[str, Reference] = {
    "pooled-fcfs": pooled_fcfs,
    "greedy-oracle": greedy_oracle,
    "floor": floor,
}


# --- hit ratios --------------------------------------------------------------------------------------------------


def infinite_hit_ratio(arrivals: Sequence[Arrival], block_tokens: int) -> float:
    """Cached tokens over prompt tokens when nothing is ever evicted. Answers are not cached."""
    return lru_hit_ratio(arrivals, block_tokens, blocks=None)


def lru_hit_ratio(arrivals: Sequence[Arrival], block_tokens: int, blocks: int | None) -> float:
    """The same with one LRU cache of `blocks`: a request touches all of its blocks, the first of them last."""
    cache: OrderedDict[int, None] = OrderedDict()
    cached = 0
    for arrival in arrivals:
        hashes = arrival.block_hashes.tolist()
        cached += _hit_tokens(arrival, hashes, cache.keys(), block_tokens)
        for block_hash in reversed(hashes):
            cache[block_hash] = None
            cache.move_to_end(block_hash)
        while blocks is not None and len(cache) > blocks:
            cache.popitem(last=False)
    return cached / _prompt_tokens(arrivals)


def min_hit_ratio(arrivals: Sequence[Arrival], block_tokens: int, blocks: int) -> float:
    """The same with Belady's MIN: what is used furthest in the future goes first, the newcomer included.

    A block is used no later than what continues it, so the cache stays closed under prefixes by itself. An upper bound
    for every placement and eviction on pods that hold `blocks` together: pooling needs no duplicates.
    """
    uses = _next_uses(arrivals)
    cache: dict[int, float] = {}
    furthest: list[tuple[float, int, int]] = []  # heap: minus next use, minus depth, hash; some are out of date
    cached = 0
    for arrival, next_uses in zip(arrivals, uses, strict=True):
        hashes = arrival.block_hashes.tolist()
        cached += _hit_tokens(arrival, hashes, cache.keys(), block_tokens)
        for depth, (block_hash, next_use) in enumerate(zip(hashes, next_uses, strict=True)):
            if math.isinf(next_use):
                cache.pop(block_hash, None)
            else:
                cache[block_hash] = next_use
                heapq.heappush(furthest, (-next_use, -depth, block_hash))
        while len(cache) > blocks:
            negative, _, block_hash = heapq.heappop(furthest)
            if cache.get(block_hash) == -negative:
                del cache[block_hash]
    return cached / _prompt_tokens(arrivals)


def _next_uses(arrivals: Sequence[Arrival]) -> list[list[float]]:
    """For each block of each arrival, the number of the next arrival that has it, too."""
    upcoming: dict[int, int] = {}
    uses: list[list[float]] = []
    for number in range(len(arrivals) - 1, -1, -1):
        hashes = arrivals[number].block_hashes.tolist()
        uses.append([upcoming.get(block_hash, math.inf) for block_hash in hashes])
        upcoming.update(dict.fromkeys(hashes, number))
    return uses[::-1]


def _hit_tokens(arrival: Arrival, hashes: Sequence[int], held: Container[int], block_tokens: int) -> int:
    found = sum(1 for _ in itertools.takewhile(held.__contains__, hashes))
    return min(found * block_tokens, arrival.prompt_tokens)


def _prompt_tokens(arrivals: Sequence[Arrival]) -> int:
    return max(1, sum(arrival.prompt_tokens for arrival in arrivals))
