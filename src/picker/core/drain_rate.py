"""How fast the queue empties: what a client is told that has to come back."""

from __future__ import annotations

import math

MEMORY_S = 10.0
LEAST_S, MOST_S = 1.0, 60.0


class DrainRate:
    """Departures per second of the time in which somebody waited."""

    def __init__(self) -> None:
        self._left = 0.0  # both fade together
        self._waited = 0.0
        self._at: float | None = None  # since when somebody has waited without a look
        self._last = -math.inf  # when somebody left, or began to wait where nobody had

    def waiting(self, now: float) -> None:
        """Somebody waits from now on, or still does."""
        self._pass(now)
        if self._at is None:
            self._last = now
        self._at = now

    def served(self, now: float, *, empty: bool) -> None:
        """One of them has been let go. empty: it was the last one."""
        self._pass(now)
        self._left += 1.0
        self._at, self._last = None if empty else now, now

    def seconds_for(self, ahead: int, now: float) -> float:
        """How long it takes until so many have left, within sensible bounds; the least one where nothing is known."""
        self._pass(now)
        if self._at is not None:
            self._at = now
        pace = self._waited / self._left if self._left >= 0.5 else 0.0
        # Where nobody has left for a while: at least as long as that has lasted.
        stuck = 0.0 if self._at is None else now - self._last
        return min(max(ahead * pace, stuck, LEAST_S), MOST_S)

    def _pass(self, now: float) -> None:
        if self._at is None or now <= self._at:
            return
        passed = now - self._at
        kept = math.exp(-passed / MEMORY_S)
        self._left *= kept
        self._waited = self._waited * kept + MEMORY_S * (1.0 - kept)
