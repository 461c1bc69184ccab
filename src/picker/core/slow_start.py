"""Endpoints that have just come, or come back: they get work step by step, as their caches and kernels warm up."""

from __future__ import annotations

import numpy as np

from picker.core.pool import Pool
from picker.types import BoolArray


class SlowStart:
    """seconds: how long it takes until an endpoint may have as much in flight as the others; 0: at once."""

    def __init__(self, pool: Pool, seconds: float) -> None:
        self._pool = pool
        self._seconds = seconds
        self._since: dict[int, tuple[int, float]] = {}  # by row: its generation, and when it began

    def __bool__(self) -> bool:
        return bool(self._since)

    def tune(self, seconds: float) -> None:
        """Another length from here on; who has begun is as far as it would be with it."""
        self._seconds = seconds

    def begin(self, row: int, now: float) -> None:
        """An endpoint takes up service. Where nobody serves yet, nobody has to wait for anybody."""
        if self._seconds > 0 and self._established(now).any():
            self._since[row] = self._pool.generation.item(row), now

    def admit(self, candidates: BoolArray, now: float) -> BoolArray:
        """(rows,) the candidates without those that have their share already; all of them if nobody else is there."""
        others = candidates & self._established(now)
        if not others.any():
            return candidates
        mean = float(self._pool.inflight[others].mean())
        left = candidates.copy()
        for row, (_, since) in self._since.items():
            if self._pool.inflight.item(row) >= 1.0 + mean * (now - since) / self._seconds:
                left[row] = False
        return left if left.any() else candidates

    def _established(self, now: float) -> BoolArray:
        """(rows,) who serves and is past its start; forgets those that are."""
        pool = self._pool
        for row, (generation, since) in list(self._since.items()):
            if now - since >= self._seconds or pool.generation.item(row) != generation:
                del self._since[row]
        older: BoolArray = pool.present & pool.healthy & (pool.added_at <= now - self._seconds)
        starting = np.zeros(pool.rows, dtype=bool)
        starting[list(self._since)] = True
        return older & ~starting
