"""Endpoints that fail: how long each rests, and what brings it back. The only writer of the columns of this."""

from __future__ import annotations

import numpy as np

from picker.core.pool import Pool


class Faults:
    """eject_after: consecutive faults after which an endpoint rests for eject_s, twice as long each further time.

    eject_max_s: at most so long.
    """

    def __init__(self, pool: Pool, *, eject_after: int, eject_s: float, eject_max_s: float) -> None:
        self._pool = pool
        self._after = eject_after
        self._least = eject_s
        self._most = eject_max_s

    def failed(self, row: int, now: float) -> None:
        """One more fault of an endpoint; enough in a row and it rests.

        What fails while it rests was under way, or tried for want of others: it makes no rest longer. Nor does what
        fails with most others: that is an outage, and says little of this one.
        """
        pool = self._pool
        pool.failures[row] += 1
        pool.succeeded_at[row] = pool.vouched_at[row] = -np.inf
        if pool.failures[row] < self._after or pool.ejected_until[row] > now:
            return
        others = np.count_nonzero(pool.present & (pool.failures < self._after))
        if 2 * others < len(pool) - 1:
            pool.rests[row] = 0
        rest = min(self._least * 2.0 ** min(pool.rests.item(row), 30), self._most)
        pool.rests[row] += 1
        pool.ejected_until[row] = now + rest
        pool.probe_at[row] = now + min(rest, self._least)

    def answered(self, row: int, now: float, *, sure: bool) -> None:
        """A good answer, of this endpoint if that is sure; else it says as much as its probes do not contradict."""
        pool = self._pool
        if sure:
            pool.succeeded_at[row] = now
            pool.ejected_until[row] = -np.inf
        else:
            pool.vouched_at[row] = now
        if sure or pool.healthy[row]:
            pool.failures[row] = pool.rests[row] = 0

    def tried(self, row: int, now: float) -> None:
        """A request goes there: if it should rest, no other does for a while."""
        if self._pool.ejected_until.item(row) > now:
            self._pool.probe_at[row] = now + self._least

    def reached(self, row: int, now: float) -> None:
        """It could not be reached and can be again: it need not rest any longer, and has one fault left."""
        pool = self._pool
        pool.ejected_until[row] = min(pool.ejected_until.item(row), now)
        pool.failures[row] = min(pool.failures.item(row), self._after - 1)
