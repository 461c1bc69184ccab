"""ADM: what a running picker says on its admin port of the sources it learns from, endpoint by endpoint.

The one place where picker is asked about itself: it compares what engines publish with what they answer all the time,
and this puts its complaints where an operator looks. Reads /readyz and /metrics, which show no prompts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from picker.check.engine import samples, unreached
from picker.check.verdict import Check, Finding, Level, Tier, Trace, failed, passed, skipped

SELF = "picker, admin port"
STALE = 30.0  # seconds without metrics of an endpoint
_BAD = ("absent", "suspect", "doubted", "refused")
_PREDICTIONS = "picker_cached_token_predictions_total"
_WRONG = 0.1  # of an endpoint's predictions; of nearly all, tests against real engines find none
_FEW = 20  # predictions that tell nothing yet


@dataclass(slots=True)
class AdminPort:
    """A picker's admin port. url: of it."""

    url: str
    session: aiohttp.ClientSession
    trace: Trace
    patience: float = 5.0

    async def get(self, path: str) -> bytes:
        """The body, whatever the status. Raises OSError where it cannot be reached."""
        self.trace.send(f"GET {path}")
        try:
            async with asyncio.timeout(self.patience), self.session.get(self.url + path) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise OSError(f"no picker can be reached at {self.url}: {unreached(error)}") from None
        self.trace.receive(f"{response.status}, {len(body)} bytes")
        return body

    async def endpoints(self) -> list[dict[str, Any]]:
        """Those of /readyz. Raises OSError where it is no picker's."""
        try:
            found = json.loads(await self.get("/readyz"))["endpoints"]
        except (ValueError, LookupError, TypeError):
            raise OSError(f"{self.url}/readyz is no picker's") from None
        return [each for each in found if isinstance(each, dict)]


Try = Callable[[AdminPort], Awaitable[Finding]]


async def reachable(admin: AdminPort) -> Finding:
    return _named(
        f"{each.get('name')} is {'draining' if each.get('draining') else 'unhealthy'}"
        for each in await admin.endpoints()
        if not each.get("healthy") or each.get("draining")
    )


async def measured(admin: AdminPort) -> Finding:
    return _named(wrong for each in await admin.endpoints() if (wrong := _unmeasured(each)))


def _unmeasured(endpoint: dict[str, Any]) -> str | None:
    name, age = endpoint.get("name"), endpoint.get("scrape_age_s")
    if not isinstance(age, int | float):
        return f"{name} has never shown its metrics"
    if age > STALE:
        return f"{name} has not shown its metrics for {age:.0f} s"
    missing = endpoint.get("metrics_missing") or []
    return f"{name} does not show {', '.join(map(str, missing))}: were they renamed?" if missing else None


async def told(admin: AdminPort) -> Finding:
    endpoints = await admin.endpoints()
    if all(each.get("kv_events", "off") == "off" for each in endpoints):
        return skipped("picker follows no KV events: exact.by is off")
    return _named(
        f"{each.get('name')}: {each['kv_events']}, {each.get('kv_events_reason') or 'for no reason it tells'}"
        for each in endpoints
        if each.get("kv_events") in _BAD
    )


async def right(admin: AdminPort) -> Finding:
    counts: dict[str, dict[str, float]] = {}
    for sample in samples((await admin.get("/metrics")).decode(errors="replace")):
        if sample.name == _PREDICTIONS:
            counts.setdefault(sample.labels.get("endpoint", ""), {})[sample.labels.get("verdict", "")] = sample.value
    totals = {name: sum(verdicts.values()) for name, verdicts in counts.items()}
    if max(totals.values(), default=0.0) < _FEW:
        return skipped("too few predictions were compared with what engines reported")
    return _named(
        f"{name}: {totals[name] - verdicts.get('right', 0.0):.0f} of {totals[name]:.0f} predictions were wrong"
        for name, verdicts in counts.items()
        if totals[name] >= _FEW and totals[name] - verdicts.get("right", 0.0) > _WRONG * totals[name]
    )


def _named(complaints: Iterator[str]) -> Finding:
    """Passed where there are none."""
    found = list(complaints)
    return failed("; ".join(found)) if found else passed()


def _check(name: str, requirement: str, run: Try, level: Level = Level.MUST) -> Check[AdminPort]:
    return Check(f"ADM-1.{name}", Tier.T3, requirement, SELF, run, level)


CHECKS: Sequence[Check[AdminPort]] = (
    _check("reachable", "Every endpoint can serve.", reachable, Level.SHOULD),
    _check("measured", "Every endpoint shows the metrics that picker reads.", measured),
    _check("told", "No endpoint's KV events are missing, broken, refused or disbelieved.", told),
    _check("right", "What is predicted from them comes true.", right),
)
