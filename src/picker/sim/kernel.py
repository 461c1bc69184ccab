"""A virtual clock: a heap of things to do, run in order of time. Nothing here waits, draws or reads a real clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Kernel:
    """The time of one simulation. `now` moves only inside `run`, from one event to the next.

    Events at the same time run in the order in which they were scheduled (the sequence number breaks ties), so a
    run is a function of its inputs. After SimPy's `Environment`, without processes.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0

    @property
    def next_at(self) -> float | None:
        """When the earliest event is due, or None when nothing is scheduled."""
        return self._heap[0][0] if self._heap else None

    def at(self, time: float, fn: Callable[[], None]) -> None:
        """Run `fn` at `time`. Raises ValueError for a time that has passed."""
        if time < self.now:
            raise ValueError(f"cannot schedule at {time}: it is {self.now} already")
        heapq.heappush(self._heap, (time, self._scheduled, fn))
        self._scheduled += 1

    def after(self, delay: float, fn: Callable[[], None]) -> None:
        """Run `fn` in `delay` seconds."""
        self.at(self.now + delay, fn)

    def run(self, until: float | None = None) -> None:
        """Run events up to and including `until`, or until none is left; then `now` is `until`, if given."""
        while self._heap and (until is None or self._heap[0][0] <= until):
            self.now, _, fn = heapq.heappop(self._heap)
            fn()
        if until is not None and until > self.now:
            self.now = until
