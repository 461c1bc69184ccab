"""Which models requests have got instead of those they named, as Prometheus metrics; counted where it is chosen."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from picker.metrics_names import Shown, counters
from picker.rewrites import Rewriting

_LABELS = ("rewrite", "model", "target_model")
_HELP = "Requests that a rewrite has spoken of, also where the target is the model asked for."
_THEIRS = ("model_rewrite_name", "model_name", "target_model")
_NAME = "model_rewrite_decisions_total"


class RewriteMetrics(Collector):
    """compat: show them under the endpoint picker's names, too."""

    def __init__(self, rewriting: Rewriting, *, compat: bool = False) -> None:
        self._rewriting = rewriting
        self._compat = compat

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily("picker_model_rewrites", _HELP, labels=_LABELS)
        for labels, count in self._rewriting.counts.items():
            family.add_metric(labels, count)
        yield family
        if self._compat:
            shown = Shown(_NAME, _THEIRS, _HELP, {f"inference_extension_{_NAME}": _THEIRS})
            yield from counters(shown, {labels: float(count) for labels, count in self._rewriting.counts.items()})
