from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest

from picker.sim.cluster import Arrival, Cluster, Incident, Outcome, Patience, Timing, Trouble, _Pod
from picker.sim.engine import Engine, StepResult
from picker.sim.latency import Profile, profile
from picker.sim.workload import Context
from picker.types import (
    Decision,
    Endpoint,
    EndpointAdded,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    HealthObserved,
    LoadObserved,
    Queued,
    Rejection,
    RejectReason,
    Request,
    ScrapeFailed,
)

PROFILE = replace(profile("qwen3-32b-2xh100"), noise_sd=0.0)
TIMING = Timing(gateway=0.002, response=0.001, scrape_interval=1.0)


@dataclass(slots=True)
class Turns:
    """A router that takes pods in turn, but never one that a request excludes, and notes what it is told."""

    endpoints: list[Endpoint] = field(default_factory=list)
    facts: list[tuple[float, Fact]] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    numbers: Callable[[], int] = field(default_factory=lambda: itertools.count().__next__)

    def submit(self, request: Request, now: float) -> Decision | Rejection | Queued:
        self.asked.append(request)
        open_to = [endpoint for endpoint in self.endpoints if endpoint.name not in request.exclude]
        if not open_to:
            return Rejection(request.id, RejectReason.NO_MATCH, 503, "nobody left")
        return Decision(request.id, open_to[self.numbers() % len(open_to)])

    def apply(self, fact: Fact, now: float) -> None:
        self.facts.append((now, fact))
        if isinstance(fact, EndpointAdded):
            self.endpoints.append(fact.endpoint)

    def poll(self, now: float) -> list[Decision | Rejection]:
        return []

    def next_wakeup(self) -> float | None:
        return None


def told(router: Turns, *kinds: type) -> list[Fact]:
    return [fact for _, fact in router.facts if isinstance(fact, kinds)]


def engine_of(name: str, started_at: float = 0.0, of: Profile = PROFILE) -> Engine:
    return Engine(of, name=name, started_at=started_at)


def cluster(
    pods: int,
    *incidents: Incident,
    timing: Timing = TIMING,
    of: Profile = PROFILE,
    patience: Patience | None = None,
    kind: type[Cluster] = Cluster,
) -> tuple[Cluster, Turns]:
    router = Turns()
    engines = [Engine(of, name=f"pod-{n}", noise=np.random.default_rng(n)) for n in range(pods)]
    made = kind(router, engines, timing=timing, incidents=incidents, engine_of=engine_of, patience=patience)
    return made, router


def ask(at: float, *, key: int = 1, tokens: int = 1000, output: int = 10) -> Arrival:
    return Arrival(at, tokens, output, Context(PROFILE.block_size).extended(key, tokens).hashes)


def run(pods: int, arrivals: Iterable[Arrival], *incidents: Incident) -> tuple[list[Outcome], Turns]:
    made, router = cluster(pods, *incidents)
    return made.run(arrivals), router


# --- serving ---


def test_a_first_token_takes_gateway_front_end_prefill_and_the_way_back() -> None:
    (outcome,), router = run(1, [ask(5.0)])
    work = 1000 * 1000 / 2
    prefill = PROFILE.step_time(prefill_tokens=1000, prefill_work=work, decodes=0, context=0)
    assert outcome.ttft == pytest.approx(0.002 + PROFILE.front_end(1000) + prefill + 0.001)
    assert outcome.e2e > outcome.ttft
    assert [type(fact) for fact in told(router, FirstToken, Finished)] == [FirstToken, Finished]


def test_a_prompt_served_before_is_found_in_the_cache_of_that_pod_only() -> None:
    outcomes, _ = run(2, [ask(0.0), ask(10.0), ask(20.0)])
    assert [outcome.endpoint for outcome in outcomes] == ["pod-0", "pod-1", "pod-0"]
    assert [outcome.cached_tokens for outcome in outcomes] == [0, 0, 1000 // 16 * 16]


def test_a_next_turn_arrives_when_the_answer_says() -> None:
    following: list[float] = []

    def then(ended_at: float) -> Arrival:
        following.append(ended_at)
        return ask(ended_at + 3.0, key=2)

    first, second = run(1, [replace(ask(0.0), then=then)])[0]
    assert following == [first.ended_at]
    assert second.at == first.ended_at + 3.0
    assert not second.failed


def test_a_prompt_larger_than_the_cache_is_refused_and_nothing_hangs() -> None:
    made, router = cluster(1, of=replace(PROFILE, kv_tokens=2000))
    large, small = made.run([ask(0.0, tokens=5000), ask(0.1, tokens=500)])
    assert (large.failed, small.failed) == (True, False)
    assert told(router, Finished)[0] == Finished(1, 400)


def test_what_has_not_ended_when_the_run_does_has_failed() -> None:
    made, _ = cluster(1)
    early, late = made.run([ask(0.0), ask(10.0, output=2000)], until=11.0)
    assert (early.failed, late.failed) == (False, True)


class Prompt(Cluster):
    """Never leaves an engine behind."""

    def _quiet(self, pod: _Pod) -> float:
        return 0.0


def scattered(count: int) -> Iterable[Arrival]:
    rng = np.random.default_rng(7)
    for n in range(count):
        tokens, output = int(rng.integers(20, 3000)), int(rng.integers(1, 600))
        first = ask(0.4 * n, key=tokens, tokens=tokens, output=output)
        yield replace(first, then=partial(once_more, tokens, output) if tokens % 2 else None)


def once_more(tokens: int, output: int, ended_at: float) -> Arrival:
    return ask(ended_at + 0.5, key=tokens, tokens=tokens + output, output=5)


@pytest.mark.parametrize("kv_tokens", [PROFILE.kv_tokens, 6_000])
def test_an_engine_that_is_left_behind_is_seen_as_if_it_were_not(kv_tokens: int) -> None:
    noisy = replace(PROFILE, noise_sd=0.05, kv_tokens=kv_tokens)
    trouble = (
        Incident(5.0, Trouble.SLOW, "pod-0", factor=3.0),
        Incident(7.0, Trouble.HANG, "pod-1", seconds=2.0),
        Incident(9.0, Trouble.KILL, "pod-0"),
    )

    def seen(kind: type[Cluster]) -> tuple[list[list[float]], list[list[float]]]:
        made, router = cluster(3, *trouble, of=noisy, kind=kind)
        times = [[o.first_token_at, o.ended_at] for o in made.run(scattered(60))]
        loads = [fact for fact in told(router, LoadObserved) if isinstance(fact, LoadObserved)]
        preempted = sum(pod.engine.counters.preemptions for pod in made._pods.values())
        assert bool(preempted) == (kv_tokens < PROFILE.kv_tokens)
        return times, [[load.observed_at, load.running or 0, load.waiting or 0] for load in loads]

    (late, late_loads), (prompt, prompt_loads) = seen(Cluster), seen(Prompt)
    np.testing.assert_allclose(late, prompt)
    np.testing.assert_allclose(late_loads, prompt_loads)


def test_who_was_preempted_ends_when_it_does() -> None:
    def ends(kind: type[Cluster]) -> list[float]:
        made, _ = cluster(1, of=replace(PROFILE, noise_sd=0.05, kv_tokens=4000), kind=kind)
        outcomes = made.run([ask(0.0, output=1500), ask(0.1, key=2, output=1500)])
        assert made._pods["pod-0"].engine.counters.preemptions
        return [outcome.ended_at for outcome in outcomes]

    np.testing.assert_allclose(ends(Cluster), ends(Prompt))


class Stepped(Engine):
    """Counts how often it is stepped."""

    steps = 0

    def step(self, now: float, horizon: float | None = None) -> StepResult | None:
        self.steps += 1
        return super().step(now, horizon)


def test_an_engine_that_writes_a_long_answer_is_seldom_stepped() -> None:
    engine = Stepped(replace(PROFILE, noise_sd=0.05), name="pod-0", noise=np.random.default_rng(1))
    Cluster(Turns(), [engine], timing=TIMING).run([ask(0.0, output=4000)])
    assert engine.counters.generation_tokens == 4000
    assert engine.steps < 40


def test_an_adapter_is_asked_for_as_a_model() -> None:
    router = Turns()
    made = Cluster(router, [engine_of("pod-0")], timing=TIMING, model="base", adapters=["french"])
    made.run([replace(ask(0.0), lora="french"), ask(1.0)])
    assert [request.model for request in router.asked] == ["french", "base"]
    assert router.endpoints[0].models == {"french", "base"}


# --- scrapes ---


def test_a_decision_sees_every_pod_as_its_latest_scrape_showed_it() -> None:
    made, router = cluster(3)
    made.run(ask(0.3 * n, key=n, output=400) for n in range(20))
    seen: dict[str, float] = {}
    for now, fact in router.facts:
        if isinstance(fact, LoadObserved):
            assert now - TIMING.scrape_interval < fact.observed_at <= now
            assert fact.observed_at > seen.get(fact.name, -1.0)
            seen[fact.name] = fact.observed_at
    assert len({at % 1.0 for at in seen.values()}) == 3  # each has a phase of its own
    assert any(fact.running for fact in told(router, LoadObserved) if isinstance(fact, LoadObserved))


def test_a_blind_pod_serves_and_shows_nothing() -> None:
    trouble = (Incident(1.0, Trouble.BLIND, "pod-0"), Incident(6.0, Trouble.SEE, "pod-0"))
    outcomes, router = run(1, [ask(float(n), key=n) for n in range(10)], *trouble)
    assert not any(outcome.failed for outcome in outcomes)
    lost = [fact.observed_at for fact in told(router, ScrapeFailed) if isinstance(fact, ScrapeFailed)]
    assert len(lost) == 5
    assert all(0.0 < at < 6.0 for at in lost)
    assert not told(router, HealthObserved)


# --- trouble ---


def test_a_request_that_has_seen_nothing_goes_elsewhere_when_its_pod_dies() -> None:
    at_work = ask(0.0, tokens=20_000)
    (outcome,), router = run(2, [at_work], Incident(0.3, Trouble.KILL, "pod-0"))
    assert (outcome.endpoint, outcome.attempts, outcome.failed) == ("pod-1", 2, False)
    assert told(router, Failed) == [Failed(1, FailureReason.RESET)]
    assert router.asked[1].exclude == {"pod-0"}
    assert outcome.ttft > 0.3


def test_a_request_that_has_seen_its_first_token_is_lost_with_its_pod() -> None:
    session = replace(ask(0.0, output=5000), then=lambda ended_at: ask(ended_at))
    outcomes, router = run(2, [session], Incident(2.0, Trouble.KILL, "pod-0"))
    assert len(outcomes) == 1
    assert outcomes[0].failed
    assert outcomes[0].first_token_at < 2.0 == outcomes[0].failed_at
    assert outcomes[0].unsavable
    assert [type(fact) for fact in told(router, FirstToken, Finished, Failed)] == [FirstToken, Failed]


def test_a_dead_pod_refuses_and_the_third_refusal_is_the_last() -> None:
    kills = [Incident(0.5, Trouble.KILL, f"pod-{n}") for n in range(4)]
    (outcome,), router = run(4, [ask(1.0)], *kills)
    assert (outcome.failed, outcome.attempts, outcome.unsavable) == (True, 3, False)
    assert told(router, Failed) == [Failed(1, FailureReason.CONNECT)] * 3
    (outcome,), _ = run(4, [ask(1.0)], kills[0], kills[2])
    assert (outcome.failed, outcome.attempts, outcome.endpoint) == (False, 3, "pod-1")


def test_a_pod_comes_back_with_an_empty_cache_and_a_new_start() -> None:
    trouble = (Incident(5.0, Trouble.KILL, "pod-0"), Incident(10.0, Trouble.REVIVE, "pod-0"))
    arrivals = [ask(at) for at in (0.0, 2.0, 12.0, 14.0)]
    outcomes, router = run(1, arrivals, *trouble)
    assert [outcome.cached_tokens for outcome in outcomes] == [0, 992, 0, 992]
    starts = [fact.started_at for fact in told(router, LoadObserved) if isinstance(fact, LoadObserved)]
    assert (starts[0], starts[-1]) == (0.0, 10.0)


def test_two_failed_scrapes_make_a_dead_pod_unhealthy_until_it_answers() -> None:
    trouble = (Incident(5.0, Trouble.KILL, "pod-0"), Incident(10.0, Trouble.REVIVE, "pod-0"))
    _, router = run(2, [ask(0.5 * n, key=n) for n in range(30)], *trouble)
    health = [(now, fact.healthy) for now, fact in router.facts if isinstance(fact, HealthObserved)]
    assert [healthy for _, healthy in health] == [False, True]
    assert 6.0 <= health[0][0] <= 7.5
    assert 10.0 <= health[1][0] <= 11.5


def test_a_hanging_pod_takes_requests_and_answers_them_later() -> None:
    hang = Incident(1.0, Trouble.HANG, "pod-0", seconds=20.0)
    outcomes, _ = run(1, [ask(0.9, output=100), ask(5.0, key=2)], hang)
    assert not any(outcome.failed for outcome in outcomes)
    assert outcomes[0].ended_at > 21.0
    assert 21.0 < outcomes[1].first_token_at < 21.5


HANG = Incident(5.0, Trouble.HANG, "pod-0", seconds=60.0)


def test_what_waits_for_a_silent_pod_is_asked_again_elsewhere() -> None:
    made, router = cluster(2, HANG, patience=Patience(2.0))
    early, moved, other = made.run([ask(0.0), ask(6.0, key=2), ask(6.1, key=3)])
    assert (early.endpoint, early.attempts) == ("pod-0", 1)
    assert not any(outcome.failed for outcome in (early, moved, other))
    assert [outcome.at for outcome in (early, moved, other)] == [0.0, 6.0, 6.1]
    waited = [outcome for outcome in (moved, other) if outcome.attempts == 2]
    assert [outcome.endpoint for outcome in waited] == ["pod-1"]
    assert 2.0 < waited[0].ttft < 3.0
    assert router.asked[-1].exclude == {"pod-0"}


def test_the_first_to_be_asked_again_stays_booked_until_the_pod_answers() -> None:
    made, router = cluster(1, HANG, Incident(7.0, Trouble.JOIN, "pod-1"), patience=Patience(2.0))
    made.run([ask(6.0), ask(6.1, key=2), ask(80.0, key=3)])
    ends = [(now, fact) for now, fact in router.facts if isinstance(fact, Failed)]
    assert [fact.reason for _, fact in ends] == [FailureReason.TIMEOUT, FailureReason.CLIENT_GONE]
    assert 8.0 <= ends[0][0] < 9.0  # the second has gone for good
    assert 65.0 < ends[1][0] < 66.0  # the first is forgotten with its own first token


def test_a_pod_that_still_writes_is_not_silent_however_long_a_prefill_takes() -> None:
    made, router = cluster(2, patience=Patience(0.5))
    made.run([ask(0.0, output=600), ask(0.1, key=2, output=600), ask(2.0, key=3, tokens=120_000)])
    assert not told(router, Failed)


def test_a_request_that_has_nowhere_else_to_go_waits() -> None:
    made, router = cluster(2, Incident(1.0, Trouble.KILL, "pod-1"), HANG, patience=Patience(2.0))
    (outcome,) = made.run([ask(6.0)])
    assert (outcome.endpoint, outcome.failed) == ("pod-0", False)
    assert not told(router, Failed)


def test_a_request_without_another_attempt_waits() -> None:
    router = Turns()
    engines = [engine_of(f"pod-{n}") for n in range(2)]
    only = Cluster(router, engines, timing=TIMING, incidents=[HANG], patience=Patience(2.0), max_attempts=1)
    (outcome,) = only.run([ask(6.0)])
    assert (outcome.attempts, outcome.failed) == (1, False)
    assert outcome.first_token_at > 65.0


def test_a_slow_pod_takes_longer_until_it_is_itself_again() -> None:
    trouble = [Incident(at, Trouble.SLOW, "pod-0", factor=factor) for at, factor in ((10.0, 3.0), (20.0, 1.0))]
    before, during, after = run(1, [ask(0.0, key=1), ask(12.0, key=2), ask(25.0, key=3)], *trouble)[0]
    overhead = 0.003 + PROFILE.front_end(1000)
    assert during.ttft - overhead == pytest.approx(3.0 * (before.ttft - overhead))
    assert after.ttft == pytest.approx(before.ttft)


def test_a_pod_that_joins_is_announced_and_serves() -> None:
    outcomes, router = run(1, [ask(float(n), key=n) for n in range(6)], Incident(3.5, Trouble.JOIN, "pod-1"))
    assert [endpoint.name for endpoint in router.endpoints] == ["pod-0", "pod-1"]
    assert {outcome.endpoint for outcome in outcomes if outcome.at > 3.5} == {"pod-0", "pod-1"}


def test_every_decision_ends_in_exactly_one_finished_or_failed_whatever_befalls() -> None:
    trouble = (
        Incident(2.0, Trouble.KILL, "pod-0"),
        Incident(4.0, Trouble.REVIVE, "pod-0"),
        Incident(5.0, Trouble.HANG, "pod-1", seconds=3.0),
        Incident(6.0, Trouble.KILL, "pod-1"),
        Incident(7.0, Trouble.KILL, "pod-0"),
        Incident(9.0, Trouble.REVIVE, "pod-0"),
    )
    outcomes, router = run(3, [ask(0.1 * n, key=n % 9, tokens=3000, output=60) for n in range(120)], *trouble)
    ends = [fact.request_id for fact in told(router, Finished, Failed) if isinstance(fact, (Finished, Failed))]
    decided = sum(outcome.attempts for outcome in outcomes)
    assert len(ends) == decided
    assert all(outcome.failed or math.isfinite(outcome.ended_at) for outcome in outcomes)
    assert sum(outcome.failed for outcome in outcomes) < 20
