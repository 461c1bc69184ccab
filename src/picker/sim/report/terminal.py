"""Runs as tables in a terminal, one for each scenario and load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from rich.console import Console
from rich.table import Table

from picker.sim.compare import Cell, Grid, Metric, pair
from picker.sim.report import words

Row = Mapping[str, object]

_WIDTH = 140
# Columns of the table: heading, key, format.
_COLUMNS = (
    ("failed", "failed", "{:.0f}"),
    ("TTFT mean", "ttft_mean_s", "{:.3f}"),
    ("P95", "ttft_p95_s", "{:.3f}"),
    ("P99", "ttft_p99_s", "{:.3f}"),
    ("E2E mean", "e2e_mean_s", "{:.2f}"),
    ("TPOT", "tpot_mean_s", "{:.4f}"),
    ("hit", "hit_ratio", "{:.3f}"),
    ("out tok/s", "output_tokens_per_s", "{:.0f}"),
)


def show(runs: Sequence[Row], about: Mapping[str, tuple[str, str]]) -> None:
    """Print them. about: title and unit of rates of each scenario by name; one that is missing goes by its name."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)  # not the 80 columns that rich takes a file to have
    grid = Grid(runs)
    for cell in grid.cells:
        title, unit = about.get(cell.scenario, (cell.scenario, ""))
        console.print(_table(grid, cell, title, unit))


def _table(grid: Grid, cell: Cell, title: str, unit: str) -> Table:
    names = grid.policies_of(cell)
    level = "" if cell.load is None else f", load {cell.load:g}"
    rate = grid.runs(cell, names[0])[0].get("rate")
    speed = f": {rate:g} {unit}" if isinstance(rate, (int, float)) else ""
    table = Table(title=f"{title}{level}{speed}", title_justify="left")
    table.add_column("policy")
    table.add_column("requests", justify="right")
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    if len(names) > 1:
        table.add_column(f"TTFT / {names[0]}", justify="right")
    for name in names:
        table.add_row(*_cells(grid, cell, name, names))
    return table


def _cells(grid: Grid, cell: Cell, name: str, names: Sequence[str]) -> list[str]:
    runs = grid.runs(cell, name)
    cells = [name, f"{fmean(_known(runs, 'requests')):.0f}"]
    for _, key, form in _COLUMNS:
        known = _known(runs, key)
        cells.append(form.format(fmean(known)) if len(known) == len(runs) else "-")
    if len(names) > 1:
        cells.append(_against(grid, cell, name, names[0]))
    return cells


def _against(grid: Grid, cell: Cell, name: str, first: str) -> str:
    """Mean TTFT over that of the first policy, with its interval where there are seeds to tell."""
    return words.ratio(pair(grid, cell, Metric.TTFT_MEAN, first, np.random.default_rng(0), ours=name).interval)


def _known(runs: Sequence[Row], key: str) -> list[float]:
    return [float(value) for run in runs if isinstance(value := run.get(key), (int, float))]
