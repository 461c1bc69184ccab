"""How late words are is known without two clocks being compared."""

import math

import pytest

from fakes import ManualClock
from picker.replicas import words
from picker.replicas.circle import LEASE
from picker.replicas.lateness import Lateness
from replicas.company import Replica, joined

AHEAD = 1000.0  # the other's clock


def exchange(one: Lateness, other: Lateness, now: float, *, there: float, back: float, rest: float = 0.3) -> None:
    """One speaks, the other hears it and speaks some time later, and one hears that."""
    said, arrived = (now, one.echoes(now)), now + there
    other.heard("one", *said, arrived + AHEAD)
    answered = arrived + rest
    answer = (answered + AHEAD, other.echoes(answered + AHEAD))
    one.heard("other", *answer, answered + back)


def pair() -> tuple[Lateness, Lateness]:
    one, other = Lateness(), Lateness()
    one.own, other.own = "one", "other"
    return one, other


def test_it_is_half_of_the_way_there_and_back_whatever_the_clocks_say() -> None:
    one, other = pair()
    assert one.of("other") is None
    exchange(one, other, 5.0, there=0.06, back=0.14)
    assert one.of("other") == pytest.approx(0.1)
    assert one.worst == pytest.approx(0.1)


def test_a_moment_of_much_work_is_not_the_bus() -> None:
    one, other = pair()
    for beat in range(8):
        exchange(one, other, 0.5 * beat, there=0.4 if beat % 2 else 0.01, back=0.01)
    assert one.of("other") == pytest.approx(0.01)


def test_a_bus_that_has_become_slow_is_noticed() -> None:
    one, other = pair()
    for beat in range(20):
        exchange(one, other, float(beat), there=0.001 if beat < 10 else 0.1, back=0.001 if beat < 10 else 0.1)
    assert one.of("other") == pytest.approx(0.1)


@pytest.mark.parametrize("echo", [(6.0, 0.0), (0.0, math.nan), (math.nan, 0.0), (-100.0, 0.0), (math.inf, 0.0)])
def test_what_cannot_be_is_not_believed(echo: tuple[float, float]) -> None:
    one, _ = pair()
    one.heard("other", 7.0, {"one": echo}, 5.0)
    assert one.of("other") is None
    assert math.isnan(one.worst)


def test_who_is_gone_is_forgotten() -> None:
    one, other = pair()
    exchange(one, other, 5.0, there=0.1, back=0.1)
    one.forget("other")
    assert one.of("other") is None
    assert one.echoes(6.0) == {}


def test_replicas_tell_each_other_with_every_sign_of_life() -> None:
    clock = ManualClock()
    one, two = Replica("one", clock), Replica("two", clock)
    one.circle.lateness.own, two.circle.lateness.own = "one", "two"
    joined(one, two)
    assert one.circle.report()["others"][0]["late_s"] is None
    alive = one.circle.alive()
    clock.advance(0.05)
    two.circle.hear("one", [alive])
    clock.advance(0.2)
    answer = two.circle.alive()
    clock.advance(0.05)
    one.circle.hear("two", [answer])
    assert one.circle.report()["others"][0]["late_s"] == pytest.approx(0.05)
    assert one.metric("picker_replicas_late_seconds") == pytest.approx(0.05)
    clock.advance(LEASE + 0.1)
    one.circle.sweep()
    assert math.isnan(one.metric("picker_replicas_late_seconds") or 0.0)


def test_one_that_knows_nothing_of_that_is_understood() -> None:
    one = Replica("one")
    one.circle.greeted("old", words.Greeting(words.VERSION, "old", 256))
    one.circle.hear("old", [words.Alive(3)])
    assert one.circle.lateness.of("old") is None
