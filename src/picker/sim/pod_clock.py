"""Virtual time that passes with the clock on the wall, or some times faster: a `Kernel` driven by an event loop.

Owns the one timer of all pods in a process. Events run at their exact virtual times however late the loop is, so a busy
machine delays answers but never changes what the pods do.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from picker.sim.kernel import Kernel
from picker.sim.lateness import LatenessCounts


class PodClock:
    """virtual seconds = wall seconds since construction * `scale`. To be made inside the running loop.

    wall: a monotonic clock in seconds. Not the loop's own: uvloop's moves in milliseconds, and once in a round.
    lateness: virtual seconds by which the first of the events that were due was late, each time that any were.
    """

    def __init__(self, scale: float = 1.0, wall: Callable[[], float] = time.monotonic) -> None:
        self._loop = asyncio.get_running_loop()
        self._read_wall = wall
        self._origin = wall()
        self.scale = scale
        self.lateness = LatenessCounts()
        self._kernel = Kernel()
        self._until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._armed_at: float | None = None
        self._running = False
        self._stopped = False
        self._afterwards: list[Callable[[], None]] = []

    @property
    def now(self) -> float:
        """Inside an event its own time; elsewhere the time up to which everything has happened."""
        return self._kernel.now

    @property
    def known_until(self) -> float:
        """Nothing from outside happens before this instant: it is on the wall already."""
        return self._until

    def at(self, time: float, fn: Callable[[], None]) -> None:
        """Run `fn` at a virtual time, not before `now`."""
        self._kernel.at(time, fn)
        self._arm()

    def afterwards(self, fn: Callable[[], None]) -> None:
        """Run `fn` once, when all that is due now has happened."""
        self._afterwards.append(fn)

    def catch_up(self) -> float:
        """Let everything happen that is due. Called before anything from outside is looked at. Returns `now`."""
        self._until = self._wall()
        due_at = self._kernel.next_at
        if due_at is not None and due_at <= self._until:
            self.lateness.note(self._until - due_at)
        self._running = True
        try:
            self._kernel.run(until=self._until)
        finally:
            self._running = False
        due, self._afterwards = self._afterwards, []
        for fn in due:
            fn()
        self._arm()
        return self._kernel.now

    def stop(self) -> None:
        """No event runs any more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _wall(self) -> float:
        return (self._read_wall() - self._origin) * self.scale

    def _arm(self) -> None:
        due = self._kernel.next_at
        if due is None or self._running or self._stopped or (self._armed_at is not None and self._armed_at <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._armed_at = due
        # Event loops count milliseconds; rounding down would wake us early, to spin until it is time.
        delay_ms = math.ceil((due - self._wall()) / self.scale * 1e3)
        self._timer = self._loop.call_later(max(delay_ms, 0) / 1e3, self._fire)

    def _fire(self) -> None:
        self._timer = self._armed_at = None
        self.catch_up()
