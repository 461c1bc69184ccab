"""What the routers of other projects have in common: endpoints by row, what they sent where, what scrapes showed.

A policy is one method, `cost`; the rest is here, so that policies differ in their rule alone. A peer books inside
`submit`, as the best of them do, and queues nothing. Subset hints, roles and priorities are none of its business.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from picker.sim.cluster import BYTES_PER_TOKEN
from picker.sim.policies.knowledge import Knowledge
from picker.types import (
    BlocksRemoved,
    BlocksStored,
    BoolArray,
    CacheCleared,
    Decision,
    Endpoint,
    EndpointAdded,
    EndpointDraining,
    EndpointRemoved,
    Fact,
    Failed,
    Finished,
    FirstToken,
    FloatArray,
    HealthObserved,
    Int64Array,
    LoadObserved,
    Queued,
    Rejection,
    RejectReason,
    Request,
    ScrapeFailed,
    Usage,
)

_RETRY_AFTER_S = 1.0


class Fleet:
    """Endpoints by row; rows are never given again. All arrays are (rows,), and longer than there are endpoints.

    Booked: inflight requests, prefilling of them without a first token, uncached tokens of those.
    Scraped, NaN until the first scrape: waiting and running requests, kv_usage as a fraction, observed_at.
    """

    def __init__(self, rows: int = 64) -> None:
        self.endpoints: list[Endpoint] = []
        self.row_of: dict[str, int] = {}
        self._serves: dict[str | None, BoolArray] = {}  # by model, worked out when asked for
        self.may_serve: BoolArray = np.zeros(rows, dtype=bool)
        self.healthy: BoolArray = np.ones(rows, dtype=bool)
        self.inflight: Int64Array = np.zeros(rows, dtype=np.int64)
        self.prefilling: Int64Array = np.zeros(rows, dtype=np.int64)
        self.uncached: FloatArray = np.zeros(rows)
        self.waiting: FloatArray = np.full(rows, math.nan)
        self.running: FloatArray = np.full(rows, math.nan)
        self.kv_usage: FloatArray = np.full(rows, math.nan)
        self.observed_at: FloatArray = np.full(rows, math.nan)
        self.queries: FloatArray = np.full(rows, math.nan)
        self.started_at: FloatArray = np.full(rows, math.nan)

    @property
    def rows(self) -> int:
        return int(self.may_serve.size)

    def add(self, endpoint: Endpoint) -> None:
        self._serves.clear()
        row = self.row_of.get(endpoint.name)
        if row is not None:
            self.endpoints[row] = endpoint
            return
        if len(self.endpoints) == self.rows:
            self._grow()
        row = self.row_of[endpoint.name] = len(self.endpoints)
        self.endpoints.append(endpoint)
        self.may_serve[row] = True

    def remove(self, name: str) -> None:
        row = self.row_of.pop(name, None)
        if row is not None:
            self.may_serve[row] = False

    def observe(self, row: int, fact: LoadObserved) -> bool:
        """Take over a scrape; what the engine did not show stays as it was. True: it is another process than before."""
        started, queries = float(self.started_at[row]), float(self.queries[row])
        restarted = fact.started_at is not None and fact.started_at > started + 1.0
        restarted = restarted or (fact.queries is not None and fact.queries < queries)
        for column, value in (
            (self.waiting, fact.waiting),
            (self.running, fact.running),
            (self.kv_usage, fact.kv_usage),
            (self.queries, fact.queries),
            (self.started_at, fact.started_at),
        ):
            if value is not None:
                column[row] = value
        self.observed_at[row] = fact.observed_at
        return restarted

    def candidates(self, request: Request) -> Int64Array:
        """Rows that may take the request: there, healthy, serving its model and not tried already."""
        mask = self.may_serve & self.healthy & self._serving(request.model)
        for name in request.exclude & self.row_of.keys():
            mask[self.row_of[name]] = False
        return np.flatnonzero(mask)

    def _serving(self, model: str | None) -> BoolArray:
        mask = self._serves.get(model)
        if mask is None:
            mask = self._serves[model] = np.zeros(self.rows, dtype=bool)
            for row, endpoint in enumerate(self.endpoints):
                mask[row] = model is None or not endpoint.models or model in endpoint.models
        return mask

    def _grow(self) -> None:
        fresh, old = Fleet(2 * self.rows), self.rows
        for name, column in vars(self).items():
            if isinstance(column, np.ndarray):
                wide = getattr(fresh, name)
                wide[:old] = column
                setattr(self, name, wide)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A request as a policy sees it. rows: (n,) candidates; the other arrays go with them.

    tokens: of the prompt. matched_blocks: leading blocks believed to be cached, of total_blocks. uncached: tokens each
    candidate would compute; the last one always is. ratio: matched share of the full blocks, 0 where there are none.
    """

    request: Request
    now: float
    rows: Int64Array
    tokens: float
    total_blocks: int
    matched_blocks: FloatArray
    uncached: FloatArray

    @property
    def ratio(self) -> FloatArray:
        return self.matched_blocks / max(self.total_blocks, 1)


@dataclass(slots=True, eq=False)
class Booking:
    """One request at one endpoint. tokens: its uncached ones, as estimated at the decision."""

    request: Request
    row: int
    tokens: float
    matched_blocks: int
    prefilled: bool = False


class Peer(ABC):
    """A router with one rule: the candidate of the lowest cost takes the request, equal ones by lot.

    knowledge: of the engines' prefix caches. block_tokens: of the block hashes. rng: for ties and nothing else, unless
    the policy itself is random.
    """

    def __init__(self, knowledge: Knowledge, rng: np.random.Generator, *, block_tokens: int) -> None:
        self.fleet = Fleet()
        self.knowledge = knowledge
        self.block_tokens = block_tokens
        self._rng = rng
        self._bookings: dict[int, Booking] = {}
        knowledge.grow_rows(self.fleet.rows)

    @abstractmethod
    def cost(self, asked: Asked) -> FloatArray:
        """(n,) by candidate; the lowest wins."""

    def booked(self, booking: Booking) -> None:  # noqa: B027 - most have no use for it
        """For what a policy counts besides: a request is on its way."""

    def ended(self, booking: Booking) -> None:  # noqa: B027
        """The same request has ended, well or not."""

    # --- the router's verbs ---

    @property
    def wants_events(self) -> bool:
        return self.knowledge.wants_events

    @property
    def inflight(self) -> int:
        """Requests decided and not ended."""
        return len(self._bookings)

    def submit(self, request: Request, now: float) -> Decision | Rejection | Queued:
        rows = self.fleet.candidates(request)
        if rows.size == 0:
            message = "No healthy endpoint is left for this request."
            return Rejection(request.id, RejectReason.NO_ENDPOINTS, 503, message, _RETRY_AFTER_S)
        asked = self._asked(request, rows, now)
        cost = self.cost(asked)
        best = np.flatnonzero(cost == cost.min())
        return self._send(asked, int(best[self._rng.integers(best.size)]) if best.size > 1 else int(best[0]))

    def apply(self, fact: Fact, now: float) -> None:
        match fact:
            case FirstToken(request_id):
                self._prefilled(request_id, now)
            case Finished(request_id, _, usage):
                self._prefilled(request_id, now)
                self._end(request_id, usage)
            case Failed(request_id):
                self._prefilled(request_id, now)
                self._end(request_id, None)
            case EndpointAdded(endpoint):
                self.fleet.add(endpoint)
                self.knowledge.grow_rows(self.fleet.rows)
            case EndpointRemoved(name):
                self.fleet.remove(name)
            case LoadObserved(name) | CacheCleared(name) | BlocksStored(name) | BlocksRemoved(name):
                self._about(self.fleet.row_of.get(name), fact)
            case HealthObserved(name, healthy) if name in self.fleet.row_of:
                self.fleet.healthy[self.fleet.row_of[name]] = healthy
            case EndpointDraining(name, draining) if name in self.fleet.row_of:
                self.fleet.may_serve[self.fleet.row_of[name]] = not draining
            case ScrapeFailed():
                pass  # Old values stay.
            case _:
                pass

    def poll(self, now: float) -> list[Decision | Rejection]:
        return []

    def next_wakeup(self) -> float | None:
        return None

    # --- deciding ---

    def _asked(self, request: Request, rows: Int64Array, now: float) -> Asked:
        estimated = request.prompt_bytes / BYTES_PER_TOKEN
        tokens = float(request.prompt_tokens) if request.prompt_tokens is not None else estimated
        matched = self.knowledge.match(request.block_hashes, now)[rows].astype(np.float64)
        cached = np.minimum(matched * self.block_tokens, max(tokens - 1.0, 0.0))
        return Asked(
            request=request,
            now=now,
            rows=rows,
            tokens=tokens,
            total_blocks=int(request.block_hashes.size),
            matched_blocks=matched,
            uncached=tokens - cached,
        )

    def _send(self, asked: Asked, best: int) -> Decision:
        request, row, fleet = asked.request, int(asked.rows[best]), self.fleet
        booking = Booking(request, row, float(asked.uncached[best]), int(asked.matched_blocks[best]))
        self._bookings[request.id] = booking
        fleet.inflight[row] += 1
        fleet.prefilling[row] += 1
        fleet.uncached[row] += booking.tokens
        self.knowledge.book(request.id, row, request.block_hashes, asked.now)
        self.booked(booking)
        return Decision(
            request.id,
            fleet.endpoints[row],
            matched_blocks=booking.matched_blocks,
            total_blocks=asked.total_blocks,
            matched_tokens=asked.tokens - booking.tokens,
            prompt_tokens=asked.tokens,
        )

    # --- facts ---

    def _prefilled(self, request_id: int, now: float) -> None:
        booking = self._bookings.get(request_id)
        if booking is None or booking.prefilled:
            return
        booking.prefilled = True
        row, fleet = booking.row, self.fleet
        fleet.prefilling[row] -= 1
        fleet.uncached[row] -= booking.tokens  # exact: tokens are whole, or quarters
        self.knowledge.prefilled(request_id, now)

    def _end(self, request_id: int, usage: Usage | None) -> None:
        booking = self._bookings.pop(request_id, None)
        if booking is None:
            return
        self.fleet.inflight[booking.row] -= 1
        self.ended(booking)
        if usage is not None and usage.cached_tokens is not None:
            actual = usage.cached_tokens // self.block_tokens
            hashes = booking.request.block_hashes
            self.knowledge.answered(booking.row, hashes, booking.matched_blocks, actual)

    def _about(self, row: int | None, fact: Fact) -> None:
        if row is None:
            return
        match fact:
            case LoadObserved():
                if self.fleet.observe(row, fact):
                    self.knowledge.restarted(row)
                if fact.kv_capacity_tokens is not None:
                    self.knowledge.set_capacity(row, max(1, fact.kv_capacity_tokens // self.block_tokens))
            case CacheCleared():
                self.knowledge.clear(row)
            case BlocksStored() | BlocksRemoved():
                self.knowledge.learn(row, fact)
            case _:
                pass
