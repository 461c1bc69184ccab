"""Whether the simulator can be believed: published measurements and queueing theory beside what it makes of them.

The figures and their sources are in `validation.toml`; `sim.ladder` runs the studies. Pure: a case is a function of its
seeds, and of the trace where it needs one. Judges, and never tunes anything.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from types import MappingProxyType

import numpy as np

from picker.sim import latency
from picker.sim.blocks import BlockPool
from picker.sim.bounds import CentralQueue, infinite_hit_ratio, lru_hit_ratio, min_hit_ratio
from picker.sim.capacity import OnlyOne
from picker.sim.cluster import Arrival, Cluster, Outcome, Timing
from picker.sim.engine import Engine, EngineRequest
from picker.sim.ladder import climb, ladders, measurements, send_times
from picker.sim.workload import Context, Recorded, Replay
from picker.types import NO_BLOCKS, FloatArray

LADDER_ALLOWED, DECODING_ALLOWED, SAME_ARRIVALS_ALLOWED = 0.15, 0.03, 0.002
TRACE_BLOCK_TOKENS = 512
# The published ratio counts partial last blocks, which are 0.0003 of the tokens and never cached, and has three digits.
_PARTIAL_BLOCKS_ALLOWED = 0.002
# Student's t, two-sided 99 %, by the number of seeds; between them the next smaller one, which is wider.
_T99 = {2: 63.657, 3: 9.925, 4: 5.841, 5: 4.604, 6: 4.032, 8: 3.499, 10: 3.250, 15: 2.977, 20: 2.861, 30: 2.756}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. low, high: over the seeds, or the confidence interval of the mean.

    allowed: how far the ratio may be from 1. None: the published value has to lie within low and high.
    """

    case: str
    figure: str
    published: float
    modelled: float
    low: float
    high: float
    allowed: float | None

    @property
    def ratio(self) -> float:
        return self.modelled / self.published if self.published else math.nan

    @property
    def ok(self) -> bool:
        if self.allowed is None:
            return self.low <= self.published <= self.high
        return abs(self.modelled - self.published) <= self.allowed * abs(self.published)


def _over_seeds(case: str, figure: str, published: float, values: Sequence[float], allowed: float) -> Row:
    return Row(case, figure, published, fmean(values), min(values), max(values), allowed)


# --- ladders of rates --------------------------------------------------------------------------------------------


def compare_ladder(name: str, run_name: str, seeds: Iterable[int]) -> list[Row]:
    """Rows of one run: output of each stage, its mean over the ladder, and TTFT p90 where published."""
    ladder = ladders()[name]
    run, case = ladder.runs[run_name], f"{name}/{run_name}"
    climbs = [climb(ladder, run, seed) for seed in seeds]
    rows = []
    for stage, rate in enumerate(ladder.rates):
        output = [climbed[stage].output for climbed in climbs]
        rows.append(_over_seeds(case, f"out tok/s @{rate:g}", run.output[stage], output, LADDER_ALLOWED))
        if run.ttft_p90:
            p90 = [climbed[stage].ttft_p90 for climbed in climbs]
            rows.append(_over_seeds(case, f"TTFT p90 s @{rate:g}", run.ttft_p90[stage], p90, LADDER_ALLOWED))
    # A mean of part of the ladder says nothing of it: then only a published mean counts.
    published = fmean(run.output) if math.isnan(run.output_mean) else run.output_mean
    means = [fmean(stage.output for stage in climbed) for climbed in climbs]
    rows.append(_over_seeds(case, "out tok/s, mean of stages", published, means, LADDER_ALLOWED))
    return [row for row in rows if not math.isnan(row.published)]


# --- decoding ----------------------------------------------------------------------------------------------------


def compare_decoding() -> list[Row]:
    """Inter-token latency of sequences that decode together, their prompts being prefilled before the first gap."""
    table = measurements()["decoding"]
    profile = replace(latency.profile(table["profile"]), max_num_seqs=max(table["sequences"]), noise_sd=0.0)
    rows = []
    for sequences, published in zip(table["sequences"], table["itl_ms"], strict=True):
        itl_ms = 1e3 * inter_token_latency(profile, sequences, table["prompt_tokens"], table["output_tokens"])
        rows.append(_over_seeds("decoding", f"ITL ms, {sequences} sequences", published, [itl_ms], DECODING_ALLOWED))
    return rows


def inter_token_latency(profile: latency.Profile, sequences: int, prompt_tokens: int, output_tokens: int) -> float:
    """Mean gap between tokens, in seconds, of a wave of `sequences` whose prompts are cached but for a block.

    Gaps begin when the whole wave decodes.
    """
    engine = Engine(profile)
    now, spent, gaps = 0.0, 0.0, 0
    hashes = tuple(range(1, prompt_tokens // profile.block_size + 1))
    # One sequence seats the prompt; the wave shares its blocks.
    engine.add(EngineRequest(0, prompt_tokens, 1, hashes), now)
    while (result := engine.step(now)) is not None:
        now += result.duration
    for number in range(1, sequences + 1):
        engine.add(EngineRequest(number, prompt_tokens, output_tokens, hashes), now)
    while (result := engine.step(now)) is not None:
        now += result.duration
        if len(result.decoding) == sequences:
            spent, gaps = spent + result.duration, gaps + result.steps
    return spent / gaps


def compare_demo() -> list[Row]:
    """The same measurement re-enacted: an open loop on one pod, prompts cached, prefill between the decode steps."""
    table = measurements()["decoding"]
    profile = replace(latency.profile(table["profile"]), max_num_seqs=table["max_num_seqs"])
    groups, users = table["groups"], table["prompts"]
    systems = [Context(profile.block_size).extended(group, table["system_tokens"]) for group in range(groups)]
    question = table["prompt_tokens"] - table["system_tokens"]
    prompts = [systems[n % groups].extended(groups + n, question) for n in range(groups * users)]
    rows = []
    for rate, published in zip(table["rates"], table["decode_s"], strict=True):
        times = send_times(rate, table["seconds"], np.random.default_rng([1, 6]), poisson=False)
        asked = (
            Arrival(at, prompt.tokens, table["output_tokens"], prompt.hashes)
            for prompt, at in zip(itertools.cycle(prompts), times.tolist(), strict=False)
        )
        engine = Engine(profile, name="pod-0", noise=np.random.default_rng([1, 7]))
        outcomes = Cluster(OnlyOne(), [engine], timing=Timing(think=math.inf)).run(asked)
        decode = fmean(outcome.ended_at - outcome.first_token_at for outcome in outcomes)
        rows.append(_over_seeds("decoding-demo", f"decode s @{rate:g}", published, [decode], LADDER_ALLOWED))
    return rows


# --- queueing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """M/M/c: `servers` of one request at a time and a mean service of one second, busy for `load` of the time.

    tick: seconds of one engine step; services are whole steps. skip: the first so many requests of a seed do not count.
    """

    servers: int = 4
    load: float = 0.8
    requests: int = 5_000
    skip: int = 500
    tick: float = 0.002

    @property
    def expected_wait(self) -> float:
        """Mean wait in seconds, by Erlang's C formula."""
        offered = self.servers * self.load
        terms = [offered**k / math.factorial(k) for k in range(self.servers)]
        last = offered**self.servers / math.factorial(self.servers) / (1.0 - self.load)
        waits = last / (sum(terms) + last)
        return waits / (self.servers * (1.0 - self.load))

    def arrivals(self, seed: int, service: Callable[[np.random.Generator, int], FloatArray]) -> list[Arrival]:
        rng = np.random.default_rng([seed, 5])
        times = np.cumsum(rng.exponential(1.0 / (self.servers * self.load), self.requests))
        steps = np.maximum(1, np.rint(service(rng, self.requests) / self.tick)).astype(int)
        return [Arrival(at, 1, n, NO_BLOCKS) for at, n in zip(times.tolist(), steps.tolist(), strict=True)]

    def profile(self, slots: int) -> latency.Profile:
        """A pod whose steps take one tick, whatever is in them, with `slots` places; memory is no limit."""
        size = 1 << 20
        return latency.Profile(
            name="server",
            source="",
            c0=self.tick,
            c_pf=0.0,
            c_attn=0.0,
            c_kv=0.0,
            c_seq=0.0,
            front_end_s=0.0,
            front_end_per_token_s=0.0,
            kv_tokens=size * 2 * (slots + 1),
            block_size=size,
            max_num_seqs=slots,
        )

    def wait(self, outcomes: Sequence[Outcome]) -> float:
        """Mean seconds before service: the first token comes with its first tick."""
        return fmean(outcome.ttft - self.tick for outcome in outcomes[self.skip :])


def exponential(rng: np.random.Generator, count: int) -> FloatArray:
    """Services of one second on average."""
    return rng.exponential(1.0, count)


Service = Callable[[np.random.Generator, int], FloatArray]
_NO_DELAY = Timing(gateway=0.0, response=0.0, scrape_interval=3600.0, think=math.inf)


def wait_in_engine(line: Line, seed: int, service: Service = exponential) -> float:
    """The servers are one engine's slots, the line is its queue."""
    engine = Engine(line.profile(line.servers), name="pod-0")
    return line.wait(Cluster(OnlyOne(), [engine], timing=_NO_DELAY).run(line.arrivals(seed, service)))


def wait_at_router(line: Line, seed: int, service: Service = exponential) -> float:
    """The servers are engines of one slot each, the line is a router's central queue."""
    profile = line.profile(1)
    engines = [Engine(profile, name=f"pod-{i}") for i in range(line.servers)]
    queue = CentralQueue({engine.name: profile for engine in engines}, BlockPool(2), 0.0)
    return line.wait(Cluster(queue, engines, timing=_NO_DELAY).run(line.arrivals(seed, service)))


def wait_by_recursion(line: Line, seed: int, service: Service = exponential) -> float:
    """The same from the arrivals alone: whoever is first takes the server that is free first (Kiefer and Wolfowitz)."""
    free, waits = [0.0] * line.servers, []
    for arrival in line.arrivals(seed, service):
        begins = max(arrival.at, free[0])
        waits.append(begins - arrival.at)
        heapq.heapreplace(free, begins + arrival.output_tokens * line.tick)
    return fmean(waits[line.skip :])


def compare_wait(case: str, line: Line, waits: Sequence[float]) -> Row:
    """Mean wait over seeds with its 99 % interval, which Erlang's value has to lie in."""
    half = _T99[max(n for n in _T99 if n <= len(waits))] * stdev(waits) / math.sqrt(len(waits))
    mean = fmean(waits)
    figure = f"mean wait s, c={line.servers}, load {line.load:g}"
    return Row(case, figure, line.expected_wait, mean, mean - half, mean + half, None)


# --- hits --------------------------------------------------------------------------------------------------------


def cached_tokens(requests: Sequence[Recorded], blocks: int) -> list[int]:
    """Cached tokens that an engine of `blocks` KV blocks reports of each request, served alone to its end."""
    size = TRACE_BLOCK_TOKENS
    engine = Engine(replace(latency.profile("qwen3-32b-2xh100"), block_size=size, kv_tokens=size * blocks))
    cached, now = [], 0.0
    for number, request in enumerate(requests):
        hashes = (request.blocks or ())[: request.prompt_tokens // size]
        engine.add(EngineRequest(number, request.prompt_tokens, max(1, request.output_tokens), hashes), now)
        while (result := engine.step(now, math.inf)) is not None:
            now += result.duration
            cached += [finished.usage.cached_tokens or 0 for finished in result.finished]
    return cached


class FreeQueue:
    """vLLM's KV cache for one request at a time, by its documentation alone: it shares no code with `sim.blocks`.

    All blocks but the null block are in one queue between requests; a request takes its hits out of it, the rest from
    the front, and gives all back at the rear, its tail first. Blocks without a hash go back to the front.
    """

    def __init__(self, blocks: int) -> None:
        self._free: OrderedDict[int, int | None] = OrderedDict((number, None) for number in range(1, blocks))
        self._holders: dict[int, list[int]] = {}

    def serve(self, prompt_tokens: int, output_tokens: int, hashes: Sequence[int]) -> int:
        """Returns the cached tokens. hashes: of the prompt's full blocks; the last token is never taken from cache."""
        size = TRACE_BLOCK_TOKENS
        usable = hashes[: (prompt_tokens - 1) // size]
        held = [self._holders[h][0] for h in itertools.takewhile(self._holders.__contains__, usable)]
        hits = len(held)
        for number in held:
            del self._free[number]
        while len(held) * size < prompt_tokens + output_tokens - 1:
            held.append(self._take())
        for number, block_hash in list(zip(held, hashes, strict=False))[hits:]:
            self._holders.setdefault(block_hash, []).append(number)
        for index in range(len(held) - 1, -1, -1):
            self._free[held[index]] = hashes[index] if index < len(hashes) else None
            self._free.move_to_end(held[index], last=index < len(hashes))
        return hits * size

    def _take(self) -> int:
        number, block_hash = self._free.popitem(last=False)
        if block_hash is not None:
            self._holders[block_hash].remove(number)
            if not self._holders[block_hash]:
                del self._holders[block_hash]
        return number


def compare_engine_hits(requests: Sequence[Recorded], blocks: int) -> list[Row]:
    """Every request's cached tokens, and their sum, against `FreeQueue`: exactly."""
    reported, queue = cached_tokens(requests, blocks), FreeQueue(blocks)
    expected = [
        queue.serve(r.prompt_tokens, max(1, r.output_tokens), (r.blocks or ())[: r.prompt_tokens // TRACE_BLOCK_TOKENS])
        for r in requests
    ]
    agree = sum(a == b for a, b in zip(reported, expected, strict=True))
    case = f"hits/engine-{blocks}"
    return [
        _over_seeds(case, "requests that agree", len(requests), [agree], 0.0),
        _over_seeds(case, "cached tokens", sum(expected), [sum(reported)], 0.0),
    ]


def compare_bounds(requests: Sequence[Recorded], blocks: Iterable[int]) -> list[Row]:
    """The hit ratios of `sim.bounds` against recounts from the file's own ids."""
    arrivals = list(Replay(requests).arrivals(1.0, TRACE_BLOCK_TOKENS, np.random.default_rng(0)))
    # De-quantising spreads requests within their tick and keeps their order.
    ids = [(r.prompt_tokens, (r.blocks or ())[: r.prompt_tokens // TRACE_BLOCK_TOKENS]) for r in requests]
    infinite = infinite_hit_ratio(arrivals, TRACE_BLOCK_TOKENS)
    rows = [_ratio_row("infinite", recount(ids, math.inf), infinite)]
    whole = measurements()["trace"]
    if len(requests) == whole["requests"]:
        rows.append(
            _over_seeds(
                "hits/bounds", "hit ratio, infinite, published", whole["infinite"], [infinite], _PARTIAL_BLOCKS_ALLOWED
            )
        )
    for size in blocks:
        rows.append(_ratio_row(f"LRU {size}", recount(ids, size), lru_hit_ratio(arrivals, TRACE_BLOCK_TOKENS, size)))
        best = min_hit_ratio(arrivals, TRACE_BLOCK_TOKENS, size)
        rows.append(_ratio_row(f"MIN {size}", recount(ids, size, clairvoyant=True), best))
    return rows


def _ratio_row(figure: str, published: float, modelled: float) -> Row:
    return _over_seeds("hits/bounds", f"hit ratio, {figure}", published, [modelled], 1e-12)


def recount(prompts: Sequence[tuple[int, Sequence[int]]], blocks: float, *, clairvoyant: bool = False) -> float:
    """Hit ratio in tokens of one cache of `blocks`: keep those of latest use, or clairvoyantly those of nearest next.

    prompts: (tokens, block ids). Slow and plain: after each request all that is held is ranked anew.
    """
    upcoming = _upcoming(prompts)
    held: dict[int, tuple[float, int]] = {}  # block -> rank, least kept
    cached = 0
    for now, (tokens, ids) in enumerate(prompts):
        cached += min(tokens, TRACE_BLOCK_TOKENS * sum(1 for _ in itertools.takewhile(held.__contains__, ids)))
        for depth, block in enumerate(ids):
            use = upcoming[block][-1] if clairvoyant else -now
            held[block] = (use, depth)
            upcoming[block].pop()
        if clairvoyant:
            held = {block: rank for block, rank in held.items() if rank[0] < math.inf}
        if len(held) > blocks:
            kept = heapq.nsmallest(int(blocks), held.items(), key=lambda item: item[1])
            held = dict(kept)
    return cached / sum(tokens for tokens, _ in prompts)


def _upcoming(prompts: Sequence[tuple[int, Sequence[int]]]) -> dict[int, list[float]]:
    """Block -> the numbers of the prompts that use it after its first, latest first, and infinity before them."""
    uses: dict[int, list[float]] = {}
    for number in range(len(prompts) - 1, -1, -1):
        for block in prompts[number][1]:
            uses.setdefault(block, [math.inf]).append(number)
    for numbers in uses.values():
        numbers.pop()
    return uses


# --- cases -------------------------------------------------------------------------------------------------------

Case = Callable[[int, Sequence[Recorded] | None], list[Row]]
"""(seeds, the conversation trace or None where it is absent) -> rows."""


def _waits(case: str, line: Line, wait: Callable[[Line, int], float]) -> Case:
    def compare(seeds: int, trace: Sequence[Recorded] | None) -> list[Row]:
        # An interval of a few seeds is too wide to say anything, and these runs are quick.
        numbers = range(1, max(seeds, 20) + 1)
        waits = [wait(line, seed) for seed in numbers]
        exact = fmean(wait_by_recursion(line, seed) for seed in numbers)
        same = f"mean wait s of the same arrivals, c={line.servers}"
        return [
            compare_wait(case, line, waits),
            Row(case, same, exact, fmean(waits), min(waits), max(waits), SAME_ARRIVALS_ALLOWED),
        ]

    return compare


def _climbs(name: str, run: str) -> Case:
    return lambda seeds, _: compare_ladder(name, run, range(1, seeds + 1))


def _hits(seeds: int, trace: Sequence[Recorded] | None) -> list[Row]:
    if trace is None:
        return []
    return [*compare_engine_hits(trace, 600), *compare_engine_hits(trace, 2400), *compare_bounds(trace, (600, 2400))]


@functools.cache
def cases() -> Mapping[str, Case]:
    """All comparisons by name, the quick ones first."""
    climbs = {f"{name}/{run}": _climbs(name, run) for name, ladder in ladders().items() for run in ladder.runs}
    return MappingProxyType(
        {
            "decoding": lambda seeds, trace: compare_decoding(),
            "decoding-demo": lambda seeds, trace: compare_demo(),
            "queue-in-engine": _waits("queue-in-engine", Line(), wait_in_engine),
            "queue-at-router": _waits("queue-at-router", Line(requests=3_000, skip=500, tick=0.02), wait_at_router),
            "hits": _hits,
            **climbs,
        }
    )
