from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.quality import Bar, Plan, Progress, bars, loads, main, seeds, special, stored, summary
from click.testing import CliRunner

from picker.errors import ConfigError
from picker.sim.compare import Comparison, Grid, Interval
from picker.sim.scenario import scenario
from picker.sim.trial import Trial
from sim.rows import row

SMALL = ("--scenarios", "S2", "--loads", "0.5", "--policies", "round-robin,picker", "--limit", "5")


def call(folder: Path, *flags: str) -> str:
    result = CliRunner().invoke(main, ["--out", str(folder), *flags], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stderr


def plan(**changes: Any) -> Plan:
    settings = {"seeds": "1-2", "loads": "0.5", "seeds_of": {}, "loads_of": {}}
    return Plan((scenario("S2"), scenario("S3")), ("a", "b"), **{**settings, **changes})


def bar(runs: list[dict[str, Any]], name: str) -> Bar:
    (found,) = [b for b in bars(Comparison(Grid(runs), np.random.default_rng(0))) if b.name.startswith(name)]
    return found


# --- what is run ---------------------------------------------------------------------------------------------


def test_seeds_and_loads_are_read_as_people_write_them() -> None:
    assert seeds("11-13,20") == [11, 12, 13, 20]
    assert loads("own,0.5") == [None, 0.5]
    assert special(["S1=11-20"]) == {"b2b": "11-20"}
    for call_, text in ((seeds, "one"), (loads, "much")):
        with pytest.raises(ConfigError, match=text):
            call_(text)
    with pytest.raises(ConfigError, match="SCENARIO=VALUES"):
        special(["S1"])


def test_a_grid_goes_seed_by_seed() -> None:
    trials = plan().trials()
    assert [(t.seed, t.scenario.number, t.policy) for t in trials[:5]] == [
        (1, "S2", "a"),
        (1, "S2", "b"),
        (1, "S3", "a"),
        (1, "S3", "b"),
        (2, "S2", "a"),
    ]
    assert trials[0].rate == pytest.approx(0.5 * 0.66)


def test_a_scenario_may_have_seeds_and_loads_of_its_own() -> None:
    trials = plan(seeds_of={"agentic": "7"}, loads_of={"agentic": "own,0.7"}).trials()
    assert {(t.seed, t.load) for t in trials if t.scenario.number == "S2"} == {(7, None), (7, 0.7)}
    assert {(t.seed, t.load) for t in trials if t.scenario.number == "S3"} == {(1, 0.5), (2, 0.5)}


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    assert "2 runs to do, 0 there" in call(tmp_path, *SMALL, "--seeds", "1")
    assert "2 runs to do, 2 there" in call(tmp_path, *SMALL, "--seeds", "1-2")
    assert "0 runs to do, 4 there" in call(tmp_path, *SMALL, "--seeds", "1-2")
    lines = (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [1, 1, 2, 2]
    assert "2 runs to do, 0 there" in call(tmp_path, *SMALL, "--seeds", "1", "--again")
    assert len(stored(tmp_path)) == 4


def test_a_line_cut_short_is_run_again_and_spoils_no_other(tmp_path: Path) -> None:
    call(tmp_path, *SMALL, "--seeds", "1")
    file = tmp_path / "runs.jsonl"
    file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert len(stored(tmp_path)) == 1
    call(tmp_path, *SMALL, "--seeds", "1")
    assert len(stored(tmp_path)) == 2


def test_the_time_left_goes_by_runs_of_the_same_scenario() -> None:
    slow, quick = scenario("S2"), scenario("S3")
    trials = [Trial(s, "a", 1.0, seed=n) for n in (1, 2, 3) for s in (slow, quick)]
    said: list[str] = []
    progress = Progress(trials, jobs=2, say=said.append)
    progress.done(trials[0], 100.0)
    assert progress.remaining() == 250.0
    progress.done(trials[1], 10.0)
    assert progress.remaining() == 110.0
    assert said[0].startswith("1/6 agentic at own, seed 1, a: 100.0 s; about 4 min left")


# --- what is made of it --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "verdict"),
    [
        (Bar("x", 0.9, 1.0), "met by 10.0 %"),
        (Bar("x", 1.1, 1.0), "**missed** by 10.0 %"),
        (Bar("x", 0.9, 0.96, goal=0.9), "met by 6.2 %, goal reached"),
        (Bar("x", 0.95, 1.0, Interval(0.95, 0.9, 1.01)), "met by 5.0 %, within noise"),
        (Bar("x", 0.9, 0.8, least=True), "met by 12.5 %"),
        (Bar("x", 0.7, 0.8, least=True), "**missed** by 12.5 %"),
        (Bar("x", None, 0.8), "not run"),
    ],
)
def test_a_bar_is_met_or_missed_by_so_much(one: Bar, verdict: str) -> None:
    assert one.verdict == verdict


def grid(name: str, load: float, **ttfts: float) -> list[dict[str, Any]]:
    return [row(policy.replace("_", "-"), 1, ttft, scenario=name, load=load) for policy, ttft in ttfts.items()]


def test_bars_find_their_scenarios_and_loads() -> None:
    runs = grid("agentic", 0.5, picker=1.0, round_robin=2.0, least_request=4.0, pooled_fcfs=0.5, floor=0.5)
    runs += grid("agentic", 0.95, picker=9.0, round_robin=9.0)
    runs += grid("bursty-chat", 0.5, picker=1.0, round_robin=2.0, least_request=4.0)
    runs += grid("bursty-chat", 0.7, picker=1.0, round_robin=5.0, least_request=3.0)
    runs += grid("mixed-gpus", 0.5, picker=1.0, round_robin=2.0, lmetric=1.25)
    assert bar(runs, "S2").value == 0.5
    assert bar(runs, "S3").value == pytest.approx(1 / 3)
    assert bar(runs, "S5").value == 0.8
    assert bar(runs, "S1-S5: gap").value == pytest.approx(2 / 3)
    assert bar(runs, "S1-S5 up to").value == 2.0
    assert bar(runs, "mean TTFT / least-request").value == pytest.approx((0.25 * 0.25 / 3) ** (1 / 3))
    worst = bar(runs, "mean TTFT / best peer, worst")
    assert (worst.value, worst.where) == (1.0, "agentic at 0.95 (round-robin)")


def test_cells_where_queues_grow_are_left_out_of_bars() -> None:
    runs = grid("agentic", 0.5, picker=1.0, round_robin=2.0)
    growing = [{**run, "ttft_growth": 0.5} for run in grid("agentic", 0.95, picker=9.0, round_robin=2.0)]
    assert bar(runs + growing, "mean TTFT / best peer, worst").value == 0.5


def test_the_hit_ratio_is_of_the_cell_where_round_robins_is_about_a_third() -> None:
    hits = [(0.5, 0.1, 0.99), (0.7, 0.34, 0.85), (0.85, 0.8, 0.9)]
    runs = [
        row(policy, load=load, hit_ratio=hit)
        for load, theirs, ours in hits
        for policy, hit in (("round-robin", theirs), ("picker", ours))
    ]
    assert bar(runs, "hit ratio").value == 0.85


def test_bars_without_runs_say_so() -> None:
    verdicts = {b.verdict for b in bars(Comparison(Grid([row("picker")]), np.random.default_rng(0)))}
    assert verdicts == {"not run"}


def test_a_summary_says_how_it_was_made_and_shows_every_cell() -> None:
    runs = grid("agentic", 0.5, picker=1.0, round_robin=2.0) + grid("bursty-chat", 0.7, picker=1.0, round_robin=4.0)
    text = summary([{**run, "commit": "abc"} for run in runs], {"machine": ["2 cores"]})
    assert "machine: 2 cores" in text
    assert "commit abc" in text
    assert "| agentic at 0.5 | stable | 1 | 0.500 round-robin |" in text
    assert "| bursty-chat at 0.7 | 4.00 | 1.00 |" in text.replace("| 1.00 | 4.00 |", "| 4.00 | 1.00 |")


def test_a_summary_says_what_exact_knowledge_buys_those_that_ran_with_both() -> None:
    runs = grid("agentic", 0.5, picker=4.0, picker_exact=3.0, round_robin=8.0)
    text = summary([{**run, "hit_ratio": 0.5} for run in runs], {})
    assert "| agentic at 0.5 | picker | 0.750 | 0.750 | 0.750 | 0.500 | 0.500 |" in text
    assert "| agentic at 0.5 | round-robin | 0" not in text
    assert "exact knowledge" not in summary(grid("agentic", 0.5, picker=4.0, round_robin=8.0), {})


def test_nothing_to_sum_up_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no runs yet"):
        call(tmp_path, "--summary")
