"""`picker load compare` and `picker load report`: saved runs beside each other, and their pages."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from picker.commands import load_outputs
from picker.commands.numbers import SEED
from picker.errors import ConfigError
from picker.load import saved
from picker.load.compare import Compared, compare
from picker.load.ladder import rungs
from picker.load.measured import Measured
from picker.load.slo import Slo, knee
from picker.load.words import figure, interval

Named = Sequence[tuple[str, Measured]]

_WIDTH = 120


class LoadCommand(click.Command):
    """`picker load URL`, which has the names of other commands in place of a URL, too."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in _BESIDE:
            return _BESIDE[args[0]].make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Saved runs"):
            formatter.write_dl(
                [
                    (f"{ctx.command_path} {name} FILE...", beside.get_short_help_str())
                    for name, beside in _BESIDE.items()
                ]
            )


_FILES = click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))


def _with_page_options(command: Any) -> Any:
    for option in reversed(load_outputs.page_options()):
        command = option(command)
    return command


@click.command(name="compare", short_help="Put saved runs beside the first of them.")
@_FILES
@_with_page_options
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the resampling.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def compare_command(
    ctx: click.Context, /, files: tuple[Path, ...], html: Path | None, slo: str | None, seed: int, as_json: bool
) -> None:
    """Runs that `--save` kept, beside the first of them: ratios with 95 % intervals.

    Runs of the same load and seed are compared request by request; others as a whole.

    \b
    picker load compare round-robin.json picker.json
    picker load compare before.json after.json --html compare.html
    """
    if len(files) < 2:
        raise ConfigError("compare needs two saved runs or more")
    wanted = load_outputs.outputs(html=html, slo=slo)
    runs = read(files)
    found = [compare(runs[0][1], run, np.random.default_rng(seed), wanted.slo) for _, run in runs[1:]]
    whole = [load_outputs.attempt("the comparison", lambda: _show(runs, found, as_json=as_json))]
    if html is not None:
        whole.append(load_outputs.put("--html", html, lambda: _page(runs, found, wanted.slo)))
    ctx.exit(0 if all(whole) else 1)


@click.command(name="report", short_help="Make the page of saved runs again.")
@_FILES
@_with_page_options
@click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write llm-d-benchmark's report v0.2.1 (.json or .yaml) of one run.",
)
@click.pass_context
def report_command(
    ctx: click.Context, /, files: tuple[Path, ...], html: Path | None, slo: str | None, report_file: Path | None
) -> None:
    """Page and reports of runs that `--save` kept; of several: latency against rate.

    \b
    picker load report run.json --html run.html --slo ttft=0.5
    picker load report rate-*.json --html ladder.html --slo ttft=0.5,tpot=50ms
    """
    if html is None and report_file is None:
        raise ConfigError("report writes nothing without --html or --report")
    wanted = load_outputs.outputs(html=html, report_file=report_file, slo=slo)
    runs = read(files)
    if len(runs) == 1:
        ctx.exit(0 if load_outputs.write(wanted, runs[0][1]) else 1)
    if report_file is not None:
        raise ConfigError("--report holds one run: give one file")
    ladder = rungs([run for _, run in runs], wanted.slo)
    if len(ladder) < 2:
        raise ConfigError("these runs have one rate: `picker load compare` puts them beside each other")
    assert html is not None
    found = knee([(rung.rate, rung.share) for rung in ladder if rung.share is not None])
    if found is not None:
        click.echo(f"{wanted.slo}: {found}")
    ctx.exit(0 if load_outputs.put("--html", html, lambda: _ladder(runs, wanted.slo)) else 1)


_BESIDE: dict[str, click.Command] = {"compare": compare_command, "report": report_command}


def read(files: Sequence[Path]) -> list[tuple[str, Measured]]:
    """Runs by the shortest names that tell them apart."""
    stems = Counter(path.stem for path in files)
    names = [path.stem if stems[path.stem] == 1 else str(path) for path in files]
    return [(name, saved.load(path)) for name, path in zip(names, files, strict=True)]


# --- the comparison ------------------------------------------------------------------------------------------


def _show(runs: Named, found: Sequence[Compared], *, as_json: bool) -> None:
    if as_json:
        beside = [_object(name, one) for (name, _), one in zip(runs[1:], found, strict=True)]
        click.echo(json.dumps({"baseline": runs[0][0], "compared": beside}, allow_nan=False))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)  # not the 80 columns that rich takes a file to have
    for (name, _), one in zip(runs[1:], found, strict=True):
        console.print(_table(runs[0][0], name, one))
        for note in one.notes:
            click.echo(note, err=True)
    click.echo("intervals cover chance within these runs, not what differs from run to run: repeat them", err=True)


def _object(name: str, compared: Compared) -> dict[str, Any]:
    lines = [dataclasses.asdict(line) | {"verdict": line.verdict.value} for line in compared.lines]
    return {"name": name, "paired": compared.paired, "metrics": lines, "notes": list(compared.notes)}


def _table(base: str, name: str, compared: Compared) -> Table:
    paired = "not paired" if compared.paired is None else f"{compared.paired:,} requests, paired"
    table = Table(title=f"A: {base}, B: {name} ({paired})", title_justify="left")
    table.add_column("")
    for heading in ("A", "B", "B / A", "95 % interval"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for line in compared.lines:
        ratio = "–" if line.ratio is None else f"{line.ratio:.3f}"
        bounds = interval(line.low, line.high)
        table.add_row(
            line.metric, figure(line.a, line.unit), figure(line.b, line.unit), ratio, bounds, line.verdict.value
        )
    return table


def _page(runs: Named, found: Sequence[Compared], slo: Slo | None) -> str:
    from picker.load.compare_page import render  # the extra `report`

    return render(runs, found, [name for name, _ in runs[1:]], slo)


def _ladder(runs: Named, slo: Slo | None) -> str:
    from picker.load.run_page import render_ladder  # the extra `report`

    return render_ladder(runs, slo)
