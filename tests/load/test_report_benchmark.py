"""Against the schema that llm-d-benchmark publishes, kept beside this file with its source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from load.runs import failed, measured_of, noisy, record
from picker.load.benchmark_report import benchmark_report
from picker.load.measured import Measured, Origin

SCHEMA: dict[str, Any] = json.loads(
    (Path(__file__).parent / "benchmark_report_v0_2_1.schema.json").read_text(encoding="utf-8")
)
KINDS: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "null": type(None),
}


def complaints(value: Any, schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """What of `value` breaks `schema`: the words of JSON Schema that this one uses."""
    schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] | schema if "$ref" in schema else schema
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices and all(any(complaints(value, choice)) for choice in choices):
        yield f"{at}: {value!r} is none of {len(choices)} choices"
    kind = schema.get("type")
    if kind == "boolean" and not isinstance(value, bool):
        yield f"{at}: is no boolean"
    if kind in KINDS and (not isinstance(value, KINDS[kind]) or isinstance(value, bool)):
        yield f"{at}: {value!r} is no {kind}"
        return
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        yield f"{at}: {value!r} is not allowed"
    if isinstance(value, (int, float)) and (
        value < schema.get("minimum", value) or value <= schema.get("exclusiveMinimum", value - 1)
    ):
        yield f"{at}: {value} is too small"
    if schema.get("format") == "date-time":
        datetime.fromisoformat(value)
    if isinstance(value, dict):
        yield from _members(value, schema, at)
    for number, item in enumerate(value if isinstance(value, list) else ()):
        yield from complaints(item, schema.get("items", {}), f"{at}[{number}]")


def _members(value: dict[str, Any], schema: dict[str, Any], at: str) -> Iterator[str]:
    properties = schema.get("properties", {})
    yield from (f"{at}.{name} is missing" for name in schema.get("required", ()) if name not in value)
    for name, member in value.items():
        if name in properties:
            yield from complaints(member, properties[name], f"{at}.{name}")
        elif schema.get("additionalProperties") is False:
            yield f"{at}.{name} is not in the schema"


RUNS = {
    "ordinary": noisy(0),
    "nothing": measured_of(),
    "failures only": measured_of(failed(1.0), failed(2.0)),
    "sessions": measured_of(
        *(record(float(n), conversation=n // 3, turn=n % 3) for n in range(9)), failed(9.0, conversation=3)
    ),
    "no origin": measured_of(record(1.0), origin=Origin()),
    "pods' seconds": measured_of(record(1.0), time_scale=10, cancelled=2),
    "silent server": measured_of(record(1.0, cached_tokens=None, output_tokens=1, gaps=[])),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_report_fits_the_schema(name: str) -> None:
    report = json.loads(json.dumps(benchmark_report(RUNS[name]), allow_nan=False))
    assert list(complaints(report, SCHEMA)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("run", "uid"), None),
        (("results", "request_performance", "aggregate", "latency", "ttft"), {"units": "s", "mean": 1.0}),
        (("results", "request_performance", "aggregate", "requests", "failures"), -1),
        (("results", "request_performance", "aggregate", "latency", "request_latency", "units"), "seconds"),
        (("scenario", "load", "standardized", "source"), "invented"),
    ],
)
def test_the_check_itself_finds_faults(path: tuple[str, ...], value: object) -> None:
    report = benchmark_report(RUNS["ordinary"])
    part = report
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    assert any(complaints(report, SCHEMA))


def test_the_figures_are_those_of_the_run() -> None:
    run = noisy(0)
    aggregate = benchmark_report(run)["results"]["request_performance"]["aggregate"]
    assert aggregate["requests"]["total"] == 300
    assert aggregate["requests"]["failures"] == 0
    ttft = aggregate["latency"]["time_to_first_token"]
    assert ttft["units"] == "s"
    assert ttft["mean"] == pytest.approx(run.figures["ttft_mean_s"], abs=1e-6)
    assert ttft["p95"] == pytest.approx(run.figures["ttft_p95_s"], abs=1e-6)
    assert aggregate["latency"]["inter_token_latency"]["mean"] == pytest.approx(0.1)
    assert aggregate["throughput"]["output_token_rate"]["mean"] == pytest.approx(run.figures["output_tokens_per_s"])


def test_failures_are_counted_and_left_out_of_statistics() -> None:
    aggregate = performance(measured_of(record(1.0, 0.1), failed(2.0), cancelled=3))["aggregate"]
    assert aggregate["requests"] | {"input_length": 0, "output_length": 0} == {
        "total": 5,
        "failures": 1,
        "incomplete": 3,
        "input_length": 0,
        "output_length": 0,
    }
    assert aggregate["latency"]["time_to_first_token"]["max"] == pytest.approx(0.1)


def test_sessions_are_told_apart_from_requests() -> None:
    sessions = benchmark_report(RUNS["sessions"])["results"]["session_performance"]["sessions"]
    assert (sessions["total"], sessions["failed"], sessions["total_events"]) == (4, 1, 10)
    assert sessions["session_duration"]["mean"] == pytest.approx(3.1)
    assert "session_performance" not in benchmark_report(RUNS["ordinary"])["results"]


def test_the_clock_of_the_report_is_the_wall() -> None:
    time = benchmark_report(RUNS["pods' seconds"])["run"]["time"]
    assert time["duration"] == "PT2.100000S"
    begun, end = (datetime.fromisoformat(time[name]) for name in ("start", "end"))
    assert (end - begun).total_seconds() == pytest.approx(2.1)


def test_the_same_run_has_the_same_name_and_another_has_another() -> None:
    again = replace(noisy(0), origin=replace(noisy(0).origin, started="2026-01-02T03:04:06.000+00:00"))
    assert benchmark_report(noisy(0))["run"]["uid"] == benchmark_report(noisy(0))["run"]["uid"]
    assert benchmark_report(again)["run"]["uid"] != benchmark_report(noisy(0))["run"]["uid"]


def performance(run: Measured) -> dict[str, Any]:
    found: dict[str, Any] = benchmark_report(run)["results"]["request_performance"]
    return found
