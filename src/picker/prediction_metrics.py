"""Exact prefix knowledge as Prometheus metrics: how each endpoint's KV events stand, and how predictions came true."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from picker.core.snapshot import EndpointState

_STATES = ("whole", "partial", "suspect", "absent", "doubted", "refused")


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
