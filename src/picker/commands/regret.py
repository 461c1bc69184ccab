"""`picker regret`: what single decisions cost against the best that could have been made, and which term was wrong."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from picker import __version__
from picker.commands.numbers import POSITIVE, SEED
from picker.commands.waiting import telling
from picker.errors import ConfigError
from picker.sim import forks
from picker.sim.bounds import REFERENCES
from picker.sim.capacity import stable_rate
from picker.sim.policies import policy
from picker.sim.regret import Case, HitClass, Metric, Plan, Weight, as_rows, summary, weights
from picker.sim.scenario import Scenario, scenario
from picker.sim.trial import Trial

_WIDTH = 140
_WORST = 10
_METRICS = {"ttft": (Metric.TTFT,), "e2e": (Metric.TOTAL,), "both": (Metric.TTFT, Metric.TOTAL)}
_WORDS = {Metric.TTFT: "TTFT", Metric.TOTAL: "TTFT + 0.35 (E2E - TTFT)"}


@click.command()
@click.option("--scenario", "called", required=True, metavar="NAME", help="A scenario by number or name.")
@click.option(
    "--load", type=POSITIVE, metavar="RHO", help="Share of the highest stable rate.  [default: the scenario's]"
)
@click.option("--policy", "policy_name", default="picker", show_default=True, metavar="NAME")
@click.option("--samples", type=click.IntRange(1), default=20, show_default=True, help="Decisions to look at.")
@click.option("--seed", type=SEED, default=1, show_default=True)
@click.option(
    "--horizon", type=POSITIVE, default=60.0, show_default=True, help="Seconds of arrivals after each decision."
)
@click.option(
    "--continuations", type=click.IntRange(1), default=3, show_default=True, help="Futures to follow it into."
)
@click.option("--alternatives", type=click.IntRange(2), metavar="N", help="Only the N endpoints ranked best.  [all]")
@click.option("--pods", type=click.IntRange(2), metavar="N", help="Modelled pods.  [default: the scenario's]")
@click.option("--limit", type=click.IntRange(1), metavar="REQUESTS", help="Only the first so many requests.")
@click.option("--metric", type=click.Choice(list(_METRICS)), default="both", show_default=True)
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Processes.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, with every alternative.")
def command(
    called: str,
    load: float | None,
    policy_name: str,
    samples: int,
    seed: int,
    horizon: float,
    continuations: int,
    alternatives: int | None,
    pods: int | None,
    limit: int | None,
    metric: str,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Force every endpoint in turn at some decisions of a simulation, and compare what came of it.

    Regret is the cost of the chosen endpoint less that of the best, in seconds summed over all requests concerned. The
    best is chosen by some continuations and measured on another, so that luck does not count.

    \b
    picker regret --scenario agentic --load 0.7 --samples 20 --horizon 30
    """
    if policy_name in REFERENCES:
        raise ConfigError(f"{policy_name} is a reference: only policies decide, and can regret it")
    policy(policy_name)
    trial = _trial(scenario(called).with_pods(count=pods), load, policy_name, seed, limit)
    plan = Plan(forks.numbers(trial, samples, horizon), horizon, continuations, alternatives)
    cases = _examine(trial, plan, jobs or os.cpu_count() or 1)
    metrics = _METRICS[metric]
    if as_json:
        click.echo(json.dumps(_document(trial, plan, cases, metrics), allow_nan=False))
    else:
        _print(trial, plan, cases, metrics)


def _trial(chosen: Scenario, load: float | None, name: str, seed: int, limit: int | None) -> Trial:
    chosen = chosen.at_load()
    if load is None and chosen.load is None:
        return Trial(chosen, name, chosen.rate, seed=seed, limit=limit)
    load = load or chosen.load or 1.0
    with telling("finding the highest stable rate") as tell:
        highest = chosen.stable_rate or stable_rate(
            chosen, limit=limit, on_progress=lambda rate: tell(f"trying {rate:.3g} {chosen.unit}")
        )
    return Trial(chosen, name, load * highest, seed=seed, load=load, limit=limit)


def _examine(trial: Trial, plan: Plan, jobs: int) -> list[Case]:
    cases: list[Case] = []
    console = Console(stderr=True)
    # Refreshed by hand: a bar with a thread of its own would be in the middle of something when a child is forked.
    with Progress(console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{trial.scenario.name}", total=len(plan.numbers))

        def found(case: Case) -> None:
            cases.append(case)
            bar.update(task, advance=1, refresh=True)

        forks.examine(trial, plan, jobs=jobs, on_case=found)
    return cases


# --- what to say ---------------------------------------------------------------------------------------------


def _document(trial: Trial, plan: Plan, cases: Sequence[Case], metrics: Sequence[Metric]) -> dict[str, object]:
    return {
        "scenario": trial.scenario.name,
        "policy": trial.policy,
        "load": trial.load,
        "rate": trial.rate,
        "seed": trial.seed,
        "horizon_s": plan.horizon,
        "continuations": plan.continuations,
        "metrics": {metric.value: _figures(cases, metric) for metric in metrics},
        "version": __version__,
        "command": shlex.join(["picker", *sys.argv[1:]]),
    }


def _figures(cases: Sequence[Case], metric: Metric) -> dict[str, object]:
    groups = {name: asdict(summary(group, metric)) for name, group in _groups(cases)}
    rng = np.random.default_rng(0)
    return {
        "classes": {name: {key: _finite(value) for key, value in row.items()} for name, row in groups.items()},
        "weights": {name: asdict(weight) for name, weight in weights(cases, metric, rng).items()},
        "decisions": as_rows(cases, metric),
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _groups(cases: Sequence[Case]) -> list[tuple[str, list[Case]]]:
    groups = [("all", list(cases))]
    groups += [(each.value, [case for case in cases if case.hit_class is each]) for each in HitClass]
    busy = [case for case in cases if case.pods[case.chosen].waiting]
    return [*groups, ("chosen has a queue", busy)]


def _print(trial: Trial, plan: Plan, cases: Sequence[Case], metrics: Sequence[Metric]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    level = "" if trial.load is None else f", load {trial.load:g}"
    console.print(
        f"{trial.scenario.title}{level}: {len(cases)} decisions of {trial.policy}, "
        f"{plan.continuations} futures of {plan.horizon:g} s each",
        highlight=False,
    )
    for metric in metrics:
        console.print(_classes(cases, metric))
        found = weights(cases, metric, np.random.default_rng(0))
        if found:
            console.print(_weights(found))
        worst = [case for case in cases if case.regret(metric) > 0]
        if worst:
            console.print(_worst(worst, metric))


def _classes(cases: Sequence[Case], metric: Metric) -> Table:
    table = Table(title=f"Regret a decision, seconds of {_WORDS[metric]}", title_justify="left")
    table.add_column("decisions where")
    for heading in ("number", "regret", "+/-", "naive", "noise", "clearly wrong"):
        table.add_column(heading, justify="right")
    for name, group in _groups(cases):
        if group:
            found = summary(group, metric)
            figures = (found.regret, 2.0 * found.error, found.naive, found.noise)
            table.add_row(name, str(found.decisions), *(_cell(f) for f in figures), f"{found.wrong:.0%}")
    return table


def _cell(figure: float) -> str:
    """A dash where nothing is known: a single decision has no error."""
    return f"{figure:.2f}" if np.isfinite(figure) else "-"


def _weights(found: Mapping[str, Weight]) -> Table:
    table = Table(title="What a second of each term turned out to cost (1: charged right)", title_justify="left")
    table.add_column("term")
    for heading in ("seconds", "95 % interval", "share of differences", "so it is"):
        table.add_column(heading, justify="right")
    for name, weight in found.items():
        verdict = (
            "charged too low" if weight.low > 1.0 else "charged too high" if weight.high < 1.0 else "not shown wrong"
        )
        interval = f"{weight.low:.2f} .. {weight.high:.2f}"
        table.add_row(name, f"{weight.value:.2f}", interval, f"{weight.share:.0%}", verdict)
    return table


def _worst(cases: Sequence[Case], metric: Metric) -> Table:
    title = "Worst decisions: what the chosen costs more than the best, as thought / in truth, and by term"
    table = Table(title=title, title_justify="left")
    for heading in ("at", "prompt", "class", "regret", "noise"):
        table.add_column(heading, justify="right")
    for heading in ("own first token", "own answer", "others"):
        table.add_column(heading, justify="right")
    table.add_column("terms, chosen - best")
    for case in sorted(cases, key=lambda case: case.regret(metric), reverse=True)[:_WORST]:
        best = case.best(metric)
        parts = (f"{thought:.2f} / {true:.2f}" for thought, true in case.parts(best, metric).values())
        terms = ", ".join(f"{n} {d:+.2f}" for n, d in case.term_differences(best).items() if abs(d) >= 0.005)
        figures = (f"{case.at:.1f}", str(case.prompt_tokens), case.hit_class.value)
        table.add_row(*figures, f"{case.regret(metric):.1f}", f"{case.noise(metric):.1f}", *parts, terms)
    return table
