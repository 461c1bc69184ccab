"""A page of HTML about runs: what they say of each scenario, and where picker stands. One file that asks for nothing.

Gathers what the template shows; numbers come from `sim.compare`, drawings from `plots`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from picker.errors import ConfigError
from picker.sim.compare import (
    FLOOR,
    OURS,
    POOLED,
    REFERENCES,
    Cell,
    Comparison,
    Grid,
    Metric,
    Overall,
    Pair,
    floor_distance,
    gap_closed,
    growth,
    mean_interval,
)
from picker.sim.report import words
from picker.sim.report.palette import Palette
from picker.sim.report.plots import Point, Series, bars, curves, swatch
from picker.sim.scenario import scenario

Row = Mapping[str, Any]

# Columns of figures: heading, key, whether less is better (None: neither is).
_COLUMNS = (
    ("failed", "failed", True),
    ("TTFT mean", "ttft_mean_s", True),
    ("TTFT P95", "ttft_p95_s", True),
    ("TTFT P99", "ttft_p99_s", True),
    ("E2E mean", "e2e_mean_s", True),
    ("TPOT", "tpot_mean_s", True),
    ("hit ratio", "hit_ratio", False),
    ("output tok/s", "output_tokens_per_s", False),
)
# Plots over load: title, key, logarithmic, upper end of the axis.
_PLOTS = (
    ("Mean TTFT, seconds", "ttft_mean_s", True, None),
    ("P95 TTFT, seconds", "ttft_p95_s", True, None),
    ("Mean E2E, seconds", "e2e_mean_s", True, None),
    ("Hit ratio", "hit_ratio", False, 1.0),
)


# What is written as 1.000 is no loss.
_EVEN = 1.0005


@dataclass(frozen=True, slots=True)
class Origin:
    """What a page says of where its runs came from. lines: (what, text), such as a machine and a commit."""

    title: str
    commands: tuple[str, ...]
    versions: tuple[str, ...]
    lines: tuple[tuple[str, str], ...] = ()


def render(runs: Sequence[Row], origin: Origin) -> str:
    """The page. Raises ConfigError for runs that cannot stand side by side."""
    grid = Grid(runs)
    comparison = Comparison(grid, np.random.default_rng(0))
    palette = Palette(grid.policies)
    environment = Environment(
        loader=PackageLoader("picker.sim", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": words.number, "ratio": words.ratio}
    return environment.get_template("page.html.jinja").render(
        origin=origin,
        ours=OURS,
        seeds=words.seeds([run["seed"] for run in runs]),
        count=len(runs),
        light=palette.properties(dark=False),
        dark=palette.properties(dark=True),
        standing=_standing(comparison) if comparison.cells and comparison.peers else None,
        scenarios=[
            _scenario(name, comparison, palette) for name in dict.fromkeys(cell.scenario for cell in grid.cells)
        ],
    )


# --- where picker stands -------------------------------------------------------------------------------------


def _standing(comparison: Comparison) -> dict[str, Any]:
    """Everything about picker against others, over cells."""
    scopes = [("stable cells", comparison.stable)] if comparison.stable else []
    if comparison.stable != comparison.cells:
        scopes.append(("all cells", comparison.cells))
    best = [p for cell in comparison.cells for metric in Metric if (p := comparison.best(cell, metric)) is not None]
    return {
        "metrics": list(Metric),
        "stable": comparison.stable,
        "best": [
            (name, [_overall(comparison.against_best(m, cells), cells) for m in Metric]) for name, cells in scopes
        ],
        "each": [
            (name, [(peer, [comparison.against(peer, m, cells) for m in Metric]) for peer in comparison.peers])
            for name, cells in scopes
        ],
        "cells": [_cell(cell, comparison) for cell in comparison.cells],
        "losses": sorted((p for p in best if p.ratio > _EVEN), key=lambda p: -p.ratio),
        "compared": len(best),
        "more_failures": _more_failures(comparison),
        "referenced": {POOLED, FLOOR} & set(comparison.grid.policies),
    }


def _overall(summary: Overall, cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "metric": summary.metric,
        "interval": summary.interval,
        "count": len(summary.pairs),
        "of": len(cells),
        "worst": summary.worst,
        "above": [(limit, len(summary.above(limit))) for limit in (1.02, 1.10)],
    }


def _cell(cell: Cell, comparison: Comparison) -> dict[str, Any]:
    grid = comparison.grid
    return {
        "cell": cell,
        "stable": cell in comparison.stable,
        "growth": growth(grid, cell),
        "best": [comparison.best(cell, metric) for metric in Metric],
        "gap": gap_closed(grid, cell),
        "floor": floor_distance(grid, cell),
    }


def _more_failures(comparison: Comparison) -> list[tuple[Pair, str]]:
    """Where a peer failed fewer requests than ours: (that pair, the cell), the least of them in each cell."""
    found = []
    for cell in comparison.cells:
        peers = comparison.grid.peers_of(cell)
        pairs = [p for peer in peers if (p := comparison.pair(cell, Metric.TTFT_MEAN, peer)) is not None]
        least = min(pairs, key=lambda p: p.failed[1], default=None)
        if least is not None and least.failed[1] < least.failed[0]:
            found.append((least, str(cell)))
    return found


# --- one scenario --------------------------------------------------------------------------------------------


def _scenario(name: str, comparison: Comparison, palette: Palette) -> dict[str, Any]:
    grid = comparison.grid
    cells = sorted((cell for cell in grid.cells if cell.scenario == name), key=lambda cell: cell.load or 0.0)
    runs = [run for cell in cells for policy in grid.policies_of(cell) for run in grid.runs(cell, policy)]
    policies = list(dict.fromkeys(policy for cell in cells for policy in grid.policies_of(cell)))
    # A run at the scenario's own rate has no place on an axis of loads.
    drawn = [cell for cell in cells if cell.load is not None] or cells
    return {
        "name": name,
        "title": _title(name),
        "pods": f"{runs[0].get('pods', '?')} x {runs[0].get('model', '?')}",
        "seeds": words.seeds([int(str(run["seed"])) for run in runs]),
        "legend": [(policy, swatch(policy, palette)) for policy in sorted(policies, key=_by_standing)],
        "plots": list(_plots(drawn, grid, palette)),
        "bars": len(drawn) == 1,
        "ladder": list(_ladder(runs, palette)),
        "levels": [_level(cell, comparison) for cell in cells],
    }


def _title(name: str) -> str:
    try:
        return scenario(name).title
    except ConfigError:  # a trace, or a scenario of the user's own
        return name


def _plots(cells: Sequence[Cell], grid: Grid, palette: Palette) -> Iterator[str]:
    measures = [(title, log, top, _over_cells(cells, grid, key)) for title, key, log, top in _PLOTS]
    measures.append(("Mean TTFT, times the floor", True, None, _over_floor(cells, grid)))
    for title, log, top, series in measures:
        if not series:
            continue
        if len(cells) > 1:
            yield curves(
                series, palette, x="load, of the highest rate that one pool keeps up with", y=title, log=log, top=top
            )
        else:
            yield bars([(one.policy, one.points[0]) for one in series], palette, x=title, ascending=log)


def _over_cells(cells: Sequence[Cell], grid: Grid, key: str) -> list[Series]:
    """A point for each cell in which every run of the policy has the figure."""
    rng = np.random.default_rng(0)
    found = []
    for policy in grid.policies:
        points = []
        for cell in cells:
            values = grid.values(cell, policy, key)
            if len(values) and np.isfinite(values).all():
                points.append(_point(cell.load or 0.0, values, rng))
        if points:
            found.append(Series(policy, tuple(points)))
    return found


def _over_floor(cells: Sequence[Cell], grid: Grid) -> list[Series]:
    found = []
    for policy in grid.policies:
        distances = [(cell.load or 0.0, floor_distance(grid, cell, policy)) for cell in cells]
        points = tuple(Point(x, y, y, y) for x, y in distances if y is not None)
        if points and policy != FLOOR:
            found.append(Series(policy, points))
    return found


def _point(x: float, values: Any, rng: np.random.Generator) -> Point:
    interval = mean_interval(values, rng)
    return Point(x, interval.ratio, interval.low, interval.high)


def _ladder(runs: Sequence[Row], palette: Palette) -> Iterator[str]:
    """What a ladder gave at each rate; of one that comes twice the later counts, as the first stage warms up."""
    of_policy: dict[str, dict[float, list[Row]]] = {}
    for run in runs:
        last = {stage["rate"]: stage for stage in run.get("stages", ()) if stage["requests"]}
        for rate, stage in last.items():
            of_policy.setdefault(run["policy"], {}).setdefault(rate, []).append(stage)
    for title, key, log in (
        ("Output tokens a second, by rate of requests", "output_tokens_per_s", False),
        ("P90 TTFT, seconds, by rate of requests", "ttft_p90_s", True),
    ):
        series = [s for policy, stages in of_policy.items() if (s := _stages(policy, stages, key)).points]
        if series:
            yield curves(series, palette, x="requests a second", y=title, log=log)


def _stages(policy: str, stages: Mapping[float, Sequence[Row]], key: str) -> Series:
    rng = np.random.default_rng(0)
    known = {rate: [stage.get(key) for stage in of_rate] for rate, of_rate in sorted(stages.items())}
    return Series(policy, tuple(_point(rate, np.array(v), rng) for rate, v in known.items() if None not in v))


# --- one table -----------------------------------------------------------------------------------------------


def _level(cell: Cell, comparison: Comparison) -> dict[str, Any]:
    """The table of a cell: routers by mean TTFT, references below."""
    grid = comparison.grid
    means = {p: {key: grid.mean(cell, p, key) for _, key, _ in _COLUMNS} for p in grid.policies_of(cell)}
    routers = [policy for policy in means if policy not in REFERENCES]
    best = {key: _best([means[policy][key] for policy in routers], less) for _, key, less in _COLUMNS}
    first = grid.runs(cell, next(iter(means)))[0]

    def order(policy: str) -> tuple[bool, float]:
        mean = means[policy]["ttft_mean_s"]
        return policy in REFERENCES, float("inf") if mean is None else mean

    return {
        "cell": cell,
        "rate": first.get("rate"),
        "requests": grid.mean(cell, next(iter(means)), "requests"),
        "headings": [heading for heading, _, _ in _COLUMNS],
        "metrics": list(Metric),
        "compared": cell in comparison.cells and len(means) > 1,
        "rows": [
            {
                "policy": policy,
                "reference": policy in REFERENCES,
                "figures": [_figure(means[policy][key], best[key], policy in routers) for _, key, _ in _COLUMNS],
                "ratios": [comparison.pair(cell, metric, policy) for metric in Metric],
            }
            for policy in sorted(means, key=order)
        ],
    }


def _best(values: Sequence[float | None], less: bool) -> str:
    """The best of the column as it is written; "" when all are written alike, as nothing is marked then."""
    known = [value for value in values if value is not None]
    if len({words.number(value) for value in known}) < 2:
        return ""
    return words.number(min(known) if less else max(known))


def _figure(value: float | None, best: str, router: bool) -> tuple[float | None, bool]:
    return value, router and words.number(value) == best


def _by_standing(policy: str) -> int:
    """Ours first, references last."""
    return 0 if policy == OURS else 2 if policy in REFERENCES else 1
