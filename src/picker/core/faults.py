"""Endpoints that fail: how long each rests, and what brings it back. The only writer of the columns of this.

A circuit breaker an endpoint. Closed: faults in a row are counted, a good answer forgets them. Open: it rests. Half
open: the rest is over, and one request at a time finds out whether it answers. Only an endpoint's own faults count: a
refused request (4xx), one that is too many (429) or that came too slowly (408) says nothing about it.
"""

from __future__ import annotations

import numpy as np

from picker.core.pool import Pool

_SAME_TROUBLE_S = 30.0  # a fault so soon after the last row of them began is more of the same
# Statuses that look like an endpoint's fault and are none: it does not have what the client wants.
_NOT_ITS_FAULT = frozenset((501, 505))


def blames(status: int) -> bool:
    """Whether an answer with this status is a fault of the endpoint."""
    return status >= 500 and status not in _NOT_ITS_FAULT


class Faults:
    """eject_after: consecutive faults after which an endpoint rests for eject_s, twice as long each further time.

    eject_max_s: at most so long.
    """

    def __init__(self, pool: Pool, *, eject_after: int, eject_s: float, eject_max_s: float) -> None:
        self._pool = pool
        self._after = eject_after
        self._least = eject_s
        self._most = eject_max_s

    def tune(self, now: float, eject_after: int, eject_s: float, eject_max_s: float) -> None:
        """Other numbers from here on. Faults that were counted stay; rests that the new numbers would not give end.

        Who has not failed so often in a row as it takes rests no longer, and nobody longer than the new longest rest.
        """
        self._after, self._least, self._most = eject_after, eject_s, eject_max_s
        pool = self._pool
        latest = np.where(pool.failures < eject_after, now, now + eject_max_s)
        shorter = pool.ejected_until > latest
        pool.ejected_until[shorter] = latest[shorter]
        pool.probe_at[shorter] = np.minimum(pool.probe_at[shorter], latest[shorter])
        pool.on_probation[pool.failures < eject_after] = False

    def failed(self, row: int, now: float) -> None:
        """One more fault of an endpoint; enough in a row and it rests.

        What fails while it rests was under way, or tried for want of others: it makes no rest longer. Nor does what
        fails with most others: that is an outage, and says little of this one.
        """
        pool = self._pool
        if not pool.failures[row] and now - pool.failing_since[row] > _SAME_TROUBLE_S:
            pool.failing_since[row] = now
        pool.failures[row] += 1
        pool.succeeded_at[row] = pool.vouched_at[row] = -np.inf
        resting = pool.ejected_until[row] > now and not pool.on_probation[row]
        if pool.failures[row] < self._after or resting:
            return
        pool.on_probation[row] = False
        others = np.count_nonzero(pool.present & (pool.failures < self._after))
        if 2 * others < len(pool) - 1:
            pool.rests[row] = 0
        rest = min(self._least * 2.0 ** min(pool.rests.item(row), 30), self._most)
        pool.rests[row] += 1
        pool.ejected_until[row] = now + rest
        pool.probe_at[row] = now + min(rest, self._least)

    def hangs(self, row: int, now: float) -> None:
        """It gives no sign of life any more: it rests at once, however few requests have found that out."""
        self._pool.failures[row] = max(self._pool.failures.item(row), self._after - 1)
        self.failed(row, now)

    def surprised(self, row: int, booked_at: float) -> bool:
        """Whether nothing spoke against the endpoint yet when a request was sent there that has failed."""
        return bool(booked_at <= self._pool.failing_since[row])

    def stirred(self, row: int, now: float) -> None:
        """It puts something out; on probation, the next one may try it."""
        self._pool.stirred_at[row] = now
        if self._pool.on_probation.item(row):
            self._pool.on_probation[row] = False
            self._pool.ejected_until[row] = now

    def answered(self, row: int, now: float, *, sure: bool) -> None:
        """A good answer, of this endpoint if that is sure; else it says as much as its probes do not contradict."""
        pool = self._pool
        if sure:
            pool.succeeded_at[row] = now
            pool.ejected_until[row] = -np.inf
            pool.on_probation[row] = False
        else:
            pool.vouched_at[row] = now
        if sure or pool.healthy[row]:
            pool.failures[row] = pool.rests[row] = 0

    def tried(self, row: int, now: float) -> None:
        """A request goes there: if it should rest, or has just done so, no other does for a while."""
        pool = self._pool
        if pool.ejected_until.item(row) > now:
            pool.probe_at[row] = now + self._least
        elif pool.failures.item(row) >= self._after:
            pool.on_probation[row] = True
            pool.ejected_until[row] = pool.probe_at[row] = now + self._least

    def reached(self, row: int, now: float) -> None:
        """It could not be reached and can be again: it need not rest any longer, and has one fault left."""
        pool = self._pool
        pool.ejected_until[row] = min(pool.ejected_until.item(row), now)
        pool.on_probation[row] = False
        pool.failures[row] = min(pool.failures.item(row), self._after - 1)
