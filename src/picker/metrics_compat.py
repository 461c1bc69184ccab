"""The endpoint picker's metrics, for dashboards and alerts made for it: the names of today and the older ones.

Counts what `Telemetry` is told, and reads gauges off the scheduler when somebody scrapes. What picker does not know is
left out rather than shown as zero: sizes in bytes, latencies between tokens, plugins one by one, KV index internals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from picker import __version__
from picker.core import filters
from picker.core.saturation import Detector
from picker.core.scheduler import Scheduler
from picker.core.view import PoolView
from picker.metrics_names import (
    ATTEMPTS,
    ERRORS,
    FLOW_TOTAL,
    QUEUE,
    REQUESTS,
    RUNNING,
    SPREADS,
    Labels,
    Shown,
    counters,
    gauges,
    histograms,
)
from picker.telemetry import Spread
from picker.types import (
    Decision,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    FloatArray,
    Outcome,
    Rejection,
    RejectReason,
    Request,
    Usage,
)

_FLOW = "default-flow"  # the endpoint picker's name for requests of no flow
_OTHER = "other"
_MODELS = 1000  # names shown; a client can make up any number
_PRODUCER = "inflight-load-producer"
_CODES = {400: "BadRequest", 404: "NotFound", 429: "ResourceExhausted", 503: "ServiceUnavailable"}
_FAILED = "ModelServerError"
_OUTCOMES = {
    RejectReason.SATURATED: "RejectedCapacity",
    RejectReason.NO_ENDPOINTS: "RejectedNoEndpoints",
    RejectReason.EXPIRED: "EvictedTTL",
}

_INDEX = ("approx-prefix-cache-producer", "approx-prefix-cache-producer")


@dataclass(slots=True)
class _Open:
    """A request that was routed and has not ended."""

    labels: Labels
    arrived_at: float
    streaming: bool
    first_at: float | None = None


class CompatMetrics(Collector):
    """A `Telemetry` watcher and a collector of its registry. pool, namespace: label values. detector: of saturation."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Callable[[], float],
        *,
        pool: str = "",
        namespace: str = "default",
        detector: Detector | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._pool = pool
        self._namespace = namespace
        self._detector = detector
        self._open: dict[int, _Open] = {}
        self._models: set[str] = set()
        self._counts: dict[str, dict[Labels, float]] = {"requests": {}, "errors": {}, "attempts": {}, "flow": {}}
        self._spreads: dict[str, dict[Labels, Spread]] = {key: {} for key in SPREADS}

    # --- told ---

    def decision(self, outcome: Outcome, seconds: float, request: Request | None) -> None:
        """One decision. A request that the caller does not name is looked up in its booking."""
        if request is None and (charge := self._scheduler.charges.get(outcome.request_id)) is not None:
            request = charge.request
        labels = self._labels(request)
        self._count("requests", labels)
        self._spread("scheduler", (), seconds)
        if isinstance(outcome, Rejection):
            self._rejected(outcome, labels)
        else:
            self._routed(outcome, labels, request)

    def _rejected(self, rejection: Rejection, labels: Labels) -> None:
        self._count("errors", (*labels, _CODES.get(rejection.status, "Internal")))
        self._count("attempts", ("failure", labels[1], "", "", ""))
        self._count("flow", (_OUTCOMES.get(rejection.reason, "RejectedOther"), labels[3], self._pool))

    def _routed(self, decision: Decision, labels: Labels, request: Request | None) -> None:
        endpoint = decision.endpoint
        where = (endpoint.name, self._namespace, endpoint.address.rpartition(":")[2])
        self._count("attempts", ("success", labels[1], *where))
        self._count("flow", ("Dispatched", labels[3], self._pool))
        self._spread("queue", (labels[2], labels[3], "Dispatched", self._pool, *labels[:2]), decision.waited)
        if decision.total_blocks:
            self._spread("hit", _INDEX, decision.matched_blocks / decision.total_blocks)
        arrived_at = self._clock() if request is None else request.arrived_at
        self._open[decision.request_id] = _Open(labels, arrived_at, request is not None and request.streaming)

    def fact(self, fact: Fact) -> None:
        match fact:
            case FirstToken(request_id):
                if (opened := self._open.get(request_id)) is not None and opened.first_at is None:
                    opened.first_at = self._clock()
            case Finished(request_id, status, usage):
                self._ended(request_id, None if status < 400 else _FAILED, usage)
            case Failed(request_id, reason):
                self._ended(request_id, None if reason is FailureReason.CLIENT_GONE else _FAILED, None)
            case _:
                pass

    def _ended(self, request_id: int, error: str | None, usage: Usage | None) -> None:
        opened = self._open.pop(request_id, None)
        if opened is None:
            return
        now, labels = self._clock(), opened.labels
        if error is not None:
            self._count("errors", (*labels, error))
            return
        self._spread("duration", labels, now - opened.arrived_at)
        if opened.first_at is not None:
            streaming = "true" if opened.streaming else "false"
            self._spread("ttft", (*labels, streaming), opened.first_at - opened.arrived_at)
        if usage is not None:
            self._used(opened, usage, now)

    def _used(self, opened: _Open, usage: Usage, now: float) -> None:
        labels, output = opened.labels, usage.completion_tokens
        self._spread("input", labels, usage.prompt_tokens)
        self._spread("output", labels, output)
        if usage.cached_tokens is not None:
            self._spread("cached", labels, usage.cached_tokens)
        if output > 0:
            self._spread("ntpot", labels, (now - opened.arrived_at) / output)
        if output > 1 and opened.streaming and opened.first_at is not None:
            self._spread("tpot", labels, (now - opened.first_at) / (output - 1))

    def _labels(self, request: Request | None) -> Labels:
        model = asked = self._shown_model("" if request is None else request.model or "")
        if request is not None and request.rewritten is not None:
            asked = self._shown_model(request.rewritten.asked or "")
        return asked, model, _FLOW, str(0 if request is None else request.priority)

    def _shown_model(self, model: str) -> str:
        if model not in self._models:
            if len(self._models) >= _MODELS:
                return _OTHER
            self._models.add(model)
        return model

    def _count(self, key: str, labels: Labels) -> None:
        counts = self._counts[key]
        counts[labels] = counts.get(labels, 0.0) + 1.0

    def _spread(self, key: str, labels: Labels, value: float) -> None:
        spreads = self._spreads[key]
        if labels not in spreads:
            spreads[labels] = Spread(SPREADS[key][1])
        spreads[labels].add(value)

    # --- shown ---

    def collect(self) -> Iterator[Metric]:
        """Everything, under all of its names."""
        yield from counters(REQUESTS, self._counts["requests"])
        yield from counters(ERRORS, self._counts["errors"])
        yield from self._attempts()
        yield from counters(FLOW_TOTAL, self._counts["flow"])
        for key, (shown, _) in SPREADS.items():
            yield from histograms(shown, self._spreads[key])
        running: dict[Labels, float] = {}
        for opened in self._open.values():
            running[opened.labels] = running.get(opened.labels, 0.0) + 1.0
        yield from gauges(RUNNING, running)
        yield from self._of_pool()
        yield from self._of_endpoints()
        yield from self._of_queue()

    def _attempts(self) -> Iterator[Metric]:
        yield from counters(ATTEMPTS, self._counts["attempts"])
        older = CounterMetricFamily(
            "inference_extension_scheduler_attempts_total",
            ATTEMPTS.help,
            labels=["status", "target_model_name", "pod_name", "namespace", "port"],
        )
        for labels, count in self._counts["attempts"].items():
            older.add_metric(labels, count)
        yield older

    def _of_pool(self) -> Iterator[Metric]:
        """Averages over the endpoints, as they were scraped last; where nothing was, there is none."""
        pool, now, label = self._scheduler.pool, self._clock(), (self._pool,)
        present = pool.present
        for column, name in (
            (pool.kv_usage, "kv_cache_utilization"),
            (pool.waiting, "queue_size"),
            (pool.running, "running_requests"),
        ):
            known = _known(column[present])
            if known.size:
                older = {f"inference_pool_average_{name}": ("name",)}
                average = Shown(f"average_{name}", ("name",), "Mean over the endpoints.", older)
                yield from gauges(average, {label: float(known.mean())})
                spread = Shown(f"std_dev_{name}", ("name",), "Standard deviation over the endpoints.")
                yield from gauges(spread, {label: float(known.std())})
        ready = Shown("ready_endpoints", ("name",), "Endpoints that serve.", {"inference_pool_ready_pods": ("name",)})
        yield from gauges(ready, {label: float(np.count_nonzero(filters.alive(pool, now)))})
        info = Shown("info", ("commit", "build_ref"), "Build.", {"inference_extension_info": ("commit", "build_ref")})
        yield from gauges(info, {(__version__, "picker"): 1.0})
        yield from self._saturation(now)

    def _saturation(self, now: float) -> Iterator[Metric]:
        if self._detector is None:
            return
        pool, labels = self._scheduler.pool, ("inference_pool", "stage")
        rows = np.flatnonzero(filters.alive(pool, now))
        older = {"inference_extension_flow_control_pool_saturation": labels}
        shown = Shown("flow_control_pool_saturation", labels, "How full the pool is; 1 is full.", older)
        value = self._detector.saturation(PoolView(pool, rows, now))
        yield from gauges(shown, {(self._pool, "effective"): value})

    def _of_endpoints(self) -> Iterator[Metric]:
        pool = self._scheduler.pool
        rows = {endpoint.name: row for row, endpoint in pool}
        waiting = {(self._pool, name): float(pool.waiting[row]) for name, row in rows.items()}
        known = {labels: value for labels, value in waiting.items() if not np.isnan(value)}
        for name, label in (
            ("llm_d_epp_per_endpoint_queue_size", "model_server_endpoint"),
            ("inference_pool_per_pod_queue_size", "model_server_pod"),
        ):
            family = GaugeMetricFamily(name, "Requests waiting in the engine.", labels=["name", label])
            for values, value in known.items():
                family.add_metric(values, value)
            yield family
        labels = ("endpoint_name", "namespace", "producer_name", "fairness_id", "priority")
        for metric, column in (("inflight_requests", pool.inflight), ("inflight_tokens", pool.backlog)):
            shown = Shown(metric, labels, "Booked there and not ended; of tokens: uncached, not computed yet.")
            booked: dict[Labels, float] = {
                (name, self._namespace, _PRODUCER, "", ""): float(column[row]) for name, row in rows.items()
            }
            yield from gauges(shown, booked)
        size = float(sum(self._scheduler.index.resident(row) for row in rows.values()))
        older = {"inference_extension_prefix_indexer_size": ()}
        index = Shown("prefix_indexer_size", ("plugin_name", "plugin_type"), "Blocks in the prefix index.", older)
        yield from gauges(index, {_INDEX: size})

    def _of_queue(self) -> Iterator[Metric]:
        waiting: dict[Labels, float] = {}
        for request in self._scheduler.queue:
            model, _, flow, priority = self._labels(request)
            labels = (flow, priority, self._pool, model, model)
            waiting[labels] = waiting.get(labels, 0.0) + 1.0
        older = {"inference_extension_flow_control_queue_size": QUEUE}
        yield from gauges(Shown("flow_control_queue_size", QUEUE, "Requests in the queue.", older), waiting)


def _known(column: FloatArray) -> FloatArray:
    known: FloatArray = column[~np.isnan(column)]
    return known
