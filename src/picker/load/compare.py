"""Two runs beside each other: every metric of both, their ratio, and how sure it is. From the requests, not the rows.

Runs of the same plan (load, seed, length) are paired: only requests that both sent count, and both are resampled alike.
Others are resampled each on its own. Intervals are 95 % percentile bootstrap over blocks of neighbouring arrivals,
since requests that queue behind one another are late together (Carlstein's blocks, Annals of Statistics 1986), and
the turns of one conversation stay in one block. Blocks are as long as the queues of the run ask for. Intervals cover
chance within the runs, not what differs between two runs of the same server: only repeated runs show that.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from picker.load.measured import Bools, Floats, Ints, Measured, Requests, rank
from picker.load.slo import Slo, good

# Blocks, at most: enough to see a spread. At least: with fewer a spread is a guess.
_BLOCKS, _FEWEST_BLOCKS = 50, 8
# A block outlasts what makes neighbours alike so many times.
_OUTLASTS = 4.0
_RESAMPLES = 1000
# Of fewer requests a tail says nothing.
FEWEST = 20
# A difference below this is nobody's reason to choose, however sure it is.
_SMALL = 0.01

# A figure of chosen rows; a row that comes twice counts twice.
Figure = Callable[[Ints], float]


class Verdict(enum.Enum):
    """What can be said of B beside A; the value is in words."""

    BETTER = "B is better"
    WORSE = "B is worse"
    ALIKE = "alike within 1 %"
    UNSURE = "no difference shown"
    FEW = "too few requests to tell"
    UNTESTED = "no interval: one figure a run"
    UNKNOWN = "no figure to compare"


@dataclass(frozen=True, slots=True)
class Metric:
    """less: less is better. figure: makes the one of some requests, and does once what every resample needs."""

    title: str
    unit: str
    less: bool
    figure: Callable[[Requests], Figure]


@dataclass(frozen=True, slots=True)
class Line:
    """One metric of both runs. ratio: B over A; low, high: its 95 % interval, None where there is none."""

    metric: str
    unit: str
    a: float | None
    b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Compared:
    """paired: requests of the same plan that both runs sent, or None for runs of different plans."""

    paired: int | None
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


def compare(a: Measured, b: Measured, rng: np.random.Generator, slo: Slo | None = None) -> Compared:
    """Every metric of `b` beside `a`."""
    notes = list(_differences(a, b))
    first, second = a.requests, b.requests
    paired = _pairs(a, b)
    if paired is not None:
        first, second = first.ordered(paired[0]), second.ordered(paired[1])
        dropped = len(a.requests) + len(b.requests) - 2 * len(first)
        if dropped:
            notes.append(f"{dropped} requests that only one of the runs sent are left out")
    count = min(_block_count(first), _block_count(second))
    if count == _FEWEST_BLOCKS:
        notes.append("queues last almost as long as these runs: the intervals are too narrow, run longer")
    draws = _draws(first, second, rng, count, alike=paired is not None)
    lines = [_line(metric, first, second, draws) for metric in _metrics(slo)]
    lines += [_rate(title, name, a, b) for title, name in _RATES]
    return Compared(None if paired is None else len(first), tuple(lines), tuple(notes))


# --- pairs ---------------------------------------------------------------------------------------------------


def _pairs(a: Measured, b: Measured) -> tuple[Ints, Ints] | None:
    """Rows of the same request in both, in order of `a`; None when the runs do not follow one plan."""
    if a.plan != b.plan:
        return None
    places = {place: row for row, place in enumerate(_places(b.requests)) if place[0] >= 0}
    rows = [(row, places[place]) for row, place in enumerate(_places(a.requests)) if place in places]
    if not rows:
        return None
    first, second = zip(*rows, strict=True)
    return np.array(first, dtype=np.int64), np.array(second, dtype=np.int64)


def _places(requests: Requests) -> list[tuple[int, int]]:
    return list(zip(requests.conversation.tolist(), requests.turn.tolist(), strict=True))


def _differences(a: Measured, b: Measured) -> list[str]:
    found = []
    if a.plan != b.plan:
        found.append("the runs follow different plans: requests are not paired, and the load may differ")
    if a.time_scale != b.time_scale:
        found.append(f"time scales differ: {a.time_scale:g} and {b.time_scale:g}")
    if a.origin.machine.get("cpu") != b.origin.machine.get("cpu"):
        found.append("the load came from different machines")
    return found


# --- resampling ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Draw:
    """Rows of both runs in one resample."""

    a: Ints
    b: Ints


def _draws(first: Requests, second: Requests, rng: np.random.Generator, count: int, *, alike: bool) -> list[_Draw]:
    blocks = _blocks(first, count), _blocks(second, count)
    draws = []
    for _ in range(_RESAMPLES):
        number = rng.integers(0, len(blocks[0]), len(blocks[0]))
        other = number if alike else rng.integers(0, len(blocks[1]), len(blocks[1]))
        draws.append(_Draw(_rows(blocks[0], number), _rows(blocks[1], other)))
    return draws


def _block_count(requests: Requests) -> int:
    """As many as let each block outlast the queues: neighbours in one are alike, and blocks are not."""
    if len(requests) < FEWEST:
        return _BLOCKS
    return int(np.clip(len(requests) / (_OUTLASTS * _alike(requests)), _FEWEST_BLOCKS, _BLOCKS))


def _alike(requests: Requests) -> float:
    """How many neighbouring requests tell as much as one: integrated autocorrelation of TTFT.

    Cut at the first lag that is not positive (Geyer's initial sequence, Statistical Science 1992, with single lags).
    """
    values = requests.ttft[np.argsort(requests.intended, kind="stable")]
    values = values[np.isfinite(values)]
    if len(values) < FEWEST or values.std() < 1e-9:
        return 1.0
    power = np.abs(np.fft.rfft(values - values.mean(), 2 * len(values))) ** 2
    lags = np.fft.irfft(power)[: len(values) // 4]
    ends = np.flatnonzero(lags <= 0)
    return float(1.0 + 2.0 * lags[1 : ends[0] if len(ends) else None].sum() / lags[0])


def _blocks(requests: Requests, most: int) -> list[Ints]:
    """Rows by block: conversations in order of their arrival, about as many in each block."""
    if not len(requests):
        return [np.zeros(0, dtype=np.int64)]
    known = requests.conversation >= 0
    # Requests of no conversation stand alone.
    owner = np.where(known, requests.conversation, -1 - np.arange(len(requests)))
    _, first, number = np.unique(owner, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(requests.intended[first], kind="stable"), kind="stable")
    count = min(most, len(first))
    block = order[number] * count // len(first)
    return [np.flatnonzero(block == each) for each in range(count)]


def _rows(blocks: list[Ints], numbers: Ints) -> Ints:
    return np.concatenate([blocks[number] for number in numbers])


# --- metrics -------------------------------------------------------------------------------------------------


def _metrics(slo: Slo | None) -> list[Metric]:
    found = [
        Metric("TTFT mean", "s", True, _mean("ttft")),
        Metric("TTFT P50", "s", True, _quantile("ttft", 0.50)),
        Metric("TTFT P95", "s", True, _quantile("ttft", 0.95)),
        Metric("TTFT P99", "s", True, _quantile("ttft", 0.99)),
        Metric("time per output token", "s", True, _mean("tpot")),
        Metric("end to end mean", "s", True, _mean("e2e")),
        Metric("end to end P95", "s", True, _quantile("e2e", 0.95)),
        Metric("hit ratio", "share", False, _hits),
        Metric("failed", "share", True, lambda requests: _share(~requests.ok)),
    ]
    if slo is not None:
        found.append(Metric(f"good: {slo}", "share", False, lambda requests: _share(good(requests, slo))))
    return found


def _mean(name: str) -> Callable[[Requests], Figure]:
    """Of the answered requests."""

    def figure(requests: Requests) -> Figure:
        values: Floats = getattr(requests, name)
        known = np.isfinite(values)
        sums, counts = np.where(known, values, 0.0), known.astype(float)
        return lambda rows: _over(float(sums[rows].sum()), float(counts[rows].sum()))

    return figure


def _quantile(name: str, fraction: float) -> Callable[[Requests], Figure]:
    """Nearest rank, with failures infinitely late."""

    def figure(requests: Requests) -> Figure:
        values: Floats = getattr(requests, name)
        late = np.where(requests.ok & np.isfinite(values), values, np.inf)
        return lambda rows: float(np.partition(late[rows], place := rank(fraction, len(rows)))[place])

    return figure


def _hits(requests: Requests) -> Figure:
    told = np.isfinite(requests.cached_tokens) & requests.ok
    cached, prompts = np.where(told, requests.cached_tokens, 0.0), np.where(told, requests.prompt_tokens, 0)
    return lambda rows: _over(float(cached[rows].sum()), float(prompts[rows].sum()))


def _share(chosen: Bools) -> Figure:
    return lambda rows: float(chosen[rows].mean())


def _over(above: float, below: float) -> float:
    return above / below if below > 0 else float("nan")


def _line(metric: Metric, first: Requests, second: Requests, draws: list[_Draw]) -> Line:
    if not len(first) or not len(second):
        return Line(metric.title, metric.unit, None, None, None, None, None, Verdict.UNKNOWN)
    of_a, of_b = metric.figure(first), metric.figure(second)
    a, b = of_a(np.arange(len(first))), of_b(np.arange(len(second)))
    low = high = None
    unknown = np.isnan(a) or np.isnan(b) or (np.isinf(a) and np.isinf(b))
    verdict = Verdict.UNKNOWN if unknown else Verdict.FEW
    if verdict is Verdict.FEW and min(len(first), len(second)) >= FEWEST:
        drawn = [(of_a(draw.a), of_b(draw.b)) for draw in draws]
        low, high = _interval(drawn)
        verdict = _verdict(drawn, low, high, less=metric.less)
    return Line(metric.title, metric.unit, _finite(a), _finite(b), _ratio(a, b), low, high, verdict)


def _ratio(a: float, b: float) -> float | None:
    return float(b / a) if np.isfinite(a) and np.isfinite(b) and a > 0 else None


def _interval(drawn: list[tuple[float, float]]) -> tuple[float | None, float | None]:
    """None where too many resamples know no ratio: a quantile among failures, say."""
    ratios = [ratio for a, b in drawn if (ratio := _ratio(a, b)) is not None]
    if len(ratios) < 0.975 * len(drawn):
        return None, None
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def _verdict(drawn: list[tuple[float, float]], low: float | None, high: float | None, *, less: bool) -> Verdict:
    """By how many resamples B is below or above A, so that it can be said of zeros and of failures, too."""
    if low is not None and high is not None and low >= 1 - _SMALL and high <= 1 + _SMALL:
        return Verdict.ALIKE
    below, above = (sum(b < a for a, b in drawn) / len(drawn), sum(b > a for a, b in drawn) / len(drawn))
    if not below and not above:
        return Verdict.ALIKE
    if max(below, above) < 0.975:
        return Verdict.UNSURE
    return Verdict.BETTER if (below > above) == less else Verdict.WORSE


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


_RATES = (("output tokens/s", "output_tokens_per_s"), ("requests/s", "requests_per_s"))


def _rate(title: str, name: str, a: Measured, b: Measured) -> Line:
    """In an open loop the plan sets it, so a resample would say nothing."""
    first, second = a.figures[name], b.figures[name]
    if first is None or second is None:
        return Line(title, "/s", first, second, None, None, None, Verdict.UNKNOWN)
    return Line(title, "/s", float(first), float(second), _ratio(first, second), None, None, Verdict.UNTESTED)
