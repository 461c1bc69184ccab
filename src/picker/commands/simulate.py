"""`picker simulate`: a workload against modelled pods in virtual time, under one or many policies."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from picker import __version__
from picker.errors import ConfigError
from picker.load import trace
from picker.sim import latency
from picker.sim.bounds import REFERENCES
from picker.sim.capacity import stable_rate
from picker.sim.policies import POLICIES, policy
from picker.sim.result import ratio_interval
from picker.sim.scenario import Scenario, scenario, scenarios, trace_scenario
from picker.sim.trial import Trial, simulate
from picker.sim.workload import SharedPrefix

Row = dict[str, object]

_DEFAULT_POLICIES = "round-robin,least-request,picker"
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


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in (value or "").split(",") if word)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number or several, as in 0.5,0.7") from None
    if any(not number > 0 for number in numbers):
        raise click.BadParameter("must be positive")
    return numbers


@click.command()
@click.option("--scenario", "called", metavar="NAME", help="A scenario by number or name; --list shows them.")
@click.option(
    "--trace", "trace_file", type=click.Path(path_type=Path), metavar="FILE", help="A recorded trace instead."
)
@click.option(
    "--trace-format",
    type=click.Choice([kind.value for kind in trace.TraceFormat]),
    help="[default: by the file's name]",
)
@click.option("--policy", "policies", default=_DEFAULT_POLICIES, show_default=True, metavar="NAME[,NAME...]")
@click.option("--pods", type=click.IntRange(1), metavar="N", help="Modelled pods.  [default: the scenario's]")
@click.option("--model", metavar="PROFILE", help="Model and GPU of the pods.  [default: the scenario's]")
@click.option("--kv-tokens", type=click.IntRange(1), metavar="N", help="KV cache of a pod.  [default: the profile's]")
@click.option(
    "--load",
    "loads",
    callback=_numbers,
    metavar="RHO[,RHO...]",
    help="Load as a share of the highest rate that the pods could stand as one.  [default: the scenario's]",
)
@click.option("--rate-scale", type=float, metavar="X", help="X times the scenario's or trace's own rate.")
@click.option("--limit", type=click.IntRange(1), metavar="REQUESTS", help="Only the first so many requests.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Repeat with N seeds.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="The first of them.")
@click.option("--scrape-interval", type=float, metavar="S", help="How old metrics may be.  [default: the scenario's]")
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Processes.  [default: one per core]")
@click.option("--list", "listing", is_flag=True, help="Name the scenarios, policies and model profiles.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    called: str | None,
    trace_file: Path | None,
    trace_format: str | None,
    policies: str,
    pods: int | None,
    model: str | None,
    kv_tokens: int | None,
    loads: tuple[float, ...],
    rate_scale: float | None,
    limit: int | None,
    seeds: int,
    seed: int,
    scrape_interval: float | None,
    jobs: int | None,
    listing: bool,
    as_json: bool,
) -> None:
    """Simulate a workload on modelled pods in virtual time and compare routing policies.

    The policies are given the same arrivals, lengths and pauses; the policy `picker` is the code that serves traffic.
    Times are seconds of the modelled pods. The same seed gives the same output on every run.

    \b
    picker simulate --scenario agentic --policy round-robin,picker --load 0.5,0.7
    picker simulate --trace conversation_trace.jsonl --pods 8 --model qwen3-32b-2xh100
    """
    if listing:
        _list(as_json=as_json)
        return
    if loads and rate_scale is not None:
        raise ConfigError("--load and --rate-scale both say how much: give one of them")
    if rate_scale is not None and not rate_scale > 0:
        raise ConfigError(f"--rate-scale must be positive, not {rate_scale:g}")
    if scrape_interval is not None and not scrape_interval > 0:
        raise ConfigError(f"--scrape-interval must be positive, not {scrape_interval:g}")
    names = [name for name in policies.split(",") if name]
    for name in names:
        if name not in REFERENCES:
            policy(name)
    chosen = _scenario(called, trace_file, trace_format)
    if model is not None:
        latency.profile(model)
    chosen = chosen.with_pods(count=pods, model=model, kv_tokens=kv_tokens)
    chosen, rates = _rates(chosen, loads, rate_scale, limit)
    trials = [
        Trial(chosen, name, rate, seed=seed + n, load=load, limit=limit, scrape_interval=scrape_interval)
        for load, rate in rates
        for n in range(seeds)
        for name in names
    ]
    runs = _run(trials, jobs or os.cpu_count() or 1)
    if as_json:
        words = shlex.join(["picker", *sys.argv[1:]])
        click.echo(json.dumps({"runs": runs, "version": __version__, "command": words}, allow_nan=False))
    else:
        _print(chosen, runs, names)


# --- what to run ---------------------------------------------------------------------------------------------


def _scenario(called: str | None, trace_file: Path | None, trace_format: str | None) -> Scenario:
    if called is None and trace_file is None:
        raise ConfigError("say what to simulate: --scenario NAME or --trace FILE (--list names scenarios)")
    chosen = scenario(called) if called is not None else trace_scenario()
    if trace_file is None:
        if trace_format is not None:
            raise ConfigError("--trace-format says nothing without --trace")
        return chosen
    rows = trace.load(trace_file, trace.TraceFormat(trace_format) if trace_format else None)
    return chosen.replaying(rows, name=trace_file.name)


def _rates(
    chosen: Scenario, loads: Sequence[float], rate_scale: float | None, limit: int | None
) -> tuple[Scenario, list[tuple[float | None, float]]]:
    """(load, rate) of the runs, and the scenario as it is at one level; a ladder is one unless a load is asked."""
    ladder = isinstance(chosen.workload, SharedPrefix) and bool(chosen.workload.stages)
    if not loads and (rate_scale is not None or ladder or chosen.load is None):
        rate = chosen.rate * (rate_scale or 1.0)
        known = chosen.stable_rate is not None and not ladder
        return chosen, [(round(rate / chosen.stable_rate, 4) if known and chosen.stable_rate else None, rate)]
    chosen = chosen.at_load()
    highest = chosen.stable_rate
    if highest is None:
        with _telling("finding the highest stable rate") as tell:
            highest = stable_rate(
                chosen, limit=limit, on_progress=lambda rate: tell(f"trying {rate:.3g} {chosen.unit}")
            )
        chosen = replace(chosen, stable_rate=highest, stable_source="found for this run")
    assert chosen.load is not None or loads
    return chosen, [(load, load * highest) for load in loads or (chosen.load or 1.0,)]


def _run(trials: Sequence[Trial], jobs: int) -> list[Row]:
    """Run them all, in processes where that helps; results in the order of the trials."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{trials[0].scenario.name}", total=len(trials))

        def advance(row: Row) -> Row:
            bar.advance(task)
            return row

        if jobs == 1 or len(trials) == 1:
            return [advance(simulate(trial)) for trial in trials]
        # Spawned, not forked: libraries' threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(trials)), mp_context=context) as pool:
            return [advance(row) for row in pool.map(simulate, trials)]


@contextmanager
def _telling(what: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what goes on, where somebody watches."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda words: None
        return
    with console.status(what) as status:
        yield lambda words: status.update(f"{what}: {words}")


# --- what to say ---------------------------------------------------------------------------------------------


def _list(*, as_json: bool) -> None:
    known = {number: scenario(number) for number in scenarios()}
    if as_json:
        listed = {
            "scenarios": [{"number": n, "name": s.name, "title": s.title} for n, s in known.items()],
            "policies": [*POLICIES, *REFERENCES],
            "models": list(latency.profiles()),
        }
        click.echo(json.dumps(listed))
        return
    click.echo("scenarios:")
    for number, each in known.items():
        click.echo(f"  {number:<12}{each.name:<22}{each.title}, {each.pods.count} x {each.pods.profile}")
    click.echo("policies:\n  " + ", ".join([*POLICIES, *REFERENCES]))
    click.echo("model profiles:\n  " + "\n  ".join(latency.profiles()))


def _print(chosen: Scenario, runs: Sequence[Row], names: Sequence[str]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)  # not the 80 columns that rich takes a file to have
    for load in dict.fromkeys(run["load"] for run in runs):
        of_load = [run for run in runs if run["load"] == load]
        level = "" if load is None else f", load {load:g}"
        rate = of_load[0]["rate"]
        table = Table(title=f"{chosen.title}{level}: {rate:g} {chosen.unit}", title_justify="left")
        table.add_column("policy")
        table.add_column("requests", justify="right")
        for heading, _, _ in _COLUMNS:
            table.add_column(heading, justify="right")
        if len(names) > 1:
            table.add_column(f"TTFT / {names[0]}", justify="right")
        for name in names:
            table.add_row(*_cells(name, names, of_load))
        console.print(table)


def _cells(name: str, names: Sequence[str], runs: Sequence[Row]) -> list[str]:
    mine = [run for run in runs if run["policy"] == name]
    cells = [name, f"{fmean(_known(mine, 'requests')):.0f}"]
    for _, key, form in _COLUMNS:
        known = _known(mine, key)
        cells.append(form.format(fmean(known)) if len(known) == len(mine) else "-")
    if len(names) > 1:
        cells.append(_against(mine, [run for run in runs if run["policy"] == names[0]]))
    return cells


def _against(mine: Sequence[Row], first: Sequence[Row]) -> str:
    """Mean TTFT over that of the first policy, with its interval where there are seeds to tell."""
    ours, theirs = _known(mine, "ttft_mean_s"), _known(first, "ttft_mean_s")
    if len(ours) != len(theirs) or not ours:
        return "-"
    interval = ratio_interval(ours, theirs, np.random.default_rng(0))
    bounds = f" [{interval.low:.3f}, {interval.high:.3f}]" if len(ours) > 1 else ""
    return f"{interval.ratio:.3f}{bounds}"


def _known(runs: Sequence[Row], key: str) -> list[float]:
    return [float(value) for run in runs if isinstance(value := run[key], (int, float))]
