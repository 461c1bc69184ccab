from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from load.fake_openai import FakeAnswer, Json, answer_well, chunk, fake_server
from picker.commands.load import command
from picker.commands.load_plan import plan_and_pace, plan_options
from picker.errors import ConfigError
from picker.load.schedule import Pace
from picker.load.workload import Plan


@click.command()
def command_of_nothing() -> None:
    """Has the flags of a plan."""


def planned(*flags: str) -> tuple[Plan, Pace]:
    """The plan and pace of a command line."""
    shape: dict[str, Any] = command.make_context("load", ["http://x", *flags]).params
    known = {option.name for option in plan_options(command_of_nothing).params} | {"time_scale"}
    return plan_and_pace(**{name: value for name, value in shape.items() if name in known})


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


def test_stages_are_windows_of_the_plan() -> None:
    plan, pace = planned("--stages", "100x10,200x5", "--arrivals", "constant")
    assert list(plan.stages) == [(0, 10, 100), (10, 15, 200)]
    assert plan.requests == pytest.approx(2000, abs=2)
    assert pace.until == 15


def test_a_scenario_is_planned_at_a_load() -> None:
    plan, pace = planned("--scenario", "S3", "--load", "0.3", "--pods", "2", "--limit", "40", "--time-scale", "8")
    assert (plan.name, plan.requests, pace.time_scale) == ("bursty-chat", 40, 8.0)
    assert pace.warmup == 120.0
    _, cold = planned("--scenario", "S3", "--limit", "5", "--warmup", "0")
    assert cold.warmup == 0.0
    assert planned("--scenario", "S9", "--limit", "60")[1].closed is not None


def test_requests_from_a_file_come_at_their_times_or_at_a_rate(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps({**body, "timestamp": at}) for at in (10.0, 11.0, 12.5)))
    assert [each.at for each in planned("--trace", str(path))[0].conversations] == [0.0, 1.0, 2.5]
    assert [each.at for each in planned("--trace", str(path), "--rate-scale", "2")[0].conversations] == [0.0, 0.5, 1.25]
    plan, _ = planned("--trace", str(path), "--rate", "10", "--arrivals", "constant", "--requests", "7")
    assert [each.at for each in plan.conversations] == pytest.approx([0.1 * i for i in range(1, 8)])
    assert planned("--trace", str(path), "--concurrency", "2")[1].closed == 2


def test_broken_lines_of_a_trace_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(trace_file(tmp_path))
    path.write_text("{\n" + path.read_text() + "\n[]")
    assert planned("--trace", str(path))[0].requests == 8
    told = capsys.readouterr().err
    assert f"skipped: {path}, line 1: " in told
    assert f"skipped: 2 of 10 lines of {path} are broken" in told


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = Path(trace_file(tmp_path))
    path.write_text("nonsense\n" * 9 + path.read_text())
    with pytest.raises(ConfigError, match="9 of 17 lines are broken"):
        planned("--trace", str(path))


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (["--turns", "3"], "--turns"),
        (["--workload", "sessions", "--groups", "3"], "--groups"),
        (["--limit", "3"], "--limit"),
        (["--rate", "1e6"], "60,000,000 requests"),
        (["--rate", "1e300", "--duration", "1e300"], "inf requests"),
        (["--concurrency", "3", "--duration", "1e308"], "inf requests"),
        (["--duration", "3", "--warmup", "60"], "--warmup 60: the run is over after"),
        (["--stages", "1x5,1000x86400"], "86,400,005 requests"),
        (["--stages", "1x5", "--rate", "3"], "--rate"),
        (["--stages", "1x5", "--duration", "3"], "--duration"),
        (["--bursts", "6,8,32"], "--bursts"),
        (["--arrivals", "mmpp", "--bursts", "6"], "--bursts"),
        (["--arrivals", "mmpp", "--bursts", "inf,8,32"], "--bursts"),
        (["--scenario", "S3", "--rate", "3"], "--rate"),
        (["--scenario", "S3", "--turns", "3"], "--turns"),
        (["--scenario", "S33"], "S3"),
        (["--load", "0.5"], "--load"),
        (["--trace-format", "mooncake"], "--trace-format"),
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


def test_a_scenario_says_of_what_its_load_is_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    planned("--scenario", "S3", "--load", "0.3", "--pods", "2", "--limit", "4")
    told = capsys.readouterr().err
    assert "30% of what 2 x deepseek-v3-8xh200 stand in the model, whatever is behind the URL" in told


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


SMALL = (
    "--no-calibrate",
    "--requests",
    "6",
    "--rate",
    "300",
    "--system-tokens",
    "10",
    "--question-tokens",
    "4",
    "--max-tokens",
    "2",
)


async def test_json_is_all_there_is_on_stdout(tmp_path: Path) -> None:
    async with fake_server() as server:
        status, out, err = await picker_load(server.url, *SMALL, "--json", "--records", str(tmp_path / "r"))
    figures = json.loads(out)
    assert (status, figures["requests"], figures["failed"]) == (0, 6, 0)
    assert figures["by_endpoint"] == {"pod-1:8000": 6}
    assert figures["hit_ratio"] == pytest.approx(0.5, abs=0.05)
    assert "sending shared-prefix: 6 requests, for 0.0" in err
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
        # Three at once: when six have come, the answers to the first three have been read.
        process = await start(server.url, *SMALL, "--processes", "1", "--concurrency", "3", "--json")
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


async def test_a_server_that_is_not_like_openai_is_one_clear_line() -> None:
    async def web_page(_: Json, answer: FakeAnswer) -> None:
        await answer.start({"content-type": "text/html"})
        await answer.send(b"<html>")

    async with fake_server(web_page) as server:
        status, out, err = await picker_load(server.url, "--requests", "3")
    assert (status, out) == (1, "")
    assert "refuses a first request: not-a-stream: the answer is text/html" in err


async def test_a_rate_that_this_machine_cannot_send_is_told_and_strict_fails() -> None:
    async with fake_server() as server:
        flags = ("--no-calibrate", "--processes", "1", "--requests", "600", "--rate", "1e6", "--system-tokens", "10")
        status, out, err = await picker_load(
            server.url, *flags, "--question-tokens", "4", "--max-tokens", "2", "--json", "--strict"
        )
    figures = json.loads(out)
    assert (status, figures["on_schedule"], figures["failed"]) == (1, False, 0)
    assert figures["achieved_rate"] < 0.98 * figures["requested_rate"]
    assert "NOT ON SCHEDULE" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
async def test_a_full_disk_costs_the_file_and_not_the_figures() -> None:
    async with fake_server() as server:
        status, out, err = await picker_load(
            server.url, *SMALL, "--json", "--records", "/dev/full", "--save", "/dev/full"
        )
    assert (status, json.loads(out)["requests"]) == (1, 6)
    assert "--records /dev/full: not written: No space left on device" in err
    assert "--save /dev/full: not written: No space left on device" in err
    assert "Traceback" not in err


async def test_wrong_usage_is_status_two() -> None:
    assert (await picker_load("not-a-url"))[0] == 2
    assert (await picker_load("http://127.0.0.1:9", "--rate", "0"))[0] == 2
