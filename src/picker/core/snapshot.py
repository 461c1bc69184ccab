"""The pool in words: one plain record an endpoint, for people and the admin API."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from picker.core.calibration import Record
from picker.core.pool import Pool
from picker.prefix.exact import Stream
from picker.types import Endpoint, FloatArray


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


def endpoint_state(
    pool: Pool,
    row: int,
    endpoint: Endpoint,
    now: float,
    *,
    speed: float,
    index_blocks: int,
    index_trust: float,
    events: Stream | None,
    predictions: Record,
    doubt: str | None,
) -> EndpointState:
    """One row of the pool, with what is known outside of it: learned speed, the prefix index and KV events.

    doubt: why predictions made from its events are not believed, None where they are.
    """
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
        prefill_tokens_per_s=speed,
        index_blocks=index_blocks,
        index_trust=index_trust,
        kv_events=_standing(events, doubt),
        kv_events_reason="" if events is None else _reason(events, doubt, predictions),
        predictions=predictions.predictions,
        predictions_over=predictions.over,
        predictions_under=predictions.under,
        prediction_error_tokens=predictions.error,
        labels=dict(endpoint.labels),
        asleep=bool(pool.asleep[row]),
    )


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
