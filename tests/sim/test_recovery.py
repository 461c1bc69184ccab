from __future__ import annotations

import math

import numpy as np
import pytest

from picker.sim.cluster import Outcome
from picker.sim.recovery import Losses, joined, level, losses, recovery


def served(at: float, ttft: float = 0.1, *, endpoint: str = "pod-0", cached: int = 0) -> Outcome:
    outcome = Outcome(at, 100, 10, None, endpoint, first_token_at=at + ttft, ended_at=at + ttft + 1.0)
    outcome.cached_tokens = cached
    return outcome


def lost(at: float, failed_at: float, *, first_token_at: float = math.inf) -> Outcome:
    return Outcome(at, 100, 10, None, "pod-0", first_token_at, failed=True, failed_at=failed_at)


def steady(ttft: dict[tuple[float, float], float], until: float = 300.0) -> list[Outcome]:
    """Ten requests a second; those that arrive within an interval take as long as it says, the others 0.1 s."""

    def took(at: float) -> float:
        return next((seconds for (start, stop), seconds in ttft.items() if start <= at < stop), 0.1)

    return [served(at, took(at)) for at in np.arange(0.0, until, 0.1).tolist()]


def test_losses_are_counted_by_when_they_failed_and_by_whether_they_had_begun() -> None:
    outcomes = [served(1.0), lost(90.0, 101.0), lost(95.0, 102.0, first_token_at=96.0), lost(150.0, 250.0)]
    assert losses(outcomes, 100.0, 200.0) == Losses(savable=1, unsavable=1)
    assert losses(outcomes).lost == 3


def test_the_level_is_that_of_arrivals_in_its_span() -> None:
    assert level(steady({(0.0, 50.0): 9.0}), 60.0, 100.0) == pytest.approx(0.1)
    assert math.isnan(level([], 0.0, 10.0))


def test_it_is_back_when_no_window_is_above_any_more() -> None:
    found = recovery(steady({(100.0, 130.0): 2.0}), 100.0, 0.1, until=200.0)
    assert found.worst == pytest.approx(2.0)
    # The window that starts at 130 s is the first without the slow ones; one from 128 s has a tenth of them.
    assert found.seconds == pytest.approx(30.0)
    assert found.undisturbed is None


def test_a_few_slow_ones_are_no_fault() -> None:
    found = recovery(steady({(100.0, 100.5): 60.0}), 100.0, 0.1, until=200.0)
    assert found.seconds == 0.0
    assert found.worst == pytest.approx(0.1)


def test_a_short_relief_is_no_recovery() -> None:
    # Waits are long again within the window that follows the relief.
    found = recovery(steady({(100.0, 110.0): 2.0, (132.0, 150.0): 2.0}), 100.0, 0.1, until=200.0)
    assert found.seconds == pytest.approx(50.0)


def test_what_never_comes_back_takes_for_ever() -> None:
    assert recovery(steady({(100.0, 300.0): 2.0}), 100.0, 0.1, until=200.0).seconds is None


def test_a_burst_that_comes_without_incidents_too_is_not_blamed_on_them() -> None:
    burst = steady({(110.0, 150.0): 1.0})
    found = recovery(burst, 100.0, 0.1, until=200.0, undisturbed=burst)
    assert found.seconds == 0.0
    assert found.undisturbed == pytest.approx(1.0)
    assert recovery(burst, 100.0, 0.1, until=200.0).seconds == pytest.approx(50.0)


def test_requests_that_never_got_a_first_token_are_infinitely_late() -> None:
    outcomes = [*steady({}), *(lost(100.0 + n, 160.0) for n in range(30))]
    assert recovery(outcomes, 100.0, 0.1, until=200.0).worst == math.inf


def test_newcomers_have_arrived_with_four_fifths_of_their_share() -> None:
    # From 120 s on every fourth request goes to the new one of four pods; its first are not cached.
    outcomes = [
        served(at, endpoint="new", cached=0 if at < 130.0 else 50)
        if at >= 120.0 and n % 4 == 0
        else served(at, cached=50)
        for n, at in enumerate(np.arange(0.0, 300.0, 0.1).tolist())
    ]
    found = joined(outcomes, {"new"}, 4, 100.0, until=200.0)
    assert found.seconds == pytest.approx(16.0)  # the window from 116 s has 16 of its 20 s
    assert found.hit_before == pytest.approx(0.5)
    assert found.hit_worst == pytest.approx(0.5 - 0.125 * 0.5)
    assert joined(outcomes, {"nobody"}, 4, 100.0, until=200.0).seconds is None
