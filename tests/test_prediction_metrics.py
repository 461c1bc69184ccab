"""Exact knowledge as metrics: what each endpoint's events came to, and how prompts were read."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from picker.prediction_metrics import EventMetrics

COUNTS = {"batches": 7.0, "bad": 1.0, "stored": 30.0, "nameless": 4.0, "gaps": 2.0, "lag": 0.25, "last_seq": 6.0}


def page(events: dict[str, dict[str, float]]) -> list[str]:
    registry = CollectorRegistry()
    registry.register(EventMetrics(lambda: events, lambda: {"read": 3.0, "late": 1.0}))
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_events_are_counted_by_endpoint_and_by_what_became_of_them() -> None:
    lines = page({"a": COUNTS})
    for line in (
        'picker_kv_event_batches_total{endpoint="a",outcome="applied"} 7.0',
        'picker_kv_event_batches_total{endpoint="a",outcome="unreadable"} 1.0',
        'picker_kv_event_blocks_total{endpoint="a",what="stored"} 30.0',
        'picker_kv_event_blocks_total{endpoint="a",what="nameless"} 4.0',
        'picker_kv_event_blocks_total{endpoint="a",what="removed"} 0.0',
        'picker_kv_event_breaks_total{endpoint="a",what="gap"} 2.0',
        'picker_kv_event_lag_seconds{endpoint="a"} 0.25',
        'picker_prompt_readings_total{outcome="late"} 1.0',
    ):
        assert line in lines, lines


def test_without_endpoints_prompts_are_counted_all_the_same() -> None:
    assert page({}) == [
        'picker_prompt_readings_total{outcome="read"} 3.0',
        'picker_prompt_readings_total{outcome="late"} 1.0',
    ]
