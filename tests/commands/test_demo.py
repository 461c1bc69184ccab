from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import replace

import pytest
from click.testing import CliRunner, Result

from picker.children import ChildFailedError
from picker.commands import demo as commands_demo
from picker.demo import SHARED_PREFIX, Audience, Comparison, Setup
from picker.demo_stack import EnvoyMissingError, Stack
from picker.errors import ConfigError
from picker.load.client import Record
from picker.load.schedule import Run
from picker.load.workload import Plan

SLOW = Record(
    intended_at=0.0,
    sent_at=0.0,
    first_at=0.2,
    ended_at=0.3,
    endpoint="127.0.0.1:1",
    prompt_tokens=100,
    output_tokens=3,
    cached_tokens=20,
)
FAST = replace(SLOW, first_at=0.05, cached_tokens=90)
STACK = Stack("envoy 1.40.0", "http://plain", "http://gateway", "http://admin", ("http://pod",))


def run(record: Record, plan: Plan) -> Run:
    return Run(plan, SHARED_PREFIX.pace, started_at=0.0, ended_at=1.0, records=[record])


def comparison(before: Record = SLOW, after: Record = FAST, plan: Plan = Plan("shared-prefix", ())) -> Comparison:
    return Comparison("envoy 1.40.0", run(before, plan), run(after, plan))


class Ending:
    """Stands for `demonstrate`: shows a comparison and ends as told."""

    def __init__(self, shown: Comparison | None, end: BaseException | signal.Signals | None = None) -> None:
        self._shown = shown
        self._end = end

    async def __call__(self, setup: Setup, audience: Audience, *, keep: bool) -> None:
        audience.up(STACK, Plan("shared-prefix", ()))
        if self._shown is not None:
            audience.result(STACK, self._shown)
        if isinstance(self._end, signal.Signals):
            os.kill(os.getpid(), self._end)
            await asyncio.Event().wait()
        elif self._end is not None:
            raise self._end


def picker_demo(monkeypatch: pytest.MonkeyPatch, ending: Ending, *arguments: str) -> Result:
    monkeypatch.setattr(commands_demo, "demonstrate", ending)
    return CliRunner().invoke(commands_demo.command, list(arguments))


def test_the_table_compares_and_the_sentence_says_what_it_means(monkeypatch: pytest.MonkeyPatch) -> None:
    result = picker_demo(monkeypatch, Ending(comparison()))
    assert result.exit_code == 0
    for words in ("cache-unaware", "TTFT P95", "+70 points", "-75%", "90.0% of the prompt tokens served from cache"):
        assert words in result.stdout


def test_json_is_all_there_is_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    result = picker_demo(monkeypatch, Ending(comparison()), "--json")
    assert json.loads(result.stdout)["routing"]["picker"]["hit_ratio"] == 0.9


def test_a_picker_that_is_not_better_is_said_so_with_a_bad_status(monkeypatch: pytest.MonkeyPatch) -> None:
    result = picker_demo(monkeypatch, Ending(comparison(FAST, SLOW)))
    assert result.exit_code == 1
    assert "not better" in result.stdout


def test_failures_are_told_by_way_and_class_with_a_bad_status(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = replace(FAST, error="http-503", detail="no endpoints")
    result = picker_demo(monkeypatch, Ending(comparison(SLOW, failed)))
    assert result.exit_code == 1
    assert "picker: 1 x http-503: no endpoints" in result.stderr


def test_a_trace_says_how_much_of_it_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("trace.jsonl", (), source_requests=12_031)
    assert "the first of 12,031" in picker_demo(monkeypatch, Ending(comparison(plan=plan))).stdout


def test_keep_prints_the_urls_and_ctrl_c_is_then_a_good_end(monkeypatch: pytest.MonkeyPatch) -> None:
    result = picker_demo(monkeypatch, Ending(comparison(), signal.SIGINT), "--keep")
    assert result.exit_code == 0
    for url in ("http://gateway/v1", "http://plain/v1", "http://admin", "http://pod", "curl http://gateway/v1"):
        assert url in result.stderr


def test_ctrl_c_before_the_result_and_sigterm_are_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    assert picker_demo(monkeypatch, Ending(None, signal.SIGINT)).exit_code == 130
    assert picker_demo(monkeypatch, Ending(None, signal.SIGTERM)).exit_code == 143


def test_without_envoy_the_other_data_plane_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result = picker_demo(monkeypatch, Ending(None, EnvoyMissingError("No Envoy found. Install it.")))
    assert isinstance(result.exception, ConfigError)
    assert "--data-plane proxy" in str(result.exception)


def test_a_dead_child_is_an_error_for_main_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    result = picker_demo(monkeypatch, Ending(None, ChildFailedError("pods ended by itself")))
    assert isinstance(result.exception, RuntimeError)
    assert "pods ended" in str(result.exception)
