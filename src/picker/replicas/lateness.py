"""How old it is what other replicas say, by the time that it is heard. Pure.

Clocks of machines are not compared: each sign of life carries the speaker's clock, what it has last heard of others'
clocks, and how long ago. Half of the way there and back is how late words are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

_LATEST = 8  # ways there and back, of which the shortest counts: a loop that is busy for a moment is not the bus
_LONGEST = 60.0  # seconds; beyond, somebody's clock is wrong

Echoes = dict[str, tuple[float, float]]
"""By replica: its clock as last heard, and seconds since."""


class Lateness:
    """own: the name by which others know this replica on the bus."""

    def __init__(self) -> None:
        self.own = ""
        self._heard: Echoes = {}  # with our clock then
        self._trips: dict[str, deque[float]] = {}

    def echoes(self, now: float) -> Echoes:
        """What to say of others' clocks."""
        return {replica: (theirs, now - at) for replica, (theirs, at) in self._heard.items()}

    def heard(self, replica: str, clock: float, echoes: Mapping[str, tuple[float, float]], now: float) -> None:
        """A sign of life: the speaker's clock, and what it has heard of ours and others'."""
        self._heard[replica] = clock, now
        if self.own in echoes:
            ours, ago = echoes[self.own]
            if 0.0 <= (trip := now - ours - ago) < _LONGEST:
                self._trips.setdefault(replica, deque(maxlen=_LATEST)).append(trip)

    def forget(self, replica: str) -> None:
        self._heard.pop(replica, None)
        self._trips.pop(replica, None)

    def of(self, replica: str) -> float | None:
        """Seconds; None where nobody has told yet."""
        trips = self._trips.get(replica)
        return min(trips) / 2.0 if trips else None

    @property
    def worst(self) -> float:
        """Of all who have told; NaN where nobody has."""
        return max((min(trips) / 2.0 for trips in self._trips.values()), default=math.nan)
