"""How one policy does beside others: ratios, how sure they are, and what became of the distance to a reference.

Reads the rows of `picker simulate --json`; runs nothing and draws nothing.

    cell        one scenario at one load
    pair        two policies in a cell on one metric: mean over seeds divided by mean over the same seeds
    best peer   of a cell and metric: the peer that `ours` looks worst beside. References are no peers
    stable      a cell where the wait does not grow under its best policy; elsewhere a figure measures how long it ran

Everything is lower-is-better. Means leave failed requests out, so a policy that failed more of them than ours cannot
be best peer; percentiles count them as infinitely late, and an infinite figure of ours stays infinite in every mean.
Intervals are 95 % percentile bootstrap over seeds, paired; the best peer is not chosen again in a resample.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from picker.errors import ConfigError

Row = Mapping[str, object]
Values = npt.NDArray[np.float64]

OURS = "picker"
POOLED, FLOOR = "pooled-fcfs", "floor"
# They know or have what no router can.
REFERENCES = frozenset((POOLED, FLOOR, "greedy-oracle"))
# Seconds of wait a second: the same as `sim.capacity` asks of the pooled oracle.
STABLE_GROWTH = 0.01
# What must not differ within a cell for its runs to be comparable.
_SAME = ("model", "pods", "rate", "exact")


class Metric(Enum):
    """What is compared: key of a row."""

    TTFT_MEAN = "ttft_mean_s"
    TTFT_P95 = "ttft_p95_s"
    E2E_MEAN = "e2e_mean_s"

    @property
    def title(self) -> str:
        return {"ttft_mean_s": "mean TTFT", "ttft_p95_s": "P95 TTFT", "e2e_mean_s": "mean E2E"}[self.value]


class Cell(NamedTuple):
    """load: None for a scenario at its own rate."""

    scenario: str
    load: float | None

    def __str__(self) -> str:
        return self.scenario if self.load is None else f"{self.scenario} at {self.load:g}"


# --- intervals -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio and the bounds of its 95 % confidence interval."""

    ratio: float
    low: float
    high: float


def ratio_interval(
    ours: Sequence[float] | Values, theirs: Sequence[float] | Values, rng: np.random.Generator, resamples: int = 4000
) -> Interval:
    """Mean of `ours` over mean of `theirs`, value i of both from the same seed: paired bootstrap over the seeds.

    With few seeds the interval is rough, and with one it is a point. Raises ValueError for sequences of unequal length.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"{len(ours)} and {len(theirs)} values do not make pairs")
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if not np.isfinite(a).all():
        return Interval(math.inf, math.inf, math.inf)
    drawn = rng.integers(0, len(a), (resamples, len(a)))
    return _interval(float(a.mean() / b.mean()), a[drawn].mean(axis=1) / b[drawn].mean(axis=1))


def mean_interval(values: Sequence[float] | Values, rng: np.random.Generator, resamples: int = 4000) -> Interval:
    """The mean of finite values and how sure it is: bootstrap over the seeds. Raises ValueError when there are none."""
    return ratio_interval(values, np.ones(len(values)), rng, resamples)


def _interval(ratio: float, resampled: Values) -> Interval:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(ratio, float(low), float(high))


# --- runs by cell --------------------------------------------------------------------------------------------


class Grid:
    """Rows by cell, policy and seed. Raises ConfigError for rows that contradict one another."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._runs: dict[Cell, dict[str, dict[int, Row]]] = {}
        for row in rows:
            self._add(row)

    def _add(self, row: Row) -> None:
        load, seed = row["load"], row["seed"]
        assert load is None or isinstance(load, (int, float))
        assert isinstance(seed, int)
        cell = Cell(str(row["scenario"]), load)
        policies = self._runs.setdefault(cell, {})
        for first in [row for seeds in policies.values() for row in seeds.values()][:1]:
            for key in _SAME:
                if first.get(key) != row.get(key):
                    raise ConfigError(
                        f"{cell}: runs differ in {key}, {first.get(key)} and {row.get(key)}: keep one kind"
                    )
        seeds = policies.setdefault(str(row["policy"]), {})
        if seeds.setdefault(seed, row) != row:
            raise ConfigError(f"{cell}: two runs of {row['policy']} with seed {seed} differ: keep one")

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(self._runs)

    @property
    def policies(self) -> tuple[str, ...]:
        """All there are, in the order of the rows."""
        return tuple(dict.fromkeys(policy for cell in self._runs.values() for policy in cell))

    def policies_of(self, cell: Cell) -> tuple[str, ...]:
        return tuple(self._runs[cell])

    def peers_of(self, cell: Cell, ours: str = OURS) -> tuple[str, ...]:
        return tuple(policy for policy in self._runs[cell] if policy not in REFERENCES and policy != ours)

    def seeds(self, cell: Cell, *policies: str) -> tuple[int, ...]:
        """Those that all of these policies ran with."""
        ran = [self._runs[cell].get(policy, {}) for policy in policies]
        return tuple(sorted(set(ran[0]).intersection(*ran[1:]))) if ran else ()

    def runs(self, cell: Cell, policy: str) -> list[Row]:
        """By seed; empty when the policy was not run in the cell."""
        return [run for _, run in sorted(self._runs[cell].get(policy, {}).items())]

    def values(self, cell: Cell, policy: str, key: str, seeds: Sequence[int] | None = None) -> Values:
        """One figure of the runs with these seeds, all by default; infinite where the run has none."""
        runs = self._runs[cell].get(policy, {})
        found = [runs[seed].get(key) for seed in (sorted(runs) if seeds is None else seeds)]
        return np.array([value if isinstance(value, (int, float)) else math.inf for value in found], dtype=float)

    def mean(self, cell: Cell, policy: str, key: str) -> float | None:
        """Over all seeds; None when a run lacks the figure or there is no run."""
        values = self.values(cell, policy, key)
        return float(values.mean()) if len(values) and np.isfinite(values).all() else None

    def failed(self, cell: Cell, policy: str, seeds: Sequence[int] | None = None) -> int:
        return int(self.values(cell, policy, "failed", seeds).sum())


# --- pairs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """`ours` beside `other`; ours and theirs are by seed.

    interval: None where the other has no finite figure to divide by. failed: requests, ours and theirs.
    """

    cell: Cell
    metric: Metric
    other: str
    seeds: tuple[int, ...]
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    failed: tuple[int, int]
    interval: Interval | None

    @property
    def ratio(self) -> float:
        """Of the means; 0 where the other is infinitely late and we are not."""
        if self.interval is not None:
            return self.interval.ratio
        return 0.0 if math.isfinite(sum(self.ours)) else 1.0


def pair(grid: Grid, cell: Cell, metric: Metric, other: str, rng: np.random.Generator, ours: str = OURS) -> Pair:
    """Raises ConfigError when the two have no seed in common in this cell."""
    seeds = grid.seeds(cell, ours, other)
    if not seeds:
        raise ConfigError(f"{cell}: {ours} and {other} have no seed in common: run both with the same seeds")
    mine, theirs = (grid.values(cell, policy, metric.value, seeds) for policy in (ours, other))
    return Pair(
        cell,
        metric,
        other,
        seeds,
        tuple(mine.tolist()),
        tuple(theirs.tolist()),
        (grid.failed(cell, ours, seeds), grid.failed(cell, other, seeds)),
        ratio_interval(mine, theirs, rng) if np.isfinite(theirs).all() else None,
    )


def best_peer(pairs: Iterable[Pair]) -> Pair | None:
    """Of one cell's pairs with peers on one metric, the one with the smallest mean of the peer's.

    Each peer is judged on the seeds it has in common with ours, so the smallest mean is the largest ratio. None when
    no peer failed as few requests as ours.
    """
    eligible = [p for p in pairs if p.failed[1] <= p.failed[0] and p.interval is not None]
    return max(eligible, key=lambda p: (p.ratio, -sum(p.theirs)), default=None)


# --- over cells ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Overall:
    """Pairs of one metric over cells. interval: of the geometric mean of their ratios; None when there is no pair.

    undecided: pairs left out because the other is infinitely late, which can only be in its favour.
    """

    metric: Metric
    interval: Interval | None
    pairs: tuple[Pair, ...]
    undecided: tuple[Pair, ...]

    @property
    def worst(self) -> Pair | None:
        return max(self.pairs, key=lambda p: p.ratio, default=None)

    def above(self, limit: float) -> tuple[Pair, ...]:
        """The pairs whose ratio is above `limit`, the worst first."""
        return tuple(sorted((p for p in self.pairs if p.ratio > limit), key=lambda p: -p.ratio))


def overall(metric: Metric, pairs: Iterable[Pair | None], rng: np.random.Generator, resamples: int = 4000) -> Overall:
    """The geometric mean of the ratios, each cell counting once.

    Seeds are resampled within cells. Cells of one scenario with the same seeds share arrivals up to their rate, so they
    are resampled together: drawn apart, the interval would be too narrow.
    """
    known = [p for p in pairs if p is not None]
    decided = tuple(p for p in known if p.interval is not None)
    undecided = tuple(p for p in known if p.interval is None)
    return Overall(metric, _geometric(decided, rng, resamples), decided, undecided)


def _geometric(pairs: Sequence[Pair], rng: np.random.Generator, resamples: int) -> Interval | None:
    if not pairs:
        return None
    if any(not math.isfinite(p.ratio) for p in pairs):
        return Interval(math.inf, math.inf, math.inf)
    draws: dict[Hashable, npt.NDArray[np.int64]] = {}
    logs = np.zeros(resamples)
    for p in pairs:
        key = (p.cell.scenario, p.seeds)
        drawn = draws.setdefault(key, rng.integers(0, len(p.seeds), (resamples, len(p.seeds))))
        logs += np.log(np.array(p.ours)[drawn].mean(axis=1) / np.array(p.theirs)[drawn].mean(axis=1))
    ratio = math.exp(math.fsum(math.log(p.ratio) for p in pairs) / len(pairs))
    return _interval(ratio, np.exp(logs / len(pairs)))


# --- one cell ------------------------------------------------------------------------------------------------


def growth(grid: Grid, cell: Cell, ours: str = OURS) -> float | None:
    """Mean `ttft_growth` of the cell's best policy: of ours and the peers that failed no more, by mean TTFT.

    None when no run says so.
    """
    allowed = grid.failed(cell, ours) if grid.runs(cell, ours) else None
    routers = [policy for policy in grid.policies_of(cell) if policy not in REFERENCES]
    known = {
        policy: mean
        for policy in routers
        if (mean := grid.mean(cell, policy, Metric.TTFT_MEAN.value)) is not None
        and (allowed is None or grid.failed(cell, policy) <= allowed)
    }
    return grid.mean(cell, min(known, key=known.__getitem__), "ttft_growth") if known else None


def stable(grid: Grid, cell: Cell, ours: str = OURS) -> bool:
    """Whether the wait grows by less than `STABLE_GROWTH` under the best policy; a cell that does not say counts."""
    slope = growth(grid, cell, ours)
    return slope is None or slope < STABLE_GROWTH


def gap_closed(grid: Grid, cell: Cell, baseline: str = "round-robin", ours: str = OURS) -> float | None:
    """The share of the way from the baseline's mean TTFT to pooled-FCFS's that ours has gone; it may exceed 1.

    On the seeds that all three have. None when one of them did not run or there is no way to go.
    """
    means = _means(grid, cell, (baseline, ours, POOLED))
    if means is None or not means[0] > means[2]:
        return None
    return (means[0] - means[1]) / (means[0] - means[2])


def floor_distance(grid: Grid, cell: Cell, policy: str = OURS, metric: Metric = Metric.TTFT_MEAN) -> float | None:
    """How many times the floor's figure the policy's is; None when one of them did not run."""
    means = _means(grid, cell, (policy, FLOOR), metric)
    return None if means is None or not means[1] else means[0] / means[1]


def _means(
    grid: Grid, cell: Cell, policies: Sequence[str], metric: Metric = Metric.TTFT_MEAN
) -> tuple[float, ...] | None:
    seeds = grid.seeds(cell, *policies)
    means = tuple(float(np.mean(grid.values(cell, policy, metric.value, seeds))) for policy in policies if seeds)
    return means if means and all(math.isfinite(mean) for mean in means) else None


# --- everything ----------------------------------------------------------------------------------------------


class Comparison:
    """`ours` beside every other policy of a grid, in each cell where ours ran; every pair is made once.

    Raises ConfigError when in some cell a policy has no seed in common with ours.
    """

    def __init__(self, grid: Grid, rng: np.random.Generator, ours: str = OURS) -> None:
        self.grid = grid
        self.ours = ours
        self._rng = rng
        self.cells = tuple(cell for cell in grid.cells if grid.runs(cell, ours))
        self.stable = tuple(cell for cell in self.cells if stable(grid, cell, ours))
        self._pairs = {
            (cell, metric, other): pair(grid, cell, metric, other, rng, ours)
            for cell in self.cells
            for metric in Metric
            for other in grid.policies_of(cell)
            if other != ours
        }

    @property
    def peers(self) -> tuple[str, ...]:
        """All that ran beside ours in some cell."""
        return tuple(dict.fromkeys(peer for cell in self.cells for peer in self.grid.peers_of(cell, self.ours)))

    def pair(self, cell: Cell, metric: Metric, other: str) -> Pair | None:
        """None when one of the two did not run there."""
        return self._pairs.get((cell, metric, other))

    def best(self, cell: Cell, metric: Metric) -> Pair | None:
        """Ours beside the cell's best peer."""
        return best_peer(self._pairs[cell, metric, peer] for peer in self.grid.peers_of(cell, self.ours))

    def against_best(self, metric: Metric, cells: Sequence[Cell]) -> Overall:
        return overall(metric, [self.best(cell, metric) for cell in cells], self._rng)

    def against(self, other: str, metric: Metric, cells: Sequence[Cell]) -> Overall:
        return overall(metric, [self.pair(cell, metric, other) for cell in cells], self._rng)
