"""What is asked of a modelled cluster: prompts as chained block hashes, and when they arrive.

Pure. All that a run will ask follows from the generator passed in and never from who serves it: scripts are drawn in
the order in which requests or sessions start. Lengths are tokens, times seconds from the start of the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from picker.sim.cluster import Arrival
from picker.types import NO_BLOCKS, FloatArray, UInt64Array

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# The published Mooncake traces have time stamps on a grid of three seconds.
_TICK = 3.0


class Workload(Protocol):
    """A recipe for arrivals; scenario files give its fields."""

    @property
    def think(self) -> float:
        """No answer leads to a next request sooner than this, in seconds; infinite where none ever does."""
        ...

    def arrivals(
        self, rate: float, block_tokens: int, rng: np.random.Generator, limit: int | None = None
    ) -> Iterator[Arrival]:
        """Arrivals in order of time, at `rate` in the unit of the workload.

        block_tokens: tokens of a hashed block. limit: requests at most, later turns included.
        """
        ...


# --- prompts -------------------------------------------------------------------------------------------------


def mix(a: int, b: int) -> int:
    """One 64-bit hash of two (splitmix64's finaliser)."""
    x = (a + b * _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def _mix_range(a: int, first: int, last: int) -> UInt64Array:
    """`mix(a, i)` for i from `first` up to, not including, `last`."""
    x = np.arange(first, last, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(a)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """A text known by its pieces: each has a key and a length, and equal beginnings have equal block hashes.

    A block is named after the piece that holds its last token and all pieces before it, so a text that goes on keeps
    the blocks it had. tokens: length so far. hashes: (tokens // block_tokens,) of its full blocks.
    """

    block_tokens: int
    tokens: int = 0
    chain: int = 0
    hashes: UInt64Array = field(default_factory=lambda: NO_BLOCKS, repr=False)

    def extended(self, key: int, tokens: int) -> Context:
        """This text and `tokens` more, of the piece called `key`."""
        piece = mix(self.chain, key)
        first, last = self.tokens // self.block_tokens, (self.tokens + tokens) // self.block_tokens
        hashes = np.concatenate([self.hashes, _mix_range(piece, first, last)]) if last > first else self.hashes
        return Context(self.block_tokens, self.tokens + tokens, mix(piece, tokens), hashes)

    def hash_of(self, key: int) -> Callable[[int], int]:
        """Hash of block i once the piece called `key` goes on from here, as the engine asks for it while it writes."""
        piece = mix(self.chain, key)
        return lambda index: mix(piece, index)


# --- times ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bursts:
    """Poisson arrivals that are `factor` times as frequent during bursts (a two-state MMPP).

    on, off: mean seconds of a burst and of the calm between, exponential. The rate given is that of the calm.
    """

    factor: float = 6.0
    on: float = 8.0
    off: float = 32.0

    @property
    def mean(self) -> float:
        """The mean rate, as a multiple of the calm's."""
        return (self.off + self.factor * self.on) / (self.on + self.off)

    def times(self, rate: float, seconds: float, rng: np.random.Generator) -> FloatArray:
        """Ascending arrival times within `seconds`.

        Bursts are drawn before arrivals, and arrivals by operational time, so another rate has the same bursts.
        """
        states = rng.spawn(1)[0]
        edges, work = [0.0], [0.0]
        for bursting in itertools.cycle((False, True)):
            if edges[-1] >= seconds:
                break
            lasts = float(states.exponential(self.on if bursting else self.off))
            edges.append(edges[-1] + lasts)
            work.append(work[-1] + lasts * (self.factor if bursting else 1.0))
        times = np.interp(_unit_poisson(rate * work[-1], rng) / rate, work, edges)
        return times[times < seconds]


def poisson(rate: float, seconds: float, rng: np.random.Generator) -> FloatArray:
    """Ascending arrival times within `seconds`; another rate stretches the same sequence."""
    return _unit_poisson(rate * seconds, rng) / rate


def _unit_poisson(until: float, rng: np.random.Generator) -> FloatArray:
    """Arrivals at one a second before `until`."""
    times: FloatArray = np.empty(0)
    while not times.size or times[-1] < until:
        start = float(times[-1]) if times.size else 0.0
        times = np.concatenate([times, start + np.cumsum(rng.exponential(1.0, 1024))])
    return times[times < until]


# --- single requests -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Groups of prompts that begin alike, as inference-perf's `shared_prefix`: llm-d's B2B workload.

    The groups x prompts are shuffled once and then walked round and round, starting again with each stage: a prompt
    recurs whole, and the walk is the worst case of an LRU cache that does not hold it all. answers are not cached:
    their texts never come back.
    stages: (rate, seconds) each, with `gap` seconds between; the rate is multiplied by the one asked for. Without
    stages there is one of `seconds`, after `warmup` = (rate, seconds) where given.
    """

    groups: int = 150
    prompts: int = 5
    system_tokens: int = 6000
    question_tokens: int = 1200
    output_tokens: int = 1000
    stages: tuple[tuple[float, float], ...] = ()
    gap: float = 30.0
    warmup: tuple[float, float] | None = None
    seconds: float = 60.0
    think: float = float("inf")

    def windows(self, rate: float) -> list[tuple[float, float, float]]:
        """(start, end, rate) of each stage."""
        stages = [(factor * rate, seconds) for factor, seconds in self.stages]
        if not stages:
            stages = [*([self.warmup] if self.warmup else []), (rate, self.seconds)]
        windows, start = [], 0.0
        for each, seconds in stages:
            windows.append((start, start + seconds, float(each)))
            start += seconds + (self.gap if self.stages else 0.0)
        return windows

    def arrivals(
        self, rate: float, block_tokens: int, rng: np.random.Generator, limit: int | None = None
    ) -> Iterator[Arrival]:
        order = rng.permutation(self.groups * self.prompts)
        asked = 0
        for start, end, each in self.windows(rate):
            times = start + poisson(each, end - start, rng)
            for number, at in zip(itertools.cycle(order), times, strict=False):
                if asked == limit:
                    return
                asked += 1
                prompt = self._prompt(int(number), block_tokens)
                yield Arrival(float(at), prompt.tokens, self.output_tokens, prompt.hashes)

    def _prompt(self, number: int, block_tokens: int) -> Context:
        system = Context(block_tokens).extended(number % self.groups, self.system_tokens)
        return system.extended(self.groups + number, self.question_tokens)


@dataclass(frozen=True, slots=True)
class Adapters:
    """Requests for one of many LoRA adapters, each with a system prompt of its own.

    weights: how often each adapter is asked for, relative; or `zipf` over `count` of them.
    """

    count: int = 64
    zipf: float = 1.0
    weights: tuple[float, ...] = ()
    system_tokens: int = 512
    question_tokens: int = 512
    output_tokens: int = 256
    seconds: float = 300.0
    think: float = float("inf")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"adapter-{i}" for i in range(len(self.weights) or self.count))

    def arrivals(
        self, rate: float, block_tokens: int, rng: np.random.Generator, limit: int | None = None
    ) -> Iterator[Arrival]:
        weights = np.array(self.weights or [1.0 / (i + 1) ** self.zipf for i in range(self.count)])
        choices = rng.spawn(1)[0]
        names = self.names
        for number, at in enumerate(poisson(rate, self.seconds, rng)[:limit]):
            adapter = int(choices.choice(len(names), p=weights / weights.sum()))
            system = Context(block_tokens).extended(adapter, self.system_tokens)
            prompt = system.extended(len(names) + number, self.question_tokens)
            yield Arrival(float(at), prompt.tokens, self.output_tokens, prompt.hashes, lora=names[adapter])


class Recorded(Protocol):
    """One request of a trace; blocks: ids of its prompt's blocks, equal for equal prefixes, or None if unknown."""

    @property
    def at(self) -> float: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def blocks(self) -> tuple[int, ...] | None: ...


@dataclass(frozen=True, slots=True)
class Replay:
    """A recorded trace, `rate` times as fast. trace_block_tokens: tokens of the blocks that it names.

    Time stamps that all lie on a grid of three seconds are spread over their tick, in the order of the file: replayed
    raw, ten requests would come at once every three seconds.
    """

    requests: Sequence[Recorded] = field(repr=False)
    trace_block_tokens: int = 512
    think: float = float("inf")

    def arrivals(
        self, rate: float, block_tokens: int, rng: np.random.Generator, limit: int | None = None
    ) -> Iterator[Arrival]:
        times = self._times(rng)
        order = np.argsort(times, kind="stable")[:limit]
        for i in order:
            request = self.requests[i]
            at = float(times[i] - times[order[0]]) / rate
            hashes = self._hashes(request, int(i), block_tokens)
            yield Arrival(at, request.prompt_tokens, max(1, request.output_tokens), hashes)

    def _times(self, rng: np.random.Generator) -> FloatArray:
        ticks = np.array([request.at for request in self.requests])
        if len(ticks) < 2 or np.any(np.abs(ticks / _TICK - np.round(ticks / _TICK)) > 1e-9):
            return ticks
        times = ticks + rng.uniform(0.0, _TICK, len(ticks))
        spread = np.empty_like(times)
        spread[np.argsort(ticks, kind="stable")] = times[np.lexsort((times, ticks))]
        return spread

    def _hashes(self, request: Recorded, number: int, block_tokens: int) -> UInt64Array:
        if request.blocks is None:
            return Context(block_tokens).extended(-1 - number, request.prompt_tokens).hashes
        if block_tokens == self.trace_block_tokens:
            return _mix_ids(request.blocks[: request.prompt_tokens // block_tokens])
        context, left = Context(block_tokens), request.prompt_tokens
        for block in request.blocks:
            context = context.extended(block, min(left, self.trace_block_tokens))
            left -= self.trace_block_tokens
        return context.hashes


def _mix_ids(blocks: Sequence[int]) -> UInt64Array:
    """A trace's ids are chained already; mixing spreads them over 64 bits."""
    x = (np.array(blocks, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    return x ^ (x >> np.uint64(27))
