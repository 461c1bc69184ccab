"""The same load on 8, 100 and 1,000 pods: how good the decisions stay, and how long the simulation takes.

python bench/scale.py [--pods N ...] [--policy NAME] [--load RHO] [--seconds S] [--json]

The workload is that of S8, its rate the same share of what the pods could stand as one. Fewer pods run more often, with
a seed of their own each time, so that every row rests on many requests. The first half of a run warms the caches.
"""

from __future__ import annotations

import json
import math
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import click
from rich.console import Console
from rich.table import Table

from picker import __version__
from picker.bench import machine
from picker.errors import ConfigError
from picker.sim.cluster import Outcome
from picker.sim.policies import policy
from picker.sim.result import figures
from picker.sim.scenario import Scenario, scenario
from picker.sim.sessions import Sessions
from picker.sim.trial import Trial

_MOST_RUNS = 20
_KEYS = ("requests", "failed", "ttft_mean_s", "ttft_p95_s", "ttft_p99_s", "hit_ratio", "picks_max_over_mean")
Row = dict[str, object]


def row(sized: Scenario, name: str, load: float, seconds: float, console: Console, *, runs: int) -> Row:
    assert sized.stable_rate is not None
    started, measured = time.process_time(), []
    asked = 0
    for seed in range(1, runs + 1):
        console.print(f"{sized.pods.count} pods, {name}: seed {seed} of {runs}", style="dim")
        outcomes: list[Outcome] = Trial(sized, name, load * sized.stable_rate, seed, load).run()
        asked += len(outcomes)
        measured += [outcome for outcome in outcomes if outcome.at >= seconds / 2.0]
    cpu = time.process_time() - started
    found = figures(measured, pods=sized.pods.count)
    about: Row = {"pods": sized.pods.count, "policy": name, "load": load, "seeds": runs}
    about |= {key: found[key] for key in _KEYS}
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0  # of the process so far
    return about | {
        "cpu_s": round(cpu, 1),
        "cpu_ms_per_request": round(1e3 * cpu / asked, 3),
        "rss_mb": round(megabytes),
    }


@click.command(help=__doc__)
@click.option("--pods", type=click.IntRange(1), multiple=True, default=(8, 100, 1000), show_default=True, metavar="N")
@click.option("--policy", "name", default="picker", show_default=True, metavar="NAME")
@click.option("--load", type=click.FloatRange(0, min_open=True), default=0.7, show_default=True, metavar="RHO")
@click.option("--seconds", type=click.FloatRange(1), default=200.0, show_default=True, metavar="S", help="Of a run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(pods: Sequence[int], name: str, load: float, seconds: float, as_json: bool) -> None:
    console, thousand = Console(stderr=True), scenario("S8")
    policy(name)
    assert isinstance(thousand.workload, Sessions)
    longer = replace(thousand, workload=replace(thousand.workload, seconds=seconds))
    rows = [
        row(
            longer.with_pods(count=count),
            name,
            load,
            seconds,
            console,
            runs=min(_MOST_RUNS, math.ceil(max(pods) / count)),
        )
        for count in sorted(pods)
    ]
    if as_json:
        about = {"version": __version__, "machine": machine.describe(), "command": shlex.join(sys.argv)}
        click.echo(json.dumps({"bench": "scale", "rows": rows, "seconds": seconds, **about}))
    else:
        show(rows, f"Agentic sessions for {seconds:g} s at load {load:g}, commit {machine.describe()['commit']}")


def show(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "policy" else "right")
    for found in rows:
        table.add_row(
            *(
                "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
                for value in found.values()
            )
        )
    Console(width=None if Console().is_terminal else 160).print(table)


if __name__ == "__main__":
    try:
        command()
    except ConfigError as error:
        click.echo(f"scale: {error}", err=True)
        sys.exit(2)
