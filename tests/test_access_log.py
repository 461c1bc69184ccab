"""What the access log says of a request, and that it costs lines, never requests, when it cannot be written."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picker.access_log import RequestLog, check_target
from picker.errors import ConfigError
from picker.types import (
    Decision,
    Endpoint,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    Rejection,
    RejectReason,
    Request,
    ResponseStarted,
    Rewritten,
    Usage,
)

KEYS = [
    *("time", "id", "request_id", "client", "key", "method", "path", "model", "target_model", "status", "endpoint"),
    "attempts",
    *("stream", "prompt_bytes", "prompt_tokens", "cached_tokens", "output_tokens", "ttft_s", "duration_s", "error"),
]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def journal(tmp_path: Path, clock: Clock | None = None, **options: Any) -> RequestLog:
    return RequestLog(str(tmp_path / "log"), clock=clock or Clock(), now=lambda: 1_795_264_911.25, **options)


def lines(tmp_path: Path, name: str = "log") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def begin(made: RequestLog, request_id: int = 1, **more: Any) -> None:
    made.begin(request_id, "POST", "/v1/chat/completions?api_key=sesame", client="10.0.0.9", alias="abc", **more)


def decided(made: RequestLog, address: str = "10.0.0.1:80", request_id: int = 1) -> None:
    blocks = np.empty(0, dtype=np.uint64)
    request = Request(request_id, "demo", 0.0, block_hashes=blocks, prompt_bytes=900, extra_bytes=100, streaming=True)
    made.decision(Decision(request_id, Endpoint(f"pod-{address[7]}", address)), 0.0, request)


def test_a_request_is_one_line_with_all_keys_and_no_query(tmp_path: Path) -> None:
    clock = Clock()
    made = journal(tmp_path, clock)
    begin(made, key="team-a")
    decided(made)
    clock.now += 0.5
    made.fact(ResponseStarted(1, 200, "10.0.0.1:80"))
    made.fact(FirstToken(1))
    clock.now += 1.0
    made.fact(Finished(1, 200, Usage(300, 20, 256)))
    made.ended(1)
    made.close()
    (line,) = lines(tmp_path)
    assert list(line) == KEYS
    assert line == {
        "time": "2026-11-21T12:41:51.250000Z",
        "id": 1,
        "request_id": "abc",
        "client": "10.0.0.9",
        "key": "team-a",
        "method": "POST",
        "path": "/v1/chat/completions",
        "model": "demo",
        "target_model": "demo",
        "status": 200,
        "endpoint": "pod-1",
        "attempts": 1,
        "stream": True,
        "prompt_bytes": 1000,
        "prompt_tokens": 300,
        "cached_tokens": 256,
        "output_tokens": 20,
        "ttft_s": 0.5,
        "duration_s": 1.5,
        "error": None,
    }


def test_both_models_are_told_where_the_endpoint_is_asked_for_another(tmp_path: Path) -> None:
    made = journal(tmp_path)
    begin(made)
    request = Request(1, "v2", 0.0, rewritten=Rewritten("chat", "canary"))
    made.decision(Decision(1, Endpoint("pod-1", "10.0.0.1:80")), 0.0, request)
    made.ended(1)
    made.close()
    (line,) = lines(tmp_path)
    assert (line["model"], line["target_model"]) == ("chat", "v2")


def test_a_second_attempt_is_counted_and_clears_the_first_ones_failure(tmp_path: Path) -> None:
    made = journal(tmp_path)
    begin(made)
    decided(made)
    made.fact(Failed(1, FailureReason.CONNECT))
    decided(made, "10.0.0.2:80")
    made.fact(ResponseStarted(1, 200))
    made.fact(Finished(1, 200))
    made.ended(1)
    made.close()
    (line,) = lines(tmp_path)
    assert (line["endpoint"], line["attempts"], line["error"], line["status"]) == ("pod-2", 2, None, 200)


def test_a_refusal_says_why(tmp_path: Path) -> None:
    made = journal(tmp_path)
    begin(made)
    made.decision(Rejection(1, RejectReason.SATURATED, 429, "full"), 0.0, None)
    made.answered(1, 429)
    made.ended(1)
    made.close()
    (line,) = lines(tmp_path)
    assert (line["status"], line["error"], line["endpoint"], line["attempts"]) == (429, "saturated", None, 0)


def test_a_client_that_left_before_anything_is_said_to_have(tmp_path: Path) -> None:
    made = journal(tmp_path)
    begin(made)
    made.ended(1)
    made.ended(1)
    made.close()
    (line,) = lines(tmp_path)
    assert (line["status"], line["error"]) == (None, "client-gone")


def test_a_data_planes_own_times_and_attempts_count(tmp_path: Path) -> None:
    made = journal(tmp_path)
    begin(made)
    decided(made)
    made.measured(1, first_byte=0.25, duration=2.5, attempts=2)
    made.fact(ResponseStarted(1, 200, "10.0.0.2:80"))
    made.fact(Finished(1, 200))
    made.ended(1)
    made.close()
    (line,) = lines(tmp_path)
    assert (line["ttft_s"], line["duration_s"], line["attempts"], line["endpoint"]) == (0.25, 2.5, 2, "10.0.0.2:80")


def test_what_nobody_began_is_nobodys_line(tmp_path: Path) -> None:
    made = journal(tmp_path)
    decided(made)
    made.fact(FirstToken(1))
    made.fact(Finished(1, 200))
    made.answered(1, 200)
    made.close()
    assert not lines(tmp_path)


def test_texts_of_clients_are_bounded(tmp_path: Path) -> None:
    made = journal(tmp_path)
    made.begin(1, "GET", "/" + "x" * 9000, client=None, alias="y" * 9000)
    made.close()
    (line,) = lines(tmp_path)
    assert len(line["path"]) < 300
    assert len(line["request_id"]) < 300


async def test_a_log_that_was_moved_away_goes_on_in_a_new_file(tmp_path: Path) -> None:
    made = journal(tmp_path)
    async with made.writing():
        begin(made, 1)
        made.ended(1)
        made.reopen()
        async with asyncio.timeout(60):
            os.rename(tmp_path / "log", tmp_path / "old")
            while not (tmp_path / "log").exists():  # noqa: ASYNC110 a file makes no event
                await asyncio.sleep(0.001)
        begin(made, 2)
        made.ended(2)
    assert [line["id"] for line in lines(tmp_path)][-1] == 2
    assert [line["id"] for name in ("old", "log") for line in lines(tmp_path, name)] == [1, 2]


def test_it_can_go_on_in_another_file(tmp_path: Path) -> None:
    made = journal(tmp_path)
    begin(made, 1)
    made.ended(1)
    made._write(*made._taken())
    check_target(str(tmp_path / "other"))
    made.move(str(tmp_path / "other"))
    begin(made, 2)
    made.ended(2)
    made.close()
    assert [[line["id"] for line in lines(tmp_path, name)] for name in ("log", "other")] == [[1], [2]]


def test_a_file_that_cannot_be_written_is_no_target(tmp_path: Path) -> None:
    check_target("-")
    with pytest.raises(ConfigError, match="cannot write"):
        check_target(str(tmp_path / "no" / "such" / "folder"))


def test_a_log_that_was_moved_away_without_a_word_is_begun_anew(tmp_path: Path) -> None:
    made = journal(tmp_path)
    os.rename(tmp_path / "log", tmp_path / "old")
    begin(made)
    made.ended(1)
    made.close()
    assert len(lines(tmp_path)) == 1
    assert not lines(tmp_path, "old")


def test_what_has_not_ended_is_told_at_the_end(tmp_path: Path) -> None:
    made = journal(tmp_path)
    begin(made)
    made.close()
    made.close()
    assert len(lines(tmp_path)) == 1


def test_lines_that_cannot_be_written_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    made = RequestLog(str(full))
    begin(made)
    made.ended(1)
    made.close()
    assert made.lost == 1
    assert "takes no lines" in caplog.text


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--access-log: cannot write .*none/log: No such file"):
        RequestLog(str(tmp_path / "none" / "log"))


def test_the_example_in_the_manual_is_such_a_line() -> None:
    manual = (Path(__file__).parent.parent / "docs" / "data-plane.md").read_text(encoding="utf-8")
    (example,) = [line for line in manual.splitlines() if line.startswith('{"time"')]
    assert list(json.loads(example)) == KEYS
