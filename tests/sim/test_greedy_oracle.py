"""The oracle's choices where the best is known, and its forecasts against what then happens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.sim import greedy_oracle as module
from picker.sim.bounds import floor
from picker.sim.cluster import Arrival, Outcome, Timing
from picker.sim.engine import EngineRequest
from picker.sim.greedy_oracle import Oracle, greedy_oracle
from picker.sim.latency import Profile, profile
from picker.sim.scenario import scenario
from picker.sim.trial import Trial, simulate

PROFILE = replace(profile("qwen3-32b-2xh100"), block_size=16, kv_tokens=16 * 4000, max_num_seqs=32)
TIMING = Timing(scrape_interval=0.05)


def prompt(first: int, blocks: int, *, at: float = 0.0, output: int = 20) -> Arrival:
    """`blocks` blocks and three tokens; prompts with another `first` share nothing."""
    hashes = np.arange(blocks, dtype=np.uint64) + np.uint64(100_000 * first)
    return Arrival(at, blocks * 16 + 3, output, hashes)


def served(arrivals: Iterable[Arrival], profiles: Sequence[Profile] = (PROFILE, PROFILE)) -> list[Outcome]:
    return greedy_oracle(arrivals, profiles, TIMING)


def pods(outcomes: Iterable[Outcome]) -> list[str | None]:
    return [outcome.endpoint for outcome in outcomes]


# --- what it chooses ---


def test_a_prompt_goes_where_it_is_cached() -> None:
    first, second, third = served([prompt(1, 1000), prompt(2, 1000, at=20.0), prompt(1, 1000, at=40.0)])
    assert second.endpoint != first.endpoint  # of equals the one with the emptier cache
    assert third.endpoint == first.endpoint
    assert third.cached_tokens == 16_000


def test_a_cached_prompt_goes_elsewhere_when_its_pod_is_busy_for_longer_than_it_takes_to_compute() -> None:
    light, heavy = prompt(2, 500, at=10.0), prompt(3, 3000, at=10.001)
    home, elsewhere, there, again = pods(served([prompt(1, 200), light, heavy, prompt(1, 200, at=11.0)]))
    assert elsewhere != home
    assert there == home
    assert again == elsewhere


def test_a_faster_pod_is_found_at_once() -> None:
    (outcome,) = served([prompt(1, 500)], [PROFILE, PROFILE.scaled(2.0), PROFILE.scaled(0.5)])
    assert outcome.endpoint == "pod-1"


def test_of_equals_the_one_with_fewer_tokens_in_flight() -> None:
    """A pod that decodes is slower by little; here nothing is decoding yet, and both are in the same step."""
    outcomes = served([prompt(1, 3, output=1000), prompt(2, 3), prompt(3, 3)], [PROFILE] * 3)
    assert len(set(pods(outcomes))) == 3


def test_a_pod_without_room_is_left_for_one_with_room() -> None:
    """The first answer holds nearly all of the first pod's cache for minutes; a second such prompt cannot start."""
    small = replace(PROFILE, kv_tokens=16 * 1200)
    outcomes = served([prompt(1, 1000, output=2000), prompt(2, 1000, at=5.0, output=5)], [small, small])
    assert len(set(pods(outcomes))) == 2
    assert outcomes[1].ttft < 5.0


def test_a_request_that_fits_nowhere_fails_as_it_does_for_everybody() -> None:
    (outcome,) = served([prompt(1, 5000)])
    assert outcome.failed


def test_nobody_is_sooner_than_the_floor() -> None:
    arrivals = [prompt(n % 3, 300, at=0.3 * n) for n in range(12)]
    least = floor(arrivals, [PROFILE], TIMING)
    assert all(o.ttft >= f.ttft - 1e-9 for o, f in zip(served(arrivals), least, strict=True))


def test_it_beats_blind_routing_on_a_real_scenario() -> None:
    small = scenario("S2").at_load().with_pods(count=2)
    rows = {name: simulate(Trial(small, name, 0.1, limit=60)) for name in ("greedy-oracle", "round-robin")}
    assert rows["greedy-oracle"]["failed"] == 0
    oracle, blind = (rows[name]["ttft_mean_s"] for name in ("greedy-oracle", "round-robin"))
    assert isinstance(oracle, float)
    assert isinstance(blind, float)
    assert oracle < 0.8 * blind


# --- what it foretells ---


def forecasts(arrivals: Sequence[Arrival], profiles: Sequence[Profile]) -> list[tuple[float, float]]:
    """(first token as foretold for the chosen pod when it was chosen, as it came)."""
    foretold: list[float] = []

    class Noting(Oracle):
        def _soonest(self, number: int, arrival: Arrival, now: float) -> module._Pod:
            pod = super()._soonest(number, arrival, now)
            foretold.append(self.first_token(pod, number, arrival, now))
            bound = min(self._at_least(each, arrival, now) for each in self._pods)
            assert bound <= foretold[-1]
            return pod

    engines = [module._Watched(p, name=f"pod-{i}") for i, p in enumerate(profiles)]
    oracle = Noting({engine.name: engine for engine in engines}, TIMING.gateway)
    outcomes = module._Telling(oracle, engines, timing=TIMING).run(arrivals)
    for engine in engines:
        engine.check_integrity()
    return [(f, o.first_token_at - TIMING.response) for f, o in zip(foretold, outcomes, strict=True)]


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.floats(0.0, 0.4)), min_size=1, max_size=15),
    kv_blocks=st.sampled_from((700, 4000)),
)
def test_a_forecast_comes_true_unless_somebody_follows_in_the_same_step(
    shapes: list[tuple[int, int, float]], kv_blocks: int
) -> None:
    """Prompts of equal length do not overtake one another in the front end."""
    small = replace(PROFILE, kv_tokens=16 * kv_blocks)
    times = np.cumsum([gap for *_, gap in shapes])
    arrivals = [prompt(g, 500, at=float(at), output=out) for (g, out, _), at in zip(shapes, times, strict=True)]
    pairs = forecasts(arrivals, [small, small.scaled(1.5)])
    assert all(came >= foretold - 1e-6 for foretold, came in pairs)
    last_foretold, last_came = pairs[-1]
    assert last_foretold == pytest.approx(last_came, abs=1e-6)


def test_a_twin_goes_on_like_its_engine_and_leaves_it_alone() -> None:
    engine, now = module._Watched(PROFILE), 0.0
    for number in range(6):
        engine.add(EngineRequest(number, 4000, 30, list(range(250)) if number % 2 else ()), now)
    for _ in range(5):
        result = engine.step(now)
        assert result is not None
        now += result.duration
    twin = engine.twin()
    ahead = [twin.step(now) for _ in range(60)]
    twin.check_integrity()
    engine.check_integrity()
    assert ahead == [engine.step(now) for _ in range(60)]
    assert twin.counters == engine.counters
