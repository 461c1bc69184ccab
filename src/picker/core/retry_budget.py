"""How many requests may be sent a second time: an outage must not double the load on those who are left.

Counts requests and retries of about the last ten seconds. What was under way at an endpoint when it failed is its own
kind: to move it costs nobody more than the endpoint would have had to do, so it is granted on top.
"""

from __future__ import annotations

import math

WINDOW_S = 10.0


class RetryBudget:
    """ratio: retries per request; None: no limit. floor: retries that are always allowed within the window.

    allowed, refused: how many there have been, for the metrics.
    """

    def __init__(self, ratio: float | None, floor: float) -> None:
        self.tune(ratio, floor)
        self._requests = self._retries = self._granted = 0.0
        self._seen = 0
        self._at = -math.inf
        self.allowed = self.refused = 0

    def tune(self, ratio: float | None, floor: float) -> None:
        """Another allowance from here on; what has been spent of late counts."""
        self._ratio = ratio or 0.0
        self._floor = math.inf if ratio is None else floor

    def grant(self, now: float) -> None:
        """One more retry than the budget has."""
        self._fade(now)
        self._granted += 1.0

    def take(self, requests: int, now: float) -> bool:
        """Whether one more request may be sent again. requests: all there have been so far, retries among them."""
        self._count(requests, now)
        if self._granted >= 0.5:
            self._granted -= 1.0
        elif self._retries + 1.0 <= self._floor + self._ratio * self._requests:
            self._retries += 1.0
        else:
            self.refused += 1
            return False
        self.allowed += 1
        return True

    def _count(self, requests: int, now: float) -> None:
        """What came since the last look counts as far as it can have come within the window."""
        passed = now - self._at
        self._fade(now)
        came, self._seen = requests - self._seen, requests
        self._requests += came * min(1.0, WINDOW_S / passed) if passed > 0 else came

    def _fade(self, now: float) -> None:
        kept = math.exp((self._at - now) / WINDOW_S) if now > self._at else 1.0
        self._requests *= kept
        self._retries *= kept
        self._granted *= kept
        self._at = max(self._at, now)
