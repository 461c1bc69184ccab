"""Endpoints as columns of arrays. The only writer is `Scheduler`; everyone else sees a read-only `PoolView`.

A row belongs to one endpoint until it leaves; then the row is reused under a new generation, so that whatever still
refers to the old endpoint can be told apart. Unknown numbers are NaN, never zero. No clock, no IO.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from picker.types import BoolArray, Endpoint, FloatArray, Int64Array, Role

NAN = float("nan")
RECENT_S = 30.0  # how long ago a request still counts as recent, in the mean

# name -> default of a free row. The dtype follows the default: bool, int64 or float64.
COLUMNS: dict[str, bool | int | float] = {
    "present": False,
    "healthy": True,  # what active probes say
    "draining": False,  # gets nothing new, for one of the two reasons that follow
    "leaving": False,  # discovery or an operator says so
    "asleep": False,
    "generation": 0,
    "added_at": NAN,
    # observed by scrapes
    "observed_at": NAN,
    "waiting": NAN,  # requests
    "running": NAN,  # requests
    "kv_usage": NAN,  # fraction 0..1
    "kv_capacity": NAN,  # tokens
    "capacity_blocks": NAN,  # the same in blocks of the prefix index
    "block_size": NAN,  # tokens
    "queries": NAN,  # tokens since the engine's start
    "hits": NAN,
    "started_at": NAN,  # unix seconds
    "max_adapters": NAN,
    "adapters": 0,  # active now
    # booked by decisions, released by facts
    "inflight": 0,  # requests
    "prefilling": 0,  # of these, requests whose first token has not come
    "backlog": 0,  # uncached prompt tokens of the prefilling ones
    "work": 0,  # of the prefilling ones, nanoseconds of prefill on an endpoint of mean speed
    "context": 0,  # prompt tokens of all in flight: what they occupy in the KV cache
    "pinned": 0,  # the same, but what several of them share counts once
    "decoding": 0,  # prompt tokens of those past their first token
    # what happened on a row so far: integrals over time, up to `area_at`
    "area_at": 0.0,
    "decodes_area": 0.0,  # requests decoding, seconds
    "context_area": 0.0,  # their context, token seconds
    "prefill_area": 0.0,  # seconds of prefill done, on an endpoint of mean speed
    "recent": 0.0,  # requests of about the last half minute, as of `recent_at`
    "recent_at": 0.0,
    "last_pick": 0,  # number of the decision that picked it last
    # learned
    "failures": 0,  # consecutive
    "succeeded_at": -np.inf,  # the latest good answer; a fault since then takes it back
    "vouched_at": -np.inf,  # the same of answers that may have been a fallback's
    "ejected_until": -np.inf,
    "probe_at": -np.inf,  # when an ejected one may be tried all the same, if few others are left
    "rests": 0,  # consecutive
    "on_probation": False,  # a rest is over, and one request is out to see whether the endpoint answers
    "failing_since": -np.inf,  # when the latest row of faults began that was no continuation of another
    "stirred_at": -np.inf,  # the latest sign that the engine works: output, or gauges that move
    "unreachable": False,  # the latest scrape failed
    "busy_since": -np.inf,  # when prefilling last became non-zero
    "awaited": 0,  # of the work, what was there when the present silence began
    "progress_at": -np.inf,  # when a first token came last
}
# What every decision looks at lies together, so that it can be taken in one piece (`Pool.counts`, `Pool.measures`).
COUNTS = ("inflight", "prefilling", "work", "backlog", "decoding", "awaited", "pinned")
MEASURES = ("busy_since", "progress_at", "waiting", "kv_capacity")
STANDING = ("present", "healthy", "draining")


class Pool:
    """The table of endpoints. Arrays are (rows,) and grow by doubling; `names` is replaced, not written, on change.

    counts, measures, standing: (columns, rows), made of the columns named in `COUNTS`, `MEASURES` and `STANDING`.
    models_changed: how often who serves which model, or plays which role, may have changed.
    """

    counts: Int64Array
    measures: FloatArray
    standing: BoolArray

    present: BoolArray
    healthy: BoolArray
    draining: BoolArray
    leaving: BoolArray
    asleep: BoolArray
    generation: Int64Array
    added_at: FloatArray
    observed_at: FloatArray
    waiting: FloatArray
    running: FloatArray
    kv_usage: FloatArray
    kv_capacity: FloatArray
    capacity_blocks: FloatArray
    block_size: FloatArray
    queries: FloatArray
    hits: FloatArray
    started_at: FloatArray
    max_adapters: FloatArray
    adapters: Int64Array
    inflight: Int64Array
    prefilling: Int64Array
    backlog: Int64Array
    work: Int64Array
    context: Int64Array
    pinned: Int64Array
    decoding: Int64Array
    area_at: FloatArray
    decodes_area: FloatArray
    context_area: FloatArray
    prefill_area: FloatArray
    recent: FloatArray
    recent_at: FloatArray
    last_pick: Int64Array
    failures: Int64Array
    succeeded_at: FloatArray
    vouched_at: FloatArray
    ejected_until: FloatArray
    probe_at: FloatArray
    rests: Int64Array
    on_probation: BoolArray
    failing_since: FloatArray
    stirred_at: FloatArray
    unreachable: BoolArray
    busy_since: FloatArray
    awaited: Int64Array
    progress_at: FloatArray

    def __init__(self, rows: int = 64) -> None:
        self.rows = rows
        self.models_changed = 0
        self.endpoints: list[Endpoint | None] = [None] * rows
        self.names: NDArray[np.object_] = np.full(rows, "", dtype=object)
        self._by_name: dict[str, int] = {}
        self._by_address: dict[str, int] = {}
        self._serves: dict[str, BoolArray] = {}
        self._serves_any = np.zeros(rows, dtype=bool)
        self._adapters: dict[str, BoolArray] = {}
        self._can = {role: np.zeros(rows, dtype=bool) for role in Role}
        self._lay_out(rows)

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[tuple[int, Endpoint]]:
        """(row, endpoint) of everything present, in the order of joining."""
        for row in self._by_name.values():
            yield row, self.endpoint(row)

    # membership

    def row(self, name: str) -> int | None:
        return self._by_name.get(name)

    def row_of_address(self, address: str) -> int | None:
        return self._by_address.get(address)

    def endpoint(self, row: int) -> Endpoint:
        endpoint = self.endpoints[row]
        assert endpoint is not None, f"row {row} is free"
        return endpoint

    def add(self, endpoint: Endpoint, now: float) -> int:
        """Give an endpoint a row of its own; its name must be new."""
        assert endpoint.name not in self._by_name
        row = self._free_row()
        generation = int(self.generation[row]) + 1
        for name, default in COLUMNS.items():
            getattr(self, name)[row] = default
        self.generation[row], self.present[row], self.added_at[row] = generation, True, now
        self._by_name[endpoint.name] = row
        self._by_address[endpoint.address] = row
        self.names = self.names.copy()
        self.names[row] = endpoint.name
        self.describe(row, endpoint)
        return row

    def remove(self, row: int) -> None:
        """Free the row; charges that still name its generation find nothing to release."""
        endpoint = self.endpoint(row)
        self.present[row] = False
        self.generation[row] += 1
        self._forget_models(row)
        self.set_adapters(row, frozenset())
        del self._by_name[endpoint.name]
        if self._by_address.get(endpoint.address) == row:
            del self._by_address[endpoint.address]
        self.endpoints[row] = None

    def describe(self, row: int, endpoint: Endpoint) -> None:
        """Take over a new description of the same endpoint: models, role, labels."""
        self.endpoints[row] = endpoint
        for role in Role:
            self._can[role][row] = endpoint.role in (role, Role.BOTH) or role is Role.BOTH
        self._forget_models(row)
        self._serves_any[row] = not endpoint.models
        for model in endpoint.models:
            self._serves.setdefault(model, np.zeros(self.rows, dtype=bool))[row] = True

    def set_models(self, row: int, models: frozenset[str]) -> None:
        self.describe(row, replace(self.endpoint(row), models=models))

    def set_adapters(self, row: int, adapters: frozenset[str]) -> None:
        """The LoRA adapters active on this endpoint."""
        self.adapters[row] = len(adapters)
        for adapter in adapters:
            self._adapters.setdefault(adapter, np.zeros(self.rows, dtype=bool))
        for adapter, active in list(self._adapters.items()):
            active[row] = adapter in adapters
            if not active.any():
                del self._adapters[adapter]

    # who can

    def serving(self, model: str | None) -> BoolArray:
        """(rows,) which may serve this model; those whose models are not known may serve any."""
        if not model:
            return self.present
        known = self._serves.get(model)
        return self._serves_any if known is None else self._serves_any | known

    def has_model(self, model: str) -> bool:
        return model in self._serves or bool((self._serves_any & self.present).any())

    def models(self) -> list[str]:
        return sorted(self._serves)

    def can(self, role: Role) -> BoolArray:
        return self._can[role]

    def active_adapter(self, adapter: str) -> BoolArray | None:
        return self._adapters.get(adapter)

    def set_standing(self, row: int, *, leaving: bool | None = None, asleep: bool | None = None) -> None:
        """Note why it is to get nothing new, or why not any more; None: as it was."""
        if leaving is not None:
            self.leaving[row] = leaving
        if asleep is not None:
            self.asleep[row] = asleep
        self.draining[row] = self.leaving[row] | self.asleep[row]

    # charges

    def book(self, row: int, *, tokens: int, context: int, pinned: int, work: int, now: float) -> None:
        if self.prefilling[row] == 0:
            self.busy_since[row], self.awaited[row] = now, work
        self.inflight[row] += 1
        self.prefilling[row] += 1
        self.backlog[row] += tokens
        self.work[row] += work
        self.context[row] += context
        self.pinned[row] += pinned
        faded = math.exp((self.recent_at.item(row) - now) / RECENT_S)
        self.recent[row], self.recent_at[row] = 1.0 + self.recent.item(row) * faded, now

    def prefilled(self, row: int, *, tokens: int, context: int, work: int, now: float) -> None:
        """A booked request has its first token: its prefill is no longer ahead of anyone."""
        self.integrate(row, now)
        self.abandoned(row, tokens=tokens, work=work)
        self.decoding[row] += context
        self.prefill_area[row] += work * 1e-9
        self.progress_at[row], self.awaited[row] = now, self.work[row]

    def abandoned(self, row: int, *, tokens: int, work: int) -> None:
        """A booked request left before its first token, which is no sign of life from the endpoint."""
        self.prefilling[row] -= 1
        self.backlog[row] -= tokens
        self.work[row] -= work
        assert self.prefilling[row] >= 0, "a prefill was released twice"
        assert self.backlog[row] >= 0, "more tokens were released than booked"
        assert self.work[row] >= 0, "more work was released than booked"

    def release(self, row: int, *, context: int, pinned: int, decoding: bool, now: float) -> None:
        if decoding:
            self.integrate(row, now)
            self.decoding[row] -= context
        self.inflight[row] -= 1
        self.context[row] -= context
        self.pinned[row] -= pinned
        assert self.inflight[row] >= 0, "a charge was released twice"
        assert self.context[row] >= 0, "more context was released than booked"
        assert self.pinned[row] >= 0, "more pinned tokens were released than booked"
        assert self.decoding[row] >= 0, "more decoding context was released than booked"

    def integrate(self, row: int, now: float) -> None:
        """Bring the row's integrals up to date; before every change of what decodes there."""
        passed = now - self.area_at[row]
        self.decodes_area[row] += passed * (self.inflight[row] - self.prefilling[row])
        self.context_area[row] += passed * self.decoding[row]
        self.area_at[row] = now

    # rows

    def _free_row(self) -> int:
        free = np.flatnonzero(~self.present)
        if free.size == 0:
            self._grow()
            return self._free_row()
        return int(free[0])

    def _grow(self) -> None:
        old, self.rows = self.rows, self.rows * 2
        columns = {name: getattr(self, name) for name in COLUMNS}
        self._lay_out(self.rows)
        for name, column in columns.items():
            getattr(self, name)[:old] = column
        names = np.full(self.rows, "", dtype=object)
        names[:old] = self.names
        self.names = names
        self.endpoints.extend([None] * (self.rows - old))
        self._serves = {model: _widened(mask, self.rows) for model, mask in self._serves.items()}
        self._adapters = {adapter: _widened(mask, self.rows) for adapter, mask in self._adapters.items()}
        self._can = {role: _widened(mask, self.rows) for role, mask in self._can.items()}
        self._serves_any = _widened(self._serves_any, self.rows)

    def _lay_out(self, rows: int) -> None:
        """Make the columns, as free rows have them."""
        for name, default in COLUMNS.items():
            setattr(self, name, np.full(rows, default))
        for table, names in (("counts", COUNTS), ("measures", MEASURES), ("standing", STANDING)):
            together = np.array([getattr(self, name) for name in names])
            setattr(self, table, together)
            for name, column in zip(names, together, strict=True):
                setattr(self, name, column)

    def _forget_models(self, row: int) -> None:
        self.models_changed += 1
        self._serves_any[row] = False
        for model, rows in list(self._serves.items()):
            rows[row] = False
            if not rows.any():
                del self._serves[model]


def _widened(mask: BoolArray, rows: int) -> BoolArray:
    wide = np.zeros(rows, dtype=bool)
    wide[: mask.size] = mask
    return wide
