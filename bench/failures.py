"""What every incident of the failure scenario cost, by policy: requests lost, and how soon all was well again.

python bench/failures.py [--policy NAME ...] [--seeds N] [--load RHO] [--patience S] [--json]

Outcomes of all seeds are looked at together: incidents come at the same times in each. Windows are 20 s of arrivals.
Recovered is when P95 TTFT is within 20 % of the minute before, or of the same window of a run without incidents where
that is higher: the load comes in bursts.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import click
from rich.console import Console
from rich.table import Table

from picker import __version__
from picker.bench import machine
from picker.errors import ConfigError
from picker.sim.cluster import Outcome, Patience
from picker.sim.policies import policy
from picker.sim.recovery import joined, level, losses, recovery
from picker.sim.scenario import Scenario, scenario
from picker.sim.trial import Trial

POLICIES = ("round-robin", "least-request", "llm-d-legacy", "llm-d-affinity", "picker")
_FILLING_S = 100.0
Row = dict[str, object]


def rows_of(failing: Scenario, name: str, outcomes: Sequence[Outcome], undisturbed: Sequence[Outcome]) -> list[Row]:
    """One row for each moment at which something happens, up to the next."""
    moments = sorted({incident.at for incident in failing.incidents})
    end = max(outcome.at for outcome in outcomes)
    pods = failing.pods.count
    rows: list[Row] = []
    for at, until in zip(moments, [*moments[1:], end], strict=True):
        happens = [incident for incident in failing.incidents if incident.at == at]
        newcomers = {incident.pod for incident in happens if incident.trouble.value in ("join", "revive")}
        pods += sum(incident.trouble.value == "join" for incident in happens)
        found = recovery(outcomes, at, level(outcomes, at - 60.0, at), until=until, undisturbed=undisturbed)
        row: Row = {"policy": name, "at": at, "until": until}
        row["what"] = ", ".join(f"{incident.trouble.value} {incident.pod}" for incident in happens)
        lost = losses(outcomes, at, until)
        row |= {"lost": lost.lost, "savable": lost.savable, "unsavable": lost.unsavable}
        row |= {
            f"ttft_p95_{key}_s" if key != "seconds" else "recovery_s": value for key, value in asdict(found).items()
        }
        if newcomers:
            # Filling up goes on while the next thing happens.
            filled = joined(outcomes, newcomers, pods, at, until=min(at + _FILLING_S, end))
            row |= asdict(filled) | {"newcomers": sorted(newcomers)}
            row["fair_share_s"] = row.pop("seconds")
        rows.append({key: _finite(value) for key, value in row.items()})
    return rows


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def outcomes_of(
    failing: Scenario, name: str, load: float, seeds: int, console: Console, patience: Patience | None
) -> list[Outcome]:
    assert failing.stable_rate is not None
    found: list[Outcome] = []
    for seed in range(1, seeds + 1):
        trouble = f"{len(failing.events)} incidents" if failing.events else "undisturbed"
        console.print(f"{failing.number} {name}: {trouble}, seed {seed}", style="dim")
        found += Trial(failing, name, load * failing.stable_rate, seed, load, patience=patience).run()
    return found


@click.command(help=__doc__)
@click.option("--scenario", "called", default="S7", show_default=True, metavar="NAME")
@click.option("--policy", "policies", multiple=True, default=POLICIES, show_default=True, metavar="NAME")
@click.option("--load", type=click.FloatRange(0, min_open=True), default=0.7, show_default=True, metavar="RHO")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, metavar="N")
@click.option(
    "--patience",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Ask again elsewhere when an endpoint says nothing for S seconds beyond the expected.  [default: wait]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    called: str, policies: Sequence[str], load: float, seeds: int, patience: float | None, as_json: bool
) -> None:
    bound = None if patience is None else Patience(patience)
    console, failing = Console(stderr=True), scenario(called)
    if not failing.events or failing.stable_rate is None:
        raise click.UsageError(f"nothing happens in {called}, or its stable rate is not known: try S7")
    for name in policies:
        policy(name)
    rows: list[Row] = []
    for name in policies:
        outcomes = outcomes_of(failing, name, load, seeds, console, bound)
        undisturbed = outcomes_of(replace(failing, events=()), name, load, seeds, console, bound)
        rows += rows_of(failing, name, outcomes, undisturbed)
    if as_json:
        about = {"version": __version__, "machine": machine.describe(), "command": shlex.join(sys.argv)}
        click.echo(
            json.dumps(
                {"bench": "failures", "rows": rows, "load": load, "seeds": seeds, "patience_s": patience, **about}
            )
        )
    else:
        show(rows, f"{failing.title}; load {load:g}, seeds 1 to {seeds}, commit {machine.describe()['commit']}")


def show(rows: Sequence[Row], title: str) -> None:
    columns = [
        *("policy", "at", "what", "lost", "savable", "unsavable", "ttft_p95_before_s", "ttft_p95_worst_s"),
        *("ttft_p95_undisturbed_s", "recovery_s", "fair_share_s", "hit_before", "hit_worst"),
    ]
    table = Table(title=title)
    for column in columns:
        table.add_column(column.removeprefix("ttft_").removesuffix("_s").replace("_", " "))
    for row in rows:
        table.add_row(*(_cell(row, column) for column in columns), end_section=row["until"] == rows[-1]["until"])
    Console(width=None if Console().is_terminal else 180).print(table)


def _cell(row: Row, column: str) -> str:
    if column not in row:
        return ""
    match row[column]:
        case None:
            return "never" if column in ("recovery_s", "fair_share_s") else "-"
        case float(value) if column.startswith(("ttft", "hit")):
            return f"{value:.3f}"
        case float(value):
            return f"{value:g}"
        case value:
            return str(value)


if __name__ == "__main__":
    try:
        command()
    except ConfigError as error:
        click.echo(f"failures: {error}", err=True)
        sys.exit(2)
