from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from picker.load.client import Record
from picker.load.report import errors, in_words, row, table
from picker.load.schedule import Pace, Run
from picker.load.workload import Plan

KEYS = [
    "requests",
    "failed",
    "duration_s",
    "schedule_delay_p99_s",
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "e2e_mean_s",
    "e2e_p95_s",
    "hit_ratio",
    "output_tokens_per_s",
    "requests_per_s",
    "by_endpoint",
]

# Sent 1 ms late, first token after 100 ms, ten more tokens in a second.
GOOD = Record(
    intended_at=10.0,
    sent_at=10.001,
    first_at=10.1,
    ended_at=11.1,
    endpoint="a",
    prompt_tokens=100,
    output_tokens=11,
    cached_tokens=40,
)
BAD = Record(intended_at=10.0, sent_at=10.0, ended_at=10.5, error="http-503", detail="no endpoints", endpoint="b")


def run(*records: Record, time_scale: float = 1.0) -> Run:
    plan = Plan(name="test", conversations=())
    return Run(plan, Pace(time_scale=time_scale), started_at=10.0, ended_at=12.0, records=list(records))


def test_the_row_has_the_promised_keys_in_order() -> None:
    assert list(row(run(GOOD))) == KEYS


def test_the_row_of_one_good_request() -> None:
    figures = row(run(GOOD))
    assert figures["requests"] == 1
    assert figures["ttft_mean_s"] == pytest.approx(0.1)
    assert figures["tpot_mean_s"] == pytest.approx(0.1)
    assert figures["e2e_p95_s"] == pytest.approx(1.1)
    assert figures["hit_ratio"] == 0.4
    assert figures["output_tokens_per_s"] == 5.5
    assert figures["requests_per_s"] == 0.5
    assert figures["schedule_delay_p99_s"] == pytest.approx(0.001)
    assert figures["by_endpoint"] == {"a": 1}


def test_times_are_seconds_of_the_pods() -> None:
    figures = row(run(GOOD, time_scale=10))
    assert figures["duration_s"] == 20.0
    assert figures["ttft_mean_s"] == pytest.approx(1.0)
    assert figures["tpot_mean_s"] == pytest.approx(1.0)
    assert figures["output_tokens_per_s"] == pytest.approx(0.55)


def test_failures_are_left_out_of_means_and_late_for_ever_in_percentiles() -> None:
    figures = row(run(*[GOOD] * 93, *[BAD] * 7))
    assert (figures["requests"], figures["failed"]) == (100, 7)
    assert figures["ttft_mean_s"] == pytest.approx(0.1)
    assert figures["ttft_p50_s"] == pytest.approx(0.1)
    assert (figures["ttft_p95_s"], figures["ttft_p99_s"], figures["e2e_p95_s"]) == (None, None, None)
    assert figures["by_endpoint"] == {"a": 93, "b": 7}


def test_percentiles_are_values_that_occurred() -> None:
    records = [replace(GOOD, first_at=10.0 + (i + 1) / 100) for i in range(100)]
    figures = row(run(*records))
    assert figures["ttft_p50_s"] == pytest.approx(0.50)
    assert figures["ttft_p95_s"] == pytest.approx(0.95)
    assert figures["ttft_p99_s"] == pytest.approx(0.99)


def test_hit_ratio_is_by_tokens_and_unknown_where_nobody_says() -> None:
    small = replace(GOOD, prompt_tokens=10, cached_tokens=0)
    silent = replace(GOOD, cached_tokens=None)
    assert row(run(GOOD, small, silent))["hit_ratio"] == pytest.approx(40 / 110, abs=1e-6)
    assert row(run(silent))["hit_ratio"] is None


def test_a_run_of_nothing_has_a_row_too() -> None:
    figures = row(run())
    assert (figures["requests"], figures["ttft_mean_s"], figures["ttft_p99_s"]) == (0, None, None)
    json.dumps(figures, allow_nan=False)


def test_failures_are_told_by_class_with_the_words_of_the_first() -> None:
    assert errors(run(BAD, replace(BAD, detail="later"), replace(BAD, error="reset", detail=""), GOOD)) == [
        "2 x http-503: no endpoints",
        "1 x reset",
    ]


def test_the_table_shows_every_endpoint() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(row(run(GOOD, BAD)), title="t"))
    shown = capture.get()
    assert "TTFT P95" in shown
    assert "  a " in shown
    assert "  b " in shown


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ttft_mean_s", 0.0421, "42.1 ms"),
        ("ttft_mean_s", 2.5, "2.50 s"),
        ("hit_ratio", 0.735, "73.5%"),
        ("output_tokens_per_s", 1234.56, "1,234.6"),
        ("requests", 12000, "12,000"),
        ("ttft_p95_s", None, "-"),
    ],
)
def test_figures_read_as_people_write_them(name: str, value: object, words: str) -> None:
    assert in_words(name, value) == words
