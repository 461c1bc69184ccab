"""A newcomer knows what another has learned, and keeps what it has found out itself on better grounds."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fakes import NOW, blocks, endpoint, request, scheduler
from picker.core.scheduler import Scheduler
from picker.types import EndpointLessons, Finished, FirstToken, Lessons, LoadObserved, Usage

NAMES = ("a", "b", "c")


def worked(requests: int, *, slow: float = 3.0) -> tuple[Scheduler, float]:
    """One that has seen so many requests, of which those on `a` took longer; and what time it is."""
    subject, now = scheduler(*NAMES), NOW
    for name in NAMES:
        subject.apply(LoadObserved(name, now, kv_capacity_tokens=100_000), now)
    for first in range(1, requests + 1, 3):
        places = {number: _placed(subject, number, now) for number in range(first, first + 3)}
        for number, name in places.items():
            now += (0.3 if name != "a" else 0.3 * slow) * (1 + number % 5)
            subject.apply(FirstToken(number), now)
        for number, name in places.items():
            now += 1.0 if name != "a" else slow
            usage = Usage(1300 + 2600 * (number % 5), 50, cached_tokens=0)
            subject.apply(Finished(number, 200, usage), now)
    return subject, now


def _placed(subject: Scheduler, number: int, now: float) -> str:
    """In turn, so that something is learned of all."""
    name = NAMES[number % 3]
    prompt = blocks(**{f"p{number}": 20 + 40 * (number % 5)})
    subject.submit(request(number, prompt, streaming=True, subset=frozenset({endpoint(name).address})), now)
    return name


@pytest.fixture(scope="module")
def teacher() -> tuple[Scheduler, float]:
    return worked(150)


def factors(subject: Scheduler) -> list[list[float]]:
    learned = subject.learned
    return [learned.prefill_speed.value[:3].tolist(), learned.decode_speed.value[:3].tolist()]


def test_a_newcomer_predicts_what_its_teacher_predicts(teacher: tuple[Scheduler, float]) -> None:
    old, now = teacher
    new = scheduler(*NAMES)
    assert factors(old) != factors(new)
    new.apply(old.lessons(now), NOW)  # clocks of their own
    assert factors(new) == factors(old)
    assert new.learned.output_tokens.value == old.learned.output_tokens.value
    assert new.bytes_per_token.value == old.bytes_per_token.value
    assert new.learned.tied == old.learned.tied
    old.learned.prefill._fit()  # which is not done at every sample
    old.learned.decode._fit()
    assert new.learned.prefill.costs == pytest.approx(old.learned.prefill.costs)
    assert new.learned.decode.costs == pytest.approx(old.learned.decode.costs)
    assert new.learned.rates(3, NOW) == pytest.approx(old.learned.rates(3, now))


def test_what_endpoints_retain_and_who_was_asked_lately_is_known(teacher: tuple[Scheduler, float]) -> None:
    old, now = teacher
    row = old.pool.row("b")
    assert row is not None
    old.index.correct(row, blocks(p=40), predicted=40, actual=0)
    new = scheduler(*NAMES)
    new.apply(old.lessons(now), NOW)
    mine = new.pool.row("b")
    assert mine is not None
    assert new.index.trust[mine] == old.index.trust[row] < 1.0
    assert new.index.effective_capacity(mine) == old.index.effective_capacity(row) < math.inf
    assert new.pool.recent[mine] == pytest.approx(old.pool.recent[row] * math.exp((old.pool.recent_at[row] - now) / 30))
    for subject, at in ((old, now), (new, NOW)):  # what it is told by the engine changes nothing of that
        subject.apply(LoadObserved("b", at, kv_capacity_tokens=100_000), at)
    assert new.index.effective_capacity(mine) == pytest.approx(old.index.effective_capacity(row), rel=0.03)


def test_what_rests_on_more_is_kept(teacher: tuple[Scheduler, float]) -> None:
    old, now = teacher
    beginner, then = scheduler(*NAMES), NOW
    before = factors(old), old.learned.prefill.costs, old.learned.output_tokens.value, old.learned.rates(3, now)
    index = [old.index.retention(row) for row in range(3)]
    for speed in (beginner.learned.prefill_speed, beginner.learned.decode_speed):
        for row in range(3):
            speed.add(row, expected=0.01, took=0.05)
    beginner.learned.output_tokens.add(9999.0, 1.0)
    beginner.learned.prefill.add((1.0, 100.0, 5000.0, 100.0), 5.0)
    beginner.learned.booked(5.0, tied=True, now=then)
    old.apply(beginner.lessons(then + 2.0), now)
    assert before == (
        factors(old),
        old.learned.prefill.costs,
        old.learned.output_tokens.value,
        old.learned.rates(3, now),
    )
    assert index == [old.index.retention(row) for row in range(3)]


def test_of_a_beginner_what_rests_on_less_gives_way(teacher: tuple[Scheduler, float]) -> None:
    old, now = teacher
    beginner, then = worked(10, slow=1.0)
    beginner.apply(old.lessons(now), then)
    assert beginner.learned.prefill.samples.keys() == old.learned.prefill.samples.keys()
    assert factors(beginner) == factors(old)


def test_each_quantity_is_weighed_by_itself() -> None:
    subject, now = worked(60)
    row = subject.pool.row("a")
    assert row is not None
    seen = subject.learned.prefill_speed.sums(row)
    mixed = Lessons(
        prefill={},
        decode={},
        ratios={"output_tokens": (5e9, 1e9), "bytes_per_token": (1.0, 1e-9), "unheard-of": (1.0, 1.0)},
        rates={},
        endpoints=(
            EndpointLessons("a", prefill=(seen[0] / 2, 9.0), decode=(1e6, 2e6)),
            EndpointLessons("gone", prefill=(1e6, 2e6)),
        ),
    )
    before = subject.bytes_per_token.value
    subject.apply(mixed, now)
    assert subject.learned.prefill_speed.sums(row) == seen
    assert subject.learned.decode_speed.sums(row) == (1e6, 2e6)
    assert subject.learned.output_tokens.value == 5.0
    assert subject.bytes_per_token.value == before


def test_one_goes_on_learning_from_what_it_was_taught(teacher: tuple[Scheduler, float]) -> None:
    old, now = teacher
    new = scheduler(*NAMES)
    new.apply(old.lessons(now), NOW)
    count, later = new.learned.prefill.count, NOW
    for number in range(1, 30):
        new.submit(request(number, blocks(**{f"q{number}": 20})), later)
        later += 0.5
        new.apply(FirstToken(number), later)
        new.apply(Finished(number, 200, Usage(2000, 50)), later + 1.0)
        later += 1.1
    assert new.learned.prefill.count > count
    assert np.isfinite(new.learned.prefill.costs).all()


def test_nothing_learned_is_nothing_taught() -> None:
    old, new = scheduler(*NAMES), scheduler(*NAMES)
    lessons = old.lessons(NOW)
    new.apply(lessons, NOW)
    assert new.learned.prefill.costs == old.learned.prefill.costs
    assert factors(new) == factors(old)
    assert new.learned.rates(3, NOW + 60.0) == (0.0, 0.0)
    assert [replace(each, recent=0.0) for each in lessons.endpoints] == [EndpointLessons(name) for name in NAMES]
