import pytest

from picker.sim.lateness import DISTORTED_S, LatenessCounts
from picker.sim.pod_clock import PodClock


def test_nothing_was_late_before_anything_happened() -> None:
    late = LatenessCounts().read()
    assert (late.events, late.p99_s, late.max_s, late.distorted) == (0, 0.0, 0.0, False)


@pytest.mark.parametrize("seconds", [2e-5, 0.003, 0.7, 40.0])
def test_percentiles_are_right_to_a_quarter(seconds: float) -> None:
    counts = LatenessCounts()
    for _ in range(99):
        counts.note(seconds)
    counts.note(2 * seconds)
    late = counts.read()
    assert seconds <= late.p50_s <= 1.25 * seconds
    assert late.p99_s <= 1.25 * seconds
    assert late.max_s == 2 * seconds


def test_one_late_answer_in_a_hundred_is_no_distortion_and_two_are() -> None:
    counts = LatenessCounts()
    for number in range(200):
        counts.note(2 * DISTORTED_S if number < 2 else 0.0)
    assert not counts.read().distorted
    counts.note(2 * DISTORTED_S)
    assert counts.read().distorted
    counts.reset()
    assert not counts.read().distorted


def test_more_than_can_be_counted_is_counted_as_the_most() -> None:
    counts = LatenessCounts()
    counts.note(1e9)
    assert counts.read().max_s == 1e9


async def test_a_clock_notes_by_how_much_it_was_late_in_its_own_time() -> None:
    walls = iter([0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5])
    clock = PodClock(scale=10.0, wall=lambda: next(walls))
    clock.at(1.0, lambda: None)
    clock.catch_up()  # half a second on the wall: five of its own, four after it was due
    assert clock.lateness.read().max_s == pytest.approx(4.0)
    clock.catch_up()
    assert clock.lateness.read().events == 1, "nothing was due"
    clock.stop()
