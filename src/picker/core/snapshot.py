"""The pool in words: one plain record an endpoint, for people and the admin API."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from picker.core.calibration import Record
from picker.core.learned import Learned
from picker.core.pool import Pool
from picker.core.state import State
from picker.prefix.exact import Stream
from picker.types import Endpoint, FloatArray

_TYPICAL_TOKENS = 4096.0


@dataclass(frozen=True, slots=True)
class EndpointState:
    """One endpoint as the scheduler sees it, for people; None where nothing is known."""

    name: str
    address: str
    models: tuple[str, ...]
    role: str
    healthy: bool
    draining: bool
    ejected_for_s: float | None
    failures: int
    inflight_requests: int
    prefilling_requests: int
    backlog_tokens: int
    context_tokens: int
    waiting: float | None
    running: float | None
    kv_usage: float | None
    kv_capacity_tokens: float | None
    scrape_age_s: float | None
    metrics_missing: tuple[str, ...]
    prefill_tokens_per_s: float
    index_blocks: int
    index_trust: float
    kv_events: str = "off"
    kv_events_reason: str = ""
    predictions: int = 0
    predictions_over: int = 0
    predictions_under: int = 0
    prediction_error_tokens: float = 0.0
    labels: dict[str, str] = field(default_factory=dict)
    asleep: bool = False


def snapshot(state: State, now: float) -> list[EndpointState]:
    """Every endpoint of the pool: with its learned speed, what the prefix index and KV events say of it."""
    return [_endpoint(state, row, endpoint, now) for row, endpoint in state.pool]


def _endpoint(state: State, row: int, endpoint: Endpoint, now: float) -> EndpointState:
    pool, predictions = state.pool, state.calibration.record(row)
    events = None if state.exact is None else state.exact.stream(row)
    # Why predictions made from its events are not believed.
    doubt = state.calibration.complaint(row) if state.calibration.doubted[row] else None
    rest = float(pool.ejected_until[row]) - now
    return EndpointState(
        name=endpoint.name,
        address=endpoint.address,
        models=tuple(sorted(endpoint.models)),
        role=endpoint.role.value,
        healthy=bool(pool.healthy[row]),
        draining=bool(pool.draining[row]),
        ejected_for_s=rest if rest > 0 else None,
        failures=int(pool.failures[row]),
        inflight_requests=int(pool.inflight[row]),
        prefilling_requests=int(pool.prefilling[row]),
        backlog_tokens=int(pool.backlog[row]),
        context_tokens=int(pool.context[row]),
        waiting=_known(pool.waiting, row),
        running=_known(pool.running, row),
        kv_usage=_known(pool.kv_usage, row),
        kv_capacity_tokens=_known(pool.kv_capacity, row),
        scrape_age_s=_known(now - pool.observed_at, row),
        metrics_missing=_missing(pool, row),
        prefill_tokens_per_s=_speed(state.learned, row),
        index_blocks=state.index.resident(row),
        index_trust=float(state.index.trust[row]),
        kv_events=_standing(events, doubt),
        kv_events_reason="" if events is None else _reason(events, doubt, predictions),
        predictions=predictions.predictions,
        predictions_over=predictions.over,
        predictions_under=predictions.under,
        prediction_error_tokens=predictions.error,
        labels=dict(endpoint.labels),
        asleep=bool(pool.asleep[row]),
    )


def _speed(learned: Learned, row: int) -> float:
    """Prefill tokens per second of a prompt of middling length."""
    seconds = learned.work(_TYPICAL_TOKENS, _TYPICAL_TOKENS)
    # An engine that answers any prompt at once (a stand-in for one) has no speed; this one is beyond all others.
    return _TYPICAL_TOKENS / max(seconds, 1e-9) * float(learned.prefill_speed.value[row])


def _missing(pool: Pool, row: int) -> tuple[str, ...]:
    """What every engine shows, and the page of this one does not: it may have been renamed."""
    if np.isnan(pool.observed_at[row]):
        return ()
    wanted = (("waiting", pool.waiting), ("running", pool.running), ("kv_usage", pool.kv_usage))
    return tuple(name for name, column in wanted if np.isnan(column[row]))


def _standing(events: Stream | None, doubt: str | None) -> str:
    """What is made of an endpoint's KV events, in a word."""
    if events is None:
        return "off"
    if events.refused:
        return "refused"
    return "doubted" if doubt else events.state.value


def _reason(events: Stream, doubt: str | None, predictions: Record) -> str:
    told = doubt or events.refused or events.reason
    return told if predictions.unwitnessed is None else f"{told}; {predictions.unwitnessed}"


def _known(column: FloatArray, row: int) -> float | None:
    value = float(column[row])
    return None if np.isnan(value) else value
