"""One run: a scenario, a policy, a rate and a seed. The same trial gives the same outcomes, to the last digit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from picker.sim.adapters import AdapterSlots
from picker.sim.bounds import REFERENCES
from picker.sim.cluster import Arrival, Cluster, Outcome, Patience, Router, Timing
from picker.sim.engine import Engine
from picker.sim.policies import PoolDescription, policy
from picker.sim.result import Figures, figures
from picker.sim.scenario import Scenario
from picker.sim.sessions import Documents, Sessions
from picker.sim.workload import Adapters, SharedPrefix

# Streams of random numbers of one seed, so that none of them moves another.
_ARRIVALS, _NOISE, _SCRAPES, _ROUTER = range(4)


@dataclass(frozen=True, slots=True)
class Trial:
    """policy: a name of `sim.policies`. load: what `rate` is of the stable rate, None where nobody knows.

    limit: requests at most. scrape_interval: seconds, None: the scenario's. exact: routers are told by KV events what
    is cached. patience: with endpoints that say nothing; None: endless.
    """

    scenario: Scenario
    policy: str
    rate: float
    seed: int = 1
    load: float | None = None
    limit: int | None = None
    scrape_interval: float | None = None
    exact: bool = False
    patience: Patience | None = None

    def arrivals(self) -> Iterator[Arrival]:
        """What is asked: the same for every policy."""
        scenario = self.scenario
        rng = np.random.default_rng([self.seed, _ARRIVALS])
        return scenario.workload.arrivals(self.rate, scenario.pods.block_tokens, rng, self.limit)

    def router(self) -> Router:
        pods = self.scenario.pods
        description = PoolDescription(pods.count, pods.block_tokens, pods.published, exact=self.exact)
        return policy(self.policy)(description, self.seed * 4 + _ROUTER)

    def engine(self, name: str, started_at: float = 0.0) -> Engine:
        """The engine of the pod called `name`, as it is when its process starts."""
        pods = self.scenario.pods
        number = int(name.rpartition("-")[2])
        return Engine(
            pods.published.scaled(pods.speed(number)),
            name=name,
            adapters=None if pods.max_loras is None else AdapterSlots(pods.max_loras, load_s=pods.lora_load_s),
            noise=np.random.default_rng([self.seed, _NOISE, number, int(started_at)]),
            started_at=started_at,
        )

    def cluster(self, router: Router) -> Cluster:
        scenario = self.scenario
        interval = scenario.scrape_interval if self.scrape_interval is None else self.scrape_interval
        return Cluster(
            router,
            [self.engine(name) for name in scenario.pods.names],
            timing=Timing(scrape_interval=interval, think=scenario.workload.think),
            model=scenario.pods.profile,
            seed=self.seed * 4 + _SCRAPES,
            adapters=scenario.adapters,
            incidents=scenario.incidents,
            engine_of=self.engine,
            patience=self.patience,
        )

    def run(self) -> list[Outcome]:
        """What became of every request, by the policy or by a reference of `sim.bounds` that has no pods to choose."""
        reference = REFERENCES.get(self.policy)
        if reference is None:
            return self.cluster(self.router()).run(self.arrivals())
        pods = self.scenario.pods
        profiles = [pods.published.scaled(pods.speed(number)) for number in range(pods.count)]
        return reference(self.arrivals(), profiles, Timing(think=self.scenario.workload.think))


def measured_from(trial: Trial, outcomes: list[Outcome]) -> float:
    """When measuring begins: what arrives before warms the caches."""
    workload, share = trial.scenario.workload, trial.scenario.warmup
    match workload:
        case SharedPrefix():
            return 0.0 if workload.stages or not workload.warmup else workload.warmup[1]
        case Sessions() | Adapters():
            return share * workload.seconds
        case Documents():
            # A closed loop takes as long as it takes: its share is one of requests, the same for every policy.
            at = sorted(outcome.at for outcome in outcomes)
            return at[int(share * len(at))] if at else 0.0
        case _:
            return share * max((outcome.at for outcome in outcomes), default=0.0)


def warmup_in_words(scenario: Scenario) -> str:
    """What `measured_from` leaves out; empty where everything counts."""
    workload, share = scenario.workload, scenario.warmup
    match workload:
        case SharedPrefix():
            return "" if workload.stages or not workload.warmup else f"the first {workload.warmup[1]:g} s"
        case Sessions() | Adapters():
            return f"the first {share * workload.seconds:g} s" if share else ""
        case Documents():
            return f"the first {share:.0%} of the requests" if share else ""
        case _:
            return f"the first {share:.0%} of the time" if share else ""


def row(trial: Trial, outcomes: list[Outcome]) -> dict[str, object]:
    """The figures of a run with what it was; a ladder has those of its stages, too."""
    scenario = trial.scenario
    pods = len(set(scenario.pods.names) | {incident.pod for incident in scenario.incidents})
    run: dict[str, object] = {
        "policy": trial.policy,
        "scenario": scenario.name,
        "model": scenario.pods.profile,
        "pods": scenario.pods.count,
        "load": trial.load,
        "rate": round(trial.rate, 6),
        "seed": trial.seed,
    }
    start = measured_from(trial, outcomes)
    run |= figures(outcomes, pods=pods, measured_from=start)
    run["unsavable"] = sum(outcome.unsavable for outcome in outcomes if outcome.at >= start)
    if isinstance(scenario.workload, SharedPrefix) and scenario.workload.stages:
        run["stages"] = _stages(trial, outcomes, scenario.workload, pods)
    return run


def _stages(trial: Trial, outcomes: list[Outcome], workload: SharedPrefix, pods: int) -> list[dict[str, object]]:
    stages: list[dict[str, object]] = []
    for start, end, rate in workload.windows(trial.rate):
        of_stage: Figures = figures([o for o in outcomes if start <= o.at < end], pods=pods)
        stages.append({"rate": round(rate, 6), "seconds": end - start, **of_stage})
    return stages


def simulate(trial: Trial) -> dict[str, object]:
    """Run it and say what came of it."""
    return row(trial, trial.run())
