"""The endpoint picker's metrics by name: labels, buckets and the older names under which the same is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from picker.telemetry import Spread

_MODEL = ("model_name", "target_model_name")
_REQUEST = (*_MODEL, "fairness_id", "priority")
QUEUE = ("fairness_id", "priority", "inference_pool", *_MODEL)
_QUEUED = ("fairness_id", "priority", "outcome", "inference_pool", *_MODEL)

_LATENCY = (
    *(0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0),
    *(30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0),
)
_TTFT = _LATENCY[:24]
_NTPOT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_TPOT = (
    *(0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 2.0),
)
# 32,778 and not 32,768: dashboards ask for the bounds that there are.
_OUTPUT = (1.0, 8.0, *(float(2**power) for power in range(4, 14)))
_TOKENS = (*_OUTPUT, 16384.0, 32778.0, *(float(2**power) for power in range(16, 21)))
_SCHEDULER = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_WAIT = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_RATIO = tuple(tenth / 10.0 for tenth in range(11))

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """One metric: its labels, its help text and under which further names it is shown with which of the labels."""

    name: str
    labels: Labels
    help: str
    older: Mapping[str, Labels] = field(default_factory=dict)

    def names(self) -> Iterator[tuple[str, Labels]]:
        yield f"llm_d_epp_{self.name}", self.labels
        yield from self.older.items()


def _objective(name: str, labels: Labels = _MODEL) -> Mapping[str, Labels]:
    return {f"inference_objective_{name}": labels}


REQUESTS = Shown("request_total", _REQUEST, "Requests.", _objective("request_total", (*_MODEL, "priority")))
ERRORS = Shown(
    "request_error_total",
    (*_REQUEST, "error_code"),
    "Requests refused or not answered as they should be.",
    _objective("request_error_total", (*_MODEL, "error_code")),
)
RUNNING = Shown(
    "request_running", _REQUEST, "Requests routed and not ended.", _objective("running_requests", ("model_name",))
)
ATTEMPTS = Shown(
    "scheduler_attempts_total",
    ("status", "target_model_name", "endpoint_name", "namespace", "port"),
    "Decisions.",
)
FLOW_TOTAL = Shown("flow_control_requests_total", ("outcome", "priority", "inference_pool"), "Requests by outcome.")

# key -> (metric, bounds of its buckets)
SPREADS: Mapping[str, tuple[Shown, tuple[float, ...]]] = {
    "duration": (
        Shown("request_duration_seconds", _REQUEST, "From arrival to the end.", _objective("request_duration_seconds")),
        _LATENCY,
    ),
    "input": (Shown("request_input_tokens", _REQUEST, "Prompt tokens.", _objective("input_tokens")), _TOKENS),
    "output": (Shown("request_output_tokens", _REQUEST, "Output tokens.", _objective("output_tokens")), _OUTPUT),
    "cached": (
        Shown("request_cached_tokens", _REQUEST, "Cached prompt tokens.", _objective("prompt_cached_tokens")),
        _TOKENS,
    ),
    "ntpot": (
        Shown(
            "request_ntpot_seconds",
            _REQUEST,
            "From arrival to the end, by output token.",
            _objective("normalized_time_per_output_token_seconds"),
        ),
        _NTPOT,
    ),
    "ttft": (Shown("request_ttft_seconds", (*_REQUEST, "streaming"), "From arrival to the first token."), _TTFT),
    "tpot": (Shown("request_streaming_tpot_seconds", _REQUEST, "By token after the first."), _TPOT),
    "scheduler": (
        Shown(
            "scheduler_e2e_duration_seconds",
            (),
            "Time of one decision.",
            {"inference_extension_scheduler_e2e_duration_seconds": ()},
        ),
        _SCHEDULER,
    ),
    "queue": (
        Shown(
            "flow_control_request_queue_duration_seconds",
            _QUEUED,
            "Time in the queue.",
            {"inference_extension_flow_control_request_queue_duration_seconds": _QUEUED},
        ),
        _WAIT,
    ),
    "hit": (
        Shown(
            "prefix_indexer_hit_ratio",
            ("plugin_name", "plugin_type"),
            "Share of a prompt believed cached where it went.",
            {"inference_extension_prefix_indexer_hit_ratio": ()},
        ),
        _RATIO,
    ),
}


def _among(shown: Labels, labels: Labels, values: Labels) -> Labels:
    """Of the values of these labels, those that are shown."""
    return tuple(values[labels.index(label)] for label in shown)


def counters(shown: Shown, counts: Mapping[Labels, float]) -> Iterator[Metric]:
    """Counts by the values of the metric's labels, under each of its names."""
    for name, labels in shown.names():
        family = CounterMetricFamily(name, shown.help, labels=list(labels))
        for values, count in _summed(shown, labels, counts).items():
            family.add_metric(values, count)
        yield family


def gauges(shown: Shown, counts: Mapping[Labels, float]) -> Iterator[Metric]:
    """As `counters`, for what goes up and down."""
    for name, labels in shown.names():
        family = GaugeMetricFamily(name, shown.help, labels=list(labels))
        for values, count in _summed(shown, labels, counts).items():
            family.add_metric(values, count)
        yield family


def _summed(shown: Shown, labels: Labels, counts: Mapping[Labels, float]) -> dict[Labels, float]:
    summed: dict[Labels, float] = {}
    for values, count in counts.items():
        kept = _among(labels, shown.labels, values)
        summed[kept] = summed.get(kept, 0.0) + count
    return summed


def histograms(shown: Shown, spreads: Mapping[Labels, Spread]) -> Iterator[Metric]:
    """As `counters`, for distributions."""
    for name, labels in shown.names():
        merged: dict[Labels, Spread] = {}
        for values, spread in spreads.items():
            kept = _among(labels, shown.labels, values)
            merged[kept] = merged[kept].plus(spread) if kept in merged else spread
        family = HistogramMetricFamily(name, shown.help, labels=list(labels))
        for kept, spread in merged.items():
            family.add_metric(kept, buckets=spread.buckets(), sum_value=spread.total)
        yield family
