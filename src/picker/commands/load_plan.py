"""The flags of `picker load` that say what is sent and when, and the plan that they become."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np

from picker.commands.numbers import POSITIVE, SEED, Finite
from picker.commands.waiting import telling
from picker.errors import ConfigError
from picker.load import requests as own
from picker.load import scenario as scenarios
from picker.load import trace
from picker.load.arrivals import Arrivals, Bursts, FloatArray, Process, Staged, parse_stages
from picker.load.requests import RequestFormat
from picker.load.schedule import Pace
from picker.load.trace import TraceFormat
from picker.load.workload import Plan, Planned, Sessions, SharedPrefix
from picker.sim.scenario import scenario

F = TypeVar("F", bound=Callable[..., Any])

WORKLOADS: dict[str, type[SharedPrefix | Sessions]] = {"shared-prefix": SharedPrefix, "sessions": Sessions}
_DEFAULT_RATE = 1.0
_DEFAULT_DURATION = 60.0
# A closed loop goes as fast as the server: conversations prepared for each second of it.
_CLOSED_PER_SECOND = 500
_FORMATS = [*(kind.value for kind in TraceFormat), *(kind.value for kind in RequestFormat)]
# The stream of random numbers of which `picker simulate` draws arrivals, so that traces are spread alike.
_ARRIVALS = 0
# A plan stands in memory before it begins, at about half a kilobyte a request.
_MOST_REQUESTS = 3_000_000
# Broken lines of a file that are told one by one.
_MOST_TOLD = 3


def words_of(kind: type[enum.Enum]) -> click.Choice[str]:
    return click.Choice([member.value for member in kind])


def plan_options(command: F) -> F:
    """What is asked and when; None means the default of the workload."""
    options = (
        click.option("--workload", type=click.Choice(list(WORKLOADS)), help="What to ask.  [default: shared-prefix]"),
        click.option(
            "--scenario",
            "scenario_name",
            metavar="NAME",
            help="Ask what `picker simulate --scenario NAME` asks (its --list shows them).",
        ),
        click.option(
            "--load",
            type=POSITIVE,
            metavar="RHO",
            help="scenario: share of the highest rate that --pods of --profile stand, whatever is behind the URL.",
        ),
        click.option(
            "--pods",
            type=click.IntRange(1),
            metavar="N",
            help="scenario: pods that --load is a share of.  [the scenario's]",
        ),
        click.option("--profile", metavar="NAME", help="scenario: their model and GPU.  [the scenario's]"),
        click.option(
            "--kv-tokens", type=click.IntRange(1), metavar="N", help="scenario: their KV cache.  [the profile's]"
        ),
        click.option(
            "--trace",
            "trace_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Replay recorded traffic: a trace, an access log, OpenAI requests, ShareGPT conversations.",
        ),
        click.option("--trace-format", type=click.Choice(_FORMATS), help="[default: by name and first line]"),
        click.option("--rate", type=POSITIVE, help="Arrivals a second (of sessions: new sessions).  [default: 1]"),
        click.option("--duration", type=POSITIVE, metavar="S", help="Seconds of load.  [default: 60; of a trace: all]"),
        click.option("--requests", type=click.IntRange(1), metavar="N", help="Arrivals instead of a duration."),
        click.option(
            "--stages",
            metavar="RATExS,...",
            help="Rates one after the other: 10x60,20x60; FROM-TOxS is a ramp: 1-50x120.",
        ),
        click.option("--arrivals", type=words_of(Process), default="poisson", show_default=True, help="Their spacing."),
        click.option(
            "--burstiness", type=POSITIVE, default=1.0, help="Of gamma arrivals; below 1 they come in bursts."
        ),
        click.option(
            "--bursts",
            metavar="FACTOR,ON,OFF",
            help="Of mmpp arrivals: times as many, mean seconds of a burst and between.  [default: 6,8,32]",
        ),
        click.option(
            "--concurrency",
            type=click.IntRange(1),
            metavar="N",
            help="Without rates and times: a closed loop of N users. With them: requests in flight at most, "
            "waiting counts as latency.",
        ),
        click.option("--warmup", type=Finite(0), metavar="S", help="First seconds that are not measured."),
        click.option("--seed", type=SEED, default=1, show_default=True, help="Same seed, same load."),
        click.option("--max-tokens", type=click.IntRange(1), help="Tokens of an answer (of a trace: at most)."),
        click.option("--groups", type=click.IntRange(1), help="shared-prefix: different system prompts."),
        click.option("--prompts", type=click.IntRange(1), help="shared-prefix: different questions of a group."),
        click.option("--system-tokens", type=click.IntRange(0), help="Tokens of a system prompt."),
        click.option("--question-tokens", type=click.IntRange(1), help="Tokens of a question."),
        click.option("--context-tokens", type=click.IntRange(0), help="sessions: mean tokens of a session's own."),
        click.option("--turns", type=Finite(1), help="sessions: mean number of turns."),
        click.option("--think", type=Finite(0), metavar="S", help="sessions: median pause before a turn."),
        click.option(
            "--limit", type=click.IntRange(1), metavar="N", help="trace, scenario: only the first N requests."
        ),
        click.option("--rate-scale", type=POSITIVE, metavar="X", help="trace, scenario: X times their own rate."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class When:
    """The flags that say when requests are sent; None: not given."""

    rate: float | None
    duration: float | None
    requests: int | None
    stages: str | None
    arrivals: str
    burstiness: float
    bursts: str | None
    concurrency: int | None

    def refuse(self, what: str, *names: str) -> None:
        _refuse({name: getattr(self, name) for name in names}, what)

    @property
    def given(self) -> bool:
        return self.rate is not None or self.stages is not None or self.concurrency is not None


_WHEN = tuple(field.name for field in dataclasses.fields(When))


def plan_and_pace(
    *,
    time_scale: float,
    trace_file: Path | None,
    trace_format: str | None,
    scenario_name: str | None,
    warmup: float | None,
    **shape: Any,
) -> tuple[Plan, Pace]:
    """What the flags of `plan_options` ask for. Raises ConfigError for a flag that says nothing about it."""
    when = When(**{name: shape.pop(name) for name in _WHEN})
    if trace_file is not None and scenario_name is not None:
        raise ConfigError("--trace and --scenario both say what to send: give one of them")
    if trace_file is None and trace_format is not None:
        raise ConfigError("--trace-format says nothing without --trace")
    if scenario_name is not None:
        plan, pace = _of_scenario(scenario_name, when, **shape)
    elif trace_file is None:
        plan, pace = _of_workload(when, **shape)
    elif isinstance(kind := _format(trace_file, trace_format), RequestFormat):
        plan, pace = _of_requests(trace_file, kind, when, **shape)
    else:
        plan, pace = _of_trace(trace_file, kind, when, **shape)
    pace = replace(pace, time_scale=time_scale)
    if warmup is None:
        return plan, pace
    if pace.until is not None and warmup >= pace.until:
        raise ConfigError(f"--warmup {warmup:g}: the run is over after {pace.until:g} s, and measures nothing")
    return plan, replace(pace, warmup=warmup, warmup_share=0.0)


def _refuse(flags: dict[str, Any], what: str) -> None:
    for name, value in flags.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} says nothing about {what}")


# --- workloads -----------------------------------------------------------------------------------------------


def _of_workload(when: When, *, workload: str | None, seed: int, **others: Any) -> tuple[Plan, Pace]:
    kind = WORKLOADS[workload or "shared-prefix"]
    known = {field.name for field in dataclasses.fields(kind)}
    _refuse({name: value for name, value in others.items() if name not in known}, workload or "shared-prefix")
    shape = kind(**{name: value for name, value in others.items() if name in known and value is not None})
    rng = np.random.default_rng(seed)
    times, pace, stages = _times(when, rng)
    return replace(shape.plan(times, rng, seed=seed), stages=stages), pace


_Windows = tuple[tuple[float, float, float], ...]


def _times(when: When, rng: np.random.Generator) -> tuple[Sequence[float] | FloatArray, Pace, _Windows]:
    """Arrival times, how to walk them, and the windows of stages."""
    if when.stages is not None:
        when.refuse("--stages", "rate", "duration", "requests")
        staged = Staged(parse_stages(when.stages), Process(when.arrivals), when.burstiness)
        _check_count(sum(stage.expected for stage in staged.stages))
        return staged.times(rng), Pace(cap=when.concurrency, until=staged.windows[-1][1]), staged.windows
    until = _DEFAULT_DURATION if when.duration is None and when.requests is None else when.duration
    if when.concurrency is not None and when.rate is None:
        expected = when.requests or (until or 1.0) * _CLOSED_PER_SECOND
        _check_count(expected)
        count = math.ceil(expected)
        return [0.0] * count, Pace(closed=when.concurrency, until=until), ()
    rate = _DEFAULT_RATE if when.rate is None else when.rate
    process = Arrivals(rate, Process(when.arrivals), when.burstiness, _bursts(when))
    _check_count(_least(when.requests, None if until is None else rate * until) or 0)
    count = _least(when.requests, None if until is None else process.count_within(until)) or 1
    times = process.times(count, rng)
    # The arrivals of a run are its expected number, so the last may come a little late; later turns end with the run.
    until = max(until, float(times[-1]) + 1e-6) if until is not None else None
    return times, Pace(cap=when.concurrency, until=until), ()


def _check_count(count: float) -> None:
    if count > _MOST_REQUESTS:
        raise ConfigError(
            f"that is {count:,.0f} requests, and a run is planned with at most {_MOST_REQUESTS:,}: "
            "lower the rate, or give --duration or --requests"
        )


def _bursts(when: When) -> Bursts:
    if when.bursts is None:
        return Bursts()
    if when.arrivals != Process.MMPP.value:
        raise ConfigError("--bursts says nothing without --arrivals mmpp")
    try:
        factor, on, off = (POSITIVE.convert(word, None, None) for word in when.bursts.split(","))
    except (ValueError, click.BadParameter):
        raise ConfigError(f"--bursts: {when.bursts!r} is not FACTOR,ON,OFF, as in 6,8,32") from None
    return Bursts(factor, on, off)


# --- scenarios -----------------------------------------------------------------------------------------------


def _of_scenario(
    name: str,
    when: When,
    *,
    seed: int,
    load: float | None,
    rate_scale: float | None,
    limit: int | None,
    pods: int | None,
    profile: str | None,
    kv_tokens: int | None,
    **others: Any,
) -> tuple[Plan, Pace]:
    what = "a scenario (it is changed with --load, --rate-scale, --pods, --profile, --kv-tokens and --limit)"
    _refuse(others, what)
    when.refuse(what, "rate", "stages", "bursts")
    chosen = scenario(name).with_pods(count=pods, model=profile, kv_tokens=kv_tokens)
    with telling("finding the highest stable rate") as tell:
        level = scenarios.level(
            chosen,
            load=load,
            rate_scale=rate_scale,
            limit=limit,
            on_progress=lambda rate: tell(f"trying {rate:.3g} {chosen.unit}"),
        )
    click.echo(_relative(level), err=True)
    plan, pace = scenarios.planned(level, seed=seed, limit=_least(limit, when.requests))
    if chosen.incidents:
        click.echo(f"what happens to pods in {chosen.number} happens only in the simulator", err=True)
    if pace.closed is not None:
        when.refuse("a closed scenario", "concurrency")
    return plan, replace(pace, cap=when.concurrency, until=_least(pace.until, when.duration))


def _relative(level: scenarios.Level) -> str:
    """How much is sent, and of what that is a share: nothing is known of the server."""
    chosen, pods = level.scenario, level.scenario.pods
    speed = f"scenario {chosen.number} at {level.rate:.3g} {chosen.unit}"
    if level.load is None:
        return speed
    stand = f"{level.load:.0%} of what {pods.count} x {pods.profile} stand in the model"
    return f"{speed}: {stand}, whatever is behind the URL (--pods, --profile and --kv-tokens say otherwise)"


N = TypeVar("N", int, float)


def _least(*values: N | None) -> N | None:
    return min((value for value in values if value is not None), default=None)


# --- files ---------------------------------------------------------------------------------------------------


def _format(path: Path, named: str | None) -> TraceFormat | RequestFormat:
    if named is not None:
        return TraceFormat(named) if named in [kind.value for kind in TraceFormat] else RequestFormat(named)
    return own.sniff(path) or trace.sniff(path)


class _Broken:
    """Tells the first broken lines one by one and counts them all."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, complaint: str) -> None:
        self.count += 1
        if self.count <= _MOST_TOLD:
            click.echo(f"skipped: {complaint}", err=True)

    def sum_up(self, path: Path, used: int) -> None:
        """Raises ConfigError when more was broken than not: it is no such file then."""
        if self.count > used:
            raise ConfigError(f"{path}: {self.count} of {self.count + used} lines are broken; is --trace-format right?")
        if self.count:
            click.echo(f"skipped: {self.count} of {self.count + used} lines of {path} are broken", err=True)


_TRACE_WORDS = "a trace (its rate is changed with --rate-scale)"


def _of_trace(
    path: Path,
    kind: TraceFormat,
    when: When,
    *,
    seed: int,
    limit: int | None,
    rate_scale: float | None,
    max_tokens: int | None,
    **others: Any,
) -> tuple[Plan, Pace]:
    _refuse(others, _TRACE_WORDS)
    when.refuse(_TRACE_WORDS, "rate", "stages", "bursts")
    broken = _Broken()
    traced = trace.load(path, kind, on_broken=broken)
    broken.sum_up(path, len(traced))
    plan = trace.plan(
        traced,
        np.random.default_rng([seed, _ARRIVALS]),
        name=path.name,
        seed=seed,
        limit=_least(limit, when.requests),
        rate_scale=1.0 if rate_scale is None else rate_scale,
        max_tokens=max_tokens,
    )
    return plan, Pace(cap=when.concurrency, until=when.duration)


def _of_requests(
    path: Path,
    kind: RequestFormat,
    when: When,
    *,
    seed: int,
    limit: int | None,
    rate_scale: float | None,
    max_tokens: int | None,
    **others: Any,
) -> tuple[Plan, Pace]:
    """Requests with text: at their own times where they have some and no others are given."""
    _refuse(others, "requests from a file")
    broken = _Broken()
    asked = own.load(path, kind, max_tokens=max_tokens, on_broken=broken)
    broken.sum_up(path, len(asked.conversations))
    conversations, scale = asked.conversations[:limit], 1.0 if rate_scale is None else rate_scale
    if asked.timed and not when.given:
        timed = tuple(replace(each, at=each.at / scale) for each in conversations[: when.requests])
        return Plan(path.name, timed), Pace(until=when.duration)
    if rate_scale is not None:
        raise ConfigError(f"--rate-scale: the requests of {path} have no times of their own; give --rate")
    when = when if when.duration or when.requests or when.stages else replace(when, requests=len(conversations))
    times, pace, stages = _times(when, np.random.default_rng(seed))
    return Plan(path.name, _dealt_out(conversations, times), stages=stages), pace


def _dealt_out(conversations: Sequence[Planned], times: Sequence[float] | FloatArray) -> tuple[Planned, ...]:
    """The conversations at these times, from the first again when they are used up."""
    return tuple(replace(conversations[i % len(conversations)], at=float(at)) for i, at in enumerate(times))
