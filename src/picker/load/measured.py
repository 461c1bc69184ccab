"""What a load run measured, apart from how: its requests as columns, and where they came from.

Reports, pages and comparisons read this, whether the run has just ended or was saved long ago. Times are seconds of
the pods from the start of the run: measured ones times `Pace.time_scale`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picker.load import report
from picker.load.client import Record
from picker.load.schedule import Run

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Requests:
    """Columns of equal length: entry i of each is one request, in order of intended times. nan: never came, not told.

    conversation, turn: its place in the plan, conversation -1 for none. error: the class, or None for an answer.
    """

    conversation: Ints
    turn: Ints
    intended: Floats
    sent: Floats
    first: Floats
    ended: Floats
    longest_gap: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    cached_tokens: Floats
    endpoint: tuple[str, ...]
    error: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.intended)

    @property
    def ok(self) -> Bools:
        """Which ones were answered."""
        return np.array([error is None for error in self.error], dtype=bool)

    @property
    def ttft(self) -> Floats:
        """Seconds from the intended time; nan for failures."""
        return np.where(self.ok, self.first - self.intended, np.nan)

    @property
    def e2e(self) -> Floats:
        return np.where(self.ok, self.ended - self.intended, np.nan)

    @property
    def tpot(self) -> Floats:
        """Seconds per output token after the first; nan for answers of one token."""
        several = self.output_tokens > 1
        return np.where(self.ok & several, (self.ended - self.first) / np.maximum(self.output_tokens - 1, 1), np.nan)

    @property
    def ntpot(self) -> Floats:
        """Seconds per output token, the first one and its wait among them."""
        return np.where(self.output_tokens > 0, self.e2e / np.maximum(self.output_tokens, 1), np.nan)

    @property
    def delay(self) -> Floats:
        """Seconds that we were late."""
        return self.sent - self.intended

    def where(self, chosen: Bools) -> Requests:
        """Only those of which `chosen` is true."""
        columns: dict[str, Any] = {}
        for field_ in fields(self):
            column = getattr(self, field_.name)
            columns[field_.name] = (
                tuple(itertools.compress(column, chosen)) if isinstance(column, tuple) else column[chosen]
            )
        return Requests(**columns)

    def ordered(self, rows: Ints) -> Requests:
        """Those of `rows`, in that order."""
        columns: dict[str, Any] = {}
        for field_ in fields(self):
            column = getattr(self, field_.name)
            columns[field_.name] = tuple(column[row] for row in rows) if isinstance(column, tuple) else column[rows]
        return Requests(**columns)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run with a rate of its own: seconds of the run, arrivals a second."""

    start: float
    end: float
    rate: float


@dataclass(frozen=True, slots=True)
class Origin:
    """Where figures come from. started: ISO 8601. machine: what `bench.machine.describe` says. shape: of the load."""

    command: str = ""
    url: str = ""
    model: str | None = None
    started: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    shape: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """A run and all that is said of it.

    figures: the row of `picker load --json`. gaps: statistics of all gaps between tokens.
    errors: class -> (how often, words of the first). notes: what a reader must know, a line each. rate: asked
    arrivals a second, None for a closed loop. planned: requests of the whole plan. cancelled: sent, but not awaited.
    """

    workload: str
    figures: Mapping[str, Any]
    requests: Requests
    origin: Origin
    time_scale: float = 1.0
    planned: int = 0
    cancelled: int = 0
    processes: int = 1
    rate: float | None = None
    stages: tuple[Stage, ...] = ()
    gaps: Mapping[str, float] | None = None
    errors: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        return float(self.figures["duration_s"] or 0.0)

    @property
    def plan(self) -> tuple[object, ...]:
        """Runs of which this is the same sent the same requests at the same times."""
        shape = tuple(sorted((name, str(value)) for name, value in self.origin.shape.items()))
        return (self.workload, self.origin.seed, self.planned, self.time_scale, shape)


# --- from a run ----------------------------------------------------------------------------------------------


def measured(run: Run, origin: Origin, notes: Sequence[str] = ()) -> Measured:
    """What `run` says."""
    scale, later = run.pace.time_scale, _begun(run)
    gaps = [np.asarray(record.gaps, dtype=float) for record in run.records if record.error is None]
    return Measured(
        workload=run.plan.name,
        figures=report.row(run),
        requests=_requests(run),
        origin=origin,
        time_scale=scale,
        planned=run.plan.requests,
        cancelled=run.cancelled,
        processes=run.processes,
        rate=_rate(run, origin),
        stages=tuple(Stage(start - later, end - later, rate) for start, end, rate in run.plan.stages),
        gaps=statistics(np.concatenate(gaps) * scale) if gaps else None,
        errors=_errors(run.records),
        notes=tuple(notes),
    )


def _requests(run: Run) -> Requests:
    records = sorted(run.records, key=lambda record: record.intended_at)
    scale = run.pace.time_scale

    def seconds(times: Sequence[float | None]) -> Floats:
        return (np.array([np.nan if t is None else t for t in times], dtype=float) - run.started_at) * scale

    return Requests(
        conversation=np.array([record.conversation for record in records], dtype=np.int64),
        turn=np.array([record.turn for record in records], dtype=np.int64),
        intended=seconds([record.intended_at for record in records]),
        sent=seconds([record.sent_at for record in records]),
        first=seconds([record.first_at for record in records]),
        ended=seconds([record.ended_at for record in records]),
        longest_gap=np.array([record.longest_gap * scale for record in records], dtype=float),
        prompt_tokens=np.array([record.prompt_tokens for record in records], dtype=np.int64),
        output_tokens=np.array([record.output_tokens for record in records], dtype=np.int64),
        cached_tokens=np.array([_or_nan(record.cached_tokens) for record in records], dtype=float),
        endpoint=tuple(record.endpoint for record in records),
        error=tuple(record.error for record in records),
    )


def _begun(run: Run) -> float:
    """Seconds of the plan at which measuring began: after what was sent to warm up."""
    for record in run.records:
        if record.turn == 0 and 0 <= record.conversation < len(run.plan.conversations):
            since = (record.intended_at - run.started_at) * run.pace.time_scale
            return round(run.plan.conversations[record.conversation].at - since, 6)
    return 0.0


def _rate(run: Run, origin: Origin) -> float | None:
    """What was asked for, or what the plan comes to; a closed loop has none, nor have stages a single one."""
    if run.pace.closed is not None or run.plan.stages:
        return None
    asked, plan = origin.shape.get("rate"), run.plan
    if isinstance(asked, (int, float)):
        return float(asked)
    return len(plan.conversations) / plan.duration if plan.duration > 0 else None


def _errors(records: Sequence[Record]) -> dict[str, tuple[int, str]]:
    counts = Counter(record.error for record in records if record.error is not None)
    words = {record.error: record.detail for record in reversed(records) if record.error is not None}
    return {kind: (count, words[kind]) for kind, count in counts.most_common()}


def _or_nan(value: int | None) -> float:
    return float("nan") if value is None else float(value)


# --- statistics ----------------------------------------------------------------------------------------------

# Names and set of llm-d-benchmark's report (and of inference-perf's): p0p1 is the 0.1 % quantile.
QUANTILES = {
    "p0p1": 0.001,
    "p1": 0.01,
    "p5": 0.05,
    "p10": 0.10,
    "p25": 0.25,
    "p50": 0.50,
    "p75": 0.75,
    "p90": 0.90,
    "p95": 0.95,
    "p99": 0.99,
    "p99p9": 0.999,
}


def statistics(values: Floats) -> dict[str, float] | None:
    """Mean, spread and quantiles (nearest rank) of the finite values; None when there are none."""
    known = np.sort(values[np.isfinite(values)])
    if not len(known):
        return None
    ranks = {name: float(known[rank(q, len(known))]) for name, q in QUANTILES.items()}
    return {
        "count": float(len(known)),
        "mean": float(known.mean()),
        "stddev": float(known.std()),
        "min": float(known[0]),
        **ranks,
        "max": float(known[-1]),
    }


def rank(fraction: float, count: int) -> int:
    """Place of the quantile among `count` ascending values: nearest rank, as in `report.row`."""
    return max(0, int(np.ceil(fraction * count)) - 1)


def hit_ratio(requests: Requests) -> float | None:
    """Cached prompt tokens over prompt tokens, of the answers that say; None if none does."""
    told = requests.ok & np.isfinite(requests.cached_tokens)
    prompts = int(requests.prompt_tokens[told].sum())
    return float(requests.cached_tokens[told].sum()) / prompts if prompts else None
