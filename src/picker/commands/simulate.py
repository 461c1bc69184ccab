"""`picker simulate`: a workload against modelled pods in virtual time, under one or many policies."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import click
from rich.console import Console
from rich.progress import Progress

from picker import __version__
from picker.commands.numbers import POSITIVE, SEED
from picker.commands.waiting import telling
from picker.errors import ConfigError
from picker.load import trace
from picker.load.interrupts import interrupts_held
from picker.sim import latency
from picker.sim.bounds import REFERENCES
from picker.sim.capacity import stable_rate
from picker.sim.policies import POLICIES, policy
from picker.sim.report import saved, terminal
from picker.sim.report.saved import Row, Saved
from picker.sim.scenario import Scenario, scenario, scenarios, trace_scenario
from picker.sim.trial import Trial, simulate, warmup_in_words
from picker.sim.workload import SharedPrefix

_DEFAULT_POLICIES = "round-robin,least-request,picker"


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    try:
        return tuple(POSITIVE.convert(word, None, None) for word in (value or "").split(",") if word)
    except click.BadParameter as error:
        raise click.BadParameter(f"{error.message} It takes one number or several, as in 0.5,0.7.") from None


@click.command()
@click.option(
    "--scenario",
    "called",
    metavar="NAME[,NAME...]",
    help="Scenarios by number or name, or `all`; --list shows them.",
)
@click.option(
    "--trace", "trace_file", type=click.Path(path_type=Path), metavar="FILE", help="A recorded trace instead."
)
@click.option(
    "--trace-format",
    type=click.Choice([kind.value for kind in trace.TraceFormat]),
    help="[default: by name and first line]",
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
@click.option("--rate-scale", type=POSITIVE, metavar="X", help="X times the scenario's or trace's own rate.")
@click.option("--limit", type=click.IntRange(1), metavar="REQUESTS", help="Only the first so many requests.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Repeat with N seeds.")
@click.option("--seed", type=SEED, default=1, show_default=True, help="The first of them.")
@click.option(
    "--scrape-interval", type=POSITIVE, metavar="S", help="How old metrics may be.  [default: the scenario's]"
)
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Processes.  [default: one per core]")
@click.option(
    "--from",
    "saved_files",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Run nothing: show what --json printed before; repeat to join.",
)
@click.option("--report", type=click.Path(path_type=Path), metavar="FILE", help="Write a page of HTML with plots.")
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
    saved_files: tuple[Path, ...],
    report: Path | None,
    listing: bool,
    as_json: bool,
) -> None:
    """Simulate a workload on modelled pods in virtual time and compare routing policies.

    The policies are given the same arrivals, lengths and pauses; the policy `picker` is the code that serves traffic.
    Times are seconds of the modelled pods. The same seed gives the same output on every run.

    \b
    picker simulate --scenario agentic --policy round-robin,picker --load 0.5,0.7
    picker simulate --scenario S2,S3 --load 0.5,0.7 --seeds 5 --json --report report.html > runs.json
    picker simulate --from runs.json --report report.html
    picker simulate --trace conversation_trace.jsonl --pods 8 --model qwen3-32b-2xh100
    """
    if listing:
        _list(as_json=as_json)
        return
    renderer = None if report is None else _renderer(report)
    about: dict[str, tuple[str, str]] = {}
    warmups: dict[str, str] = {}
    if saved_files:
        if called is not None or trace_file is not None:
            raise ConfigError("--from shows runs of before: leave out --scenario and --trace")
        shown = saved.load(saved_files)
    else:
        if loads and rate_scale is not None:
            raise ConfigError("--load and --rate-scale both say how much: give one of them")
        names = _policies(policies)
        settings = [
            _rates(each.with_pods(count=pods, model=model, kv_tokens=kv_tokens), loads, rate_scale, limit)
            for each in _scenarios(called, trace_file, trace_format, model)
        ]
        trials = [
            Trial(chosen, name, rate, seed=seed + n, load=load, limit=limit, scrape_interval=scrape_interval)
            for chosen, rates in settings
            for load, rate in rates
            for n in range(seeds)
            for name in names
        ]
        runs = _run(trials, jobs or os.cpu_count() or 1)
        shown = Saved(runs, (shlex.join(["picker", *sys.argv[1:]]),), (__version__,))
        about |= {chosen.name: (chosen.title, chosen.unit) for chosen, _ in settings}
        warmups |= {chosen.title: words for chosen, _ in settings if (words := warmup_in_words(chosen))}
    _show(shown, about, as_json=as_json)
    if warmups and not as_json:
        click.echo(_footnote(warmups))
    if renderer is not None and report is not None:
        _write(renderer, report, shown)


# --- what to run ---------------------------------------------------------------------------------------------


def _policies(named: str) -> list[str]:
    names = list(dict.fromkeys(name for name in named.split(",") if name))
    for name in names:
        if name not in REFERENCES:
            policy(name)
    if not names:
        raise ConfigError("--policy names none: --list shows them")
    return names


def _scenarios(
    called: str | None, trace_file: Path | None, trace_format: str | None, model: str | None
) -> list[Scenario]:
    """What to run, each once, in the order it was asked for."""
    if called is None and trace_file is None:
        raise ConfigError("say what to simulate: --scenario NAME or --trace FILE (--list names scenarios)")
    if model is not None:
        latency.profile(model)
    words = scenarios() if called == "all" else [word for word in (called or "").split(",") if word]
    named = {found.number: found for found in map(scenario, words)}
    chosen = list(named.values()) or [trace_scenario()]
    if trace_file is None:
        if trace_format is not None:
            raise ConfigError("--trace-format says nothing without --trace")
        return chosen
    if len(chosen) > 1:
        raise ConfigError("--trace replays one trace on one scenario's pods: name one scenario")
    rows = trace.load(trace_file, trace.TraceFormat(trace_format) if trace_format else trace.sniff(trace_file))
    return [chosen[0].replaying(rows, name=trace_file.name)]


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
        with telling("finding the highest stable rate") as tell:
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
        task = bar.add_task("simulating", total=len(trials))

        def advance(row: Row) -> Row:
            bar.advance(task)
            return row

        if jobs == 1 or len(trials) == 1:
            return [advance(simulate(trial)) for trial in trials]
        # Spawned, not forked: libraries' threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(trials)), mp_context=context) as pool, _ended_early():
            with interrupts_held():
                rows = pool.map(simulate, trials)
            return [advance(row) for row in rows]


@contextmanager
def _ended_early() -> Iterator[None]:
    """Ends the processes of a pool at once when the block is left by an error: leaving the pool waits for them.

    The pool has to be left after this block.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise


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
    click.echo("policies (NAME-exact is told by KV events what is cached):\n  " + ", ".join([*POLICIES, *REFERENCES]))
    click.echo("model profiles:\n  " + "\n  ".join(latency.profiles()))


def _show(shown: Saved, about: dict[str, tuple[str, str]], *, as_json: bool) -> None:
    if as_json:
        version, words = ", ".join(shown.versions), "; ".join(shown.commands)
        click.echo(json.dumps({"runs": shown.runs, "version": version, "command": words}, allow_nan=False))
        return
    names = {str(run["scenario"]) for run in shown.runs}
    terminal.show(shown.runs, {name: _about(name) for name in names} | about)


def _footnote(warmups: Mapping[str, str]) -> str:
    """Why a table counts fewer requests than were sent. warmups: by title of the scenario."""
    several = len(warmups) > 1
    parts = [f"{words} ({title})" if several else words for title, words in warmups.items()]
    return f"requests: those measured; what arrives in the warm-up is sent and not counted: {', '.join(parts)}"


def _about(name: str) -> tuple[str, str]:
    """Title and unit of a scenario that runs name; ours alone are known."""
    try:
        known = scenario(name)
    except ConfigError:
        return name, ""
    return known.title, known.unit


def _renderer(file: Path) -> ModuleType:
    """What writes pages. Asked for before anything runs: nobody should wait to be told that it cannot."""
    if not file.parent.is_dir():
        raise ConfigError(f"--report {file}: there is no folder {file.parent}")
    try:
        from picker.sim.report import page
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("jinja2", "matplotlib"):
            raise
        raise ConfigError(f"--report needs {error.name}: pip install matplotlib jinja2") from None
    return page


def _write(renderer: ModuleType, file: Path, shown: Saved) -> None:
    names = dict.fromkeys(str(run["scenario"]) for run in shown.runs)
    origin = renderer.Origin(f"picker simulate: {', '.join(names)}", shown.commands, shown.versions)
    try:
        file.write_text(renderer.render(shown.runs, origin), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--report {file}: {error.strerror}") from None
    click.echo(f"wrote {file}", err=True)
