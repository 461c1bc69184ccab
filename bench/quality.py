"""The grid behind the published result: every scenario, load, seed and policy in virtual time, then what it says.

    python bench/quality.py --out DIR --seeds 11-15 --seeds-of S1=11-20 --loads 0.5,0.7 --loads-of S1=own,0.7
    python bench/quality.py --out DIR --summary

Each run is a line of DIR/runs.jsonl as soon as it is done; one that is there is not run again, so a grid may be stopped
and grown. The summary is DIR/summary.md, which holds every figure against its bar, and DIR/report.html.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np

from picker import __version__
from picker.bench import machine
from picker.errors import ConfigError
from picker.sim.bounds import REFERENCES
from picker.sim.capacity import stable_rate
from picker.sim.compare import Cell, Comparison, Grid, Interval, Metric, Overall, floor_distance, gap_closed, pair
from picker.sim.policies import POLICIES, TOLD, policy
from picker.sim.report import words
from picker.sim.scenario import Scenario, scenario
from picker.sim.trial import Trial, simulate

Row = dict[str, Any]
Key = tuple[str, float | None, int, str]

# A load that is written so is the scenario's own rate, or its ladder of rates.
OWN = "own"
_HOW = """Ratios are picker / other, of means over the seeds both ran with, [95 % paired bootstrap interval]; below 1
picker is faster. A cell is a scenario at a load; its best peer is chosen for each metric; references are no peers.
Stable: under the best policy the wait grows by less than 0.01 s/s. Failed requests are left out of means and
infinitely late in percentiles; a policy that failed more of them than picker is no best peer."""
_SCENARIOS = "S1,S2,S2-tight,S3,S4,S4-offload,S5,S6,S6-split,S7"


def key(row: Mapping[str, Any]) -> Key:
    return row["scenario"], row["load"], row["seed"], row["policy"]


# --- what to run ---------------------------------------------------------------------------------------------


def seeds(text: str) -> list[int]:
    """ "11-13,20" as 11, 12, 13, 20."""
    try:
        bounds = [[int(number) for number in part.split("-", 1)] for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"seeds {text!r}: write them as 11-15 or 11,12") from None
    return [seed for part in bounds for seed in range(part[0], part[-1] + 1)]


def loads(text: str) -> list[float | None]:
    """ "own,0.5" as None, 0.5."""
    try:
        return [None if word == OWN else float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"loads {text!r}: write them as 0.5,0.7 or {OWN}") from None


def special(given: Iterable[str]) -> dict[str, str]:
    """ "S1=11-20" and the like as scenario name -> the rest."""
    pairs = [word.partition("=") for word in given]
    for called, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"{called!r}: write SCENARIO=VALUES")
    return {scenario(called).name: rest for called, _, rest in pairs}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a grid consists of. seeds_of and loads_of: by scenario name, in place of the common ones."""

    scenarios: tuple[Scenario, ...]
    policies: tuple[str, ...]
    seeds: str
    loads: str
    seeds_of: Mapping[str, str]
    loads_of: Mapping[str, str]
    limit: int | None = None

    def trials(self) -> list[Trial]:
        """Seed by seed, so that a grid that is stopped has something to say of every cell."""
        found = [
            (seed, trial)
            for chosen in self.scenarios
            for load in loads(self.loads_of.get(chosen.name, self.loads))
            for level, rate in [_level(chosen, load)]
            for seed in seeds(self.seeds_of.get(chosen.name, self.seeds))
            for name in self.policies
            for trial in [Trial(level, name, rate, seed=seed, load=load, limit=self.limit)]
        ]
        return [trial for _, trial in sorted(found, key=lambda item: item[0])]


def _level(chosen: Scenario, load: float | None) -> tuple[Scenario, float]:
    """The scenario at that load and its rate."""
    if load is None:
        return chosen, chosen.rate
    chosen = chosen.at_load()
    if chosen.stable_rate is None:
        chosen = replace(chosen, stable_rate=_measured(chosen.name))
    assert chosen.stable_rate is not None
    return chosen, load * chosen.stable_rate


@functools.cache
def _measured(name: str) -> float:
    """The stable rate of a scenario whose file does not say it."""
    _say(f"{name}: finding its highest stable rate")
    return stable_rate(scenario(name).at_load())


# --- running -------------------------------------------------------------------------------------------------


def stored(folder: Path) -> dict[Key, Row]:
    """The runs of DIR/runs.jsonl; of two of one key the later counts, and a line cut short does not."""
    file = folder / "runs.jsonl"
    found: dict[Key, Row] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[key(row)] = row
    return found


def timed(trial: Trial) -> Row:
    """The run's row and how many seconds it took here."""
    started = time.perf_counter()
    row = simulate(trial)
    return {**row, "wall_s": round(time.perf_counter() - started, 2)}


def run(trials: Sequence[Trial], folder: Path, jobs: int) -> None:
    """Run them all; each is written when it is done. An interruption leaves what was done."""
    commit = machine.describe()["commit"]
    progress = Progress(trials, jobs)
    with (folder / "runs.jsonl").open("a", encoding="utf-8") as file:
        if file.tell() and not (folder / "runs.jsonl").read_bytes().endswith(b"\n"):
            file.write("\n")
        for trial, row in _done(trials, jobs):
            file.write(json.dumps({**row, "commit": commit}, allow_nan=False) + "\n")
            file.flush()
            progress.done(trial, row["wall_s"])


def _done(trials: Sequence[Trial], jobs: int) -> Iterator[tuple[Trial, Row]]:
    if jobs == 1:
        yield from ((trial, timed(trial)) for trial in trials)
        return
    # Spawned, not forked: libraries' threads do not survive a fork.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        running = {pool.submit(timed, trial): trial for trial in trials}
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class Progress:
    """Says on stderr what is done and how long the rest may take, by what runs of the same scenario took."""

    def __init__(self, trials: Sequence[Trial], jobs: int, say: Callable[[str], None] | None = None) -> None:
        self._left = [trial.scenario.name for trial in trials]
        self._total, self._jobs = len(trials), jobs
        self._took: dict[str, list[float]] = {}
        self._say = say or _say

    def done(self, trial: Trial, seconds: float) -> None:
        self._left.remove(trial.scenario.name)
        self._took.setdefault(trial.scenario.name, []).append(seconds)
        load = OWN if trial.load is None else f"{trial.load:g}"
        self._say(
            f"{self._total - len(self._left)}/{self._total} {trial.scenario.name} at {load}, seed {trial.seed}, "
            f"{trial.policy}: {seconds:.1f} s; about {self.remaining() / 60:.0f} min left"
        )

    def remaining(self) -> float:
        """Seconds."""
        known = {name: fmean(times) for name, times in self._took.items()}
        typical = fmean(known.values())
        return sum(known.get(name, typical) for name in self._left) / self._jobs


def _say(line: str) -> None:
    click.echo(line, err=True)


# --- bars ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise. value is to be at most `limit`, or at least where `least`; None: the runs for it are missing.

    goal: a harder limit that is wished for. where: the cell or policy that the value is of.
    """

    name: str
    value: float | None
    limit: float
    interval: Interval | None = None
    goal: float | None = None
    where: str = ""
    least: bool = False

    def reaches(self, limit: float) -> bool:
        return self.value is not None and (self.value >= limit if self.least else self.value <= limit)

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not run"
        apart = abs(self.value - self.limit) / self.limit
        goal = ", goal reached" if self.goal is not None and self.reaches(self.goal) else ""
        noise = ", within noise" if self.interval and self.interval.low < self.limit < self.interval.high else ""
        return f"{'met' if self.reaches(self.limit) else '**missed**'} by {100 * apart:.1f} %{goal}{noise}"


def bars(comparison: Comparison) -> list[Bar]:
    """Every promise about routing quality, with what the runs say of it."""
    return [
        *_against_best(comparison),
        *_against_each(comparison),
        _worst("S5: mean TTFT / best policy, worst stable load", _ratios(comparison, "S5", None), 0.92),
        _worst("S2 at load 0.5-0.7: mean TTFT / round-robin", _ratios(comparison, "S2", "round-robin", 0.5, 0.7), 0.65),
        _bursts(comparison),
        _hits(comparison),
        *_bounds(comparison),
    ]


def _against_best(comparison: Comparison) -> Iterator[Bar]:
    limits = {Metric.TTFT_MEAN: (1.0, None), Metric.TTFT_P95: (1.0, None), Metric.E2E_MEAN: (0.96, 0.90)}
    summaries = {metric: comparison.against_best(metric, comparison.stable) for metric in Metric}
    for metric, (limit, goal) in limits.items():
        yield _geometric(f"{metric.title} / best peer, stable cells, geometric mean", summaries[metric], limit, goal)
    for metric, summary in summaries.items():
        ratios = [(f"{p.cell} ({p.other})", p.interval) for p in summary.pairs if p.interval is not None]
        yield replace(_worst(f"{metric.title} / best peer, worst stable cell", ratios, 1.10), goal=1.02)


def _against_each(comparison: Comparison) -> Iterator[Bar]:
    for peer in comparison.peers:
        summary = comparison.against(peer, Metric.TTFT_MEAN, comparison.stable)
        yield _geometric(f"mean TTFT / {peer}, stable cells, geometric mean", summary, 0.85, 0.75)


def _geometric(name: str, summary: Overall, limit: float, goal: float | None) -> Bar:
    interval = summary.interval
    where = f"{len(summary.pairs)} cells"
    return Bar(name, None if interval is None else interval.ratio, limit, interval, goal, where)


def _worst(name: str, ratios: Sequence[tuple[str, Interval]], limit: float) -> Bar:
    if not ratios:
        return Bar(name, None, limit)
    where, interval = max(ratios, key=lambda item: item[1].ratio)
    return Bar(name, interval.ratio, limit, interval, where=where)


def _ratios(
    comparison: Comparison, number: str, other: str | None, low: float = 0.0, high: float = 1.0
) -> list[tuple[str, Interval]]:
    """Mean TTFT in the stable cells of a scenario between two loads, over another policy's; None: the best peer's."""
    pairs = [
        comparison.best(cell, Metric.TTFT_MEAN) if other is None else comparison.pair(cell, Metric.TTFT_MEAN, other)
        for cell in _cells(comparison, number)
        if cell in comparison.stable and cell.load is not None and low <= cell.load <= high
    ]
    return [(f"{p.cell} ({p.other})", p.interval) for p in pairs if p is not None and p.interval is not None]


def _bursts(comparison: Comparison) -> Bar:
    """The stable load of S3 at which the worse of two ratios is best."""
    worse = []
    for cell in _cells(comparison, "S3"):
        pairs = [comparison.pair(cell, Metric.TTFT_P95, other) for other in ("round-robin", "least-request")]
        known = [p for p in pairs if p is not None and p.interval is not None]
        if cell in comparison.stable and len(known) == len(pairs):
            worse.append(max(known, key=lambda p: p.ratio))
    name = "S3: P95 TTFT / round-robin and least-request, at the best stable load"
    if not worse:
        return Bar(name, None, 0.48)
    best = min(worse, key=lambda p: p.ratio)
    return Bar(name, best.ratio, 0.48, best.interval, where=f"{best.cell} ({best.other})")


def _hits(comparison: Comparison) -> Bar:
    """picker's hit ratio in the stable cell where round-robin's is nearest to 0.35."""
    grid = comparison.grid
    hits = [
        (cell, ours, theirs)
        for cell in comparison.stable
        if (ours := grid.mean(cell, "picker", "hit_ratio")) is not None
        and (theirs := grid.mean(cell, "round-robin", "hit_ratio")) is not None
    ]
    name = "hit ratio where round-robin's is about 0.35"
    if not hits:
        return Bar(name, None, 0.80, least=True)
    cell, ours, theirs = min(hits, key=lambda item: abs(item[2] - 0.35))
    return Bar(name, ours, 0.80, where=f"{cell} (round-robin {theirs:.3f})", least=True)


def _bounds(comparison: Comparison) -> Iterator[Bar]:
    """Distance to the references on S1 to S5."""
    grid = comparison.grid
    cells = [cell for number in ("S1", "S2", "S3", "S4", "S5") for cell in _cells(comparison, number)]
    gaps = [
        (gap, str(cell)) for cell in cells if cell in comparison.stable and (gap := gap_closed(grid, cell)) is not None
    ]
    gap, where = min(gaps, default=(None, ""))
    yield Bar("S1-S5: gap round-robin to pooled-FCFS closed, worst stable cell", gap, 0.95, where=where, least=True)
    light = [cell for cell in cells if cell.load is not None and cell.load <= 0.7]
    distances = [(far, str(cell)) for cell in light if (far := floor_distance(grid, cell)) is not None]
    far, where = max(distances, default=(None, ""))
    yield Bar("S1-S5 up to load 0.7: mean TTFT / floor, worst cell", far, 1.3, where=where)


def _cells(comparison: Comparison, number: str) -> list[Cell]:
    name = scenario(number).name
    return [cell for cell in comparison.cells if cell.scenario == name]


# --- the summary ---------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row], made: Mapping[str, Sequence[str]]) -> str:
    """The page in Markdown. made: what -> how, such as commands and machines."""
    comparison = Comparison(Grid(rows), np.random.default_rng(0))
    sections = [
        "# Routing quality in virtual time",
        "\n".join(f"- {what}: {'; '.join(how)}" for what, how in (*made.items(), *_facts(rows).items())),
        _HOW,
        "## Bars",
        _table(("bar", "limit", "goal", "figure", "result", "where"), map(_bar, bars(comparison))),
        f"## Every cell\n\n{len(comparison.stable)} of {len(comparison.cells)} are stable.",
        _table(
            ("cell", "queue", "seeds", *(m.title for m in Metric), "gap closed", "x floor"),
            (_cell(cell, comparison) for cell in comparison.cells),
        ),
        "## Against each policy, geometric mean over stable cells",
        _table(
            ("policy", *(m.title for m in Metric)),
            (
                (peer, *(words.ratio(comparison.against(peer, m, comparison.stable).interval) for m in Metric))
                for peer in comparison.peers
            ),
        ),
    ]
    if known := list(_knowledge(comparison.grid)):
        head = ("cell", "policy", *(f"{m.title}, exact / approximate" for m in Metric), "hit ratio", "with exact")
        sections += ["## What exact knowledge of the caches buys each policy", _table(head, known)]
    for title, column in (
        *((m.title + ", s", m.value) for m in Metric),
        ("hit ratio", "hit_ratio"),
        ("failed", "failed"),
    ):
        sections += [f"## {title[0].upper()}{title[1:]}", _figures(comparison.grid, column)]
    return "\n\n".join(sections) + "\n"


def _knowledge(grid: Grid) -> Iterator[tuple[str, ...]]:
    """Every policy that ran both by what it guesses of the caches and by what the engines tell."""
    rng = np.random.default_rng(0)
    for cell in grid.cells:
        for name in grid.policies_of(cell):
            exact = name + TOLD
            if grid.seeds(cell, name, exact):
                ratios = [words.ratio(pair(grid, cell, metric, name, rng, ours=exact).interval) for metric in Metric]
                hits = [words.number(grid.mean(cell, each, "hit_ratio")) for each in (name, exact)]
                yield str(cell), name, *ratios, *hits


def _facts(rows: Sequence[Row]) -> dict[str, list[str]]:
    commits = sorted({str(row.get("commit")) for row in rows})
    return {
        "picker": [f"{__version__} at commit {', '.join(commits)}"],
        "seeds": [words.seeds([row["seed"] for row in rows])],
        "runs": [str(len(rows))],
    }


def _bar(bar: Bar) -> tuple[str, ...]:
    sign = ">=" if bar.least else "<="
    figure = words.ratio(bar.interval) if bar.interval is not None else words.number(bar.value)
    goal = "" if bar.goal is None else f"{sign} {bar.goal:.2f}"
    return bar.name, f"{sign} {bar.limit:.2f}", goal, figure, bar.verdict, bar.where


def _cell(cell: Cell, comparison: Comparison) -> tuple[str, ...]:
    best = [comparison.best(cell, metric) for metric in Metric]
    gap = gap_closed(comparison.grid, cell)
    return (
        str(cell),
        "stable" if cell in comparison.stable else "grows",
        words.seeds(comparison.grid.seeds(cell, comparison.ours)),
        *("–" if p is None else f"{words.ratio(p.interval)} {p.other}" for p in best),
        "–" if gap is None else f"{100 * gap:.1f} %",
        words.number(floor_distance(comparison.grid, cell)),
    )


def _figures(grid: Grid, column: str) -> str:
    rows = (
        (str(cell), *(words.number(grid.mean(cell, name, column)) for name in grid.policies)) for cell in grid.cells
    )
    return _table(("cell", *grid.policies), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summarise(folder: Path) -> None:
    rows = sorted(stored(folder).values(), key=lambda row: (row["scenario"], row["load"] or 0.0))
    if not rows:
        raise ConfigError(f"{folder}: holds no runs yet")
    made = _made(folder)
    (folder / "summary.md").write_text(summary(rows, made), encoding="utf-8")
    try:
        from picker.sim.report.page import Origin, render
    except ModuleNotFoundError as error:
        raise ConfigError(f"summary.md is written; report.html needs {error.name}: the extra `report`") from None
    lines = [(what, "; ".join(how)) for what, how in (*made.items(), *_facts(rows).items()) if what == "machine"]
    origin = Origin(
        "Routing quality in virtual time", tuple(made.get("command", ())), tuple(_facts(rows)["picker"]), tuple(lines)
    )
    (folder / "report.html").write_text(render(rows, origin), encoding="utf-8")


def _made(folder: Path) -> dict[str, list[str]]:
    """What is known of how the runs of a folder were made."""
    file = folder / "made.json"
    found: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _remember(folder: Path) -> None:
    about = machine.describe()
    text = f"{about['cores']} cores of {about['cpu']}, {about['system']}, Python {about['python']}"
    made = _made(folder)
    for what, how in (("command", shlex.join(["python", *sys.argv])), ("machine", text)):
        made[what] = list(dict.fromkeys([*made.get(what, []), how]))
    (folder / "made.json").write_text(json.dumps(made, indent=1), encoding="utf-8")


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR")
@click.option("--scenarios", "called", default=_SCENARIOS, show_default=True, metavar="NAME[,NAME...]")
@click.option("--policies", default=",".join([*POLICIES, *REFERENCES]), show_default=True, metavar="NAME[,NAME...]")
@click.option("--seeds", "common_seeds", default="11-15", show_default=True, metavar="FROM-TO")
@click.option("--seeds-of", multiple=True, metavar="SCENARIO=FROM-TO", help="Other seeds for one scenario.")
@click.option("--loads", "common_loads", default="0.5,0.7,0.85,0.95", show_default=True, metavar="RHO[,RHO...]")
@click.option("--loads-of", multiple=True, metavar="SCENARIO=RHO[,RHO...]", help=f"Other loads; {OWN}: its own rate.")
@click.option("--limit", type=click.IntRange(1), metavar="REQUESTS", help="Only the first so many requests of a run.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Processes.")
@click.option("--only-missing/--again", default=True, show_default=True, help="Skip runs that are there already.")
@click.option("--summary", "summing", is_flag=True, help="Run nothing: write summary.md and report.html.")
def main(
    out: Path,
    called: str,
    policies: str,
    common_seeds: str,
    seeds_of: tuple[str, ...],
    common_loads: str,
    loads_of: tuple[str, ...],
    limit: int | None,
    jobs: int,
    only_missing: bool,
    summing: bool,
) -> None:
    """Run a grid of scenarios, loads, seeds and policies, or sum one up."""
    if summing:
        summarise(out)
        return
    names = tuple(policies.split(","))
    for name in names:
        if name not in REFERENCES:
            policy(name)
    chosen = tuple(scenario(word) for word in called.split(","))
    plan = Plan(chosen, names, common_seeds, common_loads, special(seeds_of), special(loads_of), limit)
    out.mkdir(parents=True, exist_ok=True)
    there = stored(out) if only_missing else {}
    trials = [t for t in plan.trials() if (t.scenario.name, t.load, t.seed, t.policy) not in there]
    _say(f"{len(trials)} runs to do, {len(there)} there")
    if trials:
        _remember(out)
        run(trials, out, jobs)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        _say(f"quality: {error}")
        sys.exit(2)
