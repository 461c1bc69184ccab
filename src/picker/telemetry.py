"""picker's own Prometheus metrics, on a registry that is passed in. Labels come from enums and endpoint names only.

Counted in plain numbers and made into metrics when somebody scrapes: everything here runs on one thread, and what the
client library does for each count, for the sake of many, is a good part of what a request costs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from picker.types import Decision, EndpointRemoved, Fact, Failed, Finished, Outcome, Request, ScrapeFailed

_DECISION_BUCKETS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1)
_WAIT_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Watcher(Protocol):
    """Somebody else who counts what the runtime tells."""

    def decision(self, outcome: Outcome, seconds: float, request: Request | None) -> None: ...

    def fact(self, fact: Fact) -> None: ...


class Telemetry(Collector):
    """Counts what the runtime tells it. One object a process; tests build their own with a registry of their own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._decisions = {"picked": 0}  # by outcome
        self._picked: dict[str, int] = {}  # by endpoint
        self._ended = {"finished": 0}  # by how
        self._scrape_errors: dict[str, int] = {}  # by endpoint
        self._errors: dict[str, int] = {}  # by verb
        self._seconds = Spread(_DECISION_BUCKETS)
        self._waited = Spread(_WAIT_BUCKETS)
        self._predicted = 0.0
        self._cached = self._prompt = self._output = 0
        self._watchers: list[Watcher] = []
        registry.register(self)

    def watch(self, watcher: Watcher) -> None:
        """Have everything told to somebody else, too."""
        self._watchers.append(watcher)

    def decision(self, outcome: Outcome, seconds: float, request: Request | None = None) -> None:
        """One decision, with the CPU-bound time it took, and the request where the caller has it."""
        for watcher in self._watchers:
            watcher.decision(outcome, seconds, request)
        self._seconds.add(seconds)
        if isinstance(outcome, Decision):
            self._decisions["picked"] += 1
            _count(self._picked, outcome.endpoint.name)
            self._predicted += outcome.matched_tokens
            self._waited.add(outcome.waited)
        else:
            _count(self._decisions, outcome.reason.value)

    def fact(self, fact: Fact) -> None:
        for watcher in self._watchers:
            watcher.fact(fact)
        match fact:
            case Finished(usage=usage):
                self._ended["finished"] += 1
                if usage is not None:
                    self._prompt += usage.prompt_tokens
                    self._output += usage.completion_tokens
                    self._cached += usage.cached_tokens or 0
            case Failed(reason=reason):
                _count(self._ended, reason.value)
            case ScrapeFailed(name=name):
                _count(self._scrape_errors, name)
            case EndpointRemoved(name=name):
                # A series of an endpoint that is gone would stay for the life of the process: pods come and go.
                self._picked.pop(name, None)
                self._scrape_errors.pop(name, None)
            case _:
                pass

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Export a value that somebody else owns, read at scrape time."""
        Gauge(name, help_text, registry=self.registry).set_function(read)

    def internal_error(self, where: str) -> None:
        _count(self._errors, where)

    def text(self) -> bytes:
        """The exposition, in Prometheus text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """All that was counted, for the registry."""
        outcomes = "Decisions by outcome (picked, or the reason of a rejection)."
        errors = "Errors of picker's own, by the verb that failed; requests went on."
        yield _labelled("picker_decisions", outcomes, "outcome", self._decisions)
        yield _labelled("picker_picks", "Requests routed, by endpoint.", "endpoint", self._picked)
        yield _labelled("picker_requests_ended", "Requests ended, by how.", "how", self._ended)
        yield self._seconds.metric("picker_decision_seconds", "Time of one decision: hash, match, score, book.")
        yield self._waited.metric("picker_queue_wait_seconds", "Time in picker's own queue.")
        for name, help_text, count in (
            ("predicted_cached", "Prompt tokens predicted to be cached where they went.", self._predicted),
            ("cached", "Prompt tokens the engines reported as cached.", self._cached),
            ("prompt", "Prompt tokens the engines reported.", self._prompt),
            ("output", "Output tokens the engines reported.", self._output),
        ):
            yield CounterMetricFamily(f"picker_{name}_tokens", help_text, value=count)
        yield _labelled("picker_scrape_errors", "Failed scrapes, by endpoint.", "endpoint", self._scrape_errors)
        yield _labelled("picker_internal_errors", errors, "where", self._errors)


class Spread:
    """A histogram. bounds: upper ones, inclusive, ascending; what is beyond the last is counted too."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def total(self) -> float:
        """The sum of the values."""
        return self._sum

    def plus(self, other: Spread) -> Spread:
        """Both together; of the same bounds."""
        both = Spread(self._bounds)
        both._counts = [ours + theirs for ours, theirs in zip(self._counts, other._counts, strict=True)]
        both._sum = self._sum + other._sum
        return both

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), the last one for all."""
        buckets, seen = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            seen += count
            buckets.append((bound, float(seen)))
        return buckets

    def metric(self, name: str, help_text: str) -> HistogramMetricFamily:
        return HistogramMetricFamily(name, help_text, buckets=self.buckets(), sum_value=self._sum)


def _count(counts: dict[str, int], label: str) -> None:
    counts[label] = counts.get(label, 0) + 1


def _labelled(name: str, help_text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
