import pytest

from picker.sim.kernel import Kernel


def test_events_run_in_order_of_time_and_then_of_scheduling() -> None:
    kernel, ran = Kernel(), list[str]()
    kernel.at(2.0, lambda: ran.append("late"))
    kernel.at(1.0, lambda: ran.append("first of two"))
    kernel.at(1.0, lambda: ran.append("second of two"))
    kernel.run()
    assert ran == ["first of two", "second of two", "late"]
    assert kernel.now == 2.0


def test_an_event_can_schedule_another_after_itself() -> None:
    kernel, times = Kernel(now=10.0), list[float]()

    def tick() -> None:
        times.append(kernel.now)
        if len(times) < 3:
            kernel.after(0.5, tick)

    kernel.after(0.5, tick)
    kernel.run()
    assert times == [10.5, 11.0, 11.5]


def test_run_until_leaves_later_events_and_ends_on_time() -> None:
    kernel, ran = Kernel(), list[float]()
    for time in (1.0, 2.0, 3.0):
        kernel.at(time, lambda: ran.append(kernel.now))
    kernel.run(until=2.0)
    assert (ran, kernel.now, kernel.next_at) == ([1.0, 2.0], 2.0, 3.0)
    kernel.run(until=2.5)
    assert (ran, kernel.now) == ([1.0, 2.0], 2.5)


def test_the_past_cannot_be_scheduled() -> None:
    with pytest.raises(ValueError, match=r"it is 5\.0 already"):
        Kernel(now=5.0).at(4.0, lambda: None)


def test_nothing_scheduled_means_nothing_next() -> None:
    assert Kernel().next_at is None
