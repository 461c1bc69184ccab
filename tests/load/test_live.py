from __future__ import annotations

import io

import pytest
from rich.console import Console

from picker.load.live import live_line, remaining
from picker.load.schedule import Progress


def at(elapsed: float, done: int = 40, failed: int = 0) -> Progress:
    return Progress(planned=120, sent=done + 10, done=done, failed=failed, elapsed=elapsed, ttft=0.123)


def shown(*progress: Progress, seconds: float | None = None) -> str:
    screen = io.StringIO()
    with live_line("shared-prefix", Console(file=screen, force_terminal=True, width=120), seconds=seconds) as show:
        assert show is not None
        for each in progress:
            show(each)
    return screen.getvalue()


def test_a_terminal_sees_how_far_the_run_is() -> None:
    text = shown(at(2.0, failed=3), seconds=62.0)
    for words in ("shared-prefix", "40/120", "in flight 10", "failed 3", "20.0/s", "TTFT 123 ms", "0:02 of 1:02"):
        assert words in text


def test_the_rate_is_the_one_of_the_last_seconds() -> None:
    text = shown(at(10.0, done=10), at(20.0, done=20), at(25.0, done=70))
    assert "10.0/s" in text.rpartition("70/120")[2]


def test_a_rate_of_nothing_is_nought() -> None:
    assert "0.0/s" in shown(at(10.0), at(20.0), at(30.0))


def test_what_remains_is_told_by_the_plan_or_guessed_from_what_is_done() -> None:
    assert remaining(at(30.0), 60.0) == 30.0
    assert remaining(at(70.0), 60.0) == 0.0
    assert remaining(at(30.0), None) == pytest.approx(60.0)
    assert remaining(at(30.0, done=0), None) is None


def test_without_a_terminal_there_is_nothing_to_show() -> None:
    screen = io.StringIO()
    with live_line("shared-prefix", Console(file=screen)) as show:
        assert show is None
    assert screen.getvalue() == ""
