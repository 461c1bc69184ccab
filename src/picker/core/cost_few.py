"""The cost of a request on a handful of candidates, in plain numbers: what `core.cost` says, to the last bit.

Eighty operations on arrays of ten numbers take longer than the same arithmetic in Python, where much of it can be left
out besides: an endpoint at which nothing runs has no queue, no neighbours and no silence. `core.cost` is the text to
read and to change; this one follows it term by term, in its order of operations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from picker.core.shares import shares
from picker.core.view import PoolView
from picker.types import FloatArray

FEW = 24  # candidates up to which this is the faster way, however busy they are

LOGISTIC = 1.702  # makes a logistic curve of a normal one
CERTAIN = 15.0  # standard deviations
NAMES = ("queue", "prefill", "followers", "neighbours", "decoding", "memory", "stall")

# numpy's exponential function differs from the C library's now and then in the last bit: here it is always numpy's.
ROOMY = (1.0 / (1.0 + np.exp(np.array([LOGISTIC * CERTAIN])))).item()
_Row = tuple[float, ...]


class Constants(Protocol):
    """What is needed of a `CostModel`."""

    @property
    def latency_weight(self) -> float: ...
    @property
    def step_tokens(self) -> int: ...
    @property
    def stall_grace(self) -> float: ...
    @property
    def habit(self) -> float: ...


class Terms(Mapping[str, FloatArray]):
    """Each term of the cost: name -> (n,) seconds. An array is made when somebody asks for it, which is seldom.

    rows: by candidate, its terms in the order of `NAMES`.
    """

    __slots__ = ("_rows",)

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __getitem__(self, name: str) -> FloatArray:
        if name not in NAMES:
            raise KeyError(name)
        at = NAMES.index(name)
        return np.array([row[at] for row in self._rows])

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


def suits(view: PoolView) -> bool:
    """Whether `rank_few` is for this view: few candidates, and no LoRA adapter to find a slot for."""
    return 0 < view.n <= FEW and view.adapter is None


def rank_few(model: Constants, view: PoolView) -> tuple[FloatArray, Terms]:
    """(n,) totals, higher is better, and the terms they are made of."""
    learned, prompt, now = view.learned, view.prompt_tokens, view.now
    weight, grace, step_tokens = model.latency_weight, model.stall_grace, model.step_tokens
    _, token, attention, _ = learned.prefill.costs
    fixed, sequence, context = learned.decode.costs
    answer = learned.output_tokens.value
    half, floor = answer / 2.0, weight * answer * fixed
    arrivals, load = learned.rates(view.endpoints, now)
    speeds, decode_speeds = view.speeds()
    recent = view.recent
    free = _shares(speeds, recent, model.habit)
    counts, measures = view.numbers()
    rows: list[_Row] = []
    tails: list[tuple[int, float]] = []
    for tokens, shared, speed, decode_speed, share, crowd, ours, times, waiting, capacity in zip(
        *view.wants(),
        speeds,
        decode_speeds,
        free,
        _drawn(recent, free, learned.tied, arrivals / (2.0 * (1.0 - load))),
        counts,
        measures,
        *_filled(view, counts, measures, speeds),
        strict=True,
    ):
        requests, prefills, ns, backlog, decoding, awaited, pinned = ours
        own = tokens * (token + attention * (prompt - tokens / 2.0)) / speed
        queue = stall = memory = 0.0
        if requests:
            decodes = requests - prefills
            step = (fixed + sequence * decodes + context * (decoding + decodes * half)) / decode_speed
            prefill = own + step * (math.ceil((backlog + tokens) / step_tokens) + 0.5)
            if prefills:
                queue = ns * 1e-9 / speed
                silence = now - max(times[0], times[1])
                queue -= min(silence, queue / prefills)
                stall = max(0.0, silence - awaited * 1e-9 * (2.0 / speed) - grace)
        else:
            step = fixed / decode_speed
            prefill = own + step * math.ceil(tokens / step_tokens)
        decode = answer * step
        queue += waiting
        if capacity is not None:
            needed, held, holding = prompt - shared, pinned + requests * half, prefill + decode
            if (lack := held + needed - capacity) > 0.0:
                queue += lack / max(held, 1.0) * decode
            filled = held + needed + answer
            filled = filled if filled > 1.0 else 1.0
            spare = (capacity - filled) * math.sqrt(requests + 1.0) / filled
            memory = (needed + answer) / capacity * holding * holding
            if spare < CERTAIN:
                tails.append((len(rows), LOGISTIC * max(spare, -CERTAIN)))
            else:
                memory = memory * ROOMY * arrivals * share
        followers = own * (2.0 * queue + own) * crowd
        rows.append((queue, prefill, followers, own * requests * weight, floor / decode_speed, memory, stall))
    if tails:
        _crowd(rows, tails, arrivals, free)
    total = np.array([0.0 - a - b - c - d - e - f - g for a, b, c, d, e, f, g in rows])
    return total, Terms(rows)


def _crowd(rows: list[_Row], tails: list[tuple[int, float]], arrivals: float, free: list[float]) -> None:
    """Complete the memory term of those whose cache may be full. tails: (which, exponent of the chance)."""
    chances = 1.0 / (1.0 + np.exp(np.array([tail for _, tail in tails])))
    for (at, _), full in zip(tails, chances.tolist(), strict=True):
        *before, memory, stall = rows[at]
        rows[at] = (*before, memory * full * arrivals * free[at], stall)


def _shares(speeds: list[float], recent: FloatArray, habit: float) -> list[float]:
    """`core.shares`, in a pool of equals without asking."""
    if speeds.count(1.0) == len(speeds):
        return speeds
    found: list[float] = shares(np.array(speeds), recent, habit).tolist()
    return found


def _drawn(recent: FloatArray, free: list[float], tied: float, crowding: float) -> list[float]:
    """How many of those who come next come here, by how much each delays them (`CostModel._drawn`)."""
    mean = np.add.reduce(recent).item() / recent.size
    if not mean > 0.0:
        return [share * crowding for share in free]
    loose = 1.0 - tied
    return [(loose * share + each / mean * tied) * crowding for share, each in zip(free, recent.tolist(), strict=True)]


def _filled(
    view: PoolView, counts: list[list[int]], measures: list[list[float]], speeds: list[float]
) -> tuple[Sequence[float], Sequence[float | None]]:
    """By candidate: seconds of prefill of others that wait there, and the cache's size, None where none is known."""
    # What is not a number is neither above nor below another, and not even equal to itself.
    if False not in [
        times[2] <= ours[1] and times[3] == times[3] for ours, times in zip(counts, measures, strict=True)
    ]:
        return [0.0] * view.n, [times[3] for times in measures]
    waiting, capacities = (_mean_filled([times[at] for times in measures]) for at in (2, 3))
    return _others(view, waiting, counts, speeds), capacities or [None] * view.n


def _others(view: PoolView, waiting: list[float] | None, counts: list[list[int]], speeds: list[float]) -> list[float]:
    """Seconds of prefill of requests that wait there and are not ours (`CostModel._queue`)."""
    prefilling = [ours[1] for ours in counts]
    if waiting is None or not any(map(operator.gt, waiting, prefilling)):
        return [0.0] * view.n
    if requests := sum(prefilling):
        booked = np.array([ours[2] * 1e-9 / speed for ours, speed in zip(counts, speeds, strict=True)])
        mean = float(booked.sum() / requests)
    else:
        mean = view.learned.work(view.prompt_tokens, view.prompt_tokens)
    return [max(0.0, there - ours) * mean for there, ours in zip(waiting, prefilling, strict=True)]


def _mean_filled(values: list[float]) -> list[float] | None:
    """With the mean for what nobody observed; None where nothing is known (`core.cost`)."""
    column = np.array(values)
    unknown = np.isnan(column)
    if unknown.all():
        return None
    filled: list[float] = np.where(unknown, column[~unknown].mean(), column).tolist()
    return filled
