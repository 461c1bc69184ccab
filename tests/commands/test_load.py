from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from load.fake_openai import FakeAnswer, Json, answer_well, chunk, fake_server
from picker.commands.load import command, plan_and_pace
from picker.errors import ConfigError
from picker.load.schedule import Pace
from picker.load.workload import Plan


def planned(*flags: str) -> tuple[Plan, Pace]:
    """The plan and pace of a command line."""
    shape: dict[str, Any] = command.make_context("load", ["http://x", *flags]).params
    named = ("url", "model", "api", "api_key", "ignore_eos", "timeout", "records", "strict", "as_json")
    return plan_and_pace(**{name: value for name, value in shape.items() if name not in named})


def test_rate_and_duration_decide_the_number_of_requests() -> None:
    plan, pace = planned("--rate", "2", "--duration", "30")
    assert (plan.name, plan.requests, pace.closed, pace.cap) == ("shared-prefix", 60, None, None)
    assert planned("--rate", "2", "--duration", "30", "--requests", "7")[0].requests == 7


def test_concurrency_without_a_rate_is_a_closed_loop_and_with_one_a_cap() -> None:
    plan, pace = planned("--concurrency", "8", "--requests", "20")
    assert (plan.requests, pace.closed, pace.cap) == (20, 8, None)
    _, pace = planned("--concurrency", "8", "--rate", "2", "--requests", "20")
    assert (pace.closed, pace.cap) == (None, 8)


def test_the_shape_of_a_workload_comes_from_its_flags() -> None:
    plan, _ = planned("--groups", "1", "--system-tokens", "7", "--max-tokens", "3", "--requests", "2")
    assert [c.system[0].tokens for c in plan.conversations] == [7, 7]
    assert {c.turns[0].max_tokens for c in plan.conversations} == {3}
    assert planned("--workload", "sessions", "--requests", "3")[0].name == "sessions"


def test_later_turns_of_a_session_end_with_the_run() -> None:
    assert planned("--workload", "sessions", "--duration", "40")[1].until == pytest.approx(40, rel=0.5)


def trace_file(folder: Path) -> str:
    path = folder / "some.jsonl"
    lines = ({"timestamp": 100 * i, "input_length": 10, "output_length": 50, "hash_ids": [i]} for i in range(1, 9))
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def test_a_trace_is_cut_by_its_flags(tmp_path: Path) -> None:
    plan, pace = planned("--trace", trace_file(tmp_path), "--limit", "5", "--rate-scale", "2", "--max-tokens", "9")
    assert (plan.name, plan.requests) == ("some.jsonl", 5)
    assert plan.duration == pytest.approx(0.2)
    assert {c.turns[0].max_tokens for c in plan.conversations} == {9}
    assert pace.until is None


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (["--turns", "3"], "--turns"),
        (["--workload", "sessions", "--groups", "3"], "--groups"),
        (["--limit", "3"], "--limit"),
        (["--rate", "0"], "rate"),
    ],
)
def test_a_flag_that_says_nothing_is_refused_by_name(flags: list[str], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        planned(*flags)


@pytest.mark.parametrize("flags", [["--rate", "3"], ["--workload", "sessions"], ["--groups", "2"]])
def test_a_workload_flag_beside_a_trace_is_refused_by_name(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=flags[0]):
        planned("--trace", trace_file(tmp_path), *flags)


def test_a_trace_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: No such file"):
        planned("--trace", str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.jsonl: is not a text file"):
        planned("--trace", str(tmp_path / "binary.jsonl"))


# --- the whole command ---------------------------------------------------------------------------------------


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "picker", "load", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def picker_load(*arguments: str) -> tuple[int | None, str, str]:
    process = await start(*arguments)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


SMALL = ("--requests", "6", "--rate", "300", "--system-tokens", "10", "--question-tokens", "4", "--max-tokens", "2")


async def test_json_is_all_there_is_on_stdout(tmp_path: Path) -> None:
    async with fake_server() as server:
        status, out, err = await picker_load(server.url, *SMALL, "--json", "--records", str(tmp_path / "r"))
    figures = json.loads(out)
    assert (status, figures["requests"], figures["failed"]) == (0, 6, 0)
    assert figures["by_endpoint"] == {"pod-1:8000": 6}
    assert figures["hit_ratio"] == pytest.approx(0.5, abs=0.05)
    assert "Traceback" not in err
    assert len((tmp_path / "r").read_text().splitlines()) == 6


async def test_failed_requests_make_the_status_bad_and_are_told_by_class() -> None:
    async def refuse_long(request: Json, answer: FakeAnswer) -> None:
        if request["max_tokens"] == 2:
            answer.refuse(429, "slow down")
        else:
            await answer_well(request, answer)

    async with fake_server(refuse_long) as server:
        status, out, err = await picker_load(server.url, *SMALL)
    assert status == 1
    assert "failed" in out
    assert "6 x http-429: slow down" in err


async def test_ctrl_c_reports_what_was_measured() -> None:
    async def hang_after_three(request: Json, answer: FakeAnswer) -> None:
        if len(server.requests) <= 3:
            await answer_well(request, answer)
            return
        await answer.start()
        await answer.send(chunk("x"))
        await asyncio.Event().wait()

    async with fake_server(hang_after_three) as server:
        process = await start(server.url, *SMALL, "--json")
        await server.wait_for(6)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert process.returncode == 130
    assert json.loads(out)["requests"] == 3
    assert b"3 requests in flight were cancelled" in err


async def test_a_server_that_is_not_there_is_one_clear_line() -> None:
    status, out, err = await picker_load("http://127.0.0.1:9")
    assert (status, out) == (1, "")
    assert err.strip().splitlines() == [err.strip()]
    assert "http://127.0.0.1:9 does not answer" in err


async def test_wrong_usage_is_status_two() -> None:
    assert (await picker_load("not-a-url"))[0] == 2
    assert (await picker_load("http://127.0.0.1:9", "--rate", "0"))[0] == 2
