"""What filters, scorers and costs see of the pool: read-only columns of the candidates of one request."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from picker.core.adapters import Adapters
from picker.core.learned import Factors, Learned
from picker.core.pool import RECENT_S, Pool
from picker.types import BoolArray, FloatArray, Int64Array

T = TypeVar("T", bound=np.generic)

Numbers = FloatArray | list[float]


class PoolView:
    """The candidates of one request, as (n,) arrays in the order of `rows`.

    pick: `place(rows)`, where the caller has it.
    matched_blocks: leading blocks of the prompt each candidate is believed to hold, of total_blocks.
    prompt_tokens: all tokens of the request; uncached: (n,) those of them each candidate would have to compute.
    shared: (n,) leading prompt tokens that requests in flight hold in each candidate's KV cache already.
    adapters: what runs where. learned: what the pool has taught. session_row: pool row that served this session last.
    adapter_active: (n,) whether the request's model is a LoRA adapter active there. Unknown scrapes are NaN.
    """

    def __init__(
        self,
        pool: Pool,
        rows: Int64Array,
        now: float,
        *,
        pick: slice | Int64Array | None = None,
        matched_blocks: Numbers | None = None,
        total_blocks: int = 0,
        prompt_tokens: float = 0.0,
        uncached: Numbers | None = None,
        learned: Learned | None = None,
        session_row: int | None = None,
        model: str | None = None,
        shared: Numbers | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        n = rows.size
        self.now = now
        self.rows = rows
        self.n = n
        self._pick = place(rows) if pick is None else pick
        self._matched = matched_blocks
        self.total_blocks = total_blocks
        self.prompt_tokens = prompt_tokens
        self._uncached = uncached
        self._shared = shared
        self.learned = learned or Learned(pool.rows)
        self.session_row = session_row
        self._model = model
        self._adapters = adapters or Adapters(pool.rows)
        self.adapter = self._adapters.of(model)
        self._pool = pool

    @property
    def endpoints(self) -> int:
        """Of the whole pool."""
        return len(self._pool)

    def _take(self, column: NDArray[T]) -> NDArray[T]:
        taken = column[self._pick]
        taken.flags.writeable = False
        return taken

    # of this request

    @property
    def matched_blocks(self) -> FloatArray:
        """(n,) leading blocks of the prompt that each is believed to hold."""
        self._matched = _array(self._matched, self.n, 0.0)
        return self._matched

    @property
    def uncached(self) -> FloatArray:
        """(n,) tokens that each would have to compute."""
        self._uncached = _array(self._uncached, self.n, self.prompt_tokens)
        return self._uncached

    @property
    def shared(self) -> FloatArray:
        """(n,) leading prompt tokens that requests in flight hold there."""
        self._shared = _array(self._shared, self.n, 0.0)
        return self._shared

    def candidate(self, index: int) -> tuple[float, float, float]:
        """The same of one candidate: matched blocks, uncached and shared tokens."""
        matched, uncached, shared = self._matched, self._uncached, self._shared
        return (
            0.0 if matched is None else float(matched[index]),
            self.prompt_tokens if uncached is None else float(uncached[index]),
            0.0 if shared is None else float(shared[index]),
        )

    # in plain numbers, for those who look at few candidates

    def numbers(self) -> tuple[list[list[int]], list[list[float]]]:
        """By candidate the columns of `pool.COUNTS`, and those of `pool.MEASURES`."""
        pool, pick = self._pool, self._pick
        return pool.counts[:, pick].T.tolist(), pool.measures[:, pick].T.tolist()

    def wants(self) -> tuple[list[float], list[float]]:
        """By candidate the tokens it would have to compute, and those that requests in flight hold there."""
        uncached, shared = self._uncached, self._shared
        return (
            uncached if isinstance(uncached, list) else self.uncached.tolist(),
            shared if isinstance(shared, list) else self.shared.tolist(),
        )

    def speeds(self) -> tuple[list[float], list[float]]:
        """By candidate the speed of prefills, and that of decoding."""
        prefill, decode = self.learned.prefill_speed, self.learned.decode_speed
        return self._factors(prefill), self._factors(decode)

    def _factors(self, of: Factors) -> list[float]:
        factors = of.value
        if factors is of.even:  # which is the rule in a pool of equals
            return [1.0] * self.n
        taken: list[float] = factors[self._pick].tolist()
        return taken

    # scraped, NaN when not known

    @property
    def waiting(self) -> FloatArray:
        return self._take(self._pool.waiting)

    @property
    def running(self) -> FloatArray:
        return self._take(self._pool.running)

    @property
    def kv_usage(self) -> FloatArray:
        return self._take(self._pool.kv_usage)

    @property
    def kv_capacity(self) -> FloatArray:
        return self._take(self._pool.kv_capacity)

    @property
    def age(self) -> FloatArray:
        """Seconds since the last good scrape; NaN where there was none."""
        return self.now - self._take(self._pool.observed_at)

    # booked by us, exact

    @property
    def inflight(self) -> Int64Array:
        return self._take(self._pool.inflight)

    @property
    def prefilling(self) -> Int64Array:
        return self._take(self._pool.prefilling)

    @property
    def backlog(self) -> Int64Array:
        return self._take(self._pool.backlog)

    @property
    def work(self) -> FloatArray:
        """Seconds of prefill, at the pool's mean speed, booked there whose first tokens have not come."""
        seconds: FloatArray = self._take(self._pool.work) * np.float64(1e-9)
        return seconds

    @property
    def prefill_speed(self) -> FloatArray:
        """Relative to the pool's mean."""
        return self._take(self.learned.prefill_speed.value)

    @property
    def decode_speed(self) -> FloatArray:
        return self._take(self.learned.decode_speed.value)

    @property
    def pinned(self) -> Int64Array:
        """Prompt tokens that requests in flight hold there, what they share counted once."""
        return self._take(self._pool.pinned)

    @property
    def recent(self) -> FloatArray:
        """Requests of about the last half minute, older ones fading away."""
        pool, pick = self._pool, self._pick
        faded: FloatArray = np.exp((pool.recent_at[pick] - self.now) * (1.0 / RECENT_S))
        return pool.recent[pick] * faded

    @property
    def decoding(self) -> Int64Array:
        """Prompt tokens of the requests decoding there."""
        return self._take(self._pool.decoding)

    @property
    def context(self) -> Int64Array:
        return self._take(self._pool.context)

    @property
    def last_pick(self) -> Int64Array:
        return self._take(self._pool.last_pick)

    @property
    def awaited(self) -> FloatArray:
        """Seconds of prefill, at the pool's mean speed, that were booked when the present silence began."""
        seconds: FloatArray = self._take(self._pool.awaited) * np.float64(1e-9)
        return seconds

    def silence(self, prefilling: Int64Array) -> FloatArray:
        """Seconds in which a prefilling endpoint has produced no first token; 0 where nothing is prefilling."""
        since = np.maximum(self._take(self._pool.busy_since), self._take(self._pool.progress_at))
        return np.where(prefilling > 0, self.now - since, 0.0)

    # LoRA

    @property
    def max_adapters(self) -> FloatArray:
        """How many run at once; NaN where the engine does not say."""
        return self._take(self._pool.max_adapters)

    @property
    def adapters_taken(self) -> Int64Array:
        """Adapters that run there."""
        return self._take(self._adapters.taken)

    @property
    def adapters_queued(self) -> Int64Array:
        """Further adapters whose requests wait there."""
        return self._take(self._adapters.queued)

    def adapter_here(self, adapter: str) -> tuple[BoolArray, BoolArray]:
        """Where the adapter runs, and where requests of it wait and none runs."""
        return self._take(self._adapters.here(adapter)), self._take(self._adapters.awaited(adapter))

    @property
    def adapter_active(self) -> BoolArray:
        active = self._pool.active_adapter(self._model) if self._model else None
        return np.zeros(self.n, dtype=bool) if active is None else self._take(active)

    @property
    def adapter_room(self) -> BoolArray:
        """Whether one more adapter fits; False where the engine does not say."""
        room = self._take(self._pool.max_adapters)
        return np.nan_to_num(room, nan=0.0) > self._take(self._pool.adapters)


class Handful:
    """A few rows as those need them who look at them one by one. Usually the same rows are asked for again.

    places: row -> its index among them. bits: the rows as bits. pick: `place` of them.
    """

    __slots__ = ("bits", "pick", "places", "rows")

    def __init__(self, rows: Int64Array) -> None:
        self.rows = rows
        self.pick = place(rows)
        self.places = {row: at for at, row in enumerate(rows.tolist())}
        self.bits = sum([1 << row for row in self.places])


def _array(values: Numbers | None, n: int, default: float) -> FloatArray:
    if values is None:
        return np.full(n, default)
    return np.array(values) if isinstance(values, list) else values


def place(rows: Int64Array) -> slice | Int64Array:
    """How to take these rows, each named once, out of a column.

    When they are the first of the pool in their order, which is the rule, in place instead of gathered.
    """
    n = rows.size
    if n and rows.item(-1) == n - 1 and np.count_nonzero(rows[1:] > rows[:-1]) == n - 1:
        return slice(0, n)
    return rows
