"""What the pool's own behaviour has taught: how long work takes, how fast each endpoint is, how much work comes.

Two linear models hold for the pool as a whole, after the step model of continuous batching: seconds of prefill by
uncached tokens and attention, seconds of a decode step by the sequences in it and their context. Each endpoint has a
factor on top of either, so that a mixed pool needs no constant from anybody.

What is fitted is what a sample would have taken at the mean speed: where long prompts go to slow endpoints and short
ones to fast, the raw seconds make length look dear and the slow ones fast.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import TypeVar

import msgspec
import numpy as np

from picker.core.estimate import Ratio
from picker.core.regress import Regression
from picker.types import FloatArray, Int64Array

Amount = TypeVar("Amount", float, FloatArray)

_MEMORY_S = 60.0  # of arrival rates
_BUSIEST = 0.95
SAME_STEP_S = 0.002  # first tokens closer than this came from one engine step

# Where learning starts: about Llama-3.1-70B on four H100. Four times off either way did no lasting harm in simulation.
_PREFILL = np.array([0.02, 60e-6, 1e-9, 8e-6])  # s; s/token; s/token^2; s/token of an idle engine's front end
_PREFILL_SIZES = np.array([1.0, 4000.0, 2e7, 4000.0])
_DECODE = np.array([0.015, 50e-6, 20e-9])  # s; s/sequence; s/token of context
_DECODE_SIZES = np.array([1.0, 20.0, 200_000.0])


class FirstTokenSample(msgspec.Struct, frozen=True, gc=False):
    """How long a first token took since the one before it, or since its booking; tokens as expected at booking."""

    row: int
    seconds: float
    uncached: float
    prompt: float
    was_idle: bool


class _Step(msgspec.Struct, gc=False):
    """An engine step that brought first tokens: what it computed, as features of the prefill model, and its time."""

    features: tuple[float, ...]
    seconds: float


class Factors:
    """How fast each row is relative to the pool: 1 is as fast. Small deviations count as noise, not as speed.

    prior: how much of what is expected, in the unit of the samples, the belief that all are alike weighs. even: what
    `value` is, this very array, while nobody stands out.
    """

    def __init__(self, rows: int, *, prior: float, dead_band: float, keep: float = 0.98) -> None:
        self._prior, self._dead_band, self._keep = prior, dead_band, keep
        self._expected = [0.0] * rows
        self._took = [0.0] * rows
        self._logs = np.zeros(rows)  # of speed, by row, before they are centred
        self._seen = np.zeros(rows, dtype=bool)
        self._value = np.ones(rows)
        self._sum, self._count = 0.0, 0  # of the logs, and of the rows seen
        self._widest = 0.0  # none of the logs is further from zero
        self.even = self._value
        self._stale = False

    def add(self, row: int, *, expected: float, took: float) -> None:
        """A sample that should have taken `expected` took `took`; one sample moves nothing very far."""
        took = min(max(took, expected / 8.0), expected * 8.0)
        self._expected[row] = self._expected[row] * self._keep + expected
        self._took[row] = self._took[row] * self._keep + took
        self._note(row)

    def forget(self, row: int) -> None:
        self._expected[row] = self._took[row] = 0.0
        self._note(row)

    def sums(self, row: int) -> tuple[float, float]:
        """What its samples should have taken, and what they took, the older the less."""
        return self._expected[row], self._took[row]

    def learn(self, row: int, sums: tuple[float, float]) -> None:
        """Take somebody else's sums for ours if they rest on more."""
        if sums[0] > self._expected[row]:
            self._expected[row], self._took[row] = sums
            self._note(row)

    def grow(self, rows: int) -> None:
        extra = rows - len(self._took)
        self._expected += [0.0] * extra
        self._took += [0.0] * extra
        self._logs = np.concatenate([self._logs, np.zeros(extra)])
        self._seen = np.concatenate([self._seen, np.zeros(extra, dtype=bool)])
        self.even = np.ones(rows)
        self._stale = True

    @property
    def value(self) -> FloatArray:
        """(rows,) factors; replaced, not written, on change."""
        if self._stale:
            self._update()
        return self._value

    def of(self, row: int) -> float:
        """The factor of one row, without those of the others being worked out."""
        log = self._logs.item(row) - self._sum / max(self._count, 1)
        return math.exp(log) if self._seen.item(row) and abs(log) >= self._dead_band else 1.0

    def _note(self, row: int) -> None:
        # Every row's factor follows from this one's, but nobody looks before the next decision.
        seen, before = self._took[row] > 0, self._logs.item(row)
        log = math.log((self._expected[row] + self._prior) / (self._took[row] + self._prior))
        self._count += int(seen) - int(self._seen.item(row))
        self._sum += log - before
        self._seen[row], self._logs[row] = seen, log
        self._widest = max(self._widest, abs(log))
        self._stale = True

    def _update(self) -> None:
        self._stale = False
        self._value = self.even
        if 2.0 * self._widest < self._dead_band:  # so is their mean, and nobody is that far from it
            return
        self._widest = float(np.abs(self._logs).max())
        self._sum = float(self._logs.sum())  # without what has gathered of rounding
        logs = self._logs - self._sum / max(self._count, 1)
        apart = self._seen & (np.abs(logs) >= self._dead_band)
        if np.count_nonzero(apart):
            self._value = np.exp(logs, out=np.ones(logs.size), where=apart)


class Learned:
    """Everything learned but the prefix index. The scheduler is the only writer."""

    def __init__(self, rows: int) -> None:
        self.prefill = Regression(_PREFILL, _PREFILL_SIZES)
        self.decode = Regression(_DECODE, _DECODE_SIZES)
        self.prefill_speed = Factors(rows, prior=1.0, dead_band=0.10)  # of a second
        self.decode_speed = Factors(rows, prior=4.0, dead_band=0.06)  # of a stream
        self.output_tokens = Ratio(256.0, prior_weight=4.0, keep=1.0 - 1.0 / 256.0)
        self._tied = Ratio(0.0, prior_weight=20.0, keep=1.0 - 1.0 / 256.0)
        self._arrivals = _Rate()
        self._work = _Rate()
        self._open: dict[int, _Step] = {}  # by row: the latest, to which more may still belong

    def grow(self, rows: int) -> None:
        self.prefill_speed.grow(rows)
        self.decode_speed.grow(rows)

    def forget(self, row: int) -> None:
        self.prefill_speed.forget(row)
        self.decode_speed.forget(row)
        self._open.pop(row, None)

    # prefill

    def work(self, uncached: Amount, prompt: float) -> Amount:
        """Seconds of prefill at the pool's mean speed: tokens through the weights, and attention to what is before."""
        _, token, attention, _ = self.prefill.costs
        seconds: Amount = uncached * (token + attention * (prompt - uncached / 2.0))
        return seconds

    def first_token(self, sample: FirstTokenSample, *, merged: bool) -> None:
        """A first token came; merged: in the same step as the endpoint's one before, which has taken all the time.

        A step is learned from when the next one is known to be another.
        """
        u, whole = sample.uncached, sample.prompt
        features = (1.0, u, u * (whole - u / 2.0), whole if sample.was_idle else 0.0)
        step = self._open.get(sample.row)
        if merged:
            if step is not None:
                step.features = (1.0, *map(operator.add, step.features[1:], features[1:]))
            return
        self._open[sample.row] = _Step(features, sample.seconds)
        if step is not None:
            self.prefill.add(step.features, step.seconds * self.prefill_speed.of(sample.row))
            self.prefill_speed.add(sample.row, expected=self.prefill(step.features), took=step.seconds)

    # decode

    def step(self, decodes: FloatArray | Int64Array, context: FloatArray) -> FloatArray:
        """Seconds of a decode step on an endpoint of factor 1."""
        fixed, sequence, token = self.decode.costs
        seconds: FloatArray = fixed + sequence * decodes + token * context
        return seconds

    @property
    def step_floor(self) -> float:
        """Seconds of a step that does nothing."""
        return self.decode.costs[0]

    def finished(self, row: int, *, seconds: float, tokens: int, decodes: float, context: float) -> None:
        """A stream of `tokens` steps took so many seconds beside the prefills, in company of so many on average."""
        per_step = seconds / tokens
        features = (1.0, decodes, context)
        self.decode.add(features, per_step * self.decode_speed.of(row))
        expected = self.decode(features)
        if expected > 0:
            # Every stream weighs the same: in seconds, those of a fast model would never outweigh the prior.
            self.decode_speed.add(row, expected=1.0, took=per_step / expected)

    # load

    def booked(self, seconds: float, *, tied: bool, now: float) -> None:
        """A request was routed that brings so much prefill. tied: most of its prompt is cached where it went."""
        self._tied.add(float(tied), 1.0)
        self._arrivals.add(1.0, now)
        self._work.add(seconds, now)

    @property
    def tied(self) -> float:
        """The share of requests that go where most of their prompt is cached: the next one of these goes there, too."""
        return self._tied.value

    @property
    def ratios(self) -> dict[str, Ratio]:
        """By the names that replicas use."""
        return {"output_tokens": self.output_tokens, "tied": self._tied}

    def watched(self, now: float) -> dict[str, tuple[float, float]]:
        """What comes, for another replica: by name, (events, faded; seconds that they were watched)."""
        return {"arrivals": self._arrivals.watched(now), "work": self._work.watched(now)}

    def watch(self, rates: Mapping[str, tuple[float, float]], now: float) -> None:
        """Take another replica's for ours where it has watched for longer."""
        for name, rate in (("arrivals", self._arrivals), ("work", self._work)):
            if name in rates:
                rate.learn(*rates[name], now)

    def rates(self, endpoints: int, now: float) -> tuple[float, float]:
        """(requests per second, seconds of prefill per second) of the mean endpoint; the second at most 0.95."""
        work = self._work.value(now) / max(endpoints, 1)
        return self._arrivals.value(now) / max(endpoints, 1), min(work, _BUSIEST)


class _Rate:
    """Events per second over about the last minute."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._at = -math.inf
        self._since = math.inf

    def add(self, amount: float, now: float) -> None:
        self._sum = self._sum * self._fading(now) + amount
        self._since = min(self._since, now)
        self._at = now

    def value(self, now: float) -> float:
        seen = now - self._since
        if not seen > 1.0:
            return 0.0
        return self._sum * self._fading(now) / (_MEMORY_S * (1.0 - math.exp(-seen / _MEMORY_S)))

    def watched(self, now: float) -> tuple[float, float]:
        return self._sum * self._fading(now), max(now - self._since, 0.0)

    def learn(self, events: float, seconds: float, now: float) -> None:
        if seconds > max(now - self._since, 0.0):
            self._sum, self._at, self._since = events, now, now - seconds

    def _fading(self, now: float) -> float:
        return 0.0 if self._at == -math.inf else math.exp((self._at - now) / _MEMORY_S)
