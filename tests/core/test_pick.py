import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.core.pick import PICKERS, Picker, max_score, power_of_two, proportional, uniform, weighted_random


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(PICKERS)),
    totals=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9),
    count=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_a_picker_returns_distinct_candidates_as_many_as_asked(
    name: str, totals: list[float], count: int, seed: int
) -> None:
    picked = PICKERS[name](np.array(totals), count, rng(seed))
    assert len(set(picked.tolist())) == picked.size == min(count, len(totals))
    assert all(0 <= index < len(totals) for index in picked)
    assert picked.tolist() == PICKERS[name](np.array(totals), count, rng(seed)).tolist()


@settings(max_examples=60, deadline=None)
@given(
    totals=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=9),
    count=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_the_best_come_first_in_order(totals: list[float], count: int, seed: int) -> None:
    picked = max_score(np.array(totals), count, rng(seed))
    assert [totals[index] for index in picked] == sorted(totals, reverse=True)[:count]


@settings(max_examples=60, deadline=None)
@given(
    levels=st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0, 2.0]) | st.floats(-5, 5), min_size=1, max_size=8),
    size=st.integers(129, 200),
    count=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_the_best_of_many_are_those_of_a_whole_sort_and_ties_are_drawn_alike(
    levels: list[float], size: int, count: int, seed: int
) -> None:
    total = rng(seed).choice(np.array(levels), size=size)
    able = np.flatnonzero(total >= np.sort(total)[size - count])
    draws = rng(seed).random(able.size)
    expected = able[np.lexsort((draws, -total[able]))][:count]
    assert max_score(total, count, rng(seed)).tolist() == expected.tolist()


@pytest.mark.parametrize("picker", [max_score, weighted_random, power_of_two, proportional, uniform])
@pytest.mark.parametrize(("n", "count"), [(2, 1), (2, 2), (3, 1), (5, 3)])
def test_equal_totals_are_picked_equally_often(picker: Picker, n: int, count: int) -> None:
    generator, firsts = rng(), np.zeros(n)
    for _ in range(300 * n):
        firsts[picker(np.zeros(n), count, generator)[0]] += 1
    assert firsts.min() > 220
    assert firsts.max() < 380


def test_a_tie_at_the_last_place_is_open_to_all() -> None:
    generator = rng()
    seconds = {int(max_score(np.array([9.0, 1.0, 1.0, 1.0]), 2, generator)[1]) for _ in range(60)}
    assert seconds == {1, 2, 3}


def test_a_tie_among_the_best_is_open_to_all_of_them() -> None:
    generator = rng()
    firsts = {int(max_score(np.array([9.0, 9.0, 9.0, 1.0, 0.0]), 4, generator)[0]) for _ in range(60)}
    assert firsts == {0, 1, 2}


def test_weights_draw_in_proportion_and_never_the_worst_first() -> None:
    generator, firsts = rng(), np.zeros(3)
    for _ in range(2000):
        firsts[weighted_random(np.array([-5.0, -4.0, -2.0]), 1, generator)[0]] += 1
    assert firsts[0] == 0
    assert firsts[2] / firsts[1] == pytest.approx(3.0, rel=0.15)


def test_power_of_two_never_picks_the_worst_of_three_and_not_always_the_best() -> None:
    generator, firsts = rng(), np.zeros(3)
    for _ in range(900):
        firsts[power_of_two(np.array([0.0, 1.0, 2.0]), 1, generator)[0]] += 1
    assert firsts[0] == 0
    assert firsts[2] / firsts[1] == pytest.approx(2.0, rel=0.25)


def test_behind_the_winner_of_two_stand_the_best_of_the_rest() -> None:
    totals = np.array([0.0, 1.0, 2.0, 3.0])
    for seed in range(20):
        winner, *others = power_of_two(totals, 3, rng(seed)).tolist()
        assert others == [index for index in (3, 2, 1, 0) if index != winner][:2]


def test_proportional_draws_by_the_totals_themselves() -> None:
    generator, firsts = rng(), np.zeros(3)
    for _ in range(3000):
        firsts[proportional(np.array([0.0, 1.0, 3.0]), 1, generator)[0]] += 1
    assert firsts[0] == 0
    assert firsts[2] / firsts[1] == pytest.approx(3.0, rel=0.15)


def test_proportional_names_those_of_total_0_last() -> None:
    generator = rng()
    for _ in range(30):
        assert set(proportional(np.array([0.0, 1e-3, 0.0, 5.0]), 4, generator)[:2].tolist()) == {1, 3}


def test_uniform_does_not_look_at_totals() -> None:
    generator, firsts = rng(), np.zeros(2)
    for _ in range(400):
        firsts[uniform(np.array([0.0, 99.0]), 1, generator)[0]] += 1
    assert firsts.min() > 150
