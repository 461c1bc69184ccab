"""Exact prefix knowledge as Prometheus metrics: how each endpoint's KV events stand, what came of them, and how
predictions came true. Counts of what is told to it; reads names and numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from picker.core.snapshot import EndpointState

_STATES = ("whole", "partial", "suspect", "absent", "doubted", "refused")


# Family -> (help, label, label value -> count's name). See `sources.kv_stream.StreamStats` and `prefix.exact.Stream`.
_EVENTS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "picker_kv_event_batches": (
        "Batches of KV events by what became of them.",
        "outcome",
        {"applied": "batches", "repeated": "repeated", "misdirected": "misdirected", "unreadable": "bad"},
    ),
    "picker_kv_event_blocks": (
        "Blocks that KV events told of. unplaced: not spelled, or behind one that is not known; nameless: told of in a "
        "lower tier only, by hash.",
        "what",
        {"stored": "stored", "removed": "removed", "unplaced": "unread", "nameless": "nameless"},
    ),
    "picker_kv_event_breaks": (
        "Gaps in the sequence, replays asked for, restarts of the engine, events not known or not believed.",
        "what",
        {
            "gap": "gaps",
            "replay": "replays",
            "restart": "restarts",
            "unknown": "unknown",
            "dropped": "dropped",
        },
    ),
}


class EventMetrics(Collector):
    """Counts of each endpoint's KV events, and of prompts by how they were read.

    events: by endpoint, by the names of `StreamStats` and `Stream`; "lag" in seconds. readings: by outcome.
    """

    def __init__(
        self, events: Callable[[], Mapping[str, Mapping[str, float]]], readings: Callable[[], Mapping[str, float]]
    ) -> None:
        self._events = events
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        events = self._events()
        for family, (meaning, label, counts) in _EVENTS.items():
            told = CounterMetricFamily(family, meaning, labels=["endpoint", label])
            for name, known in events.items():
                for value, count in counts.items():
                    told.add_metric([name, value], known.get(count, 0.0))
            yield told
        lag = GaugeMetricFamily(
            "picker_kv_event_lag_seconds", "From making to arrival of a batch.", labels=["endpoint"]
        )
        for name, known in events.items():
            if "lag" in known:
                lag.add_metric([name], known["lag"])
        yield lag
        yield self._read()

    def _read(self) -> Metric:
        family = CounterMetricFamily(
            "picker_prompt_readings",
            "Prompts by how they were read for exact matching; all but `read` are routed by approximate knowledge.",
            labels=["outcome"],
        )
        for outcome, count in self._readings().items():
            family.add_metric([outcome], count)
        return family


class PredictionMetrics(Collector):
    """Reads the endpoints' states when somebody scrapes. read: the pool as it is at that moment."""

    def __init__(self, read: Callable[[], Sequence[EndpointState]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        states = self._read()
        yield _standing(states)
        yield from _predictions(states)


def _standing(states: Sequence[EndpointState]) -> Metric:
    family = GaugeMetricFamily(
        "picker_kv_events_state", "1 for the state an endpoint's KV events are in.", labels=["endpoint", "state"]
    )
    for state in states:
        for name in _STATES:
            family.add_metric([state.name, name], float(state.kv_events == name))
    return family


def _predictions(states: Sequence[EndpointState]) -> Iterator[Metric]:
    verdicts = CounterMetricFamily(
        "picker_cached_token_predictions",
        "Predictions from KV events that were compared with what the engine reported.",
        labels=["endpoint", "verdict"],
    )
    error = CounterMetricFamily(
        "picker_cached_token_prediction_error_tokens", "By how much they were wrong.", labels=["endpoint"]
    )
    for state in states:
        over, under = state.predictions_over, state.predictions_under
        for verdict, count in (("right", state.predictions - over - under), ("over", over), ("under", under)):
            verdicts.add_metric([state.name, verdict], count)
        error.add_metric([state.name], state.prediction_error_tokens)
    yield verdicts
    yield error
