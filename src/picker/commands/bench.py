"""`picker bench`: the performance figures of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import click
from rich import box
from rich.console import Console
from rich.table import Table

from picker.bench import machine
from picker.bench.cases import CHUNKS, PROMPT_BYTES
from picker.commands.numbers import AT_LEAST_ONE, POSITIVE, SEED
from picker.commands.options import run
from picker.config import EPP_MODES, MOST_WORKERS

F = TypeVar("F", bound=Callable[..., Any])

# Characters across where nobody says how many there are.
_PAGE = 120


@click.group()
def command() -> None:
    """This machine's performance figures, each against its baseline in the same run."""


_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


@command.command()
@click.option("--repeats", type=AT_LEAST_ONE, default=400, show_default=True, help="Decisions per row.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@_json
def pick(repeats: int, seed: int, as_json: bool) -> None:
    """One whole decision, by number of endpoints and prompt size."""
    from picker.bench.pick import rows

    show("pick", rows(repeats=repeats, seed=seed, progress=_progress), as_json=as_json)


@command.command()
@click.option(
    "--endpoints",
    multiple=True,
    type=click.IntRange(min=1),
    default=(10, 100, 1000),
    show_default=True,
    metavar="N",
    help="Endpoints; repeat for several.",
)
@click.option(
    "--blocks",
    type=AT_LEAST_ONE,
    default=1_000_000,
    show_default=True,
    help="Blocks of all endpoints, for the memory figures.",
)
@click.option(
    "--events", type=AT_LEAST_ONE, default=200_000, show_default=True, help="Blocks stored or removed, for the rate."
)
@click.option("--repeats", type=AT_LEAST_ONE, default=200, show_default=True, help="Prompts matched per row.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@_json
def events(as_json: bool, **settings: Any) -> None:
    """KV events into the index of exact prefixes, and prompts matched with it, by number of endpoints.

    All in CPU time. events_per_s: blocks stored or removed in a second, from the bytes of a batch on, of engines that
    compute prompts beside answers; prefill: long prompts alone; generated: answers alone, which are told of block by
    block. judge: what a generated block takes a thread on top of that. bytes_per_block: for a block of an endpoint,
    where no two hold the same; shared: where all hold all. match: walk and count for prompts of 32 and 400 KB. dict:
    the same with a plain dict of sets. exact: a chat request of 32 and 400 KB from its body on; read: of that, up to
    the walk; tokens: with `--exact-by tokens`, which tokenises it.
    """
    from picker.bench.events import TABLES, rows

    found = list(rows(**settings, progress=_progress, warn=_warn))
    if as_json:
        show("events", found, as_json=True)
        return
    for heading, columns in TABLES.items():
        show(f"events · {heading}", found, as_json=False, columns=("endpoints", *columns))


def _gateway_options(command: F) -> F:
    """What the benchmarks of a whole gateway share."""
    options = (
        click.option(
            "--prompt-bytes",
            multiple=True,
            type=click.IntRange(min=64),
            default=PROMPT_BYTES,
            show_default=True,
            metavar="N",
            help="Size of the prompts; repeat for several.",
        ),
        click.option(
            "--chunks",
            multiple=True,
            type=click.IntRange(min=0),
            default=CHUNKS,
            show_default=True,
            metavar="N",
            help="Chunks of the streamed answers, 0 for one JSON answer; repeat for several.",
        ),
        click.option(
            "--seconds",
            type=POSITIVE,
            default=0.7,
            show_default=True,
            metavar="S",
            help="Length of each measured window.",
        ),
        click.option(
            "--repeats",
            type=click.IntRange(min=1),
            default=3,
            show_default=True,
            metavar="N",
            help="Every figure is the median of these; --json has the extremes too.",
        ),
        _json,
    )
    for option in reversed(options):
        command = option(command)
    return command


@command.command()
@click.option(
    "--mode",
    "modes",
    multiple=True,
    type=click.Choice(EPP_MODES),
    default=EPP_MODES,
    show_default=True,
    help="What goes through picker: responses, too, or requests alone; repeat for several.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, MOST_WORKERS),
    default=1,
    show_default=True,
    metavar="N",
    help="Of picker (`picker epp --workers`); from 2 on, with the CPU time of the decider and of the workers.",
)
@_gateway_options
def extproc(as_json: bool, **settings: Any) -> None:
    """picker behind a real Envoy, against the same Envoy without it.

    CPU time is what the process used while as many requests as it can take went through; the added latency is measured
    apart, at a modest rate, up to the first byte of the answer (added_chunk: for one chunk on its way back). Few long
    streams fit into a window: with less than a hundred latency_requests, the p99 is hardly more than the slowest.
    """
    from picker.bench.extproc import COLUMNS, WORKER_COLUMNS, rows

    columns = COLUMNS + WORKER_COLUMNS if settings["workers"] > 1 else COLUMNS
    show("extproc", _finish(rows(**settings, progress=_progress)), as_json=as_json, columns=columns)


@command.command()
@_gateway_options
def proxy(as_json: bool, **settings: Any) -> None:
    """The standalone proxy, beside every peer found here (sglang-router, vllm-router, smg) and no proxy at all.

    All get the same requests and one core. The added latency is against `direct`, up to the first byte of the answer
    (added_chunk: for one chunk on its way back). Few long streams fit into a window: with less than a hundred
    latency_requests, the p99 is hardly more than the slowest. half_added_p99: the same at half of what it can take.
    Well below one of `cores`, the proxy was not what limited the requests per second. picker+envoy: behind its own
    Envoy (`--data-plane envoy`, where one is installed); its CPU and memory are picker's own share.
    """
    from picker.bench.proxy import COLUMNS, rows

    found = _finish(rows(**settings, progress=_progress, warn=_warn))
    show("proxy", found, as_json=as_json, columns=COLUMNS)


@command.command()
@click.option(
    "--endpoints",
    multiple=True,
    type=click.IntRange(min=1),
    default=(100, 1000),
    show_default=True,
    metavar="N",
    help="Endpoints to watch; repeat for several.",
)
@click.option("--interval", type=POSITIVE, metavar="S", help="Seconds between scrapes.  [picker's]")
@click.option(
    "--seconds",
    type=POSITIVE,
    default=10.0,
    show_default=True,
    metavar="S",
    help="Length of each measurement.",
)
@_json
def scrape(as_json: bool, **settings: Any) -> None:
    """picker with nothing to route: the CPU that watching its endpoints takes, and how old what it knows of them is.

    The engines are another process, each with a port and a page as vLLM's. cores: CPU time of the whole picker in a
    second. age: time since the last good scrape, over all endpoints and moments.
    """
    from picker.bench.scrape import COLUMNS, rows

    show("scrape", _finish(rows(**settings, progress=_progress)), as_json=as_json, columns=COLUMNS)


@command.command()
@click.option(
    "--scenario", "scenarios", multiple=True, default=("S3",), show_default=True, metavar="NAME", help="Repeatable."
)
@click.option(
    "--gateways", metavar="NAME,...", help="picker, round-robin, vllm-router, sglang-router, smg.  [all found here]"
)
@click.option("--load", type=POSITIVE, metavar="RHO", help="Of what the pods could stand.  [the scenario's]")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Runs of each.")
@click.option("--first-seed", type=SEED, default=0, show_default=True, metavar="N", help="The first of them.")
@click.option("--seconds", type=POSITIVE, metavar="S", help="Of arrivals, in time of the pods.  [the scenario's]")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Requests at most.")
@click.option("--time-scale", type=POSITIVE, default=4.0, show_default=True, metavar="X", help="Of the pods.")
@click.option(
    "--stream-interval", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Tokens in an event."
)
@_json
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    scenarios: tuple[str, ...],
    gateways: str | None,
    seeds: int,
    first_seed: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """picker and the gateways of others, one after the other, in front of the same simulated pods, over real HTTP.

    The scenarios are those of `picker simulate`; `make bench-peers` installs the others. Times are seconds of the pods.
    Where the pods or the load came late, this machine was too small for the --time-scale: a warning says so, and the
    exit status is 1.
    """
    from picker.bench.compare import COLUMNS, Setup, present, rows
    from picker.sim.scenario import scenario

    found = []
    names = tuple(gateways.split(",")) if gateways else present()
    for called in scenarios:
        numbers = tuple(range(first_seed, first_seed + seeds))
        setup = Setup(scenario(called), names, seeds=numbers, **settings)
        found += _finish(rows(setup, progress=_progress))
    columns = ("scenario", *COLUMNS) if len(scenarios) > 1 else COLUMNS
    show("compare", found, as_json=as_json, columns=columns)
    doubtful = [row for row in found if row["distorted"] or not row["on_schedule"]]
    for row in doubtful:
        _warn(f"{row['scenario']}, {row['gateway']}: this machine was late, so the figures are its own as well")
    ctx.exit(1 if doubtful else 0)


def _finish(rows: Coroutine[Any, Any, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def collect() -> None:
        found.extend(await rows)

    run(collect())
    return found


def show(name: str, rows: Iterable[dict[str, Any]], *, as_json: bool, columns: Sequence[str] | None = None) -> None:
    """Print rows as contract JSON, or as a table with the machine below it. columns: of the table, else all keys."""
    where = machine.describe()  # first: a checkout may change under a long run
    found = list(rows)
    if as_json:
        click.echo(json.dumps({"bench": name, "rows": found, "machine": where}))
        return
    table = Table(title=f"picker bench {name}", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = columns or list(found[0])
    for key in columns:
        # Headings break at spaces, so that a dozen columns fit.
        table.add_column(key.replace("_", " "), justify="right")
    for row in found:
        table.add_row(*(_cell(row[key]) for key in columns))
    console = Console()
    if not console.is_terminal:
        console.width = _PAGE
    console.print(table)
    console.print(" · ".join(f"{key} {value}" for key, value in where.items() if value is not None), style="dim")


def _cell(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"{value:,.0f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return "" if value is None else str(value)


def _warn(line: str) -> None:
    click.echo(f"picker bench: {line}", err=True)


def _progress(line: str) -> None:
    Console(stderr=True).print(f"[dim]{line}[/dim]") if Console(stderr=True).is_terminal else None
