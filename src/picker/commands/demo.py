"""`picker demo`: starts everything, sends one load twice, prints what the difference is."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import AbstractContextManager
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from picker.commands.numbers import POSITIVE, SEED
from picker.commands.options import run as run_loop
from picker.demo import DURATION, WORKLOAD, Comparison, Setup, demonstrate
from picker.demo_stack import DataPlane, EnvoyMissingError, Stack
from picker.errors import ConfigError
from picker.load import report
from picker.load.live import OnProgress, live_line
from picker.load.workload import Plan
from picker.sim.latency import profile

_LINES = (
    ("prefix-cache hit ratio", "hit_ratio"),
    ("TTFT mean", "ttft_mean_s"),
    ("TTFT P50", "ttft_p50_s"),
    ("TTFT P95", "ttft_p95_s"),
    ("end to end mean", "e2e_mean_s"),
    ("output tokens/s", "output_tokens_per_s"),
    ("requests", "requests"),
    ("failed", "failed"),
)


@click.command()
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="Replay a trace (Mooncake, Azure CSV).")
@click.option("--endpoints", type=click.IntRange(2), default=4, show_default=True, metavar="N", help="Simulated pods.")
@click.option(
    "--duration",
    type=POSITIVE,
    default=DURATION,
    show_default=True,
    metavar="S",
    help="Seconds of each of the two runs.",
)
@click.option(
    "--data-plane",
    type=click.Choice([plane.value for plane in DataPlane]),
    default="envoy",
    show_default=True,
    help="A real Envoy with picker as its endpoint picker, or picker's own proxy.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Same seed, same requests and times.")
@click.option("--keep", is_flag=True, help="Stay up afterwards and print the URLs, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    trace: Path | None,
    endpoints: int,
    duration: float,
    data_plane: str,
    seed: int,
    keep: bool,
    as_json: bool,
) -> None:
    """Simulated vLLM pods behind a real Envoy: the same load routed in turn, then by picker. Takes about a minute.

    Everything runs on free loopback ports and is stopped at the end. Exit status 1 when a request failed or picker was
    not better.
    """
    setup = Setup(endpoints=endpoints, duration=duration, data_plane=DataPlane(data_plane), trace=trace, seed=seed)
    terminal = Terminal(setup, as_json=as_json, keep=keep)
    click.echo(f"Starting {endpoints} simulated pods, picker and {_WITH[setup.data_plane]} ...", err=True)
    try:
        run_loop(_until_terminated(setup, terminal, keep=keep))
    except EnvoyMissingError as error:
        raise ConfigError(f"{error} Or run the demo without Envoy: picker demo --data-plane proxy") from None
    except KeyboardInterrupt:
        if terminal.comparison is None:
            ctx.exit(130)
    except asyncio.CancelledError:
        ctx.exit(143)
    ctx.exit(0 if terminal.comparison and terminal.comparison.better else 1)


_WITH = {DataPlane.ENVOY: "Envoy", DataPlane.PROXY: "its proxy"}


async def _until_terminated(setup: Setup, terminal: Terminal, *, keep: bool) -> None:
    """SIGTERM ends the demo as tidily as Ctrl-C does."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await demonstrate(setup, terminal, keep=keep)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


class Terminal:
    """The audience at a terminal: results on stdout, everything else on stderr."""

    def __init__(self, setup: Setup, *, as_json: bool, keep: bool) -> None:
        self.comparison: Comparison | None = None
        self._setup = setup
        self._as_json = as_json
        self._keep = keep

    def up(self, stack: Stack, plan: Plan) -> None:
        seconds = plan.duration / self._setup.scene.time_scale
        click.echo(f"Up. Sending {plan.requests} requests, twice, for {seconds:.0f} s each.", err=True)

    def live(self, label: str) -> AbstractContextManager[OnProgress | None]:
        return live_line(label)

    def result(self, stack: Stack, comparison: Comparison) -> None:
        self.comparison = comparison
        if self._as_json:
            click.echo(json.dumps(comparison.to_json(), allow_nan=False))
        else:
            _print(comparison, self._setup)
        for line in _errors(comparison):
            click.echo(line, err=True)
        if self._keep:
            click.echo(_urls(stack, self._setup.scene.model), err=True)


def _errors(comparison: Comparison) -> list[str]:
    runs = (("cache-unaware", comparison.cache_unaware), ("picker", comparison.picker))
    return [f"{label}: {line}" for label, run in runs for line in report.errors(run)]


def _urls(stack: Stack, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16})
    return "\n".join(
        [
            f"Up until Ctrl-C:  gateway {stack.picker}/v1   cache-unaware {stack.cache_unaware}/v1",
            f"                  picker's metrics and debug {stack.admin}   pods {' '.join(stack.pods)}",
            f"Try: curl {stack.picker}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
        ]
    )


# --- the comparison in words ---------------------------------------------------------------------------------


def _print(comparison: Comparison, setup: Setup) -> None:
    console = Console()
    for line in _scene(comparison, setup):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(_table(comparison))
    console.print(sentence(comparison), soft_wrap=True, highlight=False)


def _scene(comparison: Comparison, setup: Setup) -> list[str]:
    """What was compared, in two lines."""
    plan, scene = comparison.picker.plan, setup.scene
    cache = f"{scene.kv_tokens or profile(scene.profile).kv_tokens:,} KV tokens each"
    what = f"{plan.name}, {plan.requests:,} requests"
    if plan.source_requests is not None:
        what += f" (the first of {plan.source_requests:,}; answers cut to {WORKLOAD.max_tokens} tokens)"
    return [
        f"{setup.endpoints} simulated pods ({scene.profile}, {cache}) behind {comparison.data_plane}: {what}.",
        f"Times are seconds of the pods, which run {scene.time_scale:g} times faster than the clock.",
    ]


def _table(comparison: Comparison) -> Table:
    table = Table()
    for heading in ("", "cache-unaware", "picker", "change"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    before, after = report.row(comparison.cache_unaware), report.row(comparison.picker)
    for label, name in _LINES:
        cells = (report.in_words(name, row[name]) for row in (before, after))
        table.add_row(label, *cells, _change(name, before[name], after[name]))
    table.add_row("requests by endpoint", *(_by_endpoint(row) for row in (before, after)), "")
    return table


def _change(name: str, before: object, after: object) -> str:
    if not isinstance(before, float) or not isinstance(after, float):
        return ""
    if name == "hit_ratio":
        return f"{(after - before) * 100:+.0f} points"
    return f"{after / before - 1:+.0%}" if before else ""


def _by_endpoint(row: report.Row) -> str:
    counts = row["by_endpoint"]
    assert isinstance(counts, dict)
    return "\n".join(str(count) for count in counts.values())


def sentence(comparison: Comparison) -> str:
    """What the table says, for somebody who reads one line."""
    before, after = report.row(comparison.cache_unaware), report.row(comparison.picker)
    if comparison.failed:
        return f"{comparison.failed} requests failed: the figures compare nothing until that is mended."
    ttft = [report.in_words("ttft_mean_s", row["ttft_mean_s"]) for row in (before, after)]
    hits = [report.in_words("hit_ratio", row["hit_ratio"]) for row in (before, after)]
    if not comparison.better:
        return (
            f"picker was not better here: answers began after {ttft[1]} on average against {ttft[0]}, and {hits[1]} of "
            f"the prompt tokens came from cache against {hits[0]}."
        )
    return (
        f"By sending each prompt where it costs least (a cached beginning, a short queue), picker had {hits[1]} of the "
        f"prompt tokens served from cache instead of {hits[0]}; answers began after {ttft[1]} on average instead of "
        f"{ttft[0]} "
        f"({_change('ttft_mean_s', before['ttft_mean_s'], after['ttft_mean_s'])})."
    )
