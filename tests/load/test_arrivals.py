from __future__ import annotations

import numpy as np
import pytest

from picker.errors import ConfigError
from picker.load.arrivals import Arrivals, Bursts, Process, Stage, Staged, parse_stages


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_bursts_keep_the_mean_rate_and_are_burstier_than_poisson() -> None:
    times = Arrivals(rate=5.0, process=Process.MMPP, bursts=Bursts(factor=6, on=8, off=32)).times(40_000, rng())
    assert times[-1] == pytest.approx(40_000 / 5.0, rel=0.1)
    counts = np.bincount((times / 10.0).astype(int))
    assert counts.var() / counts.mean() > 5.0  # 1 for Poisson


def test_another_rate_has_the_same_arrivals_faster() -> None:
    for process in Process:
        slow = Arrivals(rate=2.0, process=process, bursts=Bursts(on=8, off=32)).times(100, rng())
        fast = Arrivals(rate=4.0, process=process, bursts=Bursts(on=4, off=16)).times(100, rng())
        assert fast == pytest.approx(slow / 2.0)


@pytest.mark.parametrize("bursts", [(0, 8, 32), (6, 0, 32), (6, 8, -1)])
def test_senseless_bursts_are_refused(bursts: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError):
        Bursts(*bursts)


def test_stages_are_read_as_they_are_worded() -> None:
    assert parse_stages("10x60, 10-50x30,0x5") == (Stage(10, 60), Stage(10, 30, to=50), Stage(0, 5))


@pytest.mark.parametrize("words", ["", "10", "10x", "x60", "10x0", "-1x5", "10x60;20x60", "0x10", "tenx5"])
def test_what_is_no_stage_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="--stages"):
        parse_stages(words)


def test_each_stage_has_its_rate() -> None:
    staged = Staged(parse_stages("100x50,0x10,400x50"))
    times = staged.times(rng())
    assert np.all(np.diff(times) >= 0)
    assert np.sum(times < 50) == pytest.approx(5_000, rel=0.05)
    assert np.sum((times >= 50) & (times < 60)) == 0
    assert np.sum(times >= 60) == pytest.approx(20_000, rel=0.05)
    assert times[-1] < 110
    assert staged.windows == ((0, 50, 100), (50, 60, 0), (60, 110, 400))


def test_a_ramp_grows_evenly() -> None:
    times = Staged(parse_stages("0-100x100"), Process.CONSTANT).times(rng())
    assert len(times) == pytest.approx(5_000, abs=1)
    # The rate grows from 0, so half of the time brings a quarter of the arrivals.
    assert np.sum(times < 50) == pytest.approx(1_250, abs=1)
    falling = Staged(parse_stages("100-0x100"), Process.CONSTANT).times(rng())
    assert np.sum(falling < 50) == pytest.approx(3_750, abs=1)


def test_constant_arrivals_of_a_stage_are_evenly_spaced() -> None:
    times = Staged(parse_stages("4x10"), Process.CONSTANT).times(rng())
    assert np.diff(times) == pytest.approx(0.25)


def test_stages_have_no_bursts_of_their_own() -> None:
    with pytest.raises(ConfigError, match="mmpp"):
        Staged(parse_stages("4x10"), Process.MMPP)
