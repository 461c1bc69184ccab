"""How much a scenario's pods could carry at best: the highest rate at which a pooled oracle keeps up.

The oracle is one engine with all pods' speed, cache and slots: a step of it is a step of all pods in lockstep with the
work divided evenly, so nothing is lost to placement, duplicates or imbalance. Loads are given as shares of its rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from picker.sim.adapters import AdapterSlots
from picker.sim.cluster import Cluster, Outcome, Timing
from picker.sim.engine import Engine
from picker.sim.latency import Profile
from picker.sim.scenario import Pods, Scenario
from picker.sim.sessions import Documents
from picker.sim.trial import Trial, measured_from
from picker.sim.workload import SharedPrefix
from picker.types import Decision, Endpoint, EndpointAdded, Fact, Queued, Rejection, Request

# A queue that grows makes requests wait longer the later they come: by this many seconds a second, and it is unstable.
_GROWTH = 0.01
# A stage of a ladder is shorter than its own answers; whether a queue grows shows only after many of them.
_STAGE_S = 400.0


class OnlyOne:
    """A router for a pool of one."""

    def __init__(self) -> None:
        self._endpoint: Endpoint | None = None

    def submit(self, request: Request, now: float) -> Decision | Rejection | Queued:
        assert self._endpoint is not None
        return Decision(request.id, self._endpoint)

    def apply(self, fact: Fact, now: float) -> None:
        if isinstance(fact, EndpointAdded):
            self._endpoint = fact.endpoint

    def poll(self, now: float) -> list[Decision | Rejection]:
        return []

    def next_wakeup(self) -> float | None:
        return None


def pooled(pods: Pods) -> Profile:
    """All pods as one: fixed times as they are, everything that is per token divided among them."""
    profile, speed = pods.published, pods.total_speed
    mean = speed / pods.count
    return replace(
        profile,
        name=f"{pods.count} x {profile.name}, pooled",
        c0=profile.c0 / mean,
        experts=profile.experts / mean,
        # Each pod's batch is its share of the whole, and only that touches its experts.
        expert_share=1.0 - (1.0 - profile.expert_share) ** (1.0 / pods.count),
        c_pf=profile.c_pf / speed,
        c_attn=profile.c_attn / speed,
        c_kv=profile.c_kv / speed,
        c_seq=profile.c_seq / speed,
        kv_tokens=profile.kv_tokens * pods.count,
        max_num_seqs=profile.max_num_seqs * pods.count,
        max_num_batched_tokens=profile.max_num_batched_tokens * pods.count,
        noise_sd=0.0,
    )


def run_pooled(trial: Trial) -> list[Outcome]:
    """The trial's requests on the pooled oracle; incidents do not befall it."""
    pods = trial.scenario.pods
    # A load holds up the pod that does it, which is that share of the pool.
    load_s = pods.lora_load_s / pods.count
    slots = None if pods.max_loras is None else AdapterSlots(pods.max_loras * pods.count, load_s=load_s)
    engine = Engine(pooled(pods), name="pool", adapters=slots)
    timing = Timing(scrape_interval=60.0, think=trial.scenario.workload.think)
    cluster = Cluster(OnlyOne(), [engine], timing=timing, adapters=trial.scenario.adapters)
    return cluster.run(trial.arrivals())


def growth(trial: Trial) -> float:
    """Seconds by which the wait for a first token grows in a second, on the pooled oracle: a least-squares slope."""
    outcomes = run_pooled(trial)
    start = measured_from(trial, outcomes)
    points = [(outcome.at, outcome.ttft) for outcome in outcomes if outcome.at >= start and not outcome.failed]
    if len(points) < 10:
        return 0.0
    at, ttft = np.array(points).T
    return float(np.polyfit(at - at.mean(), ttft, 1)[0])


def stable_rate(
    scenario: Scenario,
    *,
    seeds: Sequence[int] = (101, 102),
    limit: int | None = None,
    on_progress: Callable[[float], None] | None = None,
    precision: float = 0.02,
) -> float:
    """The highest rate at which the pooled oracle's queue does not grow, by bisection to `precision`.

    In the unit of the scenario's rate. A closed loop never overloads: of one it is 1, all of its users. on_progress is
    told every rate that is tried.
    """
    if isinstance(scenario.workload, Documents):
        return 1.0
    scenario = _for_measuring(scenario)

    def keeps_up(rate: float) -> bool:
        if on_progress is not None:
            on_progress(rate)
        slopes = [growth(Trial(scenario, "pooled", rate, seed=seed, limit=limit)) for seed in seeds]
        return sum(slopes) / len(slopes) < _GROWTH

    low = high = scenario.rate
    while not keeps_up(low):
        low, high = low / 2.0, low
    while low == high or keeps_up(high):
        low, high = high, high * 2.0
    while high / low > 1.0 + precision:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps_up(middle) else (low, middle)
    return low


def _for_measuring(scenario: Scenario) -> Scenario:
    scenario = scenario.at_load()
    if isinstance(scenario.workload, SharedPrefix):
        return replace(scenario, workload=replace(scenario.workload, seconds=_STAGE_S))
    return scenario
