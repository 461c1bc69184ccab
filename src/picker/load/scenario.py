"""The simulator's scenarios as plans for real servers: the same arrivals, lengths, pauses and sharing, as real text.

A scenario's requests come from the very generator that `picker simulate` draws them from, so the same seed gives the
same load to both. Blocks of a prompt become text: equal block hashes, equal bytes. The answers inside later turns are
those that really came. Pure but for finding a rate that nobody has measured, which takes a while.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from picker.errors import ConfigError
from picker.load.schedule import Pace
from picker.load.text import Piece, key
from picker.load.workload import Plan, Planned, Turn
from picker.sim.capacity import stable_rate
from picker.sim.cluster import Arrival
from picker.sim.scenario import Scenario
from picker.sim.sessions import Documents, Sessions
from picker.sim.trial import Trial
from picker.sim.workload import Adapters, SharedPrefix


@dataclass(frozen=True, slots=True)
class Level:
    """How much: rate in the scenario's unit; load: what that is of the highest stable rate, None where nobody knows."""

    scenario: Scenario
    rate: float
    load: float | None


def level(
    scenario: Scenario,
    *,
    load: float | None = None,
    rate_scale: float | None = None,
    limit: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Level:
    """The scenario at a load, or at a multiple of its own rate, as `picker simulate` takes the same flags."""
    if load is not None and rate_scale is not None:
        raise ConfigError("--load and --rate-scale both say how much: give one of them")
    ladder = isinstance(scenario.workload, SharedPrefix) and bool(scenario.workload.stages)
    if load is None and (rate_scale is not None or ladder or scenario.load is None):
        rate = scenario.rate * (rate_scale or 1.0)
        known = None if ladder or not scenario.stable_rate else rate / scenario.stable_rate
        return Level(scenario, rate, known)
    scenario = scenario.at_load()
    highest = scenario.stable_rate or stable_rate(scenario, limit=limit, on_progress=on_progress)
    share = load if load is not None else scenario.load or 1.0
    return Level(replace(scenario, stable_rate=highest), share * highest, share)


def planned(chosen: Level, *, seed: int, limit: int | None = None) -> tuple[Plan, Pace]:
    """What `picker simulate` would ask with this seed, and how to walk it; `Pace.time_scale` is the caller's."""
    scenario = chosen.scenario
    trial = Trial(scenario, "load", chosen.rate, seed=seed, load=chosen.load, limit=limit)
    if isinstance(scenario.workload, Documents):
        return _closed(trial, scenario.workload)
    conversations = tuple(_conversation(arrival, scenario.pods.block_tokens, seed) for arrival in trial.arrivals())
    if not conversations:
        raise ConfigError(f"scenario {scenario.name}: nothing arrives at this rate")
    plan = Plan(scenario.name, conversations, stages=_stages(trial))
    until = scenario.workload.seconds if isinstance(scenario.workload, Sessions) else None
    return plan, Pace(until=until, warmup=_warmup(trial, plan))


def _stages(trial: Trial) -> tuple[tuple[float, float, float], ...]:
    workload = trial.scenario.workload
    return tuple(workload.windows(trial.rate)) if isinstance(workload, SharedPrefix) and workload.stages else ()


def _warmup(trial: Trial, plan: Plan) -> float:
    """Seconds that are sent and not measured (`sim.trial.measured_from`)."""
    workload, share = trial.scenario.workload, trial.scenario.warmup
    match workload:
        case SharedPrefix():
            return 0.0 if workload.stages or not workload.warmup else workload.warmup[1]
        case Sessions() | Adapters():
            return share * workload.seconds
        case _:
            return share * plan.duration


# --- conversations -------------------------------------------------------------------------------------------


def _conversation(first: Arrival, size: int, seed: int) -> Planned:
    """An arrival with all turns that follow it, of which those that come too late are left out when their time comes.

    size: tokens of a block.
    """
    return _of_turns(list(_turns(first)), size, seed)


def _turns(first: Arrival) -> Iterator[Arrival]:
    arrival: Arrival | None = first
    while arrival is not None:
        yield arrival
        # Ending at once, so that no turn is dropped for being late here.
        arrival = arrival.then(arrival.at) if arrival.then is not None else None


def _of_turns(arrivals: list[Arrival], size: int, seed: int) -> Planned:
    first = arrivals[0]
    turns = [Turn(_prompt(first, size, seed), first.output_tokens)]
    for before, arrival in itertools.pairwise(arrivals):
        question = arrival.prompt_tokens - before.prompt_tokens - before.output_tokens
        words = (Piece(_own(arrival, seed), question),)
        turns.append(Turn(words, arrival.output_tokens, think=arrival.at - before.at))
    return Planned(at=first.at, turns=tuple(turns), model=first.lora)


def _prompt(arrival: Arrival, size: int, seed: int) -> tuple[Piece, ...]:
    """A piece for each full block, named after its hash, and what is left over."""
    blocks, hashes = len(arrival.block_hashes), arrival.block_hashes.tolist()
    if not blocks:
        return (Piece(_own(arrival, seed), arrival.prompt_tokens),)
    pieces = [Piece(key(seed, "block", each), size) for each in hashes]
    left = arrival.prompt_tokens - size * blocks
    return (*pieces, Piece(_own(arrival, seed), left)) if left else tuple(pieces)


def _own(arrival: Arrival, seed: int) -> int:
    """A key that belongs to this prompt alone."""
    last = int(arrival.block_hashes[-1]) if len(arrival.block_hashes) else 0
    return key(seed, "rest", last, arrival.session, arrival.prompt_tokens, arrival.at)


# --- a closed loop -------------------------------------------------------------------------------------------


def _closed(trial: Trial, workload: Documents) -> tuple[Plan, Pace]:
    """Users that take the next conversation when one ends: the same conversations in the same order."""
    starts = tuple(arrival.at for arrival in trial.arrivals())
    # One user alone walks through all of them, one after the other.
    alone = replace(trial, scenario=replace(trial.scenario, workload=replace(workload, users=1)), rate=1.0)
    size = trial.scenario.pods.block_tokens
    turns = (turn for first in alone.arrivals() for turn in _turns(first))
    conversations = tuple(
        replace(_of_turns(list(group), size, trial.seed), at=0.0)
        for _, group in itertools.groupby(turns, key=lambda turn: turn.session)
    )
    plan = Plan(trial.scenario.name, conversations)
    return plan, Pace(closed=len(starts), starts=starts, warmup_share=trial.scenario.warmup)
