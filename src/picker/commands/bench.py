"""`picker bench`: the performance figures of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from picker.bench import machine


@click.group()
def command() -> None:
    """This machine's performance figures, each against its baseline in the same run."""


_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


@command.command()
@click.option("--repeats", default=400, show_default=True, help="Decisions per row.")
@click.option("--seed", default=0, show_default=True)
@_json
def pick(repeats: int, seed: int, as_json: bool) -> None:
    """One whole decision, by number of endpoints and prompt size."""
    from picker.bench.pick import rows

    show("pick", rows(repeats=repeats, seed=seed, progress=_progress), as_json=as_json)


def show(name: str, rows: Iterable[dict[str, Any]], *, as_json: bool) -> None:
    """Print rows as contract JSON, or as a table with the machine below it."""
    found = list(rows)
    where = machine.describe()
    if as_json:
        click.echo(json.dumps({"bench": name, "rows": found, "machine": where}))
        return
    table = Table(title=f"picker bench {name}")
    for key in found[0]:
        table.add_column(key, justify="right")
    for row in found:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console()
    console.print(table)
    console.print(" · ".join(f"{key} {value}" for key, value in where.items()), style="dim")


def _cell(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else "" if value is None else str(value)


def _progress(line: str) -> None:
    Console(stderr=True).print(f"[dim]{line}[/dim]") if Console(stderr=True).is_terminal else None
