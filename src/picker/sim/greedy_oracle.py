"""A reference that knows everything about the present: each request goes where its own first token comes soonest.

Owns the forecast, made by running a copy of an engine onward. Knows nothing of what is yet to arrive.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from picker.sim.blocks import BlockPool
from picker.sim.cluster import Arrival, Cluster, Outcome, Timing
from picker.sim.engine import Engine, EngineRequest, StepResult
from picker.sim.latency import Profile
from picker.types import (
    Decision,
    Endpoint,
    EndpointAdded,
    Fact,
    Failed,
    Finished,
    Queued,
    Rejection,
    Request,
    UInt64Array,
)

# Forecasts that differ by less than this many digits of a second are equal.
_DIGITS = 6


def greedy_oracle(arrivals: Iterable[Arrival], profiles: Sequence[Profile], timing: Timing) -> list[Outcome]:
    """Every request on the pod where it gets its first token first, as long as nobody else arrives.

    The router sees the engines themselves: queues, what of each prefill is left, cache contents, answers still to be
    written, real speeds. Of equals the one with the fewest tokens in flight, then the emptiest cache. Step times are
    without noise, so a forecast is exact but for those who come later: a shorter prompt may overtake in the front end,
    a prompt behind may share the last step, and an answer may preempt.

    A reference, not an optimum: what is best for one request hurts those that come after it. It copies contexts to idle
    pods, which evicts others and costs prefill, and it joins full batches. A policy that looks ahead can beat it.
    """
    engines = [_Watched(profile, name=f"pod-{i}") for i, profile in enumerate(profiles)]
    oracle = Oracle({engine.name: engine for engine in engines}, timing.gateway)
    return _Telling(oracle, engines, timing=timing).run(arrivals)


class _Watched(Engine):
    """An engine that says more: ends_at, the end of the step in progress; coming, what is sent and in the front end.

    coming: request id -> (when it reaches the queue, it).
    """

    def __init__(self, profile: Profile, *, name: str = "engine") -> None:
        super().__init__(profile, name=name)
        self.ends_at = -math.inf
        self.coming: dict[int, tuple[float, EngineRequest]] = {}

    def add(self, request: EngineRequest, now: float) -> None:
        super().add(request, now)
        self.coming.pop(request.id, None)

    def step(self, now: float, horizon: float | None = None) -> StepResult | None:
        result = super().step(now, horizon)
        self.ends_at = -math.inf if result is None else now + result.duration
        return result

    def unstarted(self) -> Iterator[EngineRequest]:
        """Those whose prompts are not computed yet."""
        for sequence in self._sequences.values():
            if sequence.request.id not in self._decoding:
                yield sequence.request

    def twin(self) -> _Watched:
        """A copy that goes its own way: what steps write to is copied, requests and hashes are shared.

        Lists of hashes are shared although both may add to them: they add the same.
        """
        other = copy.copy(self)
        sequences = {number: copy.copy(sequence) for number, sequence in self._sequences.items()}
        for sequence in sequences.values():
            sequence.blocks = list(sequence.blocks)
        other.coming = {}
        other.pool = _pool_twin(self.pool)
        other.counters = replace(self.counters, success=Counter(self.counters.success))
        other._lora_requests = Counter(self._lora_requests)
        other._sequences = sequences
        other._running = {number: sequences[number] for number in self._running}
        other._prefilling = {number: sequences[number] for number in self._prefilling}
        other._decoding = {number: sequences[number] for number in self._decoding}
        # Entries that have gone stale stay behind; what is left is no heap any more.
        other._waiting = [(key, sequences[s.request.id]) for key, s in self._waiting if s.waiting]
        other._due = [(tick, n, sequences[s.request.id]) for tick, n, s in self._due if s.serial == n]
        other._ends = [(tick, n, sequences[s.request.id]) for tick, n, s in self._ends if s.serial == n]
        heapq.heapify(other._waiting)
        heapq.heapify(other._due)
        heapq.heapify(other._ends)
        return other


def _pool_twin(pool: BlockPool) -> BlockPool:
    other = copy.copy(pool)
    other._refs = pool._refs.copy()
    other._hashes = pool._hashes.copy()
    other._blank = pool._blank.copy()
    other._evictable = pool._evictable.copy()
    other._by_hash = pool._by_hash.copy()
    other._twins = {block_hash: list(blocks) for block_hash, blocks in pool._twins.items()}
    return other


class _Telling(Cluster):
    """A cluster whose router is told of each request how long its answer will be, before it decides."""

    def __init__(self, oracle: Oracle, engines: Sequence[Engine], *, timing: Timing) -> None:
        super().__init__(oracle, engines, timing=timing)
        self._oracle = oracle

    def _arrive(self, arrival: Arrival) -> None:
        self._oracle.arriving = arrival
        super()._arrive(arrival)


@dataclass(slots=True)
class _Pod:
    """tokens: of the requests in flight, answers included."""

    endpoint: Endpoint
    engine: _Watched
    tokens: int = 0


class Oracle:
    """A router that forecasts on copies of the engines. arriving: the request that is about to be submitted."""

    def __init__(self, engines: dict[str, _Watched], gateway_s: float) -> None:
        self.arriving: Arrival | None = None
        self._engines = engines
        self._gateway_s = gateway_s
        self._pods: list[_Pod] = []
        self._sent: dict[int, tuple[_Pod, int]] = {}

    def submit(self, request: Request, now: float) -> Decision | Rejection | Queued:
        arrival = self.arriving
        assert arrival is not None, "nobody told what arrives"
        pod = self._soonest(request.id, arrival, now)
        tokens = arrival.prompt_tokens + arrival.output_tokens
        pod.tokens += tokens
        self._sent[request.id] = pod, tokens
        pod.engine.coming[request.id] = self._on_the_way(pod, request.id, arrival, now)
        return Decision(request.id, pod.endpoint)

    def apply(self, fact: Fact, now: float) -> None:
        match fact:
            case EndpointAdded(endpoint):
                self._pods.append(_Pod(endpoint, self._engines[endpoint.name]))
            case Finished(request_id) | Failed(request_id):
                pod, tokens = self._sent.pop(request_id)
                pod.tokens -= tokens
                pod.engine.coming.pop(request_id, None)  # the engine may have refused it
            case _:
                pass

    def poll(self, now: float) -> list[Decision | Rejection]:
        return []

    def next_wakeup(self) -> float | None:
        return None

    # --- the forecast ---

    def _soonest(self, number: int, arrival: Arrival, now: float) -> _Pod:
        """Pods in order of what they would need at least, until that is more than the best of them really needs."""
        at_least = [self._at_least(pod, arrival, now) for pod in self._pods]
        found: tuple[tuple[float, int, int, int], _Pod] | None = None
        for i in sorted(range(len(self._pods)), key=at_least.__getitem__):
            if found is not None and at_least[i] > found[0][0]:
                break
            pod = self._pods[i]
            first = round(self.first_token(pod, number, arrival, now), _DIGITS)
            rank = first, pod.tokens, pod.engine.pool.cached, i
            if found is None or rank < found[0]:
                found = rank, pod
        assert found is not None, "no pod to choose"
        return found[1]

    def first_token(self, pod: _Pod, number: int, arrival: Arrival, now: float) -> float:
        """When the request, sent to this pod, gets its first token; infinity where the pod can never hold it."""
        engine = pod.engine
        if arrival.prompt_tokens + arrival.output_tokens > engine.pool.usable * engine.profile.block_size:
            return math.inf
        on_the_way = [*engine.coming.values(), self._on_the_way(pod, number, arrival, now)]
        coming = deque(sorted(on_the_way, key=lambda entry: entry[0]))
        ahead, at = engine.twin(), max(engine.ends_at, now)
        while True:
            if ahead.idle and coming[0][0] >= at:
                # It wakes the engine, which waits for nobody who comes at the same instant.
                at = coming[0][0]
                ahead.add(coming.popleft()[1], at)
            else:
                while coming and coming[0][0] <= at:
                    ahead.add(coming.popleft()[1], at)
            result = ahead.step(at, coming[0][0] if coming else math.inf)
            assert result is not None, "the request got lost"
            at += result.duration
            if number in result.first_tokens:
                return at

    def _at_least(self, pod: _Pod, arrival: Arrival, now: float) -> float:
        """No first token before this: the end of the step in progress, and the request's own steps with nobody else.

        A bound as long as no prompt goes on from an answer that is still being written.
        """
        profile = pod.engine.profile
        cached = profile.block_size * self._reusable(pod, arrival)
        uncached = arrival.prompt_tokens - cached
        begins = max(pod.engine.ends_at, now + self._gateway_s + profile.front_end(arrival.prompt_tokens))
        work = uncached * (cached + uncached / 2.0)
        own = profile.step_time(prefill_tokens=uncached, prefill_work=work, decodes=0, context=0)
        own += profile.c0 * (-(-uncached // profile.max_num_batched_tokens) - 1)
        return begins + own - 10.0**-_DIGITS  # sums of floats in another order

    def _reusable(self, pod: _Pod, arrival: Arrival) -> int:
        """Leading blocks cached there, or to be computed for those who are before it."""
        hashes = arrival.block_hashes
        limit = (arrival.prompt_tokens - 1) // pod.engine.profile.block_size
        cached = len(pod.engine.pool.match(hashes.tolist(), limit))
        before = itertools.chain(pod.engine.unstarted(), (request for _, request in pod.engine.coming.values()))
        return min(limit, max([cached, *(_common(hashes, np.asarray(other.block_hashes)) for other in before)]))

    def _on_the_way(self, pod: _Pod, number: int, arrival: Arrival, now: float) -> tuple[float, EngineRequest]:
        reaches_at = now + self._gateway_s + pod.engine.profile.front_end(arrival.prompt_tokens)
        return reaches_at, EngineRequest(
            id=number,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=arrival.output_tokens,
            block_hashes=arrival.block_hashes,
            hash_of=arrival.hash_of,
            arrived_at=arrival.at,
        )


def _common(a: UInt64Array, b: UInt64Array) -> int:
    """How many leading elements are equal."""
    n = min(a.size, b.size)
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n
