from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from load.fake_openai import fake_server
from picker import demo, envoy
from picker.demo import GROUPS_PER_POD, REPLAY, SHARED_PREFIX, Comparison, Setup, compare, make_plan
from picker.demo_stack import Stack, naming_the_pod
from picker.errors import ConfigError
from picker.load.client import Record
from picker.load.live import OnProgress
from picker.load.schedule import Run
from picker.load.workload import Plan
from picker.sim.latency import profile

GOOD = Record(
    intended_at=0.0, sent_at=0.0, first_at=0.1, ended_at=0.3, prompt_tokens=100, output_tokens=3, cached_tokens=20
)
BAD = Record(intended_at=0.0, sent_at=0.0, ended_at=0.1, error="reset")
NOTHING = Plan(name="nothing", conversations=())


def run(*records: Record) -> Run:
    return Run(NOTHING, SHARED_PREFIX.pace, started_at=0.0, ended_at=1.0, records=list(records))


def test_prompts_fill_more_cache_than_one_pod_has_and_less_than_all_have() -> None:
    plan = make_plan(Setup(endpoints=4))
    systems = {conversation.system for conversation in plan.conversations}
    tokens = sum(system[0].tokens for system in systems)
    capacity = SHARED_PREFIX.kv_tokens
    assert capacity is not None
    assert len(systems) == 4 * GROUPS_PER_POD
    assert capacity < tokens < 4 * capacity


def test_no_question_is_asked_twice() -> None:
    plan = make_plan(Setup(duration=60.0))
    questions = [conversation.turns[0].text for conversation in plan.conversations]
    assert len(set(questions)) == len(questions)


def test_the_load_follows_the_number_of_pods_and_the_duration() -> None:
    small, more, longer = (make_plan(Setup(endpoints=n, duration=d)) for n, d in ((2, 10.0), (4, 10.0), (2, 20.0)))
    assert more.requests == pytest.approx(2 * small.requests, abs=1)
    assert longer.requests == pytest.approx(2 * small.requests, abs=1)
    assert small.duration == pytest.approx(10.0 * SHARED_PREFIX.time_scale, rel=0.25)
    seconds = profile(SHARED_PREFIX.profile).c_pf * small.prompt_tokens / (2 * small.duration)
    assert SHARED_PREFIX.load * 0.7 < seconds < SHARED_PREFIX.load * 1.1


def test_both_runs_and_every_run_of_a_seed_send_the_same() -> None:
    assert make_plan(Setup(seed=3)) == make_plan(Setup(seed=3))
    assert make_plan(Setup(seed=3)) != make_plan(Setup(seed=4))


def test_a_trace_is_cut_and_sped_up_to_the_same_load_and_duration(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = (
        {"timestamp": 2000 * i, "input_length": 5120, "output_length": 500, "hash_ids": [i] * 10} for i in range(5000)
    )
    path.write_text("\n".join(json.dumps(line) for line in lines))
    plan = make_plan(Setup(trace=path))
    assert plan.source_requests == 5000
    assert plan.requests < 5000
    assert plan.duration == pytest.approx(demo.DURATION * REPLAY.time_scale, rel=0.05)
    assert {c.turns[0].max_tokens for c in plan.conversations} == {demo.WORKLOAD.max_tokens}


def test_a_trace_that_compares_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [1]}')
    with pytest.raises(ConfigError, match="one request"):
        make_plan(Setup(trace=path))
    with pytest.raises(ConfigError, match="No such file"):
        make_plan(Setup(trace=tmp_path / "missing.jsonl"))


@pytest.mark.parametrize("line", ['{"time": 1, "prompt_tokens": 5, "output_tokens": 5}', '{"hash_ids": [1]}', "words"])
def test_a_file_of_another_kind_is_told_what_kinds_are_taken(line: str, tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=r"access\.jsonl.*: the demo takes Mooncake's JSON lines and Azure's CSV"):
        make_plan(Setup(trace=path))


@pytest.mark.parametrize(
    ("flag", "setup"),
    [("--endpoints", {"endpoints": 1}), ("--duration", {"duration": 0.0}), ("--duration", {"duration": math.inf})],
)
def test_a_demo_of_nothing_is_refused(flag: str, setup: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=flag):
        Setup(**setup)  # type: ignore[arg-type]


def test_json_has_the_promised_keys() -> None:
    figures = Comparison("envoy 1.40.0", run(GOOD, BAD), run(GOOD)).to_json()
    assert (figures["requests"], figures["failed"], figures["data_plane"]) == (3, 1, "envoy 1.40.0")
    routing = figures["routing"]
    assert isinstance(routing, dict)
    assert list(routing) == ["cache-unaware", "picker"]
    assert routing["cache-unaware"]["failed"] == 1
    assert routing["picker"]["ttft_mean_s"] == pytest.approx(0.1 * SHARED_PREFIX.time_scale)


SOONER = replace(GOOD, first_at=0.05)


@pytest.mark.parametrize(
    ("before", "after", "better"),
    [
        ([GOOD], [SOONER], True),
        ([SOONER], [GOOD], False),
        ([GOOD], [SOONER, BAD], False),
        ([GOOD, BAD], [SOONER], False),
        ([], [], False),
    ],
)
def test_better_means_sooner_and_nothing_failed(before: list[Record], after: list[Record], better: bool) -> None:
    assert Comparison("x", run(*before), run(*after)).better is better


# --- the two runs --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unseen(label: str) -> Iterator[OnProgress | None]:
    yield None


async def test_both_ways_get_the_same_requests_with_empty_caches() -> None:
    plan = make_plan(Setup(duration=0.2))
    async with fake_server() as in_turn, fake_server() as by_picker, fake_server() as pod:
        stack = Stack("fake", in_turn.url, by_picker.url, "", (pod.url, in_turn.url, by_picker.url))
        comparison = await compare(stack, plan, SHARED_PREFIX, unseen)
    assert in_turn.requests == by_picker.requests
    assert len(in_turn.requests) == plan.requests
    assert comparison.failed == 0
    # Emptied before the first run and between the two.
    assert pod.resets == [0, 0]
    assert (in_turn.resets, by_picker.resets) == ([0, plan.requests], [0, 0])


def test_envoy_names_the_pod_on_the_plain_listener_only() -> None:
    config = naming_the_pod(envoy.bootstrap(["127.0.0.1:1"], "127.0.0.1:2", plain="127.0.0.1:0"))
    texts = {listener["name"]: json.dumps(listener) for listener in config["static_resources"]["listeners"]}
    assert "UPSTREAM_REMOTE_ADDRESS" in texts[envoy.PLAIN]
    assert "UPSTREAM_REMOTE_ADDRESS" not in texts[envoy.GATEWAY]
