"""Hold the simulator against published measurements and queueing theory: `python bench/validation.py [--case NAME]`.

Prints one line a figure and exits with 1 when one is outside. Mooncake's conversation trace is looked for in the folder
that PICKER_TRACES names; without it the case that needs it is skipped, and said to be.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from picker.load.trace import load
from picker.sim.validation import Row, cases
from picker.sim.workload import Recorded

_TRACE = "mooncake_conversation.jsonl"
_WIDTH = 120


@click.command()
@click.option(
    "--case", "wanted", multiple=True, metavar="NAME", help="Only this, or all that begin so; may be repeated."
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Of random arrivals.")
@click.option("--list", "listing", is_flag=True, help="Name the cases.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(wanted: tuple[str, ...], seeds: int, listing: bool, as_json: bool) -> None:
    """Compare what the simulator says with what has been measured or proved."""
    chosen = [name for name in cases() if not wanted or name.startswith(wanted)]
    if not chosen:
        raise click.BadParameter(f"no case begins with {' or '.join(wanted)}; there are {', '.join(cases())}")
    if listing:
        click.echo("\n".join(chosen))
        return
    trace = _trace()
    rows: list[Row] = []
    for name in chosen:
        found = cases()[name](seeds, trace)
        if not found:
            click.echo(f"{name}: skipped, PICKER_TRACES names no folder with {_TRACE}", err=True)
            continue
        if not as_json:
            _print(name, found)
        rows += found
    if as_json:
        click.echo(json.dumps({"seeds": seeds, "rows": [_plain(row) for row in rows]}, allow_nan=False))
    sys.exit(0 if all(row.ok for row in rows) else 1)


def _trace() -> Sequence[Recorded] | None:
    folder = os.environ.get("PICKER_TRACES")
    path = Path(folder) / _TRACE if folder else None
    return load(path) if path is not None and path.exists() else None


def _plain(row: Row) -> dict[str, object]:
    numbers = {**asdict(row), "ratio": row.ratio, "ok": row.ok}
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in numbers.items()}


def _print(name: str, rows: Sequence[Row]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    outside = sum(not row.ok for row in rows)
    table = Table(title=f"{name}: {len(rows) - outside} of {len(rows)} within", title_justify="left")
    table.add_column("figure")
    for heading in ("published", "modelled", "low", "high", "ratio", "allowed", ""):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = [f"{value:,.5g}" for value in (row.published, row.modelled, row.low, row.high)]
        allowed = "interval" if row.allowed is None else f"{row.allowed:.2g}"
        table.add_row(row.figure, *numbers, f"{row.ratio:.3f}", allowed, "" if row.ok else "OUTSIDE")
    console.print(table)


if __name__ == "__main__":
    main()
