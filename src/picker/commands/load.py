"""`picker load`: flags become a plan, the plan is driven, its figures are printed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from picker.commands import load_outputs
from picker.commands.load_compare import LoadCommand
from picker.commands.load_plan import plan_and_pace, plan_options, words_of
from picker.commands.numbers import POSITIVE
from picker.commands.options import run as run_loop
from picker.load import report, wording
from picker.load.client import Api, Client, Target
from picker.load.live import live_line
from picker.load.processes import Job, drive_job, useful
from picker.load.schedule import LATE, Run, without_warmup
from picker.load.text import PLAIN, Wording

_OUTPUTS = ("save", "html", "report_file", "slo")


@click.command(cls=LoadCommand)
@click.argument("url")
@plan_options
@click.option("--model", help="Model to ask for.  [default: the first that the server names]")
@click.option("--api", type=words_of(Api), default="chat", show_default=True, help="Endpoint of the OpenAI API.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Bearer token; better in OPENAI_API_KEY.")
@click.option("--stream/--no-stream", default=True, help="Ask for streamed answers; without, TTFT is not seen.")
@click.option("--ignore-eos/--no-ignore-eos", default=True, help="Ask for full-length answers (vLLM, SGLang).")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The model's tokenizer, for prompts of exactly the planned tokens.",
)
@click.option(
    "--calibrate/--no-calibrate",
    default=True,
    help="Without --tokenizer: ask first how many tokens the server makes of our text.",
)
@click.option("--timeout", type=POSITIVE, default=600.0, show_default=True, help="Seconds for a whole answer.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    metavar="N",
    help="That send, each on a core.  [default: as many as the plan needs, at most one a core]",
)
@click.option(
    "--time-scale",
    type=POSITIVE,
    default=1.0,
    help="The server is simulated pods that run X times faster than real time: rates, durations and figures are "
    "in their seconds.",
)
@click.option("--records", type=click.Path(path_type=Path), metavar="FILE", help="Write every request as a JSON line.")
@load_outputs.output_options
@click.option("--strict", is_flag=True, help="Exit 1 also when we could not send on time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    url: str,
    model: str | None,
    api: str,
    api_key: str | None,
    stream: bool,
    ignore_eos: bool,
    tokenizer: Path | None,
    calibrate: bool,
    timeout: float,
    processes: int | None,
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
    picker load http://127.0.0.1:8000 --stages 2x60,4x60,8x60 --html report.html
    picker load http://127.0.0.1:8000 --workload sessions --rate 0.5
    picker load http://127.0.0.1:8000 --scenario S3 --load 0.7
    picker load http://127.0.0.1:8000 --trace conversation_trace.jsonl --limit 500
    """
    wanted = load_outputs.outputs(**{name: shape.pop(name) for name in _OUTPUTS})
    target = Target(
        url, model=model, api=Api(api), api_key=api_key, timeout=timeout, ignore_eos=ignore_eos, stream=stream
    )
    words = PLAIN if tokenizer is None else wording.vocabulary(tokenizer)
    plan, pace = plan_and_pace(time_scale=time_scale, **shape)
    job = Job(plan, pace, target, words)
    job, run = run_loop(_measure(job, processes, calibrate=calibrate and tokenizer is None))
    written = _tell(without_warmup(run), job.target, shape, wanted, as_json=as_json)
    if records is not None:
        written &= load_outputs.attempt(f"--records {records}", lambda: _write(run, records))
    ctx.exit(_status(run, strict=strict, written=written))


async def _measure(job: Job, processes: int | None, *, calibrate: bool) -> tuple[Job, Run]:
    """The run, and the job as it was done."""
    job = await _prepared(job, calibrate=calibrate)
    stop = asyncio.Event()
    count = useful(job.plan, job.pace) if processes is None else min(processes, len(job.plan.conversations))
    click.echo(_ahead(job), err=True)
    with _ending_early(stop), live_line(job.plan.name, seconds=_seconds(job)) as on_progress:
        return job, await drive_job(job, count, stop=stop, on_progress=on_progress)


def _ahead(job: Job) -> str:
    """What is about to be sent, for those who watch no progress. Seconds are the clock's."""
    plan, pace, seconds = job.plan, job.pace, _seconds(job)
    may_end_before = pace.until is not None and (pace.closed or any(len(c.turns) > 1 for c in plan.conversations))
    words = [f"sending {plan.name}: {plan.requests:,} requests" + (" at most" if may_end_before else "")]
    if pace.closed is not None:
        words.append(f"{pace.closed:,} at a time")
    if seconds is not None:
        words.append(f"for {seconds:,.0f} s" if seconds >= 10 else f"for {seconds:.2g} s")
    if pace.warmup:
        words.append(f"of which the first {pace.warmup / pace.time_scale:,.3g} s are warm-up and not measured")
    if pace.warmup_share:
        words.append(f"of which the first {pace.warmup_share:.0%} are warm-up and not measured")
    return ", ".join(words)


def _seconds(job: Job) -> float | None:
    """How long the plan sends, by the clock; None where nothing says so."""
    return (job.pace.until or job.plan.duration) / job.pace.time_scale or None


def _sending_seconds(job: Job) -> float | None:
    """Wall seconds until the last request is sent, where that is known."""
    plan, pace = job.plan, job.pace
    seconds = pace.until if pace.closed or any(len(each.turns) > 1 for each in plan.conversations) else plan.duration
    return None if seconds is None else seconds / pace.time_scale


async def _prepared(job: Job, *, calibrate: bool) -> Job:
    """The job with the model's name and with words as long as its tokens."""
    async with Client(job.target) as client:
        model = await client.find_model()
        words: Wording = await wording.calibrated(client) if calibrate else job.wording
    return replace(job, target=replace(job.target, model=model), wording=words)


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


# --- the end -------------------------------------------------------------------------------------------------


def _tell(run: Run, target: Target, shape: Mapping[str, Any], wanted: load_outputs.Outputs, *, as_json: bool) -> bool:
    """Print the figures, then write files: what cannot be written takes nothing that was printed along."""
    notes = [*_remarks(run), *report.errors(run)]
    measured = load_outputs.measured_now(run, url=target.url, model=target.model, shape=shape, notes=notes)
    measured = replace(measured, figures={**measured.figures, **_schedule(run)})
    figures = load_outputs.figures(measured, wanted.slo)
    told = load_outputs.attempt("the figures", lambda: _print(run, target, figures, as_json=as_json))
    for line in notes:
        click.echo(line, err=True)
    return load_outputs.write(wanted, measured) and told


def _print(run: Run, target: Target, figures: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(figures, allow_nan=False))
    else:
        Console().print(report.table(dict(figures), title=f"{run.plan.name} on {target.url}"))


def _schedule(run: Run) -> dict[str, object]:
    """Whether the load was what it was meant to be; rates are those of the pods."""
    scale = run.pace.time_scale
    wanted, sent = run.requested_rate, run.achieved_rate
    return {
        "on_schedule": run.on_schedule,
        "requested_rate": None if wanted is None else round(wanted / scale, 6),
        "achieved_rate": None if sent is None else round(sent / scale, 6),
        "processes": run.processes,
        "generator_cpu_s": round(run.cpu_s, 3),
    }


def _remarks(run: Run) -> Iterator[str]:
    """What a reader of the figures should know, a line each."""
    if not run.on_schedule:
        yield _late(run)
    if run.stopped:
        unsent = run.plan.requests - run.sent - run.lost_turns
        yield f"ended early: {run.cancelled} requests in flight were cancelled, {unsent} not sent; neither is counted"
    if run.warmup:
        yield f"{len(run.warmup)} requests of the warm-up are not counted"
    if run.pace.closed and not run.stopped and _ran_dry(run):
        yield "the server was faster than expected and all prepared requests are used up: give more with --requests"
    if run.lost_turns:
        yield f"{run.lost_turns} turns were not sent because a turn before them failed"
    if run.pace.time_scale != 1:
        yield f"times are seconds of pods that run {run.pace.time_scale:g} times faster than the clock"
    if run.records and report.hit_ratio(run.records) is None:
        yield "no hit ratio: the server reports no cached tokens (vLLM: --enable-prompt-tokens-details)"


def _ran_dry(run: Run) -> bool:
    """Whether a closed loop that should have gone on for a time ran out of conversations."""
    until = run.pace.until
    asked_for = until is not None and (run.ended_at - run.started_at) * run.pace.time_scale < 0.98 * until
    return asked_for and run.sent + run.lost_turns >= run.plan.requests


def _late(run: Run) -> str:
    share = (run.achieved_rate or 0.0) / (run.requested_rate or 1.0)
    return (
        f"NOT ON SCHEDULE: requests went out up to {(run.schedule_delay_p99 or 0.0) * 1e3:,.0f} ms late (P99; "
        f"{LATE * 1e3:.0f} ms is allowed) at {share:.1%} of the planned rate. This machine cannot generate that load "
        f"with {run.processes} process{'es' if run.processes > 1 else ''}: the figures include its own delays"
    )


def _status(run: Run, *, strict: bool, written: bool) -> int:
    if run.stopped:
        return 130
    bad = run.failed or not run.records or not written or (strict and not run.on_schedule)
    return 1 if bad else 0


def _write(run: Run, path: Path) -> None:
    """Times in wall seconds from the start of the run."""
    with path.open("wb") as lines:
        for record in run.records:
            entry = {each.name: getattr(record, each.name) for each in dataclasses.fields(record)}
            for name in ("intended_at", "sent_at", "first_at", "ended_at"):
                entry[name] = None if entry[name] is None else round(entry[name] - run.started_at, 6)
            entry["gaps"] = [round(gap, 6) for gap in record.gaps]
            lines.write(msgspec.json.encode(entry) + b"\n")
