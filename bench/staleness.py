"""What old metrics cost: the same runs with a scrape every 50 ms and every 5 s.

python bench/staleness.py [--scenario S2 ...] [--policy NAME ...] [--seeds N] [--limit REQUESTS] [--json]

A policy that counts its own work in flight should hardly notice; one that goes by scraped queues suffers.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from picker import __version__
from picker.bench import machine
from picker.errors import ConfigError
from picker.sim.compare import ratio_interval
from picker.sim.policies import policy
from picker.sim.scenario import Scenario, scenario
from picker.sim.trial import Trial, simulate

FRESH, STALE = 0.05, 5.0
# P95 TTFT with stale metrics may be this many times that with fresh ones.
BAR = 1.10


@dataclass(frozen=True, slots=True)
class Question:
    scenario: Scenario
    policy: str
    load: float
    seeds: int
    limit: int | None

    def row(self, console: Console) -> dict[str, object]:
        fresh, stale = self._p95(FRESH, console), self._p95(STALE, console)
        ratio = ratio_interval(stale, fresh, np.random.default_rng(0))
        return {
            "scenario": self.scenario.number,
            "policy": self.policy,
            "load": self.load,
            "ttft_p95_fresh_s": fresh,
            "ttft_p95_stale_s": stale,
            "ratio": round(ratio.ratio, 4),
            "ratio_low": round(ratio.low, 4),
            "ratio_high": round(ratio.high, 4),
        }

    def _p95(self, interval: float, console: Console) -> list[float]:
        """By seed; infinite where more than one request in twenty failed."""
        assert self.scenario.stable_rate is not None
        found = []
        for seed in range(1, self.seeds + 1):
            console.print(
                f"{self.scenario.number} {self.policy}: scrape every {interval:g} s, seed {seed}", style="dim"
            )
            rate = self.load * self.scenario.stable_rate
            run = simulate(
                Trial(self.scenario, self.policy, rate, seed, self.load, self.limit, scrape_interval=interval)
            )
            p95 = run["ttft_p95_s"]
            found.append(float(p95) if isinstance(p95, float) else float("inf"))
        return found


@click.command(help=__doc__)
@click.option("--scenario", "called", multiple=True, default=("S2", "S3", "S4"), show_default=True, metavar="NAME")
@click.option("--policy", "policies", multiple=True, default=("picker", "llm-d-legacy"), show_default=True)
@click.option("--load", type=click.FloatRange(0, min_open=True), default=0.7, show_default=True, metavar="RHO")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, metavar="N")
@click.option("--limit", type=click.IntRange(1), metavar="REQUESTS", help="Only the first so many requests.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    called: Sequence[str], policies: Sequence[str], load: float, seeds: int, limit: int | None, as_json: bool
) -> None:
    console = Console(stderr=True)
    for name in policies:
        policy(name)
    questions = [Question(scenario(number), name, load, seeds, limit) for number in called for name in policies]
    rows = [question.row(console) for question in questions]
    if as_json:
        about = {"version": __version__, "machine": machine.describe(), "command": shlex.join(sys.argv)}
        click.echo(json.dumps({"bench": "staleness", "rows": rows, "seeds": seeds, **about}))
    else:
        show(rows, seeds)


def show(rows: Sequence[dict[str, object]], seeds: int) -> None:
    table = Table(title=f"P95 TTFT, seconds, mean of {seeds} seeds, at commit {machine.describe()['commit']}")
    for heading in ("scenario", "policy", f"scrape {FRESH:g} s", f"scrape {STALE:g} s", "ratio", "95 % interval", ""):
        table.add_column(heading)
    for row in rows:
        fresh, stale = (np.asarray(row[f"ttft_p95_{age}_s"], dtype=float).mean() for age in ("fresh", "stale"))
        interval = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        good = "" if row["policy"] != "picker" else "good" if float(str(row["ratio"])) <= BAR else "BAD"
        cells = (str(row["scenario"]), str(row["policy"]), f"{fresh:.3f}", f"{stale:.3f}", f"{row['ratio']:.3f}")
        table.add_row(*cells, interval, good)
    Console(width=None if Console().is_terminal else 120).print(table)


if __name__ == "__main__":
    try:
        command()
    except ConfigError as error:
        click.echo(f"staleness: {error}", err=True)
        sys.exit(2)
