"""What it costs that several replicas decide: against one, in virtual time, and what one's death costs.

python bench/replicas.py [--scenario S1 ...] [--replicas N ...] [--delay SECONDS ...] [--seeds N] [--limit REQUESTS]

A request goes to a replica at random. Each is told by the others what they decide and see, `delay` later; inf: as if
there were no bus. `agreement`: how much of what one believes to be cached where of the latest prompts another does,
too, so long after it was started anew in the middle of the run.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import click
from rich.console import Console

from picker import __version__
from picker.bench import machine
from picker.core.scheduler import Scheduler
from picker.sim.cluster import Arrival
from picker.sim.replicated import Replicated, agreement
from picker.sim.scenario import scenario
from picker.sim.sessions import Sessions
from picker.sim.trial import Trial, measured_from, row
from picker.types import Request, UInt64Array

Row = dict[str, object]

_SHOWN = ("requests", "failed", "ttft_mean_s", "ttft_p95_s", "hit_ratio")
_LATEST = 200  # prompts by which replicas are compared
_LOOKS = (0.0, 0.1, 1.0, 5.0, 30.0)  # seconds after a replica was started anew
_GONE = 5.0  # seconds
_FIRST = 30.0  # seconds of a new one's life


def schedulers(trial: Trial, count: int) -> list[Scheduler]:
    """Alike but for what they draw."""
    made = [Trial(trial.scenario, trial.policy, trial.rate, trial.seed + 1000 * each).router() for each in range(count)]
    assert all(isinstance(each, Scheduler) for each in made)
    return [each for each in made if isinstance(each, Scheduler)]


def by_chance(count: int) -> Callable[[Request], int]:
    """As a gateway spreads streams."""
    return lambda request: (request.id * 2654435761 >> 8) % count


def shared(trial: Trial, count: int, delay: float) -> Row:
    router = Replicated(schedulers(trial, count), delay=delay, choose=by_chance(count))
    found = row(trial, trial.cluster(router).run(trial.arrivals()))
    return {"replicas": count, "delay_s": None if delay == math.inf else delay} | {key: found[key] for key in _SHOWN}


def death(trial: Trial, delay: float, *, lessons: bool = True) -> Row:
    """Two, of which one dies a third into the run, and comes back with nothing five seconds later.

    lessons: whether the other hands on what it has learned, beside what is cached where.
    """
    first, second, fresh = schedulers(trial, 3)
    router = Replicated([first, second], delay=delay, choose=by_chance(2), lessons=lessons)
    cluster, latest = trial.cluster(router), deque[UInt64Array](maxlen=_LATEST)
    assert isinstance(trial.scenario.workload, Sessions)
    span = trial.scenario.workload.seconds
    dies, looks = span / 3, {}

    def look(after: float) -> None:
        router.deliver(cluster.kernel.now)
        looks[f"agreement_{after:g}s"] = round(agreement(fresh, second, list(latest)), 4)

    def begin() -> None:
        router.start(0, fresh, cluster.kernel.now)
        for after in _LOOKS:
            cluster.kernel.at(cluster.kernel.now + max(after, delay), partial(look, after))

    cluster.kernel.at(dies, lambda: router.kill(0, cluster.kernel.now))
    cluster.kernel.at(dies + _GONE, begin)
    outcomes = cluster.run(_noted(trial.arrivals(), latest))
    found = row(trial, outcomes)
    after = [each.ttft for each in outcomes if dies <= each.at < dies + 60 and not each.failed]
    before = [each.ttft for each in outcomes if measured_from(trial, outcomes) <= each.at < dies and not each.failed]
    begins = dies + _GONE
    fresh_s = [each.ttft for each in outcomes if begins <= each.at < begins + _FIRST and not each.failed]
    spans = {"ttft_before_s": _mean(before), "ttft_60s_after_s": _mean(after), "ttft_30s_of_new_s": _mean(fresh_s)}
    about = {"replicas": 2, "delay_s": delay, "death": dies, "lessons": lessons}
    return about | {key: found[key] for key in _SHOWN} | spans | looks


def _noted(arrivals: Iterator[Arrival], latest: deque[UInt64Array]) -> Iterator[Arrival]:
    for arrival in arrivals:
        latest.append(arrival.block_hashes)
        yield arrival


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


@click.command(help=__doc__)
@click.option("--scenario", "called", multiple=True, default=("S2",), show_default=True, metavar="NAME")
@click.option("--replicas", "counts", type=click.IntRange(1), multiple=True, default=(1, 2, 4), show_default=True)
@click.option("--delay", "delays", type=float, multiple=True, default=(0.001, 0.1, math.inf), help="inf: no bus.")
@click.option("--load", type=click.FloatRange(0, min_open=True), default=0.7, show_default=True, metavar="RHO")
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, metavar="N")
@click.option("--limit", type=click.IntRange(1), metavar="REQUESTS", help="Only the first so many requests.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    called: Sequence[str],
    counts: Sequence[int],
    delays: Sequence[float],
    load: float,
    seeds: int,
    limit: int | None,
    as_json: bool,
) -> None:
    console, rows = Console(stderr=True), list[Row]()
    for name in called:
        chosen = scenario(name)
        assert chosen.stable_rate is not None
        for seed in range(1, seeds + 1):
            trial = Trial(chosen, "picker", load * chosen.stable_rate, seed, load, limit)
            runs = [(count, delay) for count in counts for delay in (delays if count > 1 else (0.0,))]
            for count, delay in runs:
                rows.append({"scenario": name, "seed": seed} | shared(trial, count, delay))
                console.print(_line(rows[-1]))
            if isinstance(chosen.workload, Sessions):
                for lessons in (True, False):
                    rows.append({"scenario": name, "seed": seed} | death(trial, 0.001, lessons=lessons))
                    console.print(_line(rows[-1]))
    if as_json:
        about = {"version": __version__, "machine": machine.describe(), "command": shlex.join(sys.argv)}
        click.echo(json.dumps({"bench": "replicas", "load": load, "rows": rows, **about}))


def _line(found: Row) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
    )


if __name__ == "__main__":
    command()
