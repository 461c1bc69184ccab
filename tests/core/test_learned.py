import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import NOW, speeds
from picker.core.learned import Factors, FirstTokenSample, Learned
from picker.core.scheduler import Scheduler, Settings
from picker.prefix.approximate import ApproximateIndex
from picker.sim.cluster import Arrival, Cluster, Timing
from picker.sim.engine import Engine
from picker.sim.latency import Profile, profile
from picker.types import Decision, Request

# --- both models, from an engine whose constants are known ---

TRUTH = profile("llama-3.1-8b-h100")


def simulated(speeds: tuple[float, ...] = (1.0, 1.0), *, requests: int = 500, truth: Profile = TRUTH) -> Scheduler:
    """A scheduler that has sent so many requests of mixed lengths to engines of these speeds."""
    rng = np.random.default_rng(1)
    subject = Scheduler(Settings(block_bytes=64, seed=3), ApproximateIndex(1 << 24))
    engines = [
        Engine(truth.scaled(speed), name=f"e{number}", noise=np.random.default_rng(number))
        for number, speed in enumerate(speeds)
    ]
    times = np.cumsum(rng.exponential(0.4 / sum(speeds), size=requests))
    prompts = rng.integers(100, 12_000, size=requests)
    outputs = rng.integers(20, 400, size=requests)
    Cluster(subject, engines, timing=Timing()).run(
        Arrival(float(at), int(prompt), int(output), np.array([], dtype=np.uint64))
        for at, prompt, output in zip(times, prompts, outputs, strict=True)
    )
    return subject


def test_the_constants_of_an_engine_are_found_out_by_serving_with_it() -> None:
    """The prior is two to three times off. First tokens wait for decodes too: prefill is found a little dearer."""
    learned = simulated().learned
    for prompt in (2000, 8000, 16_000):
        true = TRUTH.c_pf * prompt + TRUTH.c_attn * prompt * prompt / 2
        assert true < learned.work(float(prompt), prompt) < 1.35 * true, prompt
    for decodes in (2, 10):
        context = np.array([5000.0 * decodes])
        true = TRUTH.step_time(prefill_tokens=0, prefill_work=0.0, decodes=decodes, context=int(context[0]))
        assert learned.step(np.array([decodes]), context) == pytest.approx([true], rel=0.25), decodes
    assert learned.output_tokens.value == pytest.approx(210, rel=0.15)


def test_a_mixed_pool_is_told_apart_by_serving_with_it() -> None:
    subject = simulated((2.0, 1.0))
    for factors in (subject.learned.prefill_speed, subject.learned.decode_speed):
        fast, slow = factors.value[:2]
        assert fast / slow == pytest.approx(2.0, rel=0.25)


def test_an_endpoint_that_is_given_the_long_prompts_is_not_taken_to_be_faster_than_it_is() -> None:
    """Three times slower, and most of what is long goes there, as a router that knows would have it."""
    learned, rng = Learned(2), np.random.default_rng(6)
    for _ in range(600):
        row = int(rng.random() < 0.3)
        tokens = float(rng.integers(4000, 40_000) if row == int(rng.random() < 0.9) else rng.integers(100, 4000))
        seconds = (50e-6 * tokens + 1e-9 * tokens * tokens) * rng.lognormal(0.0, 0.05) / (1.5, 0.5)[row]
        learned.first_token(FirstTokenSample(row, seconds, tokens, tokens, was_idle=False), merged=False)
    fast, slow = learned.prefill_speed.value
    assert fast / slow == pytest.approx(3.0, rel=0.1)


def test_an_endpoint_that_is_given_the_most_company_is_not_taken_to_be_slower_than_it_is() -> None:
    """Three times faster, and with many times the sequences and the context in a step."""
    learned, rng = Learned(2), np.random.default_rng(6)
    for _ in range(600):
        row = int(rng.random() < 0.1)
        decodes = float(rng.integers(10, 40) if row == 0 else rng.integers(1, 6))
        context = decodes * float(rng.integers(5000, 20_000))
        seconds = 100 * (0.018 + 40e-9 * context) * rng.lognormal(0.0, 0.05) / (1.5, 0.5)[row]
        learned.finished(row, seconds=seconds, tokens=100, decodes=decodes, context=context)
    fast, slow = learned.decode_speed.value
    assert fast / slow == pytest.approx(3.0, rel=0.1)


def test_one_hang_spoils_neither_what_is_known_of_the_pool_nor_of_the_endpoint() -> None:
    """The whole pool's speed, as far as it decides, before and after one first token a minute late."""
    for at in (2, 30, 200):
        calm, hung = Learned(4), Learned(4)
        rng = np.random.default_rng(5)
        for number in range(260):
            sample = prefill(rng, row=number % 4)
            calm.first_token(sample, merged=False)
            late = sample.seconds + (60.0 if number == at else 0.0)
            hung.first_token(msgspec.structs.replace(sample, seconds=late), merged=False)
            for model in (calm, hung):
                model.finished(number % 4, seconds=2.0, tokens=100, decodes=5, context=5000.0)
            assert hung.work(4000.0, 4000.0) == pytest.approx(calm.work(4000.0, 4000.0), rel=0.5), (at, number)
            ratio = hung.prefill_speed.value / calm.prefill_speed.value
            assert np.abs(np.log(ratio)).max() < (0.8 if at < 20 else 0.4), (at, number)
        assert hung.work(4000.0, 4000.0) == pytest.approx(calm.work(4000.0, 4000.0), rel=0.05)
        assert hung.prefill_speed.value == pytest.approx(calm.prefill_speed.value, rel=0.15)


def test_a_stream_that_stood_still_for_a_minute_is_not_how_fast_answers_come() -> None:
    learned = Learned(2)
    for number in range(120):
        late = 60.0 if number == 20 else 0.0
        learned.finished(number % 2, seconds=2.0 + late, tokens=100, decodes=5, context=5000.0)
        assert learned.step(np.array([5]), np.array([5000.0]))[0] == pytest.approx(0.02, rel=0.35), number
    assert learned.decode_speed.value[:2] == pytest.approx([1.0, 1.0], abs=0.1)


def prefill(rng: np.random.Generator, *, row: int = 0, speed: float = 1.0, merged: int = 1) -> FirstTokenSample:
    """A step of 20 ms and 50 us a token, with 5 % of noise; merged: so many such prompts in one step."""
    tokens = float(rng.integers(100, 8000))
    seconds = (0.02 + 50e-6 * tokens * merged) * rng.lognormal(0.0, 0.05) / speed
    return FirstTokenSample(row, seconds, tokens, tokens, was_idle=False)


def test_a_step_of_several_prefills_is_learned_as_one_whoever_else_steps_meanwhile() -> None:
    """Two endpoints in turns: between the first tokens of one step come those of another endpoint's."""
    learned = Learned(2)
    rng = np.random.default_rng(0)
    for _ in range(200):
        samples = [prefill(rng, row=row, merged=5) for row in (0, 1)]
        for turn in range(5):
            for sample in samples:
                learned.first_token(sample, merged=turn > 0)
    for tokens in (1000.0, 4000.0):
        assert learned.work(tokens, tokens) == pytest.approx(50e-6 * tokens, rel=0.1)
    assert learned.prefill_speed.value.tolist() == [1.0, 1.0]


def test_an_endpoint_whose_prefills_share_steps_is_not_taken_to_be_slower() -> None:
    learned = Learned(2)
    rng = np.random.default_rng(0)
    for _ in range(200):
        learned.first_token(prefill(rng, row=0), merged=False)
        several = prefill(rng, row=1, merged=5)
        for turn in range(5):
            learned.first_token(several, merged=turn > 0)
    assert learned.prefill_speed.value.tolist() == pytest.approx([1.0, 1.0], abs=0.15)


def test_a_first_token_that_came_with_one_nobody_measured_teaches_nothing() -> None:
    learned = Learned(1)
    for _ in range(50):
        learned.first_token(prefill(np.random.default_rng(0)), merged=True)
    assert learned.prefill.count == 0


def test_the_front_end_of_an_idle_engine_is_not_mistaken_for_prefill() -> None:
    learned = Learned(1)
    rng = np.random.default_rng(0)
    for number in range(400):
        prompt, idle = float(rng.integers(1000, 20_000)), number % 2 == 0
        uncached = prompt * float(rng.uniform(0.05, 1.0))
        seconds = 0.02 + 50e-6 * uncached + (16e-6 * prompt if idle else 0.0)
        learned.first_token(FirstTokenSample(0, seconds, uncached, prompt, was_idle=idle), merged=False)
    assert learned.work(4000.0, 4000.0) == pytest.approx(0.2, rel=0.1)


def test_what_an_endpoint_had_begun_when_it_left_is_not_put_down_to_the_next_in_its_row() -> None:
    learned = Learned(1)
    sample = FirstTokenSample(0, 30.0, 100.0, 100.0, was_idle=False)
    learned.first_token(sample, merged=False)
    learned.forget(0)
    learned.first_token(msgspec.structs.replace(sample, seconds=0.1), merged=False)
    assert learned.prefill.count == 0


def test_work_is_nothing_for_nothing_and_the_same_for_one_and_for_many() -> None:
    learned = Learned(1)
    assert learned.work(0.0, 0.0) == 0.0
    many = learned.work(np.array([0.0, 100.0, 5000.0]), 5000.0)
    assert many.tolist() == [learned.work(each, 5000.0) for each in (0.0, 100.0, 5000.0)]


# --- how fast each endpoint is ---


def factors(rows: int = 3, *, dead_band: float = 0.1) -> Factors:
    return Factors(rows, prior=1.0, dead_band=dead_band)


def test_nobody_is_faster_before_anything_was_seen() -> None:
    assert factors().value.tolist() == [1.0, 1.0, 1.0]
    assert Factors(0, prior=1.0, dead_band=0.1).value.tolist() == []


@given(samples=st.lists(st.tuples(st.integers(0, 4), st.floats(0.1, 10.0)), max_size=12), grown=st.booleans())
@settings(max_examples=60, deadline=None)
def test_factors_are_those_of_the_definition(samples: list[tuple[int, float]], grown: bool) -> None:
    subject, expected, took = factors(5), np.zeros(8), np.zeros(8)
    for row, seconds in samples:
        subject.add(row, expected=1.0, took=seconds)
        expected[row], took[row] = expected[row] * 0.98 + 1.0, took[row] * 0.98 + min(max(seconds, 0.125), 8.0)
        logs = np.log((expected + 1.0) / (took + 1.0))
        logs -= logs.sum() / max(np.count_nonzero(took), 1)
        assert subject.value == pytest.approx(np.where((took > 0) & (np.abs(logs) >= 0.1), np.exp(logs), 1.0)[:5])
    if grown:
        subject.grow(8)
        assert subject.value.shape == (8,)
        assert subject.value[5:].tolist() == [1.0] * 3


def test_an_endpoint_twice_as_fast_is_twice_as_fast_as_the_others() -> None:
    subject = factors(4)
    for _ in range(200):
        for row, speed in enumerate((1.0, 1.0, 2.0)):
            subject.add(row, expected=0.5, took=0.5 / speed)
    slow, other, fast, unseen = subject.value
    assert slow == other
    assert fast / slow == pytest.approx(2.0, rel=0.05)
    assert unseen == 1.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.2, 5.0), min_size=2, max_size=6))
def test_the_geometric_mean_is_1_and_a_common_error_of_the_pools_model_is_nobodys_speed(rates: list[float]) -> None:
    subject, common = factors(6, dead_band=0.0), factors(6, dead_band=0.0)
    for _ in range(100):
        for row, rate in enumerate(rates):
            subject.add(row, expected=100.0, took=100.0 / rate)
            common.add(row, expected=100.0, took=300.0)
    assert np.log(subject.value[: len(rates)]).mean() == pytest.approx(0.0, abs=1e-9)
    assert common.value == pytest.approx(np.ones(6))


def test_small_deviations_are_noise() -> None:
    subject = factors(2)
    speeds(subject, (1 / 1.09, 1.09))
    assert subject.value.tolist() == [1.0, 1.0]
    speeds(subject, (1 / 1.12, 1.12))
    assert subject.value == pytest.approx([1 / 1.12, 1.12], rel=0.01)


def test_few_samples_say_little() -> None:
    subject = factors(2)
    subject.add(0, expected=0.1, took=0.05)
    subject.add(1, expected=0.1, took=0.1)
    assert subject.value.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("took", [0.0, 1e-9, 60.0, 1e6])
def test_one_crazy_sample_does_not_make_a_speed(took: float) -> None:
    subject = factors(2)
    for _ in range(100):
        for row in (0, 1):
            subject.add(row, expected=0.5, took=0.5)
    subject.add(0, expected=0.5, took=took)
    assert subject.value == pytest.approx([1.0, 1.0], abs=0.12)


def test_a_change_of_speed_is_followed() -> None:
    subject = factors(2)
    speeds(subject, (0.5, 2.0))
    speeds(subject, (2.0, 0.5))
    assert subject.value == pytest.approx([2.0, 0.5], rel=0.01)


def test_a_row_that_is_forgotten_is_like_one_never_seen_and_the_others_are_centred_without_it() -> None:
    subject = factors(3)
    speeds(subject, (4.0, 0.5, 0.5))
    subject.forget(0)
    assert subject.value.tolist() == [1.0, 1.0, 1.0]
    subject.forget(1)
    subject.forget(2)
    assert subject.value.tolist() == [1.0, 1.0, 1.0]


def test_growing_keeps_what_was_learned() -> None:
    subject = factors(2)
    speeds(subject, (0.5, 2.0))
    before = subject.value.tolist()
    subject.grow(5)
    assert subject.value.tolist() == [*before, 1.0, 1.0, 1.0]
    subject.add(4, expected=1.0, took=1.0)
    assert subject.value.size == 5


def test_factors_that_were_handed_out_do_not_change_under_whoever_has_them() -> None:
    subject = factors(2)
    before = subject.value
    speeds(subject, (0.5, 2.0))
    assert subject.value[0] < 1.0
    assert before.tolist() == [1.0, 1.0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.just(0.0) | st.floats(0, 1e6), st.just(0.0) | st.floats(0, 1e6)), max_size=30
    )
)
def test_factors_are_finite_and_positive_whatever_is_seen(samples: list[tuple[int, float, float]]) -> None:
    subject = factors()
    for row, expected, took in samples:
        subject.add(row, expected=expected, took=took)
        assert np.isfinite(subject.value).all()
        assert (subject.value > 0).all()


# --- how much comes ---


def arriving(rate: float, seconds: float, *, work: float = 0.1, since: float = NOW) -> Learned:
    learned = Learned(1)
    for number in range(int(rate * seconds) + 1):
        learned.booked(work, tied=False, now=since + number / rate)
    return learned


@pytest.mark.parametrize("seconds", [10, 30, 60, 600])
def test_steady_arrivals_are_counted_as_they_come_while_warming_up_and_after(seconds: float) -> None:
    arrivals, load = arriving(8.0, seconds).rates(1, NOW + seconds)
    assert arrivals == pytest.approx(8.0, rel=0.05)
    assert load == pytest.approx(0.8, rel=0.05)


def test_rates_are_those_of_the_mean_endpoint() -> None:
    assert arriving(8.0, 60).rates(4, NOW + 60) == pytest.approx((2.0, 0.2), rel=0.05)


def test_a_change_of_the_rate_is_followed_within_minutes() -> None:
    learned = arriving(8.0, 600)
    for number in range(600):
        learned.booked(0.1, tied=False, now=NOW + 600 + number / 2.0)
    assert learned.rates(1, NOW + 900)[0] == pytest.approx(2.0, rel=0.1)


def test_rates_fade_in_silence() -> None:
    learned = arriving(8.0, 60)
    before, _ = learned.rates(1, NOW + 60)
    after, _ = learned.rates(1, NOW + 120)
    assert after < before * math.exp(-0.4)
    assert learned.rates(1, NOW + 3600)[0] == pytest.approx(0.0, abs=1e-9)


def test_before_anything_came_and_in_the_first_second_no_rate_is_known() -> None:
    learned = Learned(1)
    assert learned.rates(1, NOW) == (0.0, 0.0)
    learned.booked(1.0, tied=False, now=NOW)
    assert learned.rates(1, NOW + 1.0) == (0.0, 0.0)
    assert learned.rates(1, NOW + 10.0)[0] > 0.0


def test_a_pool_is_never_taken_to_be_busier_than_it_can_be_for_long() -> None:
    assert arriving(8.0, 60, work=10.0).rates(1, NOW + 60)[1] == 0.95


def test_a_pool_without_endpoints_has_rates_all_the_same() -> None:
    assert arriving(8.0, 60).rates(0, NOW + 60)[0] == pytest.approx(8.0, rel=0.05)


def test_a_clock_that_starts_anywhere_tells_the_same() -> None:
    for since in (0.0, -50.0, 1e9):
        assert arriving(8.0, 60, since=since).rates(1, since + 60)[0] == pytest.approx(8.0, rel=0.05)


def test_nobody_is_tied_before_anything_came() -> None:
    assert Learned(1).tied == 0.0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_the_tied_is_found_and_a_change_of_it_followed(share: float) -> None:
    learned = Learned(1)
    for number in range(2000):
        learned.booked(0.1, tied=number % 100 < 100 * share, now=NOW + number)
    assert learned.tied == pytest.approx(share, abs=0.06)
    for number in range(2000):
        learned.booked(0.1, tied=number % 2 == 0, now=NOW + 2000 + number)
    assert learned.tied == pytest.approx(0.5, abs=0.01)


def test_one_request_that_is_tied_does_not_make_all_of_them_so() -> None:
    learned = Learned(1)
    learned.booked(0.1, tied=True, now=NOW)
    assert 0.0 < learned.tied < 0.1


# --- together, in the scheduler ---


def test_an_engine_that_answers_at_once_is_decided_on_all_the_same() -> None:
    subject = simulated(requests=5)
    subject.learned.prefill.coefficients = np.zeros(4)
    subject.learned.decode.coefficients = np.zeros(3)
    subject.learned.finished(0, seconds=0.0, tokens=100, decodes=1.0, context=100.0)
    assert all(math.isfinite(state.prefill_tokens_per_s) for state in subject.snapshot(NOW))
    decision = subject.submit(Request(10_000, None, 1e6, prompt_bytes=4000), 1e6)
    assert isinstance(decision, Decision)
    assert decision.ranking is not None
    assert np.isfinite(decision.ranking.total).all()
