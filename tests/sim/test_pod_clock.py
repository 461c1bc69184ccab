import functools

from picker.sim.pod_clock import PodClock


async def test_events_happen_at_their_own_times_however_late_they_are() -> None:
    clock, seen = PodClock(scale=1e9), list[float]()

    def tick() -> None:
        seen.append(clock.now)
        if clock.now < 3.0:
            clock.at(clock.now + 1.0, tick)

    clock.at(1.0, tick)
    assert clock.catch_up() > 3.0
    assert seen == [1.0, 2.0, 3.0]
    assert clock.known_until == clock.now
    clock.stop()


async def test_what_waits_for_the_end_of_a_run_happens_once_after_all_events() -> None:
    clock, seen = PodClock(scale=1e9), list[str]()

    def happen(name: str) -> None:
        seen.append(name)
        clock.afterwards(lambda: seen.append(f"after {name}"))

    for name in ("a", "b"):
        clock.at(1.0, functools.partial(happen, name))
    clock.catch_up()
    clock.catch_up()
    assert seen == ["a", "b", "after a", "after b"]
    clock.stop()


async def test_time_to_come_has_not_happened() -> None:
    clock = PodClock(scale=1.0)
    clock.at(1e6, lambda: None)
    assert clock.catch_up() < 1e6
    clock.stop()
