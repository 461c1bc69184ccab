"""The simulated pod's /metrics: vLLM 0.32's families, labels and buckets as Prometheus text.

Owns the histograms and the text. Counters and gauges are read from the engine when somebody scrapes; a family that has
not changed since is not rendered again, so that scraping many idle pods costs little.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.utils import floatToGoString

from picker.sim.engine import Engine, FinishedRequest, StepResult

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"

_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LONG = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_HTTP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60)
_FEW = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
_FINISHED = ("stop", "length", "abort", "error", "repetition")
_REJECTED = ("max_num_queued_reqs", "max_num_queued_tokens")
_SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
_TIERS = ("device", "host", "p2p", "disk", "external_unspecified")
# Counted by vLLM and never moved here: what they count is not simulated.
_STILL = (
    "external_prefix_cache_queries",
    "external_prefix_cache_hits",
    "mm_cache_queries",
    "mm_cache_hits",
    "estimated_flops_per_gpu",
    "estimated_read_bytes_per_gpu",
    "estimated_write_bytes_per_gpu",
)


class Family:
    """The gauges or counters of one name; all but their values is text made once. Counters get `_created` lines."""

    def __init__(
        self,
        name: str,
        labels: Mapping[str, str],
        variants: Sequence[tuple[str, str]] = (),
        created: float | None = None,
    ) -> None:
        wholes = [{**labels, key: value} for key, value in variants] or [dict(labels)]
        shown = name if created is None else f"{name}_total"
        self._head = _head(shown, "gauge" if created is None else "counter")
        self._series = [_series(shown, whole) for whole in wholes]
        self._tail = ""
        if created is not None:
            lines = (f"{_series(f'{name}_created', whole)}{_number(created)}\n" for whole in wholes)
            self._tail = _head(f"{name}_created", "gauge") + "".join(lines)

    def render(self, *values: float) -> str:
        """values: one for each variant, in their order."""
        lines = [f"{series}{_number(value)}\n" for series, value in zip(self._series, values, strict=True)]
        return self._head + "".join(lines) + self._tail


class Histogram:
    """One Prometheus histogram with fixed labels; its text is kept until something is observed."""

    def __init__(self, name: str, labels: Mapping[str, str], bounds: Sequence[float], created: float) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        edges = (*(_number(float(bound)) for bound in bounds), "+Inf")
        self._buckets = [_series(f"{name}_bucket", {**labels, "le": edge}) for edge in edges]
        self._total = _series(f"{name}_count", labels), _series(f"{name}_sum", labels)
        self._head = _head(name, "histogram")
        self._created = _head(f"{name}_created", "gauge") + _series(f"{name}_created", labels) + _number(created)
        self._text: str | None = None

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times
        self._text = None

    def render(self) -> str:
        if self._text is None:
            counts = list(itertools.accumulate(self._counts))
            lines = [f"{series}{count}.0\n" for series, count in zip(self._buckets, counts, strict=True)]
            count, total = self._total
            lines.append(f"{count}{counts[-1]}.0\n{total}{_number(self._sum)}\n")
            self._text = self._head + "".join(lines) + self._created + "\n"
        return self._text


class PodMetrics:
    """What one pod counts beside its engine, and the page of it all.

    model: first served name. started_at: unix seconds. sleep_level: None while it is awake. Durations are observed in
    virtual seconds, as the engine has them: a pod at ten times the speed shows the latencies of the pod it stands for.
    """

    def __init__(self, engine: Engine, model: str, started_at: float) -> None:
        self._engine = engine
        self._labels = {"engine": "0", "model_name": model}
        self._started_at = started_at
        self.rejections = 0
        self.sleep_level: int | None = None
        self._http: Counter[tuple[str, str, str]] = Counter()
        self._lora_seen: dict[str, float] = {}
        self._running = self._gauge("num_requests_running")
        self._waiting = self._gauge("num_requests_waiting")
        self._waiting_by_reason = self._gauge("num_requests_waiting_by_reason", "reason", ("capacity", "deferred"))
        self._kv_usage = self._gauge("kv_cache_usage_perc")
        states = ("awake", "weights_offloaded", "discard_all")
        self._sleep_state = self._gauge("engine_sleep_state", "sleep_state", states)
        self._queries = self._counter("prefix_cache_queries")
        self._hits = self._counter("prefix_cache_hits")
        self._prompts = self._counter("prompt_tokens")
        self._prompts_by_source = self._counter("prompt_tokens_by_source", "source", _SOURCES)
        self._prompts_cached = self._counter("prompt_tokens_cached")
        self._prompts_cached_by_tier = self._counter("prompt_tokens_cached_by_source", "source", _TIERS)
        self._generated = self._counter("generation_tokens")
        self._preempted = self._counter("num_preemptions")
        self._success = self._counter("request_success", "finished_reason", _FINISHED)
        rejected = [("reason", reason) for reason in _REJECTED]
        self._rejected = Family("vllm:admission_rejections", {"model_name": model}, rejected, started_at)
        limit = engine.profile.max_model_len
        sizes = tuple(itertools.takewhile(lambda n: n <= limit, _one_two_five()))
        self.ttft = self._histogram("time_to_first_token_seconds", _TTFT)
        self.itl = self._histogram("inter_token_latency_seconds", _ITL)
        self.tpot = self._histogram("request_time_per_output_token_seconds", _ITL)
        self.e2e = self._histogram("e2e_request_latency_seconds", _LONG)
        self.queue = self._histogram("request_queue_time_seconds", _LONG)
        self.inference = self._histogram("request_inference_time_seconds", _LONG)
        self.prefill = self._histogram("request_prefill_time_seconds", _LONG)
        self.decode = self._histogram("request_decode_time_seconds", _LONG)
        self.step_tokens = self._histogram("iteration_tokens_total", _STEP_TOKENS)
        self.prompt_tokens = self._histogram("request_prompt_tokens", sizes)
        self.generation_tokens = self._histogram("request_generation_tokens", sizes)
        self.most_generated = self._histogram("request_max_num_generation_tokens", sizes)
        self.computed_tokens = self._histogram("request_prefill_kv_computed_tokens", sizes)
        self.max_tokens = self._histogram("request_params_max_tokens", sizes)
        self.choices = self._histogram("request_params_n", _FEW)
        self.preemptions = self._histogram("request_num_preemptions", _PREEMPTIONS)
        self._histograms = [h for h in vars(self).values() if isinstance(h, Histogram)]
        self.http_seconds = Histogram("http_request_duration_highr_seconds", {}, _HTTP, started_at)
        self._still = self._still_text()

    # --- what happened ---

    def step(self, result: StepResult) -> None:
        """One or more engine steps ended."""
        tokens = result.prefill_tokens + len(result.decoding)
        self.step_tokens.observe(tokens, result.steps)
        emitted = len(result.decoding) * result.steps
        if emitted:
            self.itl.observe(result.duration / result.steps, emitted)

    def finished(self, record: FinishedRequest, *, max_tokens: int | None, choices: int) -> None:
        """A request reached its last token."""
        prompt, output, cached = record.usage.prompt_tokens, record.usage.completion_tokens, record.usage.cached_tokens
        decode = record.finished_at - record.first_token_at
        self.ttft.observe(record.first_token_at - record.arrived_at)
        self.e2e.observe(record.finished_at - record.arrived_at)
        self.queue.observe(record.scheduled_at - record.queued_at)
        self.prefill.observe(record.first_token_at - record.scheduled_at)
        self.decode.observe(decode)
        self.inference.observe(record.finished_at - record.scheduled_at)
        self.prompt_tokens.observe(prompt)
        self.generation_tokens.observe(output)
        self.most_generated.observe(output)
        self.computed_tokens.observe(prompt - (cached or 0))
        self.choices.observe(choices)
        self.preemptions.observe(record.preemptions)
        if output > 1:
            self.tpot.observe(decode / (output - 1))
        if max_tokens is not None:
            self.max_tokens.observe(max_tokens)

    def answered(self, handler: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request was answered; /metrics and probes are not counted."""
        self._http[handler, method, f"{status // 100}xx"] += 1
        self.http_seconds.observe(seconds)

    # --- the page ---

    def render(self, now: float) -> bytes:
        """The text of a scrape. now: unix seconds."""
        parts = [*self._gauges(), *self._counters(), *(h.render() for h in self._histograms)]
        parts += (self._still, *self._lora(now), *self._http_counts(), self.http_seconds.render())
        return "".join(parts).encode()

    def _gauges(self) -> Iterator[str]:
        gauges = self._engine.gauges
        yield self._running.render(gauges.running)
        yield self._waiting.render(gauges.waiting)
        yield self._waiting_by_reason.render(gauges.waiting - gauges.deferred, gauges.deferred)
        yield self._kv_usage.render(gauges.kv_usage)
        level = self.sleep_level
        yield self._sleep_state.render(float(level is None), float(level == 1), float(level == 2))

    def _counters(self) -> Iterator[str]:
        counters, cached = self._engine.counters, self._engine.counters.cached_tokens
        success = {reason.value: count for reason, count in counters.success.items()}
        yield self._queries.render(counters.queries)
        yield self._hits.render(counters.hits)
        yield self._prompts.render(counters.prompt_tokens)
        yield self._prompts_by_source.render(counters.prompt_tokens - cached, cached, 0)
        yield self._prompts_cached.render(cached)
        yield self._prompts_cached_by_tier.render(cached, 0, 0, 0, 0)
        yield self._generated.render(counters.generation_tokens)
        yield self._preempted.render(counters.preemptions)
        yield self._success.render(*(success.get(reason, 0) for reason in _FINISHED))
        yield self._rejected.render(self.rejections, 0)

    def _lora(self, now: float) -> Iterator[str]:
        """vLLM keeps a series for every combination seen; the latest has the largest value. It lists both alike."""
        if self._engine.adapters is None:
            return
        self._lora_seen[",".join(sorted(self._engine.active_adapters))] = now
        name, slots = "vllm:lora_requests_info", str(self._engine.adapters.slots)
        yield _head(name, "gauge")
        for active, seen in self._lora_seen.items():
            labels = {"max_lora": slots, "running_lora_adapters": active, "waiting_lora_adapters": active}
            yield f"{_series(name, labels)}{_number(seen)}\n"

    def _http_counts(self) -> Iterator[str]:
        yield _head("http_requests_total", "counter")
        for (handler, method, status), count in self._http.items():
            labels = {"handler": handler, "method": method, "status": status}
            yield f"{_series('http_requests_total', labels)}{count}.0\n"

    def _still_text(self) -> str:
        """What never changes while the pod runs."""
        profile, blocks = self._engine.profile, self._engine.pool.num_blocks
        config = {
            "block_size": profile.block_size,
            "cache_dtype": "auto",
            "effective_attention_block_size": profile.block_size,
            "enable_prefix_caching": True,
            "engine": 0,
            "gpu_memory_utilization": 0.9,
            "kv_cache_max_concurrency": round(blocks * profile.block_size / profile.max_model_len, 2),
            "kv_cache_memory_bytes": None,
            "kv_cache_size_tokens": blocks * profile.block_size,
            "num_gpu_blocks": blocks,
            "num_gpu_blocks_override": None,
            "prefix_cache_retention_interval": 0,
            "prefix_caching_hash_algo": "sha256",
            "sliding_window": None,
            "user_specified_block_size": False,
        }
        labels = {key: str(value) for key, value in config.items()}
        parts = [self._counter(name).render(0) for name in _STILL]
        parts.append(Family("vllm:cache_config_info", labels).render(1))
        parts.append(Family("process_start_time_seconds", {}).render(self._started_at))
        return "".join(parts)

    def _histogram(self, name: str, bounds: Sequence[float]) -> Histogram:
        return Histogram(f"vllm:{name}", self._labels, bounds, self._started_at)

    def _gauge(self, name: str, label: str = "", values: Sequence[str] = ()) -> Family:
        return Family(f"vllm:{name}", self._labels, [(label, value) for value in values])

    def _counter(self, name: str, label: str = "", values: Sequence[str] = ()) -> Family:
        return Family(f"vllm:{name}", self._labels, [(label, value) for value in values], self._started_at)


def _series(name: str, labels: Mapping[str, str]) -> str:
    """Name and labels up to the value; labels in order of their names, as prometheus_client prints them."""
    escaped = {k: v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for k, v in labels.items()}
    inside = ",".join(f'{key}="{escaped[key]}"' for key in sorted(escaped))
    return f"{name}{{{inside}}} " if inside else f"{name} "


def _head(name: str, kind: str) -> str:
    return f"# HELP {name} {name.removeprefix('vllm:').replace('_', ' ').capitalize()}.\n# TYPE {name} {kind}\n"


def _one_two_five() -> Iterator[int]:
    for power in itertools.count():
        yield from (10**power, 2 * 10**power, 5 * 10**power)


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]
