import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from picker.sim.adapters import AdapterSlots
from picker.sim.engine import Engine, EngineRequest
from picker.sim.latency import profile
from picker.sim.pod_metrics import Histogram, PodMetrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: bytes) -> Samples:
    families = text_string_to_metric_families(page.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(page: bytes, name: str, **labels: str) -> float:
    """The one sample of this name with at least these labels."""
    found = [v for (n, ls), v in samples(page).items() if n == f"vllm:{name}" and labels.items() <= dict(ls).items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


@pytest.fixture
def served() -> tuple[PodMetrics, Engine]:
    """A pod that served two equal prompts of 1,000 tokens, 50 tokens out, one after the other."""
    engine = Engine(profile("llama-3.1-8b-h100"), adapters=AdapterSlots(4))
    metrics = PodMetrics(engine, "tiny", started_at=1.5e9)
    now = 0.0
    for number in (1, 2):
        engine.add(EngineRequest(number, 1000, 50, list(range(62)), arrived_at=now, lora="ad1"), now)
        while (result := engine.step(now, math.inf)) is not None:
            now += result.duration
            metrics.step(result)
            for record in result.finished:
                metrics.finished(record, max_tokens=50, choices=1)
    return metrics, engine


def test_what_a_gateway_reads_is_there(served: tuple[PodMetrics, Engine]) -> None:
    page = served[0].render(now=1.6e9)
    assert value(page, "num_requests_running") == 0
    assert value(page, "num_requests_waiting") == 0
    assert value(page, "num_requests_waiting_by_reason", reason="capacity") == 0
    assert value(page, "kv_cache_usage_perc") == 0
    assert value(page, "prefix_cache_queries_total") == 2000
    assert value(page, "prefix_cache_hits_total") == 992
    assert value(page, "prompt_tokens_by_source_total", source="local_cache_hit") == 992
    assert value(page, "prompt_tokens_by_source_total", source="local_compute") == 1008
    assert value(page, "generation_tokens_total") == 100
    assert value(page, "request_success_total", finished_reason="length") == 2
    assert value(page, "request_success_total", finished_reason="abort") == 0
    config = {name: dict(labels) for (name, labels) in samples(page)}["vllm:cache_config_info"]
    blocks = 414_000 // 16
    assert (config["block_size"], config["num_gpu_blocks"]) == ("16", str(blocks))
    assert config["kv_cache_size_tokens"] == str(blocks * 16)
    assert samples(page)["process_start_time_seconds", frozenset()] == 1.5e9


def test_latencies_are_those_of_the_records(served: tuple[PodMetrics, Engine]) -> None:
    page = served[0].render(now=1.6e9)
    assert value(page, "e2e_request_latency_seconds_count") == 2
    total = value(page, "e2e_request_latency_seconds_sum")
    parts = ("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds")
    assert sum(value(page, f"{part}_sum") for part in parts) == pytest.approx(total)
    assert value(page, "inter_token_latency_seconds_count") == 2 * 49
    assert value(page, "inter_token_latency_seconds_sum") == pytest.approx(
        value(page, "request_decode_time_seconds_sum")
    )
    assert value(page, "iteration_tokens_total_sum") == 1000 + 8 + 98


def test_buckets_are_cumulative_and_end_with_all(served: tuple[PodMetrics, Engine]) -> None:
    page = served[0].render(now=1.6e9)
    name = "vllm:inter_token_latency_seconds_bucket"
    counts = [v for (n, _), v in samples(page).items() if n == name]
    assert counts == sorted(counts)
    assert counts[-1] == 98


def test_gauges_lag_behind_by_a_step(served: tuple[PodMetrics, Engine]) -> None:
    metrics, engine = served
    engine.add(EngineRequest(3, 1600, 50), 100.0)
    engine.step(100.0)
    assert value(metrics.render(now=1.6e9), "num_requests_running") == 0
    engine.step(101.0)
    page = metrics.render(now=1.6e9)
    assert value(page, "num_requests_running") == 1
    assert value(page, "kv_cache_usage_perc") == pytest.approx(100 / (414_000 // 16 - 1))


def test_the_adapters_of_the_latest_moment_have_the_largest_value(served: tuple[PodMetrics, Engine]) -> None:
    metrics, engine = served
    metrics.render(now=1.6e9)
    engine.add(EngineRequest(3, 100, 5, lora="ad2"), 100.0)
    page = metrics.render(now=1.6e9 + 1)
    assert value(page, "lora_requests_info", running_lora_adapters="", waiting_lora_adapters="") == 1.6e9
    latest = value(page, "lora_requests_info", running_lora_adapters="ad2", waiting_lora_adapters="ad2", max_lora="4")
    assert latest == 1.6e9 + 1


def test_without_adapters_there_is_no_lora_family() -> None:
    engine = Engine(profile("llama-3.1-8b-h100"))
    assert b"lora" not in PodMetrics(engine, "tiny", started_at=0.0).render(now=1.0)


def test_the_page_has_the_size_of_a_real_one(served: tuple[PodMetrics, Engine]) -> None:
    page = served[0].render(now=1.6e9)
    assert 40_000 < len(page) < 70_000
    assert page.endswith(b"\n")


def test_labels_are_sorted_and_escaped() -> None:
    histogram = Histogram("h", {"model_name": 'a"b\\', "engine": "0"}, (1.0,), created=0.0)
    histogram.observe(1.0, times=3)
    histogram.observe(5.0)
    lines = histogram.render().splitlines()
    assert lines[2] == 'h_bucket{engine="0",le="1.0",model_name="a\\"b\\\\"} 3.0'
    assert lines[3:6] == [
        'h_bucket{engine="0",le="+Inf",model_name="a\\"b\\\\"} 4.0',
        'h_count{engine="0",model_name="a\\"b\\\\"} 4.0',
        'h_sum{engine="0",model_name="a\\"b\\\\"} 8.0',
    ]
