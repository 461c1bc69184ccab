"""What is known of endpoints: who is there, how it does, what it caches, and when it has begun anew."""

from __future__ import annotations

import numpy as np

from picker.core.state import State
from picker.types import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    Endpoint,
    EndpointAdded,
    EndpointDraining,
    EndpointRemoved,
    EventsChanged,
    EventState,
    HealthObserved,
    LoadObserved,
    ModelsObserved,
    PrefixHeld,
    ScrapeFailed,
    Sleep,
)

_OfRow = (
    LoadObserved
    | BlocksStored
    | BlocksRemoved
    | EventsChanged
    | ScrapeFailed
    | HealthObserved
    | ModelsObserved
    | EndpointDraining
    | EndpointRemoved
    | CacheCleared
    | PrefixHeld
)
Observation = EndpointAdded | _OfRow


class Observations:
    """Learns facts about endpoints. Those about one that is gone are ignored: facts cross on the way."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._pool, self._index, self._exact = state.pool, state.index, state.exact
        self._learned, self._charges, self._faults = state.learned, state.charges, state.faults
        self._calibration, self._slow_start, self._notices = state.calibration, state.slow_start, state.notices
        self._block_bytes = state.settings.block_bytes

    def apply(self, fact: Observation, now: float) -> None:
        """Learn a fact about an endpoint."""
        if isinstance(fact, EndpointAdded):
            self._added(fact.endpoint, now)
        elif (row := self._pool.row(fact.name)) is not None:
            self._about(row, fact, now)

    def _about(self, row: int, fact: _OfRow, now: float) -> None:
        match fact:
            case LoadObserved():
                self._load(row, fact, now)
            case BlocksStored() | BlocksRemoved() | EventsChanged():
                self._told(row, fact)
            case ScrapeFailed():  # old values stay and age; see `PoolView.age`
                self._pool.unreachable[row] = True
            case HealthObserved(healthy=healthy):
                self._health(row, now, healthy=healthy)
            case ModelsObserved(models=models, adapters=adapters):
                self._charges.adapters.known |= adapters
                self._pool.set_models(row, models)
            case EndpointDraining(draining=draining):
                self._pool.set_standing(row, leaving=draining)
            case EndpointRemoved():
                self._removed(row)
            case CacheCleared():
                self._index.clear(row)
                if self._exact is not None:
                    self._exact.apply(row, fact)
            case PrefixHeld(block_hashes=block_hashes):
                self._index.store(row, block_hashes)

    def _health(self, row: int, now: float, *, healthy: bool) -> None:
        if healthy and not self._pool.healthy[row]:
            self._faults.reached(row, now)
            self._slow_start.begin(row, now)
        self._pool.healthy[row] = healthy

    def _told(self, row: int, fact: BlocksStored | BlocksRemoved | EventsChanged) -> None:
        if self._exact is None:
            return
        self._exact.apply(row, fact)
        if isinstance(fact, EventsChanged):
            self._calibration.forget(row)
            if fact.state is EventState.SUSPECT:
                self._notices.append(f"{fact.name}: its KV events cannot be relied on: {fact.reason}")

    def _added(self, endpoint: Endpoint, now: float) -> None:
        row = self._pool.row(endpoint.name)
        if row is not None and self._pool.endpoint(row).address == endpoint.address:
            models = endpoint.models or self._pool.endpoint(row).models
            self._pool.describe(row, _with_models(endpoint, models))
            return
        if row is not None:
            self._removed(row)
        rows = self._pool.rows
        self._slow_start.begin(self._pool.add(endpoint, now), now)
        if self._pool.rows != rows:
            self._grow(self._pool.rows)

    def _grow(self, rows: int) -> None:
        self._learned.grow(rows)
        self._index.grow_rows(rows)
        self._charges.adapters.grow(rows)
        self._calibration.grow(rows)
        if self._exact is not None:
            self._exact.grow_rows(rows)

    def _removed(self, row: int) -> None:
        self._pool.remove(row)
        self._index.remove_row(row)
        self._charges.pins.clear(row)
        self._charges.adapters.clear(row)
        self._calibration.forget(row)
        if self._exact is not None:
            self._exact.remove_row(row)
        self._learned.forget(row)

    def _load(self, row: int, fact: LoadObserved, now: float) -> None:
        pool, restarted = self._pool, self._restarted(row, fact)
        if restarted:
            self._index.clear(row)
        if restarted or pool.unreachable[row]:
            self._faults.reached(row, now)
            pool.unreachable[row] = False
        if restarted:
            self._slow_start.begin(row, now)
        if fact.sleep is not None:
            self._sleeps(row, fact.sleep, now)
        if self._moves(row, fact):
            pool.stirred_at[row] = now
        pool.observed_at[row] = fact.observed_at
        for column, value in (
            (pool.waiting, fact.waiting),
            (pool.running, fact.running),
            (pool.kv_usage, fact.kv_usage),
            (pool.queries, fact.queries),
            (pool.hits, fact.hits),
            (pool.started_at, fact.started_at),
            (pool.block_size, fact.block_size),
            (pool.max_adapters, fact.max_adapters),
        ):
            column[row] = np.nan if value is None else value
        if fact.kv_capacity_tokens:  # None: not told; 0: an engine that has not measured it yet
            self._set_capacity(row, fact.kv_capacity_tokens)
        if (
            fact.queries is not None
            and fact.hits is not None
            and self._calibration.counted(row, fact.queries, fact.hits)
        ):
            self._state.note_verdict(row)
        if fact.adapters is not None:
            pool.set_adapters(row, fact.adapters)
            self._charges.adapters.known |= fact.adapters

    def _sleeps(self, row: int, sleep: Sleep, now: float) -> None:
        """An engine that sleeps is well and gets nothing new; of what it forgets nothing is believed."""
        asleep = sleep is not Sleep.AWAKE
        if sleep is Sleep.DEEP:  # each time: what was under way when it fell asleep may have been noted since
            self._index.clear(row)
            if self._exact is not None:
                self._exact.apply(row, CacheCleared(self._pool.endpoint(row).name))
        if asleep != self._pool.asleep.item(row):
            self._pool.set_standing(row, asleep=asleep)
            self._notices.append(f"{self._pool.endpoint(row).name} {'sleeps' if asleep else 'is awake again'}")
            if not asleep:
                self._slow_start.begin(row, now)

    def _moves(self, row: int, fact: LoadObserved) -> bool:
        """Whether the engine has done anything since the last look: its gauges are set at every step, and only then."""
        pool = self._pool
        pairs = ((fact.kv_usage, pool.kv_usage), (fact.queries, pool.queries), (fact.running, pool.running))
        return any(value is not None and value != column.item(row) for value, column in pairs)

    def _restarted(self, row: int, fact: LoadObserved) -> bool:
        """A new process start, or a counter that went back: the cache the index remembers is gone."""
        started, queries = float(self._pool.started_at[row]), float(self._pool.queries[row])
        moved = fact.started_at is not None and fact.started_at > started + 1.0
        return moved or (fact.queries is not None and fact.queries < queries)

    def _set_capacity(self, row: int, tokens: int) -> None:
        """Follow the engine's capacity, and what we learn of bytes per token, in steps that matter."""
        self._pool.kv_capacity[row] = tokens
        if self._exact is not None:
            self._exact.set_capacity(row, tokens)
        blocks = max(1, int(tokens * self._state.bytes_per_token.value) // self._block_bytes)
        known = float(self._pool.capacity_blocks[row])
        if not abs(blocks - known) <= 0.02 * known:
            self._pool.capacity_blocks[row] = blocks
            self._index.set_capacity(row, blocks)


def _with_models(endpoint: Endpoint, models: frozenset[str]) -> Endpoint:
    return Endpoint(
        endpoint.name, endpoint.address, models, endpoint.role, endpoint.scheme, endpoint.rank, endpoint.labels
    )
