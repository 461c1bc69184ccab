"""The scanner against pages in the shape engines print them, and against what their exporter renders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from picker.errors import WireError
from picker.types import LoadObserved, ModelsObserved, Sleep
from picker.wire.metrics_text import MetricsReader, decode_metrics, decode_models, scan_metrics

STARTED_AT = 1795202416.27

SECONDS = "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 7680.0"
SHORT = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0"
TOKENS = "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0 500.0 1000.0 2000.0 5000.0 10000.0 20000.0 32768.0"
HISTOGRAMS = {
    "time_to_first_token_seconds": "0.001 0.005 " + SHORT + " 160.0 640.0 2560.0",
    "inter_token_latency_seconds": SHORT,
    "request_time_per_output_token_seconds": SHORT,
    "e2e_request_latency_seconds": SECONDS,
    "request_queue_time_seconds": SECONDS,
    "request_inference_time_seconds": SECONDS,
    "request_prefill_time_seconds": SECONDS,
    "request_decode_time_seconds": SECONDS,
    "iteration_tokens_total": "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0",
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_max_num_generation_tokens": TOKENS,
    "request_params_max_tokens": TOKENS,
    "request_prefill_kv_computed_tokens": TOKENS,
    "request_params_n": "1.0 2.0 5.0 10.0 20.0",
    "request_num_preemptions": "1.0 2.0 3.0 4.0 5.0 10.0 20.0",
}
CACHE_CONFIG = {
    "block_size": "32",
    "cache_dtype": "auto",
    "enable_prefix_caching": "True",
    "gpu_memory_utilization": "0.9",
    "hash_block_size": "None",
    "kv_cache_max_concurrency": "2.31640625",
    "kv_cache_memory_bytes": "None",
    "kv_cache_size_tokens": "2372",
    "mamba_block_size": "None",
    "num_cpu_blocks": "None",
    "num_gpu_blocks": "300",
    "num_gpu_blocks_override": "300",
    "prefix_caching_hash_algo": "sha256",
    "sliding_window": "None",
    "user_specified_block_size": "True",
}


def series(name: str, value: object, labels: Mapping[str, str] | None = None, kind: str = "gauge") -> str:
    """One family with one sample, as the exporter prints it: comments first, labels sorted by name."""
    return f"# HELP {name} Words about {name}, 1 means all.\n# TYPE {name} {kind}\n{sample(name, value, labels)}"


def sample(name: str, value: object, labels: Mapping[str, str] | None = None) -> str:
    inside = ",".join(f'{key}="{text}"' for key, text in sorted((labels or {}).items()))
    return f"{name}{{{inside}}} {value}\n" if inside else f"{name} {value}\n"


@dataclass
class Page:
    """A page of one vLLM server at about its real size, one series per engine; what a test changes is a field."""

    engines: tuple[str, ...] = ("0",)
    model: str = "meta-llama/Llama-3.1-8B-Instruct"
    gauges: dict[str, list[float]] = field(
        default_factory=lambda: {
            "num_requests_running": [8.0, 5.0],
            "num_requests_waiting": [4.0, 1.0],
            "kv_cache_usage_perc": [0.8, 0.4],
        }
    )
    counters: dict[str, list[float]] = field(
        default_factory=lambda: {"prefix_cache_queries": [11829.0, 171.0], "prefix_cache_hits": [2656.0, 44.0]}
    )
    cache_config: dict[str, str] = field(default_factory=lambda: dict(CACHE_CONFIG))
    lora: list[tuple[dict[str, str], float]] = field(default_factory=list)
    sleep: list[tuple[float, float, float]] = field(default_factory=list)
    started_at: float | None = STARTED_AT
    total: str = "_total"

    def text(self) -> bytes:
        parts = [self._process(), *self._scalars(), *self._histograms(), *self._infos()]
        return "".join(parts).encode()

    def _labels(self, engine: str, **more: str) -> dict[str, str]:
        return {"engine": engine, "model_name": self.model, **more} if engine else {"model_name": self.model, **more}

    def _process(self) -> str:
        gc = "".join(sample("python_gc_objects_collected_total", 1.0, {"generation": str(n)}) for n in range(3))
        start = "" if self.started_at is None else series("process_start_time_seconds", self.started_at)
        return gc + series("process_virtual_memory_bytes", "7.112900608e+09") + start

    def _scalars(self) -> Iterable[str]:
        for name, values in self.gauges.items():
            yield f"# HELP vllm:{name} Number of.\n# TYPE vllm:{name} gauge\n"
            for engine, value in zip(self.engines, values, strict=False):
                yield sample(f"vllm:{name}", value, self._labels(engine))
        for engine in self.engines:
            for reason, value in (("capacity", 97.0), ("deferred", 98.0)):
                yield sample("vllm:num_requests_waiting_by_reason", value, self._labels(engine, reason=reason))
        for engine, states in zip(self.engines, self.sleep, strict=False):
            for state, value in zip(("awake", "weights_offloaded", "discard_all"), states, strict=True):
                yield sample("vllm:engine_sleep_state", value, self._labels(engine, sleep_state=state))
        others = {"external_prefix_cache_queries": [7.0] * 2, "mm_cache_hits": [1.0] * 2, "prompt_tokens": [9.0] * 2}
        for name, values in {**self.counters, **others}.items():
            yield f"# HELP vllm:{name}_total In tokens.\n# TYPE vllm:{name}_total counter\n"
            for number, (engine, value) in enumerate(zip(self.engines, values, strict=False)):
                yield sample(f"vllm:{name}{self.total}", value, self._labels(engine))
                yield sample(f"vllm:{name}_created", STARTED_AT + 10 + number, self._labels(engine))

    def _histograms(self) -> Iterable[str]:
        for name, buckets in HISTOGRAMS.items():
            yield f"# HELP vllm:{name} Histogram of {name}.\n# TYPE vllm:{name} histogram\n"
            for engine in self.engines:
                for le in (*buckets.split(), "+Inf"):
                    yield sample(f"vllm:{name}_bucket", 55.0, self._labels(engine, le=le))
                yield sample(f"vllm:{name}_count", 55.0, self._labels(engine))
                yield sample(f"vllm:{name}_sum", 1.25, self._labels(engine))
            yield f"# HELP vllm:{name}_created Histogram of {name}.\n# TYPE vllm:{name}_created gauge\n"
            for engine in self.engines:
                yield sample(f"vllm:{name}_created", STARTED_AT + 10, self._labels(engine))
        for handler in ("/v1/chat/completions", "/v1/completions", "/v1/models"):
            for le in (*SECONDS.split(), "+Inf"):
                yield sample("http_request_duration_seconds_bucket", 9.0, {"handler": handler, "le": le})

    def _infos(self) -> Iterable[str]:
        if self.cache_config:
            for engine in self.engines:
                labels = {**self.cache_config, "engine": engine} if engine else self.cache_config
                yield series("vllm:cache_config_info", 1.0, labels)
        for labels, value in self.lora:
            yield sample("vllm:lora_requests_info", repr(value), labels)


def load(text: bytes | str, rank: int | None = None) -> LoadObserved:
    body = text.encode() if isinstance(text, str) else text
    return decode_metrics(body, name="pod-1", observed_at=12.5, rank=rank)


# --- vLLM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "sleep"),
    [
        ([], None),
        ([(1.0, 0.0, 0.0)], Sleep.AWAKE),
        ([(0.0, 0.0, 0.0)], Sleep.LIGHT),
        ([(0.0, 1.0, 0.0)], Sleep.DEEP),
        ([(0.0, 0.0, 1.0)], Sleep.DEEP),
        ([(math.nan, 0.0, 1.0)], None),
    ],
)
def test_an_engine_says_whether_it_sleeps_and_whether_its_cache_is_gone(
    states: list[tuple[float, float, float]], sleep: Sleep | None
) -> None:
    assert decode_metrics(Page(sleep=states).text(), name="a", observed_at=1.0).sleep is sleep


def test_of_several_ranks_each_sleeps_for_itself_and_together_the_deepest_counts() -> None:
    page = scan_metrics(Page(engines=("0", "1"), sleep=[(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)]).text())
    shown = [page.load(name="a", observed_at=1.0, rank=rank).sleep for rank in (0, 1, None)]
    assert shown == [Sleep.AWAKE, Sleep.DEEP, Sleep.DEEP]


def test_a_reader_sees_an_engine_fall_asleep_and_wake() -> None:
    reader, seen = MetricsReader(), []
    for states in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)):
        seen.append(reader.read(Page(sleep=[states]).text()).load(name="a", observed_at=1.0).sleep)
    assert seen == [Sleep.AWAKE, Sleep.DEEP, Sleep.AWAKE]


def test_a_full_page_gives_every_field() -> None:
    page = Page(lora=[({"max_lora": "2", "running_lora_adapters": "ad1", "waiting_lora_adapters": "ad1"}, 1.8e9)])
    assert 45_000 < len(page.text()) < 65_000
    assert load(page.text()) == LoadObserved(
        name="pod-1",
        observed_at=12.5,
        waiting=4.0,
        running=8.0,
        kv_usage=0.8,
        block_size=32,
        kv_capacity_tokens=2372,
        queries=11829.0,
        hits=2656.0,
        started_at=STARTED_AT,
        adapters=frozenset({"ad1"}),
        max_adapters=2,
    )


def test_waiting_by_reason_is_not_waiting() -> None:
    page = Page()
    del page.gauges["num_requests_waiting"]
    assert load(page.text()).waiting is None


@pytest.mark.parametrize(
    ("dropped", "unknown"),
    [("num_requests_waiting", "waiting"), ("num_requests_running", "running"), ("kv_cache_usage_perc", "kv_usage")],
)
def test_a_dropped_gauge_is_unknown_and_the_rest_stays(dropped: str, unknown: str) -> None:
    page = Page()
    del page.gauges[dropped]
    observed = load(page.text())
    fields = {"waiting": observed.waiting, "running": observed.running, "kv_usage": observed.kv_usage}
    assert [name for name, value in fields.items() if value is None] == [unknown]


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "-1.0", "wrong"])
def test_a_value_that_is_no_amount_is_unknown(value: str) -> None:
    text = sample("vllm:num_requests_waiting", value, {"engine": "0"}) + sample("vllm:num_requests_running", 1)
    assert (load(text).waiting, load(text).running) == (None, 1.0)


def test_page_without_cache_config_lora_or_start_leaves_them_unknown() -> None:
    observed = load(sample("vllm:num_requests_waiting", 0.0))
    assert observed == LoadObserved("pod-1", 12.5, waiting=0.0)


def test_old_names_are_read() -> None:
    page = Page(engines=("",), gauges={"num_requests_running": [1.0], "gpu_cache_usage_perc": [0.25]})
    page.counters = {"gpu_prefix_cache_queries": [640.0], "gpu_prefix_cache_hits": [320.0]}
    observed = load(page.text())
    assert (observed.kv_usage, observed.queries, observed.hits) == (0.25, 640.0, 320.0)


def test_new_names_win_over_old_ones() -> None:
    page = Page()
    page.gauges["gpu_cache_usage_perc"] = [0.1]
    page.counters = {"gpu_prefix_cache_queries": [1.0], **page.counters}
    observed = load(page.text())
    assert (observed.kv_usage, observed.queries) == (0.8, 11829.0)


def test_counters_without_total_are_read() -> None:
    observed = load(Page(total="").text())
    assert (observed.queries, observed.hits) == (11829.0, 2656.0)


def test_prefix_counters_in_blocks_are_not_taken_for_tokens() -> None:
    help_line = "# HELP vllm:gpu_prefix_cache_queries_total Queries, in terms of number of queried blocks.\n"
    text = help_line + sample("vllm:gpu_prefix_cache_queries_total", 40.0) + sample("vllm:num_requests_running", 2.0)
    assert (load(text).queries, load(text).running) == (None, 2.0)


def test_page_may_start_with_a_wanted_line_and_end_without_newline() -> None:
    assert load('vllm:num_requests_waiting{engine="0"} 3').waiting == 3.0


def test_lines_may_end_in_crlf() -> None:
    assert load('x 1\r\nvllm:num_requests_waiting{engine="0"} 3.0\r\n').waiting == 3.0


def test_timestamps_and_exemplars_after_the_value_are_ignored() -> None:
    text = 'vllm:num_requests_waiting{engine="0"} 3 1795202416270\nvllm:num_requests_running 2 # {id="a"} 9.0\n'
    assert (load(text).waiting, load(text).running) == (3.0, 2.0)


@pytest.mark.parametrize(
    "labels",
    [
        r'engine="1",model_name="a\"},engine=\"7\" \\ \n"',
        r'model_name="a} 5 # {,engine=",engine="1"',
        r'model_name="\\",engine="1",',
        r'model_name = "x" , engine = "1"',
        r'engine="1",other_engine="7"',
        r'other_engine="7",engine="1"',
    ],
)
def test_labels_come_in_any_order_with_escapes(labels: str) -> None:
    text = f"vllm:num_requests_waiting{{{labels}}} 3.0\n"
    assert load(text, rank=1).waiting == 3.0


# --- data parallel -----------------------------------------------------------------------------------------


def test_a_rank_gets_its_own_series() -> None:
    page = Page(engines=("0", "1")).text()
    first, second = load(page, rank=0), load(page, rank=1)
    assert (first.waiting, first.running, first.kv_usage, first.queries) == (4.0, 8.0, 0.8, 11829.0)
    assert (second.waiting, second.running, second.kv_usage, second.queries) == (1.0, 5.0, 0.4, 171.0)
    assert first.kv_capacity_tokens == second.kv_capacity_tokens == 2372


def test_without_a_rank_the_engines_are_one() -> None:
    observed = load(Page(engines=("0", "1")).text())
    assert (observed.waiting, observed.running, observed.queries, observed.hits) == (5.0, 13.0, 12000.0, 2700.0)
    assert observed.kv_usage == pytest.approx(0.6)
    assert (observed.block_size, observed.kv_capacity_tokens) == (32, 2 * 2372)


def test_one_unknown_engine_makes_the_sum_unknown() -> None:
    page = Page(engines=("0", "1"))
    page.gauges["num_requests_waiting"] = [4.0, math.nan]
    assert (load(page.text()).waiting, load(page.text(), rank=0).waiting) == (None, 4.0)


def test_a_missing_engine_label_is_rank_0() -> None:
    text = sample("vllm:num_requests_waiting", 3.0, {"model_name": "tiny"})
    assert load(text, rank=0).waiting == 3.0


def test_a_rank_that_is_not_shown_is_refused_by_number() -> None:
    with pytest.raises(WireError, match=r"rank 2 \(ranks shown: 0, 1\)"):
        load(Page(engines=("0", "1")).text(), rank=2)


def test_one_scan_serves_all_ranks() -> None:
    page = scan_metrics(Page(engines=("0", "1")).text())
    assert page.ranks == {0, 1}
    assert page.load(name="b", observed_at=1.0, rank=1) == decode_metrics(
        Page(engines=("0", "1")).text(), name="b", observed_at=1.0, rank=1
    )


# --- capacity ----------------------------------------------------------------------------------------------


def test_capacity_is_what_the_engine_says_not_blocks_times_size() -> None:
    assert load(Page().text()).kv_capacity_tokens == 2372


@pytest.mark.parametrize("tokens", [None, "None"])
def test_capacity_from_blocks_leaves_the_null_block_out(tokens: str | None) -> None:
    page = Page()
    del page.cache_config["kv_cache_size_tokens"]
    page.cache_config |= {} if tokens is None else {"kv_cache_size_tokens": tokens}
    assert load(page.text()).kv_capacity_tokens == 299 * 32


def test_capacity_is_unknown_while_the_engine_says_none() -> None:
    page = Page()
    page.cache_config |= {"kv_cache_size_tokens": "None", "num_gpu_blocks": "None"}
    assert (load(page.text()).kv_capacity_tokens, load(page.text()).block_size) == (None, 32)


# --- LoRA --------------------------------------------------------------------------------------------------


def lora(running: str, waiting: str = "") -> dict[str, str]:
    return {"max_lora": "4", "running_lora_adapters": running, "waiting_lora_adapters": waiting}


def test_the_newest_lora_series_is_the_current_one() -> None:
    page = Page(lora=[(lora("old"), 1.7952028559499464e9), (lora("a, b", "b,c"), 1.7952028559616172e9)])
    assert load(page.text()).adapters == frozenset({"a", "b", "c"})
    page.lora.reverse()
    assert load(page.text()).adapters == frozenset({"a", "b", "c"})


def test_no_active_adapter_is_an_empty_set_and_no_lora_is_unknown() -> None:
    idle = load(Page(lora=[(lora(""), 1.8e9)]).text())
    assert (idle.adapters, idle.max_adapters) == (frozenset(), 4)
    assert (load(Page().text()).adapters, load(Page().text()).max_adapters) == (None, None)


def test_adapter_names_are_unescaped() -> None:
    assert load(Page(lora=[(lora(r"a\"b\\c\nd"), 1.8e9)]).text()).adapters == frozenset({'a"b\\c\nd'})


# --- restarts ----------------------------------------------------------------------------------------------


def test_a_restart_shows_as_a_new_start_time() -> None:
    assert load(Page(started_at=STARTED_AT).text()).started_at == STARTED_AT
    assert load(Page(started_at=STARTED_AT + 60).text()).started_at == STARTED_AT + 60


def test_without_process_metrics_the_oldest_counter_dates_the_start() -> None:
    page = Page(started_at=None, engines=("0", "1"))
    assert load(page.text()).started_at == STARTED_AT + 10
    assert load(page.text(), rank=1).started_at == STARTED_AT + 11


# --- other engines -----------------------------------------------------------------------------------------

SGLANG_LABELS = {"model_name": "llama", "engine_type": "unified", "tp_rank": "0", "pp_rank": "0"}


def sglang(**values: float) -> str:
    return "".join(series(f"sglang:{name}", value, SGLANG_LABELS) for name, value in values.items())


def test_sglang_is_read_by_its_own_names() -> None:
    gauges = {"num_running_reqs": 7.0, "num_queue_reqs": 2.0, "token_usage": 0.28, "cache_hit_rate": 0.9}
    info = sample("sglang:cache_config_info", 1.0, {"page_size": "16", "num_pages": "1000", **SGLANG_LABELS})
    assert load(sglang(**gauges) + info) == LoadObserved(
        "pod-1", 12.5, waiting=2.0, running=7.0, kv_usage=0.28, block_size=16, kv_capacity_tokens=16000
    )


def test_sglang_capacity_as_gauges() -> None:
    text = sglang(num_running_reqs=0.0, page_size=16.0, num_pages=62500.0)
    assert (load(text).block_size, load(text).kv_capacity_tokens) == (16, 1_000_000)
    assert load(text + sglang(max_total_num_tokens=999_999.0)).kv_capacity_tokens == 999_999


def test_sglang_repeats_and_parts_of_one_rank_are_not_added() -> None:
    text = "".join(
        sample("sglang:num_queue_reqs", value, {"dp_rank": dp, "tp_rank": tp, "priority": priority})
        for dp, tp, priority, value in [
            ("0", "0", "", 5.0),
            ("0", "1", "", 5.0),
            ("0", "0", "3", 2.0),
            ("1", "2", "", 1.0),
        ]
    )
    assert [load(text).waiting, load(text, rank=0).waiting, load(text, rank=1).waiting] == [6.0, 5.0, 1.0]


def test_trtllm_is_read_by_its_own_names() -> None:
    text = "trtllm_num_requests_waiting 1\ntrtllm_num_requests_running 2\ntrtllm_kv_cache_utilization 0.5\n"
    sizes = "trtllm_kv_cache_tokens_per_block 32\ntrtllm_kv_cache_max_blocks 100\n"
    assert load(text + sizes) == LoadObserved(
        "pod-1", 12.5, waiting=1.0, running=2.0, kv_usage=0.5, block_size=32, kv_capacity_tokens=3200
    )


# --- what is no page ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"<!doctype html><html><body>nginx</body></html>", "HTML"),
        (b'{"error":"Unauthorized"}', "JSON"),
        (b"[]", "JSON"),
        (b"Not Found", "not Prometheus text"),
        (b"# HELP go_threads x\n# TYPE go_threads gauge\ngo_threads 12\n", "none of the series we know"),
        (b'# TYPE vllm:num_requests_waiting gauge\nvllm:e2e_bucket{le="1"} 3\n', "none of the series we know"),
        (b"process_start_time_seconds 1.7e9\n", "metrics switched off"),
    ],
)
def test_what_is_no_engine_page_is_refused_in_plain_words(body: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        load(body)


@settings(max_examples=60, deadline=None)
@given(body=st.binary(max_size=400) | st.text(alphabet='vllm:num_requests_waiting{}",=\\ \n01.', max_size=200))
def test_any_bytes_give_a_load_or_a_wire_error(body: bytes | str) -> None:
    try:
        observed = load(body)
    except WireError:
        return
    assert observed.waiting is None or observed.waiting >= 0


@settings(max_examples=60, deadline=None)
@given(
    model=st.text(st.characters(codec="utf-8"), max_size=30),
    waiting=st.integers(0, 10**6),
    usage=st.floats(0, 1, allow_nan=False),
    queries=st.floats(0, 1e15),
)
def test_reads_back_what_the_engines_exporter_writes(model: str, waiting: int, usage: float, queries: float) -> None:
    registry = CollectorRegistry()
    labels = ["model_name", "engine"]
    waiting_family = Gauge("vllm:num_requests_waiting", "Requests waiting.", labels, registry=registry)
    usage_family = Gauge("vllm:kv_cache_usage_perc", "1 means 100 percent.", labels, registry=registry)
    queries_family = Counter("vllm:prefix_cache_queries", "In tokens.", labels, registry=registry)
    for rank in (0, 3):
        waiting_family.labels(model, str(rank)).set(waiting + rank)
        usage_family.labels(model, str(rank)).set(usage)
        queries_family.labels(model, str(rank)).inc(queries)
    observed = load(generate_latest(registry), rank=3)
    assert (observed.waiting, observed.kv_usage, observed.queries) == (waiting + 3, usage, queries)
    assert observed.started_at is not None


# --- /v1/models --------------------------------------------------------------------------------------------


def test_models_and_adapters_are_listed_with_the_context_length() -> None:
    body = (
        b'{"object":"list","data":['
        b'{"id":"tiny","object":"model","created":1,"owned_by":"vllm","root":"/m","parent":null,"max_model_len":1024,'
        b'"permission":[{"id":"modelperm-1"}]},'
        b'{"id":"ad1","object":"model","root":"/a","parent":"tiny","max_model_len":null}]}'
    )
    models, adapters = frozenset({"tiny", "ad1"}), frozenset({"ad1"})
    assert decode_models(body, name="pod-1") == ModelsObserved("pod-1", models, 1024, adapters)


def test_models_without_context_length_are_listed() -> None:
    assert decode_models(b'{"data":[{"id":"m"}]}', name="p") == ModelsObserved("p", frozenset({"m"}), None)
    assert decode_models(b'{"data":[]}', name="p") == ModelsObserved("p", frozenset(), None)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error":"Unauthorized"}', b'{"data":[{"name":"x"}]}'])
def test_what_is_no_model_list_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="not a model list"):
        decode_models(body, name="pod-1")


# --- page after page ---------------------------------------------------------------------------------------

COUNT = st.floats(0, 1e12) | st.integers(0, 10**7).map(float)


class Pages(list[bytes]):
    """Hypothesis shows what it tries, and whole pages are more than it likes to show."""

    def __repr__(self) -> str:
        return f"<{len(self)} pages of {[len(text) for text in self]} bytes>"


@st.composite
def similar_pages(draw: st.DrawFn) -> Pages:
    """What one server shows over time: other numbers, now and then other lines."""
    made = Page(engines=draw(st.sampled_from([("0",), ("0", "1"), ("",)])))
    found = Pages()
    for _ in range(draw(st.integers(1, 6))):
        for values in (*made.gauges.values(), *made.counters.values()):
            if draw(st.booleans()):
                values[:] = draw(st.lists(COUNT, min_size=2, max_size=2))
        if draw(st.integers(0, 4)) == 0:
            running = draw(st.sampled_from(["", "one", "one,two"]))
            labels = {"max_lora": "4", "running_lora_adapters": running, "waiting_lora_adapters": ""}
            made.lora.append((labels, draw(COUNT)))
        if draw(st.integers(0, 9)) == 0:
            made.gauges.pop(draw(st.sampled_from(sorted(made.gauges))), None) if len(made.gauges) > 1 else None
        if draw(st.integers(0, 9)) == 0:
            made.started_at = draw(st.none() | st.floats(1e9, 2e9))
        found.append(made.text())
    return found


@settings(max_examples=30, deadline=None)
@given(pages=similar_pages())
def test_a_page_is_read_after_others_as_if_it_were_the_first(pages: Pages) -> None:
    reader = MetricsReader()
    for text in pages:
        assert reader.read(text) == scan_metrics(text)


def test_a_page_on_which_nothing_has_changed_is_what_it_was_before() -> None:
    reader, text = MetricsReader(), Page().text()
    assert reader.read(text) is reader.read(bytes(bytearray(text)))


def test_a_page_that_cannot_be_read_is_refused_and_the_next_one_is_read_again() -> None:
    reader = MetricsReader()
    before = reader.read(Page().text())
    for bad in (b"", b"<html>", Page().text().replace(b"vllm:", b"else:")):
        with pytest.raises(WireError):
            reader.read(bad)
    assert reader.read(Page().text()) == before


def test_one_adapter_in_place_of_another_is_noticed_though_the_page_is_no_longer() -> None:
    reader = MetricsReader()
    labels = {"max_lora": "4", "waiting_lora_adapters": "", "running_lora_adapters": "one"}
    assert reader.read(Page(lora=[(labels, 5.0)]).text()).adapters == frozenset({"one"})
    assert reader.read(Page(lora=[(labels | {"running_lora_adapters": "two"}, 6.0)]).text()).adapters == frozenset(
        {"two"}
    )


def test_a_page_that_ends_before_the_value_of_a_line_is_searched_anew() -> None:
    reader, text = MetricsReader(), sample("vllm:num_requests_running", 3.0)
    assert reader.read(text.encode()).load(name="a", observed_at=0.0).running == 3.0
    with pytest.raises(WireError):
        reader.read(text.replace("3.0", " ").encode())
