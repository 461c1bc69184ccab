"""Requests that follow one another: sessions of several turns, and a closed loop of questions about documents.

A next turn is the previous prompt, the answer that came, and what the user adds. Scripts are drawn when a session
starts, in the order of starts, so that every policy meets the same sessions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from picker.sim.cluster import Arrival
from picker.sim.workload import Bursts, Context, poisson

_SYSTEM = 1
# Keys of a session: its number, then what it is within the session.
_PER_SESSION = 1 << 20


class Draw(Protocol):
    """A distribution of scenario files: the value of the next draw."""

    def __call__(self, rng: np.random.Generator) -> float: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    value: float

    def __call__(self, rng: np.random.Generator) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Uniform:
    low: float
    high: float

    def __call__(self, rng: np.random.Generator) -> float:
        return float(rng.uniform(self.low, self.high))


@dataclass(frozen=True, slots=True)
class Normal:
    """Clipped to [low, high]."""

    mean: float
    sd: float
    low: float = 0.0
    high: float = float("inf")

    def __call__(self, rng: np.random.Generator) -> float:
        return min(max(float(rng.normal(self.mean, self.sd)), self.low), self.high)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """By mean and standard deviation of the value itself, before it is clipped to [low, high]."""

    mean: float
    sd: float
    low: float = 0.0
    high: float = float("inf")

    def __call__(self, rng: np.random.Generator) -> float:
        variance = np.log1p((self.sd / self.mean) ** 2)
        value = float(rng.lognormal(np.log(self.mean) - variance / 2, np.sqrt(variance)))
        return min(max(value, self.low), self.high)


@dataclass(frozen=True, slots=True)
class OneOrMore:
    """1 with probability `single`, else 2 plus a geometric number of `more` on average."""

    single: float
    more: float

    def __call__(self, rng: np.random.Generator) -> float:
        alone, extra = rng.random() < self.single, rng.geometric(1.0 / (1.0 + self.more)) - 1
        return 1.0 if alone else 2.0 + float(extra)


DRAWS = {
    "fixed": Fixed,
    "uniform": Uniform,
    "normal": Normal,
    "lognormal": LogNormal,
    "one-or-more": OneOrMore,
}


@dataclass(frozen=True, slots=True)
class _Turn:
    question: int
    output: int
    pause: float  # before it


@dataclass(frozen=True, slots=True)
class Sessions:
    """Sessions that start at `rate` a second, open loop, whatever becomes of the others.

    Every prompt begins with the same `system_tokens`, then the session's own context. turns: requests of a session.
    question, output: tokens of each turn. pause: seconds from the end of an answer to the next turn, never below
    `think`. bursts: how starts are spaced; None: Poisson. seconds: nothing arrives later, so a session may end early.
    """

    turns: Draw
    context: Draw
    question: Draw
    output: Draw
    pause: Draw
    system_tokens: int = 1000
    think: float = 0.0
    seconds: float = 600.0
    bursts: Bursts | None = None
    max_prompt: float = float("inf")

    def arrivals(
        self, rate: float, block_tokens: int, rng: np.random.Generator, limit: int | None = None
    ) -> Iterator[Arrival]:
        scripts, left = rng.spawn(1)[0], limit
        system = Context(block_tokens).extended(_SYSTEM, self.system_tokens)
        times = self.bursts.times(rate, self.seconds, rng) if self.bursts else poisson(rate, self.seconds, rng)
        for number, at in enumerate(times, start=1):
            own = max(1, round(self.context(scripts)))
            turns = self._script(scripts)[:left]
            if left is not None:
                left -= len(turns)
            if not turns:
                return
            first = system.extended(number * _PER_SESSION, own)
            yield self._turn(number, 0, float(at), first, turns)

    def _script(self, rng: np.random.Generator) -> tuple[_Turn, ...]:
        return tuple(
            _Turn(
                question=max(1, round(self.question(rng))),
                output=max(1, round(self.output(rng))),
                pause=max(self.think, self.pause(rng)),
            )
            for _ in range(max(1, round(self.turns(rng))))
        )

    def _turn(self, number: int, turn: int, at: float, history: Context, turns: Sequence[_Turn]) -> Arrival:
        """Turn number `turn` of the session; history: all that was said before it."""
        key = number * _PER_SESSION + 2 * turn
        this, prompt = turns[turn], history.extended(key + 1, turns[turn].question)

        def then(ended_at: float) -> Arrival | None:
            if turn + 1 == len(turns) or ended_at + turns[turn + 1].pause >= self.seconds:
                return None
            following = prompt.extended(key + 2, this.output)
            if following.tokens + turns[turn + 1].question + turns[turn + 1].output > self.max_prompt:
                return None
            return self._turn(number, turn + 1, ended_at + turns[turn + 1].pause, following, turns)

        return Arrival(
            at=at,
            prompt_tokens=prompt.tokens,
            output_tokens=this.output,
            block_hashes=prompt.hashes,
            hash_of=prompt.hash_of(key + 2),
            session=f"session-{number}",
            then=then,
        )


@dataclass(slots=True)
class _Loop:
    """Which conversation the next free user takes."""

    documents: Iterator[int]
    left: int
    taken: int = 0


@dataclass(frozen=True, slots=True)
class Documents:
    """A closed loop about private documents: `rate` x `users` users, each at most one request in flight.

    A user takes the next conversation, asks its `questions` one after the other at once, then takes the next. Each
    conversation is about one of `documents` texts of `document_tokens`: in an order shuffled once and walked round, or
    with `zipf` drawn by Zipf's law. requests: how many are asked in all.
    """

    documents: int = 96
    document_tokens: int = 48_000
    questions: int = 6
    question_tokens: int = 256
    output_tokens: int = 256
    users: int = 64
    zipf: float | None = None
    requests: int = 3000
    think: float = 0.0
    spread: float = 5.0  # seconds over which the users begin

    def arrivals(
        self, rate: float, block_tokens: int, rng: np.random.Generator, limit: int | None = None
    ) -> Iterator[Arrival]:
        loop = _Loop(self._order(rng.spawn(1)[0]), left=min(self.requests, limit or self.requests))
        starts = np.sort(rng.uniform(0.0, self.spread, max(1, round(self.users * rate))))
        for at in starts:
            first = self._conversation(float(at), block_tokens, loop)
            if first is not None:
                yield first

    def _order(self, rng: np.random.Generator) -> Iterator[int]:
        if self.zipf is None:
            yield from itertools.cycle(rng.permutation(self.documents).tolist())
            return
        weights = 1.0 / np.arange(1, self.documents + 1) ** self.zipf
        while True:
            yield from rng.choice(self.documents, size=1024, p=weights / weights.sum()).tolist()

    def _conversation(self, at: float, block_tokens: int, loop: _Loop) -> Arrival | None:
        questions = min(self.questions, loop.left)
        if not questions:
            return None
        loop.left -= questions
        loop.taken += 1
        document = Context(block_tokens).extended(next(loop.documents), self.document_tokens)
        return self._ask(at, document, loop, (loop.taken, questions))

    def _ask(self, at: float, history: Context, loop: _Loop, place: tuple[int, int]) -> Arrival:
        """place: number of the conversation, and how many of its questions are left, this one included."""
        number, left = place
        key = number * _PER_SESSION + 2 * left
        prompt = history.extended(key, self.question_tokens)

        def then(ended_at: float) -> Arrival | None:
            if left == 1:
                return self._conversation(ended_at, history.block_tokens, loop)
            following = prompt.extended(key + 1, self.output_tokens)
            return self._ask(ended_at, following, loop, (number, left - 1))

        return Arrival(
            at=at,
            prompt_tokens=prompt.tokens,
            output_tokens=self.output_tokens,
            block_hashes=prompt.hashes,
            hash_of=prompt.hash_of(key + 1),
            session=f"conversation-{number}",
            then=then,
        )
