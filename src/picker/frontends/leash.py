"""Ends a request's waiting when its client leaves, or when somebody it waits for takes too long.

One timer and one callback a request, instead of a watching task and a timer for every wait.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from picker.types import FailureReason

_LOOK_EVERY = 60.0  # seconds; an alarm is never set further ahead


class Leash:
    """Holds one task. Pulling cancels the task; the task finds out why in `reason`.

    The task must call `release` before it returns: a cancel that comes later would hit whatever it does next.
    """

    __slots__ = ("_alarm_at", "_blame", "_deadline", "_loop", "_set_at", "_task", "_timer", "_unless", "reason")

    def __init__(self, task: asyncio.Task[None], loop: asyncio.AbstractEventLoop) -> None:
        self.reason: FailureReason | None = None
        self._task: asyncio.Task[None] | None = task
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._alarm_at = math.inf
        self._deadline = math.inf
        self._blame = FailureReason.TIMEOUT
        self._unless: Callable[[], float] | None = None
        self._set_at = loop.time()

    def within(self, seconds: float, blame: FailureReason, unless: Callable[[], float] | None = None) -> None:
        """What is waited for next must come within `seconds`, else the leash is pulled for `blame`.

        Replaces the deadline before. math.inf: no deadline. unless: asked when the time is over; the seconds that it
        tells are waited on, and it is asked again; 0 or less pulls.
        """
        self._blame = blame
        self._unless = unless
        self._set_at = now = self._loop.time()
        self._deadline = deadline = now + seconds
        # A later deadline keeps the alarm that is set: it looks again when it rings. So a stream of a thousand
        # chunks sets a handful of timers.
        if deadline < self._alarm_at:
            self._set_alarm(deadline)

    def silence(self, blame: FailureReason) -> float:
        """Seconds that somebody who could be blamed so has been waited for; 0 where somebody else is."""
        return self._loop.time() - self._set_at if self._blame is blame else 0.0

    def pull(self, reason: FailureReason = FailureReason.CLIENT_GONE) -> None:
        """Cancel the task, once; the first reason stays."""
        if self.reason is None and self._task is not None:
            self.reason = reason
            self._task.cancel()

    def slacken(self) -> None:
        """Take back the pull that the task has just caught, to go on and be held as before."""
        assert self._task is not None
        self._task.uncancel()
        self.reason = None

    def release(self) -> None:
        self._task = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_alarm(self, deadline: float) -> None:
        # An alarm that rings early only looks; so the next deadline, which may be sooner, needs no other alarm.
        at = min(deadline, self._loop.time() + _LOOK_EVERY)
        if self._timer is not None:
            self._timer.cancel()
        self._alarm_at = at
        self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._alarm_at = math.inf
        if self._loop.time() >= self._deadline:
            more = 0.0 if self._unless is None else self._unless()
            if more > 0.0:
                self.within(more, self._blame, self._unless)
            else:
                self.pull(self._blame)
        elif self._deadline < math.inf:
            self._set_alarm(self._deadline)
