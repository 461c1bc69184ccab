"""The vLLM v1 engine as a pure state machine: scheduler, prefix cache and step times, with time in place of a GPU.

Owns every request between `add` and its end. Reads no clock, draws from no generator but the one given to it, and
knows no text: prompts are token counts and block hashes. The shells (`sim.cluster`, `sim.pod`) own time and transport.

A sequence's life; only `step` moves it forward:

    waiting --admit--> prefilling --whole prompt computed--> decoding --last token--> finished
       ^                   |                                    |
       +----- preempted: blocks released, recomputed later -----+
"""

from __future__ import annotations

import enum
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from picker.sim.adapters import AdapterSlots
from picker.sim.blocks import BlockPool
from picker.sim.latency import Profile, StepNoise
from picker.types import LoadObserved, UInt64Array, Usage


class Policy(enum.Enum):
    """vLLM's `--scheduling-policy`; under PRIORITY the lower number goes first."""

    FCFS = "fcfs"
    PRIORITY = "priority"


class FinishReason(enum.Enum):
    LENGTH = "length"
    STOP = "stop"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, eq=False)
class EngineRequest:
    """What the engine needs to know of a request; times in seconds, lengths in tokens.

    id: unique among live requests. output_tokens: how many it emits unless aborted.
    block_hashes: chained hashes of the full blocks of the prompt; a list that goes on into the output is fine.
    hash_of: hash of block i beyond that list, asked for once, when the block is full; None: output is not cached.
    lora: adapter name; the caller keeps hashes of different adapters apart. ends_with: reason given at the last token.
    """

    id: int
    prompt_tokens: int
    output_tokens: int
    block_hashes: Sequence[int] | UInt64Array = ()
    hash_of: Callable[[int], int] | None = None
    arrived_at: float = 0.0
    priority: int = 0
    lora: str | None = None
    ends_with: FinishReason = FinishReason.LENGTH


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One request's record. usage.cached_tokens is the hit of its first admission, as vLLM reports it."""

    id: int
    usage: Usage
    reason: FinishReason
    arrived_at: float
    queued_at: float
    scheduled_at: float
    first_token_at: float
    finished_at: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """Blocks `first`, `first` + 1, ... of a request entered the prefix cache under `hashes`, after block `parent`."""

    request_id: int
    first: int
    hashes: tuple[int, ...]
    parent: int | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step, or several pure decode steps merged. All of it holds from its start plus `duration` on.

    A request aborted during the step may still be named; the caller ignores it.

    duration: seconds. steps: engine steps it stands for. first_tokens: ids that emit their first token at the end.
    decoding: ids that emit one token at the end of each of the steps. resumed: ids that emit one token after having
    been recomputed. preempted: ids sent back to the queue. removed hashes left the cache before `stored` entered it.
    prefill_tokens: prompt tokens computed, hits not included.
    """

    duration: float
    steps: int
    prefill_tokens: int
    first_tokens: tuple[int, ...]
    decoding: tuple[int, ...]
    resumed: tuple[int, ...]
    finished: tuple[FinishedRequest, ...]
    preempted: tuple[int, ...]
    stored: tuple[StoredBlocks, ...]
    removed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Gauges:
    """What the engine tells of itself, as of the end of its last completed step. deferred: of the waiting."""

    running: int = 0
    waiting: int = 0
    deferred: int = 0
    kv_usage: float = 0.0


@dataclass(slots=True)
class EngineCounters:
    """Totals since the start, as vLLM's counters of these names.

    queries and hits are prompt tokens counted at admission; prompt_tokens, and cached_tokens of them, at the first
    token.
    """

    queries: int = 0
    hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    success: Counter[FinishReason] = field(default_factory=Counter)


class _Sequence:
    """A request inside the engine. While it decodes, its computed tokens are `base` + the engine's `_ticks`."""

    __slots__ = (
        "base",
        "blocks",
        "cached",
        "computed",
        "emitted",
        "first_token_at",
        "hashes",
        "preemptions",
        "queued_at",
        "request",
        "scheduled_at",
        "serial",
        "waiting",
    )

    def __init__(self, request: EngineRequest, queued_at: float) -> None:
        hashes = request.block_hashes
        self.request = request
        self.hashes: list[int] = hashes.tolist() if isinstance(hashes, np.ndarray) else list(hashes)
        self.blocks: list[int] = []
        self.computed = 0  # tokens in KV while it waits or prefills
        self.emitted = 0  # output tokens, not kept up to date while it decodes
        self.cached = 0
        self.serial = -1  # place in the running order; -1 when not running, so entries in heaps go stale
        self.base = 0
        self.waiting = False
        self.preemptions = 0
        self.queued_at = queued_at
        self.scheduled_at = math.nan
        self.first_token_at = math.nan

    @property
    def tokens(self) -> int:
        """Tokens to have in KV before the next one comes out."""
        return self.request.prompt_tokens + self.emitted


class _Batch:
    """What one step is going to do, while it is planned."""

    __slots__ = ("computed", "delay", "preempted", "prefill_tokens", "prefill_work", "removed", "stored")

    def __init__(self) -> None:
        self.prefill_tokens = 0
        self.prefill_work = 0.0
        self.delay = 0.0
        self.computed: list[_Sequence] = []  # their prefill ends with this step
        self.preempted: list[int] = []
        self.stored: list[StoredBlocks] = []
        self.removed: list[int] = []


class Engine:
    """One vLLM engine. `add` and `abort` at any time; call `step` when idle work appears and at the end of each step.

    Scheduling as in vLLM v1: running sequences first, in order of admission; then, unless somebody was preempted, the
    queue, until token budget, sequence slots or blocks run out. Prefill is chunked. A sequence is admitted only if the
    blocks of its whole prompt, less the hit, are free (`scheduler_reserve_full_isl`). A running sequence that gets no
    block preempts the last one (the least urgent under PRIORITY), which is recomputed later from its cached prefix.

    Cost of a step is independent of the batch: all decoding sequences advance by one counter, and heaps hold the
    counts at which one of them fills a block, needs a block, or ends.

    profile: limits and costs. adapters: LoRA slots, None when there are none. noise: factors on step times, with the
    profile's noise_sd and mean 1; None for exact times. started_at is passed on in `load`.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        name: str = "engine",
        policy: Policy = Policy.FCFS,
        adapters: AdapterSlots | None = None,
        noise: np.random.Generator | None = None,
        started_at: float = 0.0,
    ) -> None:
        self.profile = profile
        self.name = name
        self.adapters = adapters
        self.counters = EngineCounters()
        self.pool = BlockPool(profile.num_blocks)
        self.started_at = started_at
        self._policy = policy
        self._slowdown = 1.0
        self._noise = StepNoise(noise, profile.noise_sd) if noise is not None and profile.noise_sd else None

        self._sequences: dict[int, _Sequence] = {}
        self._lora_requests: Counter[str] = Counter()
        self._waiting: list[tuple[tuple[float, ...], _Sequence]] = []  # heap; aborted entries are dropped when met
        self._waiting_count = 0
        self._rank = 0
        self._running: dict[int, _Sequence] = {}  # in order of admission
        self._prefilling: dict[int, _Sequence] = {}
        self._decoding: dict[int, _Sequence] = {}
        self._decoding_ids: tuple[int, ...] | None = None
        self._base_sum = 0
        self._serial = 0
        self._ticks = 0  # decode steps so far
        self._due: list[tuple[int, int, _Sequence]] = []  # tick at which a block is needed or full, serial
        self._ends: list[tuple[int, int, _Sequence]] = []  # tick of the last token, serial

        # The queue cannot move until blocks or slots come back; see `_admit`.
        self._stalled = False
        self._awaited: int | None = None
        self._deferred = 0
        self.gauges = self._ahead = Gauges()

    # --- what goes in ---------------------------------------------------------------------------------------

    def add(self, request: EngineRequest, now: float) -> None:
        """Queue a request. It is looked at by the next `step`.

        Raises ValueError for a live id, an empty prompt or output, or one that could never hold all its blocks.
        """
        if request.id in self._sequences:
            raise ValueError(f"request {request.id} is in the engine already")
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError(f"request {request.id} has no prompt or no output")
        longest = request.prompt_tokens + request.output_tokens - 1  # the last token's KV is never computed
        if -(-longest // self.profile.block_size) > self.pool.usable:
            raise ValueError(f"request {request.id}: {longest} tokens do not fit in {self.pool.usable} blocks")
        sequence = _Sequence(request, now)
        self._sequences[request.id] = sequence
        if request.lora is not None:
            self._lora_requests[request.lora] += 1
        self._rank += 1
        self._enqueue(sequence, self._rank)

    def abort(self, request_id: int, now: float) -> bool:
        """Drop a request and its blocks; their hashes stay matchable. False when it is unknown or has finished.

        now: as every verb takes it; blocks come back at once, whatever step is in progress.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        if sequence.waiting:
            sequence.waiting = False
            self._waiting_count -= 1
        else:
            self._leave_running(sequence)
        self._forget(sequence)
        self._stalled = False
        return True

    def slow_down(self, factor: float) -> None:
        """From the next step on everything takes `factor` times as long: a throttled GPU, a noisy neighbour."""
        self._slowdown = factor

    def reset_prefix_cache(self) -> bool:
        """vLLM's POST /reset_prefix_cache: False, and nothing happens, while any block is held."""
        return self.pool.clear()

    # --- what comes out -------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs: `step` would return None."""
        return not self._sequences

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._waiting_count

    @property
    def num_deferred(self) -> int:
        """Of the waiting, those passed over for want of a LoRA slot when the queue was last looked at."""
        return self._deferred

    @property
    def kv_usage(self) -> float:
        """Fraction of the KV blocks that running sequences hold at this moment; `load` shows it with vLLM's lag."""
        return self.pool.usage

    @property
    def active_adapters(self) -> frozenset[str]:
        """Adapters of all requests here, running or waiting: vLLM cannot tell the two apart either."""
        return frozenset(self._lora_requests)

    def load(self, now: float) -> LoadObserved:
        """What a scrape shows: gauges as of the end of the last completed step, as vLLM sets them.

        A request that arrived since is not in them. Over a merged step they are those of its start.
        """
        return LoadObserved(
            name=self.name,
            observed_at=now,
            waiting=self.gauges.waiting,
            running=self.gauges.running,
            kv_usage=self.gauges.kv_usage,
            block_size=self.profile.block_size,
            kv_capacity_tokens=self.pool.num_blocks * self.profile.block_size,
            queries=self.counters.queries,
            hits=self.counters.hits,
            started_at=self.started_at,
            adapters=self.active_adapters if self.adapters else None,
            max_adapters=self.adapters.slots if self.adapters else None,
        )

    def step(self, now: float, horizon: float | None = None) -> StepResult | None:
        """Plan and account for the step that begins `now`, which is the end of the one before or the end of idleness.

        Returns None when there is nothing to do. The state moves to the end of the step at once.

        horizon: the caller adds and aborts nothing before this instant. Then decode steps that begin before it are
        merged into one result, up to the next end of a request or want of a block, with the same times and effects
        as one by one. None: no merging.
        """
        if not self._sequences:
            self._deferred = 0
            self.gauges = self._ahead = self._snapshot()
            return None
        self.gauges = self._ahead
        batch = _Batch()
        self._schedule(batch, now)
        # Each sequence fits alone (see `add`), so whoever is left after preemptions has something to do.
        assert batch.prefill_tokens or self._decoding, "a step without work"
        steps, duration = self._run(batch, now, horizon)
        result = self._finish_step(batch, steps, duration, now + duration)
        self._ahead = self._snapshot()
        return result

    # --- planning one step ----------------------------------------------------------------------------------

    def _schedule(self, batch: _Batch, now: float) -> None:
        preempted = len(batch.preempted)
        self._grow_decoding(batch)
        budget = self.profile.max_num_batched_tokens - len(self._decoding)
        # At most one sequence is between two chunks, and it is the last admitted: the budget ended with it.
        for sequence in tuple(self._prefilling.values()):
            budget -= self._compute(sequence, budget, batch)
        if len(batch.preempted) == preempted:
            self._admit(batch, budget, now)

    def _grow_decoding(self, batch: _Batch) -> None:
        """Give the decoding sequences the blocks this step needs, in running order."""
        due, tick = self._due, self._ticks
        while due and due[0][0] <= tick:
            _, serial, sequence = heapq.heappop(due)
            if sequence.serial == serial:
                self._grow(sequence, sequence.base + tick, batch)

    def _grow(self, sequence: _Sequence, computed: int, batch: _Batch) -> None:
        """Token number `computed` of a decoding sequence is about to be computed, at the edge of a block."""
        size = self.profile.block_size
        offset = computed % size
        if offset == 0 and not self._reserve(sequence, computed + 1, batch):
            return
        if offset == size - 1:
            self._register(sequence, computed // size, computed // size + 1, batch)
        self._watch_block(sequence, computed + 1)

    def _watch_block(self, sequence: _Sequence, computed: int) -> None:
        """Look at the sequence again when it first needs or fills a block, from token number `computed` on."""
        size = self.profile.block_size
        offset = computed % size
        at = computed if offset == 0 else computed + size - 1 - offset
        heapq.heappush(self._due, (at - sequence.base, sequence.serial, sequence))

    def _reserve(self, sequence: _Sequence, tokens: int, batch: _Batch) -> bool:
        """Give a running sequence blocks for its first `tokens`, preempting if need be. False: it was the victim."""
        missing = -(-tokens // self.profile.block_size) - len(sequence.blocks)
        while missing > self.pool.free:
            victim = self._victim()
            self._preempt(victim)
            batch.preempted.append(victim.request.id)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.blocks += self.pool.allocate(missing, batch.removed)
        return True

    def _victim(self) -> _Sequence:
        if self._policy is Policy.FCFS:
            return next(reversed(self._running.values()))
        return max(self._running.values(), key=lambda s: (s.request.priority, s.request.arrived_at))

    def _preempt(self, sequence: _Sequence) -> None:
        if sequence.request.id in self._decoding:
            sequence.emitted = sequence.base + self._ticks - sequence.request.prompt_tokens + 1
        self._leave_running(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self._enqueue(sequence, -self.counters.preemptions)  # in front of everybody, the last preempted first

    def _admit(self, batch: _Batch, budget: int, now: float) -> None:
        """Start waiting sequences until budget, slots or blocks run out.

        Once blocks or slots were what ran out, the answer stays no until one comes back, something arrives, or the
        block that the first one's hit lacks gets stored: evictions between only lengthen what it needs.
        """
        if self._stalled:
            return
        passed_over: list[tuple[tuple[float, ...], _Sequence]] = []
        while budget and (entry := self._first_waiting()) is not None:
            sequence = entry[1]
            if len(self._running) >= self.profile.max_num_seqs:
                self._stalled, self._awaited = True, None
                break
            if self.adapters and not self.adapters.admits(sequence.request.lora):
                passed_over.append(heapq.heappop(self._waiting))
                continue
            hit = self._fitting_hit(sequence)
            if hit is None:
                break
            heapq.heappop(self._waiting)
            self._start(sequence, hit, batch, now)
            budget -= self._compute(sequence, budget, batch)
        else:
            self._stalled = bool(budget and passed_over)
        self._deferred = len(passed_over)
        for entry in passed_over:
            heapq.heappush(self._waiting, entry)

    def _first_waiting(self) -> tuple[tuple[float, ...], _Sequence] | None:
        waiting = self._waiting
        while waiting and not waiting[0][1].waiting:
            heapq.heappop(waiting)
        return waiting[0] if waiting else None

    def _fitting_hit(self, sequence: _Sequence) -> list[int] | None:
        """The cached blocks to start from, or None when the rest of the prompt does not fit beside them."""
        size = self.profile.block_size
        # The last token is computed always, or there would be nothing to sample from: a full hit loses a block.
        limit = min((sequence.tokens - 1) // size, len(sequence.hashes))
        hit = self.pool.match(sequence.hashes, limit)
        needed = -(-sequence.tokens // size) - len(hit) + self.pool.count_free(hit)
        if needed <= self.pool.free:
            return hit
        self._stalled = True
        self._awaited = sequence.hashes[len(hit)] if len(hit) < limit else None
        return None

    def _start(self, sequence: _Sequence, hit: list[int], batch: _Batch, now: float) -> None:
        request = sequence.request
        self._waiting_count -= 1
        sequence.waiting = False
        self.pool.hold(hit)
        sequence.blocks = hit
        sequence.computed = len(hit) * self.profile.block_size
        if not sequence.preemptions:
            sequence.scheduled_at = now
            sequence.cached = sequence.computed
            self.counters.queries += request.prompt_tokens
            self.counters.hits += sequence.cached
        self._serial += 1
        sequence.serial = self._serial
        self._running[request.id] = self._prefilling[request.id] = sequence
        if self.adapters:
            batch.delay += self.adapters.start(request.lora)

    def _compute(self, sequence: _Sequence, budget: int, batch: _Batch) -> int:
        """Put the next chunk of a prefill into the step. Returns its tokens."""
        start = sequence.computed
        chunk = min(sequence.tokens - start, budget)
        size = self.profile.block_size
        if not chunk or not self._reserve(sequence, start + chunk, batch):
            return 0
        self._register(sequence, start // size, (start + chunk) // size, batch)
        sequence.computed = start + chunk
        batch.prefill_tokens += chunk
        batch.prefill_work += chunk * (start + chunk / 2)
        if sequence.computed == sequence.tokens:
            del self._prefilling[sequence.request.id]
            batch.computed.append(sequence)
        return chunk

    def _register(self, sequence: _Sequence, first: int, stop: int, batch: _Batch) -> None:
        """Blocks first..stop-1 are full at the end of this step; lookups find them from now on."""
        while len(sequence.hashes) < stop:
            if sequence.request.hash_of is None:
                stop = len(sequence.hashes)
                break
            sequence.hashes.append(sequence.request.hash_of(len(sequence.hashes)))
        if first >= stop:
            return
        hashes = sequence.hashes[first:stop]
        for block, block_hash in zip(sequence.blocks[first:stop], hashes, strict=True):
            self.pool.register(block, block_hash)
            if block_hash == self._awaited:
                self._stalled = False
        parent = sequence.hashes[first - 1] if first else None
        batch.stored.append(StoredBlocks(sequence.request.id, first, tuple(hashes), parent))

    # --- how long it takes, and how many steps are like it ----------------------------------------------------

    def _run(self, batch: _Batch, now: float, horizon: float | None) -> tuple[int, float]:
        """Steps to take as one, and their seconds in all."""
        decodes = len(self._decoding)
        factor = self._slowdown * (self.adapters.factor if self.adapters else 1.0)
        first = factor * self.profile.step_time(
            prefill_tokens=batch.prefill_tokens,
            prefill_work=batch.prefill_work,
            decodes=decodes,
            context=self._base_sum + decodes * self._ticks,
        )
        growth = factor * self.profile.c_kv * decodes
        alike = not batch.prefill_tokens and (self._stalled or not self._waiting_count)
        span = horizon - now if horizon is not None and alike else 0.0
        begun = _steps_before(span, first, growth)
        if begun == 1:
            return 1, first * (self._noise.take() if self._noise else 1.0) + batch.delay
        limit = self._steps_to_next_end()
        if self._noise is None:
            steps = self._walk_blocks(min(limit, begun), batch)
            return steps, steps * first + growth * (steps * (steps - 1) / 2)
        limit = min(limit, begun + begun // 4 + 8)  # room for a run of quick steps; a shorter merge is right too
        ends = np.cumsum((first + growth * np.arange(limit)) * self._noise.peek(limit))
        begun = int(np.searchsorted(ends, span, side="left")) + 1
        steps = self._walk_blocks(min(limit, begun), batch)
        self._noise.skip(steps)
        return steps, float(ends[steps - 1])

    def _steps_to_next_end(self) -> int:
        ends = self._ends
        while ends[0][2].serial != ends[0][1]:
            heapq.heappop(ends)
        return ends[0][0] - self._ticks + 1

    def _walk_blocks(self, steps: int, batch: _Batch) -> int:
        """Grow blocks as `steps` steps would; fewer when one of them would do more than that. Returns how many."""
        due = self._due
        while due and (tick := due[0][0]) < self._ticks + steps:
            together = []
            while due and due[0][0] == tick:
                together.append(heapq.heappop(due))
            live = [(sequence, sequence.base + tick) for _, serial, sequence in together if sequence.serial == serial]
            if self._is_eventful(live):
                for entry in together:
                    heapq.heappush(due, entry)
                return tick - self._ticks
            for sequence, computed in live:
                self._grow(sequence, computed, batch)
        return steps

    def _is_eventful(self, growing: list[tuple[_Sequence, int]]) -> bool:
        """Whether this growth, all of one step, would preempt somebody or let the first waiting sequence in."""
        wanted = sum(not computed % self.profile.block_size for _, computed in growing)
        if wanted > self.pool.free:
            return True
        return bool(self._waiting_count) and any(self._would_wake(sequence, at) for sequence, at in growing)

    def _would_wake(self, sequence: _Sequence, computed: int) -> bool:
        """Whether the block that this token fills is the one that the first waiting sequence lacks."""
        index, offset = divmod(computed, self.profile.block_size)
        if self._awaited is None or offset != self.profile.block_size - 1:
            return False
        if index == len(sequence.hashes) and sequence.request.hash_of is not None:
            sequence.hashes.append(sequence.request.hash_of(index))
        return index < len(sequence.hashes) and sequence.hashes[index] == self._awaited

    # --- the end of the step --------------------------------------------------------------------------------

    def _finish_step(self, batch: _Batch, steps: int, duration: float, end: float) -> StepResult:
        decoding = self._ids_decoding()
        finished: list[FinishedRequest] = []
        self._ticks += steps
        self.counters.generation_tokens += len(decoding) * steps
        while self._ends and self._ends[0][0] < self._ticks:
            _, serial, sequence = heapq.heappop(self._ends)
            if sequence.serial == serial:
                finished.append(self._finish(sequence, end))
        first_tokens = [s.request.id for s in batch.computed if not s.emitted]
        resumed = [s.request.id for s in batch.computed if s.emitted]
        for sequence in batch.computed:
            self._emit_after_prefill(sequence, end, finished)
        return StepResult(
            duration=duration,
            steps=steps,
            prefill_tokens=batch.prefill_tokens,
            first_tokens=tuple(first_tokens),
            decoding=decoding,
            resumed=tuple(resumed),
            finished=tuple(finished),
            preempted=tuple(batch.preempted),
            stored=tuple(batch.stored),
            removed=tuple(batch.removed),
        )

    def _emit_after_prefill(self, sequence: _Sequence, end: float, finished: list[FinishedRequest]) -> None:
        request = sequence.request
        if not sequence.emitted:
            sequence.first_token_at = end
            self.counters.prompt_tokens += request.prompt_tokens
            self.counters.cached_tokens += sequence.cached
        sequence.emitted += 1
        self.counters.generation_tokens += 1
        left = request.output_tokens - sequence.emitted
        if not left:
            finished.append(self._finish(sequence, end))
            return
        sequence.base = sequence.computed - self._ticks
        self._base_sum += sequence.base
        self._decoding[request.id] = sequence
        self._decoding_ids = None
        self._watch_block(sequence, sequence.computed)
        heapq.heappush(self._ends, (self._ticks + left - 1, sequence.serial, sequence))

    def _finish(self, sequence: _Sequence, end: float) -> FinishedRequest:
        request = sequence.request
        self._leave_running(sequence)
        self._forget(sequence)
        self.counters.success[request.ends_with] += 1
        return FinishedRequest(
            id=request.id,
            usage=Usage(request.prompt_tokens, request.output_tokens, sequence.cached),
            reason=request.ends_with,
            arrived_at=request.arrived_at,
            queued_at=sequence.queued_at,
            scheduled_at=sequence.scheduled_at,
            first_token_at=sequence.first_token_at,
            finished_at=end,
            preemptions=sequence.preemptions,
        )

    # --- moving a sequence between sets ---------------------------------------------------------------------

    def _enqueue(self, sequence: _Sequence, rank: int) -> None:
        request = sequence.request
        urgent = self._policy is Policy.PRIORITY
        key = (float(request.priority), request.arrived_at, float(rank)) if urgent else (float(rank),)
        sequence.waiting = True
        self._waiting_count += 1
        heapq.heappush(self._waiting, (key, sequence))
        self._stalled = False

    def _leave_running(self, sequence: _Sequence) -> None:
        request = sequence.request
        del self._running[request.id]
        self._prefilling.pop(request.id, None)
        if self._decoding.pop(request.id, None) is not None:
            self._base_sum -= sequence.base
            self._decoding_ids = None
        sequence.serial = -1
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self._stalled = False
        if self.adapters:
            self.adapters.stop(request.lora)

    def _forget(self, sequence: _Sequence) -> None:
        request = sequence.request
        del self._sequences[request.id]
        if request.lora is not None:
            self._lora_requests[request.lora] -= 1
            self._lora_requests += Counter()  # drops what fell to zero

    def _ids_decoding(self) -> tuple[int, ...]:
        if self._decoding_ids is None:
            self._decoding_ids = tuple(self._decoding)
        return self._decoding_ids

    def _snapshot(self) -> Gauges:
        return Gauges(len(self._running), self._waiting_count, self._deferred, self.pool.usage)

    # --- trust, but verify ----------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError when the books disagree. Reads everything; for tests."""
        running = list(self._running.values())
        self.pool.check_integrity(s.blocks for s in running)
        assert [s.serial for s in running] == sorted(s.serial for s in running), "running order"
        assert self._decoding.keys() | self._prefilling.keys() == self._running.keys(), "a running sequence is idle"
        assert not self._decoding.keys() & self._prefilling.keys(), "a sequence decodes and prefills"
        assert list(self._prefilling) in ([], [s.request.id for s in running[-1:]]), "a partial prefill is not last"
        assert self._base_sum == sum(s.base for s in self._decoding.values()), "sum of contexts"
        waiting = [s for s in self._sequences.values() if s.waiting]
        assert len(waiting) == self._waiting_count, "waiting count"
        assert len(waiting) + len(running) == len(self._sequences), "a sequence is nowhere"
        assert all(not s.blocks and s.serial == -1 for s in waiting), "a waiting sequence holds blocks"
        for sequence, computed in self._contexts():
            held = len(sequence.blocks) * self.profile.block_size
            assert held >= computed > held - self.profile.block_size, "blocks and tokens disagree"
        if not self._sequences:
            assert self.pool.usage == 0.0, "an empty engine holds blocks"

    def _contexts(self) -> Iterator[tuple[_Sequence, int]]:
        for sequence in self._running.values():
            decodes = sequence.request.id in self._decoding
            yield sequence, sequence.base + self._ticks if decodes else sequence.computed


def _steps_before(span: float, first: float, growth: float) -> int:
    """Steps that begin within `span` seconds, the one at 0 included; the j-th lasts first + j * growth."""
    if span == math.inf:
        return 1 << 60
    if span <= first:
        return 1
    if growth == 0.0:
        return math.ceil(span / first)
    slope = first / growth - 0.5
    return math.ceil(math.sqrt(slope * slope + 2.0 * span / growth) - slope)
