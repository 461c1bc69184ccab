from __future__ import annotations

from picker.core.drain_rate import DrainRate


def departures(rate: DrainRate, every: float, count: int, *, begin: float = 0.0) -> float:
    rate.waiting(begin)
    for number in range(1, count + 1):
        rate.served(begin + number * every, empty=False)
    return begin + count * every


def test_who_comes_to_a_full_queue_waits_as_long_as_it_takes_to_empty() -> None:
    rate = DrainRate()
    now = departures(rate, every=0.5, count=40)
    assert 9.5 <= rate.seconds_for(20, now) <= 10.5


def test_the_pace_of_late_counts() -> None:
    rate = DrainRate()
    now = departures(rate, every=2.0, count=10)
    for number in range(1, 200):
        rate.served(now + number * 0.1, empty=False)
    assert 1.0 <= rate.seconds_for(20, now + 20.0) <= 4.0


def test_time_in_which_nobody_waited_is_no_slowness() -> None:
    rate = DrainRate()
    rate.waiting(0.0)
    rate.served(0.5, empty=True)
    rate.waiting(1000.0)
    rate.served(1000.5, empty=False)
    assert rate.seconds_for(4, 1000.5) <= 3.0


def test_a_queue_that_does_not_move_gets_a_longer_wait_with_time() -> None:
    rate = DrainRate()
    rate.waiting(0.0)
    assert rate.seconds_for(5, 0.1) == 1.0
    assert rate.seconds_for(5, 8.0) == 8.0


def test_nothing_known_and_absurd_ones_stay_within_bounds() -> None:
    assert DrainRate().seconds_for(100, 5.0) == 1.0
    rate = DrainRate()
    now = departures(rate, every=5.0, count=20)
    assert rate.seconds_for(10_000, now) == 60.0
