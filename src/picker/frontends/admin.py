"""The admin API: metrics, liveness, readiness, and why a request went where it went.

A view of the runtime on a port of its own, read-only unless it is given what can be changed. Shows sizes, names and
times; no prompt, no block hash and no session id gets here. What is not known is null: JSON has no NaN, and zero would
be a claim.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import html
import math
import socket
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute

from picker.frontends.admin_control import Control, Guard, install
from picker.frontends.keys import Keyring, named_key
from picker.frontends.limits import Door
from picker.frontends.serving import serve
from picker.runtime import Record, Runtime
from picker.telemetry import CONTENT_TYPE
from picker.types import Decision, Rejection, Request

DEFAULT_HOST = "127.0.0.1"  # it names endpoints and models: nobody else's business unless someone says so
_GRACE = 1.0  # seconds; every answer is made at once
_LATEST = 50


class Admin:
    """Serves the admin API of one runtime. token: when set, /debug wants it as bearer token; keys: any of these does.

    Without one, /debug is for programs on the same machine; read_only: for everybody. control: what can be changed by
    it (see `admin_control`), unless read_only. guard_metrics: /metrics is guarded as /debug is. door: TLS, and what is
    asked of connections.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        token: str | None = None,
        keys: Keyring | None = None,
        control: Control | None = None,
        read_only: bool = False,
        guard_metrics: bool = False,
        door: Door | None = None,
    ) -> None:
        ring = keys or Keyring([] if token is None else [named_key("admin", token)])
        self.app = _app(runtime, ring, control, read_only=read_only, guard_metrics=guard_metrics)
        self._door = door

    async def serve(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Serve on a bound socket (see `serving.listen`) until `stop` is set."""
        await serve(self.app, listener, stop, grace=_GRACE, door=self._door)


# Every route is `async`, although none waits: FastAPI runs plain functions in threads, and the scheduler's state may be
# read on the loop's thread only.


def _app(runtime: Runtime, keys: Keyring, control: Control | None, *, read_only: bool, guard_metrics: bool) -> FastAPI:
    app = FastAPI(title="picker admin", docs_url=None, redoc_url=None, openapi_url=None)
    metrics, health, debug = _metrics(runtime), _health(runtime), _debug(runtime)
    guard = [Depends(Guard(keys, everybody=read_only))]
    app.include_router(metrics, dependencies=guard if guard_metrics else [])
    app.include_router(health)
    app.include_router(debug, dependencies=guard)
    more = [] if control is None else install(app, control, keys, read_only=read_only)
    routers = (metrics, health, debug, *more)
    listed = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    routes = [(" ".join((*_methods(route), route.path)), route.description) for route in listed]

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> str:
        return _index(routes)

    return app


def _metrics(runtime: Runtime) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    async def metrics() -> Response:
        """picker's own metrics in Prometheus text format."""
        return Response(runtime.telemetry.text(), media_type=CONTENT_TYPE)

    return router


def _health(runtime: Runtime) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """200 while the process answers."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        """200 when a request could be routed, else 503 with the reason."""
        detail = _readiness(runtime)
        return JSONResponse(detail, status_code=200 if detail["ready"] else 503)

    return router


def _debug(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/debug")

    @router.get("/endpoints")
    async def endpoints() -> JSONResponse:
        """Every endpoint as the scheduler sees it."""
        return JSONResponse({"endpoints": _plain(runtime.scheduler.snapshot(runtime.clock()))})

    @router.get("/decisions")
    async def decisions(limit: Annotated[int, Query(ge=1, le=1000)] = _LATEST) -> JSONResponse:
        """The latest decisions, newest first; ?limit= up to 1000."""
        now = runtime.clock()
        return JSONResponse({"decisions": [_plain(_summary(record, now)) for record in runtime.recent(limit)]})

    @router.get("/decisions/{request_id}")
    async def decision(request_id: int) -> JSONResponse:
        """One decision: what was asked, how every candidate was judged, how it ended."""
        record = runtime.record(request_id)
        if record is None:
            raise HTTPException(404, f"request {request_id} is not among the latest; ids are in x-picker-request-id")
        return JSONResponse(_plain(_explanation(record, runtime.clock())))

    return router


# --- views -------------------------------------------------------------------------------------------------


def _readiness(runtime: Runtime) -> dict[str, Any]:
    states = runtime.scheduler.snapshot(runtime.clock())
    reports = {name: _plain(report()) for name, report in runtime.reports.items()}
    usable = sum(state.healthy and not state.draining for state in states)
    follows = reports.get("leader_election", {}).get("leading") is False
    learns = reports.get("replicas", {}).get("settled") is False
    if runtime.draining or runtime.leaving:
        reason = "shutting down"
    elif follows:
        reason = "another replica leads, or will: this one does not"
    elif learns:
        reason = "the other replicas have not told yet what they know"
    elif not states:
        reason = "no endpoint is known"
    elif not usable:
        reason = "every known endpoint is unhealthy or draining"
    else:
        reason = f"{usable} of {len(states)} endpoints can serve"
    shown = (
        *("name", "healthy", "draining", "asleep", "scrape_age_s", "metrics_missing"),
        *("kv_events", "kv_events_reason"),
    )
    endpoints = [{name: _plain(getattr(state, name)) for name in shown} for state in states]
    return {
        "ready": bool(usable) and not (runtime.draining or runtime.leaving or follows or learns),
        "reason": reason,
        "endpoints": endpoints,
    } | reports


def _summary(record: Record, now: float) -> dict[str, Any]:
    outcome = record.outcome
    decision = outcome if isinstance(outcome, Decision) else None
    return {
        "id": record.request.id,
        "age_s": now - record.decided_at,
        "model": record.request.model,
        "endpoint": decision.endpoint.name if decision else None,
        "rejected": outcome.reason if isinstance(outcome, Rejection) else None,
        "matched_blocks": decision.matched_blocks if decision else None,
        "total_blocks": decision.total_blocks if decision else len(record.request.block_hashes),
        "seconds": record.seconds,
        "status": record.status,
        "failure": record.failure,
    }


def _explanation(record: Record, now: float) -> dict[str, Any]:
    outcome = record.outcome
    ranking = outcome.ranking if isinstance(outcome, Decision) else None
    return {
        "id": record.request.id,
        "age_s": now - record.decided_at,
        "seconds": record.seconds,
        "request": _features(record.request),
        "decision": _decision(outcome) if isinstance(outcome, Decision) else None,
        "rejection": _rejection(outcome) if isinstance(outcome, Rejection) else None,
        "candidates": None if ranking is None else ranking.candidates(),
        "end": _end(record),
    }


def _features(request: Request) -> dict[str, Any]:
    """What the decision could depend on. Hashes would let a reader test guesses of a prompt, so they are counted."""
    return {
        "model": request.model,
        "blocks": len(request.block_hashes),
        "prompt_bytes": request.prompt_bytes,
        "extra_bytes": request.extra_bytes,
        "prompt_tokens": request.prompt_tokens,
        "max_tokens": request.max_tokens,
        "priority": request.priority,
        "has_session": request.session is not None,
        "role": request.role,
        "subset": request.subset,
        "exclude": request.exclude,
    }


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "endpoint": decision.endpoint.name,
        "address": decision.endpoint.address,
        "rank": decision.endpoint.rank,
        "fallbacks": [endpoint.name for endpoint in decision.fallbacks],
        "matched_blocks": decision.matched_blocks,
        "total_blocks": decision.total_blocks,
        "matched_tokens": decision.matched_tokens,
        "prompt_tokens": decision.prompt_tokens,
        "waited_s": decision.waited,
        "charged": decision.charged,
    }


def _rejection(rejection: Rejection) -> dict[str, Any]:
    return {
        "reason": rejection.reason,
        "status": rejection.status,
        "message": rejection.message,
        "retry_after_s": rejection.retry_after,
    }


def _end(record: Record) -> dict[str, Any] | None:
    if record.ended_at is None:
        return None
    return {
        "after_s": record.ended_at - record.decided_at,
        "status": record.status,
        "failure": record.failure,
        "usage": record.usage,
    }


def _plain(value: Any) -> Any:
    """A value as JSON can say it: records as objects, enums by value, sets sorted, numbers that are none as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(_plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value


def _index(routes: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td>{_link(path)}</td><td>{html.escape(text)}</td></tr>" for path, text in routes)
    return f"<!doctype html><title>picker</title><h1>picker</h1><table cellpadding=4>{rows}</table>\n"


def _methods(route: APIRoute) -> list[str]:
    """Those that are not GET."""
    return sorted(set(route.methods or ()) - {"GET", "HEAD"})


def _link(path: str) -> str:
    return path if "{" in path or " " in path else f'<a href="{path}">{path}</a>'
