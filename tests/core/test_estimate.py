import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.core.estimate import Ratio, Speeds


def test_a_ratio_starts_at_its_prior() -> None:
    assert Ratio(4.0, prior_weight=100.0, keep=0.9).value == 4.0


def test_a_ratio_weighs_samples_by_their_size() -> None:
    ratio = Ratio(4.0, prior_weight=100.0, keep=1.0)
    ratio.add(200.0, 100.0)
    assert ratio.value == 3.0


def test_a_ratio_forgets_its_prior_and_follows_a_change() -> None:
    ratio = Ratio(4.0, prior_weight=100.0, keep=0.9)
    for _ in range(100):
        ratio.add(200.0, 100.0)
    assert ratio.value == pytest.approx(2.0, rel=1e-3)
    for _ in range(100):
        ratio.add(600.0, 100.0)
    assert ratio.value == pytest.approx(6.0, rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6)), max_size=30))
def test_a_ratio_stays_within_what_was_seen(samples: list[tuple[float, float]]) -> None:
    ratio = Ratio(5.0, prior_weight=1.0, keep=0.9)
    for numerator, denominator in samples:
        ratio.add(numerator, denominator)
    seen = [5.0, *(numerator / denominator for numerator, denominator in samples)]
    assert min(seen) * 0.999 <= ratio.value <= max(seen) * 1.001


def test_every_row_starts_at_the_prior() -> None:
    assert Speeds(3, prior=8000.0).of(np.arange(3)).tolist() == [8000.0] * 3


def test_a_row_learns_its_own_speed_and_others_take_after_the_pool() -> None:
    speeds = Speeds(2, prior=8000.0)
    for _ in range(400):
        speeds.add(0, 2000.0, 1.0)
    own, other = speeds.of(slice(0, 2))
    assert own == pytest.approx(2000.0, rel=0.01)
    assert other == pytest.approx(2000.0, rel=0.25)


def test_a_wrong_prior_does_not_tell_rows_of_one_kind_apart() -> None:
    speeds = Speeds(4, prior=100_000.0)
    for turn in range(400):
        speeds.add(turn % 2, 1000.0, 0.5)
    learned = speeds.of(np.arange(4))
    assert learned.max() / learned.min() < 1.6


def test_one_outlier_moves_a_row_little() -> None:
    speeds = Speeds(1, prior=8000.0)
    for _ in range(50):
        speeds.add(0, 8000.0, 1.0)
    speeds.add(0, 300.0, 1.0)
    assert speeds.of(slice(0, 1))[0] > 7500.0


def test_a_row_that_is_forgotten_is_like_a_new_one() -> None:
    speeds = Speeds(2, prior=8000.0)
    for _ in range(20):
        speeds.add(0, 100.0, 1.0)
    speeds.forget(0)
    first, second = speeds.of(slice(0, 2))
    assert first == second


def test_growing_keeps_what_was_learned() -> None:
    speeds = Speeds(1)
    for _ in range(20):
        speeds.add(0, 100.0, 1.0)
    before = speeds.of(slice(0, 1)).tolist()
    speeds.grow(3)
    after = speeds.of(np.arange(3)).tolist()
    assert after[:1] == before
    assert after[1] == after[2]
