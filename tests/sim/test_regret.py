"""Regret of single decisions: toys whose right answer is known, and the processes that find it out."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import pytest

from forked import no_children_left
from picker.core.profile import Cost
from picker.sim import forks
from picker.sim.cluster import Arrival, Router
from picker.sim.latency import profile
from picker.sim.policies import PoolDescription, scheduler
from picker.sim.regret import Case, Gate, HitClass, Metric, Plan, Pod, alternatives, summary, weights
from picker.sim.scenario import Pods, Scenario
from picker.sim.trial import Trial
from picker.types import Decision, Endpoint, EndpointAdded, Fact, Queued, Rejection, RejectReason, Request

NOISELESS = replace(profile("qwen3-32b-2xh100"), noise_sd=0.0, block_size=64)
TOKENS = 8000
REFILL_S = NOISELESS.c_pf * TOKENS + NOISELESS.c_attn * TOKENS**2 / 2


@dataclass(frozen=True)
class Same:
    """The same prompt again and again, `gap` seconds apart."""

    count: int
    gap: float = 5.0
    think: float = float("inf")

    def arrivals(
        self, rate: float, block_tokens: int, rng: np.random.Generator, limit: int | None = None
    ) -> Iterator[Arrival]:
        for i in range(self.count):
            yield Arrival(i * self.gap, TOKENS + 1, 5, np.arange(TOKENS // block_tokens, dtype=np.uint64))


@dataclass
class Always:
    """A router that takes the endpoint of this name whenever it may."""

    name: str
    endpoints: dict[str, Endpoint] = field(default_factory=dict)

    def submit(self, request: Request, now: float) -> Decision | Rejection | Queued:
        open_to = [e for name, e in self.endpoints.items() if name not in request.exclude]
        if not open_to:
            return Rejection(request.id, RejectReason.NO_MATCH, 503, "nobody left")
        wanted = [endpoint for endpoint in open_to if endpoint.name == self.name]
        return Decision(request.id, (wanted or open_to)[0])

    def apply(self, fact: Fact, now: float) -> None:
        if isinstance(fact, EndpointAdded):
            self.endpoints[fact.endpoint.name] = fact.endpoint

    def poll(self, now: float) -> list[Decision | Rejection]:
        return []

    def next_wakeup(self) -> float | None:
        return None


@dataclass(frozen=True, slots=True)
class Toy(Trial):
    """A trial of a router of the test's own."""

    made: Any = None

    def router(self) -> Router:
        router: Router = self.made()
        return router


def toy(router: Any, workload: Any, pods: int = 2) -> Toy:
    scenario = Scenario("T", "toy", "a toy", Pods(count=pods), workload, warmup=0.0)
    return Toy(scenario, "toy", 1.0, made=router)


class Flipped:
    """Sends request number 3 away from where its prompt is cached."""

    def __init__(self, at: int = 3) -> None:
        self.router, self.at = Always("pod-0"), at

    def submit(self, request: Request, now: float) -> Decision | Rejection | Queued:
        if request.id == self.at and not request.exclude:
            request = msgspec.structs.replace(request, exclude=frozenset({"pod-0"}))
        return self.router.submit(request, now)

    def apply(self, fact: Fact, now: float) -> None:
        self.router.apply(fact, now)

    def poll(self, now: float) -> list[Decision | Rejection]:
        return []

    def next_wakeup(self) -> float | None:
        return None


def examined(trial: Trial, plan: Plan, jobs: int = 2) -> list[Case]:
    cases: list[Case] = []
    forks.examine(trial, plan, jobs=jobs, on_case=cases.append)
    return cases


# --- toys ---


def test_leaving_the_pod_that_holds_the_prompt_is_regretted_by_the_time_to_compute_it_again() -> None:
    (case,) = examined(toy(Flipped, Same(6)), Plan([3], 30.0))
    assert case.pods[case.chosen].name == "pod-1"
    assert case.hit_class is HitClass.LEFT
    assert case.regret(Metric.TTFT) == pytest.approx(REFILL_S, rel=0.1)
    assert case.pods[case.best(Metric.TTFT)].name == "pod-0"
    assert case.cached.tolist() == [TOKENS, 0]
    assert no_children_left()


def test_keeping_it_there_is_not_regretted() -> None:
    (case,) = examined(toy(lambda: Always("pod-0"), Same(6)), Plan([3], 30.0))
    assert case.hit_class is HitClass.KEPT
    assert case.regret(Metric.TTFT) <= 0.0
    cost = case.cost(Metric.TTFT).mean(axis=1)
    assert cost[1] - cost[0] == pytest.approx(REFILL_S, rel=0.1)


def test_a_first_prompt_is_cached_nowhere() -> None:
    (case,) = examined(toy(lambda: Always("pod-0"), Same(3)), Plan([1], 30.0))
    assert case.hit_class is HitClass.NONE
    assert case.regret(Metric.TTFT) == pytest.approx(0.0, abs=0.1)


@dataclass(frozen=True)
class Crowd(Same):
    """As many prompts of their own at once as there are, then one more a moment later."""

    def arrivals(
        self, rate: float, block_tokens: int, rng: np.random.Generator, limit: int | None = None
    ) -> Iterator[Arrival]:
        for i in range(self.count):
            hashes = np.arange(TOKENS // block_tokens, dtype=np.uint64) + np.uint64(1000 * i)
            yield Arrival(0.01 * i, TOKENS + 1, 5, hashes)


def test_what_a_decision_does_to_those_behind_it_counts() -> None:
    """All on one pod: moving the third of four there helps itself and the fourth."""
    (case,) = examined(toy(lambda: Always("pod-0"), Crowd(4)), Plan([3], 30.0))
    own, _, others, _ = (case.costs[0] - case.costs[1]).mean(axis=0)
    assert own > 1.5 * REFILL_S
    assert others == pytest.approx(REFILL_S, rel=0.3)


def test_continuation_0_of_the_chosen_endpoint_is_what_happens() -> None:
    trial = toy(lambda: Always("pod-0"), Crowd(4))
    outcomes = trial.cluster(trial.router()).run(trial.arrivals())
    (case,) = examined(trial, Plan([3], 30.0, continuations=1))
    assert case.costs[0, 0, 0] == pytest.approx(outcomes[2].ttft)
    assert case.costs[0, 0, 2] == pytest.approx(sum(outcome.ttft for n, outcome in enumerate(outcomes) if n != 2))


def test_looking_at_decisions_changes_none_of_them() -> None:
    pool = PoolDescription(2, 64, NOISELESS)
    trial = toy(lambda: scheduler(pool, 3, Cost()), Crowd(6))
    plain = [outcome.endpoint for outcome in trial.cluster(trial.router()).run(trial.arrivals())]
    cases = examined(trial, Plan([2, 4, 5], 30.0))
    assert [case.pods[case.chosen].name for case in cases] == [plain[1], plain[3], plain[4]]
    assert all(set(case.terms) >= {"queue", "prefill", "followers"} for case in cases)


def test_one_process_finds_what_several_find() -> None:
    trial = toy(Flipped, Same(6))
    one, many = (examined(trial, Plan([3, 4], 30.0), jobs=jobs) for jobs in (1, 4))
    assert [case.costs.tolist() for case in one] == [case.costs.tolist() for case in many]


def test_an_endpoint_that_refuses_is_no_alternative() -> None:
    class Picky(Always):
        def submit(self, request: Request, now: float) -> Decision | Rejection | Queued:
            if "pod-0" in request.exclude and "pod-1" in request.exclude:
                return Rejection(request.id, RejectReason.NO_MATCH, 503, "not that one")
            return super().submit(request, now)

    (case,) = examined(toy(lambda: Picky("pod-0"), Same(4), pods=3), Plan([2], 30.0))
    assert [pod.name for pod in case.pods] == ["pod-0", "pod-1"]


# --- processes ---


def test_a_child_says_what_it_found_and_is_gone() -> None:
    with forks.Forks(jobs=2) as fork:
        for number in range(5):
            if fork.branch(number):
                fork.report(number * "x" * 100_000)
        assert {key: len(text) for key, text in fork.collect().items()} == {n: n * 100_000 for n in range(5)}
        assert fork.collect() == {}
    assert no_children_left()


def test_a_child_that_fails_is_named_and_none_is_left() -> None:
    def run() -> None:
        with forks.Forks(jobs=4) as fork:
            if fork.branch("left"):
                raise ValueError("in the child alone")
            if fork.branch("right"):
                fork.report(1)
            fork.collect()

    with pytest.raises(RuntimeError, match="left"):
        run()
    assert no_children_left()


def test_an_interrupt_takes_the_children_along() -> None:
    def run() -> None:
        with forks.Forks(jobs=4) as fork:
            for number in range(3):
                if fork.branch(number):
                    signal.pause()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert no_children_left()


def test_a_system_without_fork_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(RuntimeError, match="cannot fork"):
        forks.Forks(jobs=1)


# --- which decisions, which future ---


def test_decisions_are_spread_over_the_time_that_is_measured() -> None:
    trial = toy(lambda: Always("pod-0"), Same(40))
    numbers = forks.numbers(trial, 4, horizon=50.0)
    assert len(numbers) == 4
    assert all(first < second for first, second in itertools.pairwise(numbers))
    assert numbers[-1] <= 30  # the last 50 s of arrivals are the horizon of the last
    assert numbers == forks.numbers(trial, 4, horizon=50.0)


def test_a_gate_closes_behind_its_horizon_for_turns_too() -> None:
    def again(ended: float) -> Arrival:
        return Arrival(ended + 1.0, 10, 1, np.empty(0, dtype=np.uint64), then=again)

    gate = Gate()
    source = gate.source(Arrival(float(at), 10, 1, np.empty(0, dtype=np.uint64), then=again) for at in range(100))
    first = next(source)
    assert first.then is not None
    second = first.then(3.0)
    assert second is not None
    gate.close(5.0, 10.0)
    assert [arrival.at for arrival in source][-1] == 15.0
    assert second.then is not None
    assert second.then(13.0) is not None
    assert second.then(15.0) is None


def test_another_future_is_a_later_stretch_of_the_same_arrivals() -> None:
    gate = Gate()
    source = gate.source(Arrival(float(at), at + 1, 1, np.empty(0, dtype=np.uint64)) for at in range(100))
    next(source)
    gate.close(0.5, 3.0, skip=20.0)
    assert [(arrival.at, arrival.prompt_tokens) for arrival in source] == [(1.0, 22), (2.0, 23), (3.0, 24)]


def test_the_best_ranked_are_tried_with_the_chosen_first() -> None:
    decision = Decision(1, Endpoint("b", "b", frozenset()))
    assert alternatives(decision, ["a", "b"], None) == ["a", "b"]
    assert alternatives(decision, ["a", "b"], 2) == ["a", "b"]  # it ranks nothing
    assert alternatives(Rejection(1, RejectReason.NO_ENDPOINTS, 503, ""), ["a"], None) == []


# --- figures ---


def made(costs: Sequence[Sequence[float]], chosen: int = 0, terms: Mapping[str, Sequence[float]] | None = None) -> Case:
    """costs: own TTFT by endpoint and continuation."""
    own = np.array(costs, dtype=float)
    parts = np.stack([own, *[np.zeros_like(own)] * 3], axis=2)
    pods = tuple(Pod(f"pod-{i}", 0, 0, 0.0) for i in range(len(own)))
    named = {name: np.array(values, dtype=float) for name, values in (terms or {}).items()}
    return Case(1, 0.0, 1000, pods, chosen, np.zeros(len(own)), 0.0, parts, named)


def test_luck_in_one_future_is_no_regret() -> None:
    lucky = made([[10.0, 10.0], [4.0, 14.0], [14.0, 4.0]])
    assert lucky.naive_regret(Metric.TTFT) == pytest.approx(1.0)
    assert lucky.regret(Metric.TTFT) == pytest.approx(-4.0)
    steady = made([[10.0, 11.0], [8.0, 9.0]])
    assert steady.regret(Metric.TTFT) == steady.naive_regret(Metric.TTFT) == pytest.approx(2.0)


def test_noise_is_how_unsure_a_difference_is() -> None:
    assert made([[1.0, 2.0], [3.0, 4.0]]).noise(Metric.TTFT) == 0.0
    assert made([[1.0, 2.0], [3.0, 6.0]]).noise(Metric.TTFT) == pytest.approx(1.0)
    assert np.isnan(made([[1.0], [3.0]]).noise(Metric.TTFT))


def test_between_equals_regret_is_nothing_on_average_though_the_smallest_sum_is_smaller() -> None:
    rng = np.random.default_rng(1)
    cases = [made(rng.normal(10.0, 1.0, (4, 3)).tolist()) for _ in range(300)]
    found = summary(cases, Metric.TTFT)
    assert abs(found.regret) < 3.0 * found.error
    assert found.naive > 0.3


def test_a_term_that_is_charged_at_half_is_found_to_be() -> None:
    rng = np.random.default_rng(2)
    cases = []
    for _ in range(60):
        right, low = rng.exponential(1.0, 4), rng.exponential(1.0, 4)
        truth = right + 2.0 * low
        costs = truth[:, None] + rng.normal(0.0, 0.3, (4, 3))
        cases.append(made(costs.tolist(), terms={"right": right.tolist(), "low": low.tolist(), "none": [1.0] * 4}))
    found = weights(cases, Metric.TTFT, np.random.default_rng(0))
    assert set(found) == {"right", "low"}
    assert found["right"].value == pytest.approx(1.0, abs=0.15)
    assert found["low"].value == pytest.approx(2.0, abs=0.15)
    assert found["low"].low > 1.5


def test_a_policy_that_names_no_terms_has_no_weights() -> None:
    assert weights([made([[1.0], [2.0]])] * 20, Metric.TTFT, np.random.default_rng(0)) == {}


def test_no_decisions_have_no_regret() -> None:
    assert summary([], Metric.TTFT).decisions == 0
