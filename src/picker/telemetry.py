"""picker's own Prometheus metrics, on a registry that is passed in. Labels come from enums and endpoint names only."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from picker.types import Decision, EndpointRemoved, Fact, Failed, Finished, Outcome, ScrapeFailed

_DECISION_BUCKETS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.1)
_WAIT_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Telemetry:
    """Counts what the runtime tells it. One object a process; tests build their own with a registry of their own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._decisions = Counter(
            "picker_decisions",
            "Decisions by outcome (picked, or the reason of a rejection).",
            ["outcome"],
            registry=registry,
        )
        self._picked = Counter("picker_picks", "Requests routed, by endpoint.", ["endpoint"], registry=registry)
        self._ended = Counter("picker_requests_ended", "Requests ended, by how.", ["how"], registry=registry)
        self._seconds = Histogram(
            "picker_decision_seconds",
            "Time of one decision: hash, match, score, book.",
            buckets=_DECISION_BUCKETS,
            registry=registry,
        )
        self._waited = Histogram(
            "picker_queue_wait_seconds", "Time in picker's own queue.", buckets=_WAIT_BUCKETS, registry=registry
        )
        self._predicted = Counter(
            "picker_predicted_cached_tokens", "Prompt tokens predicted to be cached where they went.", registry=registry
        )
        self._cached = Counter(
            "picker_cached_tokens", "Prompt tokens the engines reported as cached.", registry=registry
        )
        self._prompt = Counter("picker_prompt_tokens", "Prompt tokens the engines reported.", registry=registry)
        self._output = Counter("picker_output_tokens", "Output tokens the engines reported.", registry=registry)
        self._scrape_errors = Counter(
            "picker_scrape_errors", "Failed scrapes, by endpoint.", ["endpoint"], registry=registry
        )
        self._errors = Counter(
            "picker_internal_errors",
            "Errors of picker's own, by the verb that failed; requests went on.",
            ["where"],
            registry=registry,
        )

        # Looked up once: finding a labelled series costs as much as counting in it.
        self._picked_any = self._decisions.labels("picked")
        self._finished = self._ended.labels("finished")
        self._picked_by: dict[str, Counter] = {}

    def decision(self, outcome: Outcome, seconds: float) -> None:
        """One decision, with the CPU-bound time it took."""
        self._seconds.observe(seconds)
        if isinstance(outcome, Decision):
            self._picked_any.inc()
            name = outcome.endpoint.name
            picked = self._picked_by.get(name) or self._picked_by.setdefault(name, self._picked.labels(name))
            picked.inc()
            self._predicted.inc(outcome.matched_tokens)
            self._waited.observe(outcome.waited)
        else:
            self._decisions.labels(outcome.reason.value).inc()

    def fact(self, fact: Fact) -> None:
        match fact:
            case Finished(usage=usage):
                self._finished.inc()
                if usage is not None:
                    self._prompt.inc(usage.prompt_tokens)
                    self._output.inc(usage.completion_tokens)
                    self._cached.inc(usage.cached_tokens or 0)
            case Failed(reason=reason):
                self._ended.labels(reason.value).inc()
            case ScrapeFailed(name=name):
                self._scrape_errors.labels(name).inc()
            case EndpointRemoved(name=name):
                self._forget(name)
            case _:
                pass

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Export a value that somebody else owns, read at scrape time."""
        Gauge(name, help_text, registry=self.registry).set_function(read)

    def internal_error(self, where: str) -> None:
        self._errors.labels(where).inc()

    def text(self) -> bytes:
        """The exposition, in Prometheus text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)

    def _forget(self, name: str) -> None:
        self._picked_by.pop(name, None)
        # A series of an endpoint that is gone would stay for the life of the process: pods come and go.
        for metric in (self._picked, self._scrape_errors):
            try:
                metric.remove(name)
            except KeyError:
                pass
