from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from picker.errors import ConfigError
from picker.sim.capacity import growth, pooled, stable_rate
from picker.sim.cluster import Trouble
from picker.sim.policies import POLICIES, policy
from picker.sim.scenario import Pods, read, scenario, scenarios, trace_scenario
from picker.sim.sessions import Documents, Sessions
from picker.sim.trial import Trial, simulate
from picker.sim.workload import SharedPrefix

EXTENDING = 'extends = "s2"\nnumber = "X"\nname = "x"\ntitle = "x"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- what there is ---


def test_the_nine_scenarios_go_by_number_and_by_name() -> None:
    assert [f"S{n}" for n in range(1, 10)] == list(scenarios())[:9]
    assert scenario("S2").name == "agentic"
    assert scenario("agentic") == scenario("s2")


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'agentix' is unknown; did you mean agentic"):
        scenario("agentix")
    with pytest.raises(ConfigError, match="'piker'; did you mean picker"):
        policy("piker")


@pytest.mark.parametrize("number", list(scenarios()))
def test_every_scenario_runs_in_short_under_every_policy_of_ours(number: str) -> None:
    short = scenario(number, short=True)
    for name in ("round-robin", "picker"):
        run = simulate(Trial(short, name, short.rate, limit=40))
        assert isinstance(run["requests"], int)
        assert run["requests"] > 5
        assert run["failed"] == 0


@pytest.mark.parametrize("number", list(scenarios()))
def test_a_stable_rate_says_how_it_was_found(number: str) -> None:
    whole = scenario(number)
    assert (whole.stable_rate is None) == (not whole.stable_source)


def test_a_failing_pod_costs_only_answers_that_had_begun() -> None:
    short = scenario("S7", short=True)
    assert [event.trouble for event in short.events] == ["kill", "hang", "join"]
    assert [i.trouble for i in short.incidents] == [Trouble.KILL, Trouble.REVIVE, Trouble.HANG, Trouble.JOIN]
    run = simulate(Trial(short, "picker", 2.0))
    assert isinstance(run["failed"], int)
    # Answers that had begun on the pod that dies are lost; no more.
    assert 0 <= run["failed"] <= 15


def test_the_same_trial_has_the_same_figures_and_another_seed_others() -> None:
    short = scenario("S2", short=True)
    trial = Trial(short, "picker", short.rate)
    assert simulate(trial) == simulate(trial)
    assert simulate(trial)["ttft_mean_s"] != simulate(replace(trial, seed=2))["ttft_mean_s"]


def test_all_policies_meet_the_same_arrivals() -> None:
    short = scenario("S6", short=True)
    runs = [Trial(short, name, short.rate).run() for name in POLICIES]
    asked = [[(o.at, o.prompt_tokens, o.output_tokens) for o in run] for run in runs]
    assert all(each == asked[0] for each in asked)


# --- other pods ---


def test_more_pods_of_the_kind_stand_proportionally_more() -> None:
    whole = replace(scenario("S3"), stable_rate=4.0)
    assert whole.with_pods(count=16).stable_rate == 8.0
    assert whole.with_pods(kv_tokens=100_000).stable_rate is None
    assert whole.with_pods(model="qwen3-32b-2xh100").pods.kv_tokens is None
    uneven = replace(scenario("S5"), stable_rate=4.0)
    assert uneven.with_pods(count=1).stable_rate == pytest.approx(4.0 * 1.5 / 16)


def test_a_closed_loop_grows_with_its_pods() -> None:
    workload = scenario("S9").with_pods(count=16).workload
    assert isinstance(workload, Documents)
    assert workload.users == 128


def test_a_ladder_gives_way_to_one_stage_at_a_load() -> None:
    workload = scenario("S1").at_load().workload
    assert isinstance(workload, SharedPrefix)
    assert workload.windows(20.0) == [(0.0, 50.0, 15.0), (50.0, 110.0, 20.0)]


def test_a_trace_needs_no_scenario_and_all_of_it_counts() -> None:
    bare = trace_scenario()
    assert (bare.name, bare.warmup, bare.load) == ("trace", 0.0, None)


# --- files ---


def test_a_scenario_may_extend_another(tmp_path: Path) -> None:
    mine = read(written(tmp_path, EXTENDING + '[pods]\ncount = 3\n[workload]\nturns = {draw = "fixed", value = 2}\n'))
    assert (mine.pods.count, mine.pods.profile) == (3, scenario("S2").pods.profile)
    assert isinstance(mine.workload, Sessions)
    assert mine.stable_rate is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[pods]\ncuont = 3\n", "pods: key 'cuont' is unknown; did you mean count"),
        ('[pods]\nprofile = "qwen3-32b"\n', "no model profile 'qwen3-32b'; did you mean qwen3-32b-2xh100"),
        ('[workload]\nkind = "session"\n', "workload.kind 'session' is unknown; did you mean sessions"),
        ('[workload]\npause = {draw = "unifrom"}\n', "workload.pause.draw 'unifrom' is unknown; did you mean uniform"),
        ('[workload]\npause = {draw = "uniform", low = 1}\n', "uniform: .*'high'"),
        ('[[events]]\nat = 1\ntrouble = "die"\n', "trouble 'die' is unknown"),
        ("[pods\n", "mine.toml"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read(written(tmp_path, EXTENDING + text))


# --- capacity ---


def test_the_pool_does_in_a_step_what_its_pods_do_in_theirs() -> None:
    pods = Pods(count=4, profile="qwen3-coder-30b-h200")
    one, all_of_them = pods.published, pooled(pods)
    each = one.step_time(prefill_tokens=500, prefill_work=1e6, decodes=8, context=9000)
    together = all_of_them.step_time(prefill_tokens=2000, prefill_work=4e6, decodes=32, context=36_000)
    assert together == pytest.approx(each)
    assert all_of_them.kv_tokens == 4 * one.kv_tokens


def test_a_queue_grows_above_the_stable_rate_and_not_below() -> None:
    short = replace(scenario("S6", short=True), warmup=0.0)
    highest = stable_rate(short, seeds=(1,), precision=0.2)
    assert growth(Trial(short, "pooled", 0.7 * highest)) < 0.01 < growth(Trial(short, "pooled", 1.5 * highest))
