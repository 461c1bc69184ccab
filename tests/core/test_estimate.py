import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.core.estimate import Ratio


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
