from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.errors import ConfigError
from picker.sim import bounds, capacity
from picker.sim.compare import (
    REFERENCES,
    STABLE_GROWTH,
    Cell,
    Comparison,
    Grid,
    Metric,
    best_peer,
    floor_distance,
    gap_closed,
    growth,
    mean_interval,
    overall,
    pair,
    ratio_interval,
    stable,
)
from sim.rows import row, rows

CELL = Cell("agentic", 0.5)
TTFT = Metric.TTFT_MEAN
seconds = st.floats(0.01, 100.0)
some_seeds = st.lists(seconds, min_size=1, max_size=6)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def compared(runs: list[dict[str, Any]]) -> Comparison:
    return Comparison(Grid(runs), rng())


# --- intervals -----------------------------------------------------------------------------------------------


def test_a_ratio_is_surer_the_more_alike_the_pairs_are() -> None:
    theirs = [1.0, 2.0, 4.0, 8.0, 16.0]
    steady = ratio_interval([0.5 * value for value in theirs], theirs, rng())
    noisy = ratio_interval([0.9, 0.5, 3.0, 2.0, 9.1], theirs, rng())
    assert (steady.low, steady.ratio, steady.high) == pytest.approx((0.5, 0.5, 0.5))
    assert noisy.ratio == pytest.approx(0.5)
    assert noisy.low < 0.45 < 0.55 < noisy.high


def test_two_seeds_give_the_bounds_that_can_be_counted_by_hand() -> None:
    # A quarter of the resamples is the first seed twice, a quarter the second: both bounds lie within them.
    found = ratio_interval([1.0, 3.0], [2.0, 2.0], rng())
    assert (found.low, found.ratio, found.high) == pytest.approx((0.5, 1.0, 1.5))


def test_values_that_make_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="do not make pairs"):
        ratio_interval([1.0], [], rng())


@given(some_seeds)
@settings(max_examples=25)
def test_a_mean_lies_within_its_interval_and_that_within_the_values(values: list[float]) -> None:
    found = mean_interval(values, rng())
    assert min(values) <= found.low + 1e-9
    assert found.high <= max(values) + 1e-9
    assert found.ratio == pytest.approx(sum(values) / len(values))


# --- pairs ---------------------------------------------------------------------------------------------------


@given(some_seeds)
@settings(max_examples=25)
def test_a_policy_beside_its_like_is_exactly_one(values: list[float]) -> None:
    found = pair(Grid(rows(picker=values, twin=values)), CELL, TTFT, "twin", rng()).interval
    assert found is not None
    assert (found.low, found.ratio, found.high) == pytest.approx((1.0, 1.0, 1.0))


@given(some_seeds, st.data(), st.floats(0.1, 10.0))
@settings(max_examples=25)
def test_slower_peers_scale_the_ratio_and_its_bounds(values: list[float], data: st.DataObject, factor: float) -> None:
    theirs = data.draw(st.lists(seconds, min_size=len(values), max_size=len(values)))
    grid = Grid(rows(picker=values, a=theirs, b=[factor * value for value in theirs]))
    one, other = (pair(grid, CELL, TTFT, peer, rng()).interval for peer in "ab")
    assert one is not None
    assert other is not None
    scaled = [bound / factor for bound in (one.low, one.ratio, one.high)]
    assert [other.low, other.ratio, other.high] == pytest.approx(scaled)


def test_only_seeds_that_both_ran_count() -> None:
    runs = [row("picker", 1, 1.0), row("picker", 2, 3.0), row("a", 2, 6.0), row("a", 3, 100.0)]
    found = pair(Grid(runs), CELL, TTFT, "a", rng())
    assert (found.seeds, found.ratio) == ((2,), 0.5)


def test_no_seed_in_common_is_told_with_the_cell_and_both_names() -> None:
    with pytest.raises(ConfigError, match=r"agentic at 0\.5: picker and a have no seed in common"):
        compared([row("picker", 1), row("a", 2)])


def test_best_peer_has_the_smallest_mean_of_each_metric() -> None:
    runs = [row("picker"), row("a", ttft=2.0, ttft_p95_s=4.0), row("b", ttft=3.0, ttft_p95_s=3.5)]
    found = compared(runs)
    assert [(p.other, p.ratio) for m in (TTFT, Metric.TTFT_P95) if (p := found.best(CELL, m))] == [
        ("a", 0.5),
        ("b", pytest.approx(1 / 3.5)),
    ]


def test_references_are_no_peers() -> None:
    assert set(bounds.REFERENCES) <= REFERENCES
    found = compared(rows(picker=[2.0], a=[4.0], pooled_fcfs=[1.0], floor=[1.0]))
    best = found.best(CELL, TTFT)
    assert best is not None
    assert best.other == "a"
    assert found.peers == ("a",)
    assert found.pair(CELL, TTFT, "floor") is not None


def test_who_failed_more_requests_cannot_be_best() -> None:
    quick = row("quick", ttft=0.1, failed=3)
    for failed, best in ((0, "slow"), (2, "slow"), (3, "quick")):
        found = compared([row("picker", failed=failed), quick, row("slow", ttft=2.0)]).best(CELL, TTFT)
        assert found is not None
        assert found.other == best


def test_without_a_peer_there_is_no_best() -> None:
    assert best_peer([]) is None
    assert compared([row("picker"), row("floor")]).best(CELL, TTFT) is None


def test_an_infinite_percentile_of_ours_stays_infinite_and_one_of_theirs_decides_nothing() -> None:
    ours_late = [row("picker", 1, ttft_p95_s=None, failed=9), row("a")]
    theirs_late = [row("picker"), row("a", ttft_p95_s=None, failed=9)]
    best = compared(ours_late).best(CELL, Metric.TTFT_P95)
    assert best is not None
    assert math.isinf(best.ratio)
    summary = compared(ours_late).against("a", Metric.TTFT_P95, [CELL])
    assert summary.interval is not None
    assert math.isinf(summary.interval.ratio)
    late = compared(theirs_late).against("a", Metric.TTFT_P95, [CELL])
    assert (late.interval, late.pairs, len(late.undecided)) == (None, (), 1)


# --- over cells ----------------------------------------------------------------------------------------------


def two_cells(first: float, second: float) -> list[dict[str, Any]]:
    """picker at 1 s in both; a's seconds in each."""
    runs = []
    for load, theirs in ((0.5, first), (0.7, second)):
        runs += [row("picker", load=load), row("a", ttft=theirs, load=load)]
    return runs


def test_cells_count_alike_in_the_geometric_mean() -> None:
    found = compared(two_cells(0.5, 8.0))
    summary = found.against_best(TTFT, found.cells)
    assert summary.interval is not None
    assert summary.interval.ratio == pytest.approx(math.sqrt(2.0 * 0.125))
    assert summary.worst is not None
    assert summary.worst.cell == CELL
    assert [p.cell.load for p in summary.above(1.02)] == [0.5]
    assert summary.above(2.0) == ()


def test_bounds_of_a_geometric_mean_can_be_counted_by_hand() -> None:
    """Cells of one scenario share their draws: a quarter of the resamples has the first seed twice in all of them."""
    loads = (0.5, 0.6, 0.7, 0.8)
    runs = [row("a", seed, load=load) for load in loads for seed in (1, 2)]
    runs += [row("picker", seed, ttft, load=load) for load in loads for seed, ttft in ((1, 0.5), (2, 1.5))]
    found = compared(runs)
    summary = found.against("a", TTFT, found.cells).interval
    assert summary is not None
    assert (summary.low, summary.ratio, summary.high) == pytest.approx((0.5, 1.0, 1.5))


@given(some_seeds, some_seeds)
@settings(max_examples=25)
def test_the_mean_over_one_cell_is_that_cell(ours: list[float], theirs: list[float]) -> None:
    both = min(len(ours), len(theirs))
    one = pair(Grid(rows(picker=ours[:both], a=theirs[:both])), CELL, TTFT, "a", rng())
    summary = overall(TTFT, [one, None], rng()).interval
    assert one.interval is not None
    assert summary is not None
    assert (summary.low, summary.ratio, summary.high) == pytest.approx(
        (one.interval.low, one.interval.ratio, one.interval.high), rel=1e-6
    )


def test_no_cells_have_no_mean() -> None:
    summary = overall(TTFT, [None], rng())
    assert (summary.interval, summary.worst, summary.above(1.0)) == (None, None, ())


# --- one cell ------------------------------------------------------------------------------------------------


def test_a_cell_is_stable_when_the_wait_does_not_grow_under_its_best_policy() -> None:
    assert STABLE_GROWTH == capacity._GROWTH
    runs = [row("picker", ttft=1.0, ttft_growth=0.009), row("a", ttft=9.0, ttft_growth=0.5)]
    assert stable(Grid(runs), CELL)
    assert growth(Grid(runs), CELL) == 0.009
    runs.append(row("b", ttft=0.9, ttft_growth=0.02))
    assert not stable(Grid(runs), CELL)
    # One that rejects what it cannot serve is not the best policy, and neither is a reference.
    assert stable(Grid([*runs[:2], {**runs[2], "failed": 5}]), CELL)
    assert stable(Grid([*runs[:2], row("floor", ttft=0.1, ttft_growth=0.3)]), CELL)


def test_runs_that_do_not_tell_of_growth_count_as_stable() -> None:
    run = row("picker")
    del run["ttft_growth"]
    assert growth(Grid([run]), CELL) is None
    assert stable(Grid([run]), CELL)


def test_gap_closed_and_distance_to_the_floor() -> None:
    grid = Grid(rows(round_robin=[10.0, 14.0], picker=[3.0, 3.0], pooled_fcfs=[2.0, 2.0], floor=[1.0, 1.5]))
    assert gap_closed(grid, CELL) == pytest.approx(0.9)
    assert floor_distance(grid, CELL) == pytest.approx(2.4)
    assert floor_distance(grid, CELL, "round-robin", Metric.E2E_MEAN) == pytest.approx(9.6)


def test_without_a_way_to_go_no_gap_is_closed() -> None:
    assert gap_closed(Grid(rows(round_robin=[1.0], picker=[1.0], pooled_fcfs=[1.0])), CELL) is None
    assert gap_closed(Grid(rows(picker=[1.0])), CELL) is None
    assert floor_distance(Grid(rows(picker=[1.0])), CELL) is None


# --- runs that do not fit ------------------------------------------------------------------------------------


def test_the_same_run_twice_is_one_and_two_different_ones_are_refused() -> None:
    assert Grid([row("a"), row("a")]).seeds(CELL, "a") == (1,)
    with pytest.raises(ConfigError, match="two runs of a with seed 1 differ"):
        Grid([row("a"), row("a", ttft=2.0)])


def test_runs_on_other_pods_are_not_of_the_same_cell() -> None:
    with pytest.raises(ConfigError, match="runs differ in pods, 2 and 8"):
        Grid([row("a"), row("b", pods=8)])
