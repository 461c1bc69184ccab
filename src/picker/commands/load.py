"""`picker load`: flags become a plan, the plan is driven, its figures are printed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
import numpy as np
from rich.console import Console

from picker.commands.options import run as run_loop
from picker.errors import ConfigError
from picker.load import report, trace
from picker.load.client import Api, Client, Target
from picker.load.live import live_line
from picker.load.schedule import Pace, Run, drive
from picker.load.workload import Arrivals, Plan, Process, Sessions, SharedPrefix

F = TypeVar("F", bound=Callable[..., Any])

WORKLOADS: dict[str, type[SharedPrefix | Sessions]] = {"shared-prefix": SharedPrefix, "sessions": Sessions}
_DEFAULT_RATE = 1.0
_DEFAULT_DURATION = 60.0
# A closed loop goes as fast as the server: conversations prepared for each second of it.
_CLOSED_PER_SECOND = 500


def _words(kind: type[Any]) -> click.Choice[str]:
    return click.Choice([member.value for member in kind])


def _shape_options(command: F) -> F:
    """What is asked and when; None means the default of the workload."""
    options = (
        click.option("--workload", type=click.Choice(list(WORKLOADS)), help="What to ask.  [default: shared-prefix]"),
        click.option(
            "--trace",
            "trace_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Replay recorded traffic instead of a workload.",
        ),
        click.option("--trace-format", type=_words(trace.TraceFormat), help="[default: by the file's name]"),
        click.option("--rate", type=float, help="Arrivals a second (of sessions: new sessions).  [default: 1]"),
        click.option("--duration", type=float, metavar="S", help="Seconds of load.  [default: 60; of a trace: all]"),
        click.option("--requests", type=click.IntRange(1), metavar="N", help="Arrivals instead of a duration."),
        click.option("--arrivals", type=_words(Process), default="poisson", show_default=True, help="Their spacing."),
        click.option("--burstiness", type=float, default=1.0, help="Of gamma arrivals; below 1 they come in bursts."),
        click.option(
            "--concurrency",
            type=click.IntRange(1),
            metavar="N",
            help="Without --rate and --trace: a closed loop of N users. With them: requests in flight at most, "
            "waiting counts as latency.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same requests and times."),
        click.option("--max-tokens", type=click.IntRange(1), help="Tokens of an answer (of a trace: at most)."),
        click.option("--groups", type=click.IntRange(1), help="shared-prefix: different system prompts."),
        click.option("--prompts", type=click.IntRange(1), help="shared-prefix: different questions of a group."),
        click.option("--system-tokens", type=click.IntRange(0), help="Tokens of a system prompt."),
        click.option("--question-tokens", type=click.IntRange(1), help="Tokens of a question."),
        click.option("--context-tokens", type=click.IntRange(0), help="sessions: mean tokens of a session's own."),
        click.option("--turns", type=click.FloatRange(1), help="sessions: mean number of turns."),
        click.option("--think", type=click.FloatRange(0), metavar="S", help="sessions: median pause before a turn."),
        click.option("--limit", type=click.IntRange(1), metavar="N", help="trace: only its first N requests."),
        click.option("--rate-scale", type=float, metavar="X", help="trace: X times the recorded rate."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("url")
@_shape_options
@click.option("--model", help="Model to ask for.  [default: the first that the server names]")
@click.option("--api", type=_words(Api), default="chat", show_default=True, help="Endpoint of the OpenAI API.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Bearer token; better in OPENAI_API_KEY.")
@click.option("--ignore-eos/--no-ignore-eos", default=True, help="Ask for full-length answers (vLLM, SGLang).")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds for a whole answer.")
@click.option(
    "--time-scale",
    type=float,
    default=1.0,
    help="The server is simulated pods that run X times faster than real time: rates, durations and figures are "
    "in their seconds.",
)
@click.option("--records", type=click.Path(path_type=Path), metavar="FILE", help="Write every request as a JSON line.")
@click.option("--strict", is_flag=True, help="Exit 1 also when we could not send on time (P99 over 10 ms late).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    url: str,
    model: str | None,
    api: str,
    api_key: str | None,
    ignore_eos: bool,
    timeout: float,
    time_scale: float,
    records: Path | None,
    strict: bool,
    as_json: bool,
    **shape: Any,
) -> None:
    """Put load on any OpenAI-compatible server at URL and measure its answers.

    Requests go out at planned times whatever the server does (an open loop), and latency counts from those times.
    Failed requests are left out of means and count as infinitely late in percentiles. Exit status 1 when any failed.

    \b
    picker load http://127.0.0.1:8000 --rate 4 --duration 60
    picker load http://127.0.0.1:8000 --workload sessions --rate 0.5
    picker load http://127.0.0.1:8000 --trace conversation_trace.jsonl --limit 500
    """
    if not time_scale > 0:
        raise ConfigError(f"--time-scale must be positive, not {time_scale:g}")
    target = Target(url, model=model, api=Api(api), api_key=api_key, timeout=timeout, ignore_eos=ignore_eos)
    plan, pace = plan_and_pace(time_scale=time_scale, **shape)
    done: list[Run] = []
    run_loop(_measure(plan, pace, target, done.append))
    (run,) = done
    if records is not None:
        _write(run, records)
    _print(run, target, as_json=as_json)
    ctx.exit(_status(run, strict=strict))


async def _measure(plan: Plan, pace: Pace, target: Target, keep: Callable[[Run], None]) -> None:
    stop = asyncio.Event()
    async with Client(target) as client:
        await client.find_model()
        with _ending_early(stop), live_line(plan.name) as on_progress:
            keep(await drive(plan, client, pace, stop=stop, on_progress=on_progress))


@contextmanager
def _ending_early(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run with what it has; a second one ends the process."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def first() -> None:
        stop.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


# --- flags to a plan -----------------------------------------------------------------------------------------


def plan_and_pace(*, time_scale: float, trace_file: Path | None, **shape: Any) -> tuple[Plan, Pace]:
    """What the flags of `_shape_options` ask for. Raises ConfigError for a flag that says nothing about it."""
    if trace_file is not None:
        return _of_trace(trace_file, time_scale=time_scale, **shape)
    return _of_workload(time_scale=time_scale, **shape)


def _of_trace(
    path: Path,
    *,
    time_scale: float,
    trace_format: str | None,
    seed: int,
    limit: int | None,
    requests: int | None,
    rate_scale: float | None,
    duration: float | None,
    concurrency: int | None,
    max_tokens: int | None,
    **others: Any,
) -> tuple[Plan, Pace]:
    _refuse(others | {"arrivals": None, "burstiness": None}, "a trace (its rate is changed with --rate-scale)")
    traced = trace.load(path, trace.TraceFormat(trace_format) if trace_format else None)
    plan = trace.plan(
        traced,
        np.random.default_rng(seed),
        name=path.name,
        seed=seed,
        limit=min((n for n in (limit, requests) if n is not None), default=None),
        rate_scale=1.0 if rate_scale is None else rate_scale,
        max_tokens=max_tokens,
    )
    return plan, Pace(time_scale=time_scale, cap=concurrency, until=duration)


def _of_workload(
    *,
    time_scale: float,
    workload: str | None,
    rate: float | None,
    duration: float | None,
    requests: int | None,
    arrivals: str,
    burstiness: float,
    concurrency: int | None,
    seed: int,
    **others: Any,
) -> tuple[Plan, Pace]:
    kind = WORKLOADS[workload or "shared-prefix"]
    known = {field.name for field in dataclasses.fields(kind)}
    _refuse({name: value for name, value in others.items() if name not in known}, workload or "shared-prefix")
    shape = kind(**{name: value for name, value in others.items() if name in known and value is not None})
    rng = np.random.default_rng(seed)
    until = _DEFAULT_DURATION if duration is None and requests is None else duration
    if concurrency is not None and rate is None:
        count = requests or math.ceil((until or 1.0) * _CLOSED_PER_SECOND)
        return shape.plan([0.0] * count, rng, seed=seed), Pace(time_scale=time_scale, closed=concurrency, until=until)
    process = Arrivals(_DEFAULT_RATE if rate is None else rate, Process(arrivals), burstiness)
    counts = (requests, process.count_within(until) if until is not None else None)
    times = process.times(min(count for count in counts if count is not None), rng)
    # The arrivals of a run are its expected number, so the last may come a little late; later turns end with the run.
    until = max(until, float(times[-1]) + 1e-6) if until is not None else None
    return shape.plan(times, rng, seed=seed), Pace(time_scale=time_scale, cap=concurrency, until=until)


def _refuse(flags: dict[str, Any], what: str) -> None:
    for name, value in flags.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} says nothing about {what}")


# --- the end -------------------------------------------------------------------------------------------------


def _print(run: Run, target: Target, *, as_json: bool) -> None:
    figures = report.row(run)
    if as_json:
        click.echo(json.dumps(figures, allow_nan=False))
    else:
        Console().print(report.table(figures, title=f"{run.plan.name} on {target.url}"))
    for line in (*_remarks(run), *report.errors(run)):
        click.echo(line, err=True)


def _remarks(run: Run) -> Iterator[str]:
    """What a reader of the figures should know, a line each."""
    if run.stopped:
        unsent = run.plan.requests - run.sent - run.lost_turns
        yield f"ended early: {run.cancelled} requests in flight were cancelled, {unsent} not sent; neither is counted"
    if run.lost_turns:
        yield f"{run.lost_turns} turns were not sent because a turn before them failed"
    if run.pace.time_scale != 1:
        yield f"times are seconds of pods that run {run.pace.time_scale:g} times faster than the clock"
    if not _on_time(run):
        yield "requests were sent late (P99 over 10 ms): this machine cannot keep the schedule, latencies include that"
    if run.records and report.hit_ratio(run.records) is None:
        yield "no hit ratio: the server reports no cached tokens (vLLM: --enable-prompt-tokens-details)"


def _on_time(run: Run) -> bool:
    delay = report.schedule_delay_p99(run)
    return run.pace.cap is not None or delay is None or delay <= report.LATE


def _status(run: Run, *, strict: bool) -> int:
    if run.stopped:
        return 130
    bad = run.failed or not run.records or (strict and not _on_time(run))
    return 1 if bad else 0


def _write(run: Run, path: Path) -> None:
    """Times in wall seconds from the start of the run."""
    with path.open("wb") as lines:
        for record in run.records:
            entry = dataclasses.asdict(record)
            for name in ("intended_at", "sent_at", "first_at", "ended_at"):
                entry[name] = None if entry[name] is None else round(entry[name] - run.started_at, 6)
            lines.write(msgspec.json.encode(entry) + b"\n")
