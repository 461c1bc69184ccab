"""Several schedulers that hear of each other decide about as well as one; those that do not, do not."""

import math

import numpy as np
import pytest

from picker.core.scheduler import Scheduler
from picker.sim.cluster import Outcome
from picker.sim.replicated import LEASE_S, Replicated, agreement
from picker.sim.scenario import scenario
from picker.sim.trial import Trial
from picker.types import Request

SHORT = scenario("S2", short=True)
TRIAL = Trial(SHORT, "picker", SHORT.rate, seed=1)


def schedulers(count: int) -> list[Scheduler]:
    made = [TRIAL.router() for _ in range(count)]
    return [each for each in made if isinstance(each, Scheduler)]


def mean_ttft(outcomes: list[Outcome]) -> float:
    return float(np.mean([each.ttft for each in outcomes]))


def run(count: int, delay: float) -> list[Outcome]:
    router = Replicated(schedulers(count), delay=delay, choose=lambda request: request.id % count)
    return TRIAL.cluster(router).run(TRIAL.arrivals())


def test_one_that_is_told_at_once_decides_as_if_it_were_alone() -> None:
    alone = TRIAL.cluster(TRIAL.router()).run(TRIAL.arrivals())
    assert [each.endpoint for each in run(1, 0.0)] == [each.endpoint for each in alone]


def test_two_that_are_told_at_once_decide_as_one() -> None:
    assert [each.endpoint for each in run(2, 0.0)] == [each.endpoint for each in run(1, 0.0)]


def test_two_that_are_told_soon_are_as_good_as_one() -> None:
    one, two, never = (mean_ttft(run(count, delay)) for count, delay in ((1, 0.0), (2, 0.05), (2, math.inf)))
    assert two <= 1.03 * one
    assert never > 1.03 * one


def test_the_same_runs_give_the_same_outcomes() -> None:
    assert [each.ended_at for each in run(2, 0.05)] == [each.ended_at for each in run(2, 0.05)]


@pytest.fixture
def two() -> Replicated:
    return Replicated(schedulers(2), delay=0.01, choose=lambda request: request.id % 2)


def submit(router: Replicated, number: int, now: float) -> None:
    router.submit(Request(number, None, now, np.arange(number, number + 40, dtype=np.uint64), 40 * 256), now)


def endpoints(router: Replicated) -> None:
    cluster = TRIAL.cluster(router)  # makes its endpoints known
    assert cluster.kernel.now == 0.0


def test_what_one_knows_the_other_knows_after_the_delay(two: Replicated) -> None:
    endpoints(two)
    submit(two, 1, 1.0)
    first, second = two.schedulers
    assert first is not None
    assert second is not None
    two.deliver(1.009)
    assert int(first.pool.inflight.sum()) == 0
    two.deliver(1.011)
    assert int(first.pool.inflight.sum()) == int(second.pool.inflight.sum()) == 1


def test_what_a_dead_one_had_open_is_released_after_its_lease(two: Replicated) -> None:
    endpoints(two)
    submit(two, 1, 1.0)
    two.kill(1, 2.0)
    (first,) = (each for each in two.schedulers if each is not None)
    assert int(first.pool.inflight.sum()) == 1
    two.deliver(2.0 + LEASE_S)
    assert int(first.pool.inflight.sum()) == 0


def test_one_that_comes_anew_is_told_what_is_known(two: Replicated) -> None:
    endpoints(two)
    for number in range(1, 50):
        submit(two, number * 100, number / 10)
    two.kill(1, 6.0)
    (fresh,) = schedulers(1)
    two.start(1, fresh, 7.0)
    first = two.schedulers[0]
    assert first is not None
    prompts = [np.arange(number * 100, number * 100 + 40, dtype=np.uint64) for number in range(1, 50)]
    assert agreement(fresh, first, prompts) == 0.0
    two.deliver(7.02)
    assert agreement(fresh, first, prompts) == 1.0


@pytest.mark.parametrize("lessons", [True, False])
def test_one_that_comes_anew_is_told_what_was_learned(lessons: bool) -> None:
    router = Replicated(schedulers(2), delay=0.01, choose=lambda request: 0, lessons=lessons)
    TRIAL.cluster(router).run(TRIAL.arrivals())
    router.kill(1, 100.0)
    router.start(1, schedulers(1)[0], 105.0)
    router.deliver(106.0)
    old, new = router.schedulers
    assert old is not None
    assert new is not None
    assert (new.learned.prefill.count > 0) is lessons
    assert (new.learned.output_tokens.value == old.learned.output_tokens.value) is lessons
