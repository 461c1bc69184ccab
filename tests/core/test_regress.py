import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.core.regress import Regression

TRUTH = np.array([0.03, 1e-4, 2e-9])
SCALES = np.array([1.0, 4000.0, 2e7])


def regression(prior_is: float = 4.0, **options: float) -> Regression:
    """One whose prior is so many times off."""
    return Regression(TRUTH * prior_is, SCALES, **options)  # type: ignore[arg-type]


def sample(rng: np.random.Generator) -> tuple[float, ...]:
    tokens, cached = rng.uniform(100, 20_000), rng.uniform(0, 20_000)
    return 1.0, tokens, tokens * (cached + tokens / 2)


def seconds(features: tuple[float, ...], truth: np.ndarray = TRUTH) -> float:
    return float(np.dot(features, truth))


def teach(subject: Regression, count: int, *, noise: float = 0.1, truth: np.ndarray = TRUTH, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        features = sample(rng)
        subject.add(features, seconds(features, truth) * rng.lognormal(0.0, noise))


def off(subject: Regression, truth: np.ndarray = TRUTH) -> float:
    """How many times it misjudges typical samples, at the worst, either way."""
    rng = np.random.default_rng(99)
    ratios = [subject(features) / seconds(features, truth) for features in (sample(rng) for _ in range(50))]
    return max(*ratios, *(1 / ratio for ratio in ratios))


def test_the_prior_holds_before_the_first_samples() -> None:
    subject = regression()
    np.testing.assert_array_equal(subject.coefficients, 4.0 * TRUTH)
    teach(subject, 3)
    np.testing.assert_array_equal(subject.coefficients, 4.0 * TRUTH)
    teach(subject, 1)
    assert (subject.coefficients != 4.0 * TRUTH).any()


@pytest.mark.parametrize(
    ("prior_is", "within", "predicts"), [(0.1, 0.1, 1.05), (0.25, 0.1, 1.05), (1.0, 0.1, 1.05), (4.0, 0.3, 1.1)]
)
def test_known_coefficients_are_found_again_though_something_else_was_believed(
    prior_is: float, within: float, predicts: float
) -> None:
    subject = regression(prior_is)
    teach(subject, 600)
    assert subject.coefficients[1:] == pytest.approx(TRUTH[1:], rel=within)
    assert off(subject) < predicts


@pytest.mark.parametrize("prior_is", [0.1, 0.25, 4.0, 10.0])
def test_a_few_samples_tell_most_of_it(prior_is: float) -> None:
    subject = regression(prior_is)
    teach(subject, 16)
    assert off(subject) < 1.8
    teach(subject, 500, seed=1)
    assert off(subject) < 1.25


def test_what_was_long_ago_is_forgotten() -> None:
    """Size by size, and each by as many samples of its own: one in ten is of the size that is predicted worst here."""
    subject = regression(1.0)
    teach(subject, 600)
    teach(subject, 600, truth=3.0 * TRUTH, seed=1)
    assert 1.4 < off(subject, 3.0 * TRUTH) < 1.8
    teach(subject, 2400, truth=3.0 * TRUTH, seed=2)
    assert off(subject, 3.0 * TRUTH) < 1.15


@pytest.mark.parametrize(("prior_is", "within"), [(0.25, 0.1), (1.0, 0.1), (4.0, 0.2)])
def test_many_short_samples_leave_the_slope_that_the_long_ones_have_shown(prior_is: float, within: float) -> None:
    """Here short ones all take the same, as in an engine that waits for its weights: alone, they would say no slope.

    They do make the prior weigh more, for the mean weight of a sample is theirs.
    """
    subject = Regression(prior_is * TRUTH[:2], SCALES[:2])
    rng = np.random.default_rng(1)
    for tokens in rng.uniform(5000, 20_000, 200):
        subject.add((1.0, tokens), seconds((1.0, tokens), TRUTH[:2]) * rng.lognormal(0.0, 0.1))
    slope = subject.coefficients[1]
    assert slope == pytest.approx(TRUTH[1], rel=0.1)
    for tokens in rng.uniform(50, 600, 5000):
        subject.add((1.0, tokens), 0.06 * rng.lognormal(0.0, 0.1))
    assert subject.coefficients[1] == pytest.approx(slope, rel=within)


def test_errors_too_small_to_be_squared_leave_nobody_out() -> None:
    subject = Regression(np.array([0.0, 1.0]), np.array([1.0, 1.0]))
    for _ in range(8):
        subject.add((0.0, 1e-170), 2e-170)
    assert np.isfinite(subject.coefficients).all()


@settings(max_examples=60, deadline=None)
@given(
    samples=st.lists(
        st.tuples(st.floats(0, 1e5), st.floats(0, 1e10), st.just(0.0) | st.floats(0, 1e4)), min_size=5, max_size=40
    )
)
def test_coefficients_are_finite_and_never_negative_whatever_is_seen(samples: list[tuple[float, float, float]]) -> None:
    subject = regression()
    for tokens, work, took in samples:
        subject.add((1.0, tokens, work), took)
    assert np.isfinite(subject.coefficients).all()
    assert (subject.coefficients >= 0).all()


def test_a_cost_that_would_be_negative_is_left_out_and_the_others_fitted_without_it() -> None:
    subject = regression(1.0)
    rng = np.random.default_rng(0)
    for _ in range(300):
        features = sample(rng)
        subject.add(features, max(0.0, 1e-4 * features[1] - 1e-9 * features[2]))
    assert subject.coefficients[2] == 0.0
    assert subject.coefficients[1] > 0.0


@pytest.mark.parametrize("at", [0, 1, 3, 5, 40, 200])
def test_one_hang_does_not_move_it(at: int) -> None:
    calm, hung = regression(1.0), regression(1.0)
    rng = np.random.default_rng(3)
    for number in range(260):
        features = sample(rng)
        took = seconds(features) * rng.lognormal(0.0, 0.1)
        calm.add(features, took)
        hung.add(features, took + (60.0 if number == at else 0.0))
        assert off(hung) < max(1.5, off(calm) + 0.3), number
    assert off(hung) < 1.15


def test_errors_that_are_all_alike_leave_every_sample_in() -> None:
    subject = regression(1.0, prior_samples=1e6)
    for _ in range(16):
        subject.add((1.0, 0.0, 0.0), 5.0)
    assert np.isfinite(subject.coefficients).all()
    exact = regression(1.0)
    teach(exact, 32, noise=0.0)
    assert off(exact) < 1.01


def test_an_error_beyond_all_proportion_leaves_the_others_in() -> None:
    subject = regression(1.0)
    rng = np.random.default_rng(3)
    for number in range(40):
        features = sample(rng)
        subject.add(features, 1e12 if number == 2 else seconds(features))
    assert np.isfinite(subject.coefficients).all()
    assert off(subject) < 1.5
