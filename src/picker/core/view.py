"""What filters, scorers and costs see of the pool: read-only columns of the candidates of one request."""

from __future__ import annotations

import numpy as np

from picker.core.pool import Pool
from picker.types import BoolArray, FloatArray, Int64Array


class PoolView:
    """The candidates of one request, as (n,) arrays in the order of `rows`.

    matched_blocks: leading blocks of the prompt each candidate is believed to hold, of total_blocks.
    prompt_tokens: all tokens of the request; uncached: (n,) those of them each candidate would have to compute.
    speed: (n,) learned prefill speed in tokens per second. session_row: pool row that served this session last.
    adapter_active: (n,) whether the request's model is a LoRA adapter active there. Unknown scrapes are NaN.
    """

    def __init__(
        self,
        pool: Pool,
        rows: Int64Array,
        now: float,
        *,
        matched_blocks: FloatArray | None = None,
        total_blocks: int = 0,
        prompt_tokens: float = 0.0,
        uncached: FloatArray | None = None,
        speed: FloatArray | None = None,
        session_row: int | None = None,
        model: str | None = None,
    ) -> None:
        n = rows.size
        self.now = now
        self.rows = rows
        self.n = n
        self.matched_blocks = np.zeros(n) if matched_blocks is None else matched_blocks
        self.total_blocks = total_blocks
        self.prompt_tokens = prompt_tokens
        self.uncached = np.full(n, prompt_tokens) if uncached is None else uncached
        self.speed = np.ones(n) if speed is None else speed
        self.session_row = session_row
        self._model = model
        self._pool = pool

    def _take(self, column: FloatArray) -> FloatArray:
        # Indexing by an array copies: whatever a scorer does with it, the pool is not written.
        return column[self.rows]

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
        return self._pool.inflight[self.rows]

    @property
    def prefilling(self) -> Int64Array:
        return self._pool.prefilling[self.rows]

    @property
    def backlog(self) -> Int64Array:
        return self._pool.backlog[self.rows]

    @property
    def context(self) -> Int64Array:
        return self._pool.context[self.rows]

    @property
    def last_pick(self) -> Int64Array:
        return self._pool.last_pick[self.rows]

    @property
    def awaited(self) -> Int64Array:
        """Tokens of the backlog that were booked before the silence of `idle_for` began."""
        return self._pool.awaited[self.rows]

    @property
    def idle_for(self) -> FloatArray:
        """Seconds in which a prefilling endpoint has produced no first token; 0 where nothing is prefilling."""
        since = np.maximum(self._take(self._pool.busy_since), self._take(self._pool.progress_at))
        return np.where(self.prefilling > 0, self.now - since, 0.0)

    # LoRA

    @property
    def adapter_active(self) -> BoolArray:
        active = self._pool.active_adapter(self._model) if self._model else None
        return np.zeros(self.n, dtype=bool) if active is None else active[self.rows]

    @property
    def adapter_room(self) -> BoolArray:
        """Whether one more adapter fits; False where the engine does not say."""
        room = self._take(self._pool.max_adapters)
        return np.nan_to_num(room, nan=0.0) > self._pool.adapters[self.rows]
