"""Ends a request's waiting when its client leaves, or when somebody it waits for takes too long.

One callback a request and one timer for all of them, instead of a watching task and a timer for every wait.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from picker.types import FailureReason

_APART = 0.01  # seconds between two looks at the deadlines; so late one may be noticed


class Watch:
    """Looks after the deadlines of all leashes of a loop, with one timer for all of them.

    Most requests end long before their deadline, and a stream of a thousand chunks moves its own a thousand times: the
    timer rings for the earliest deadline there was when it was set, and looks what has become of it.
    """

    __slots__ = ("_at", "_leashes", "_loop", "_timer", "now")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = loop.time
        self._loop = loop
        self._leashes: set[Leash] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._at = math.inf

    def add(self, leash: Leash) -> None:
        self._leashes.add(leash)

    def discard(self, leash: Leash) -> None:
        self._leashes.discard(leash)

    def look_at(self, deadline: float) -> None:
        """See to it that somebody looks then, if not before."""
        if deadline < self._at:
            if self._timer is not None:
                self._timer.cancel()
            self._at = deadline
            self._timer = self._loop.call_at(deadline, self._look)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer, self._at = None, math.inf
        now = self.now()
        due = [leash for leash in self._leashes if leash.deadline <= now]
        earliest = min((leash.deadline for leash in self._leashes), default=math.inf)
        if earliest < math.inf:  # first of all: one that fails when it rings must not leave the others unwatched
            self.look_at(max(earliest, now + _APART))
        for leash in due:
            leash.ring()


class Leash:
    """Holds one task. Pulling cancels the task; the task finds out why in `reason`.

    The task must call `release` before it returns: a cancel that comes later would hit whatever it does next.
    deadline: by the clock of the watch.
    """

    __slots__ = ("_blame", "_set_at", "_task", "_unless", "_watch", "deadline", "reason")

    def __init__(self, task: asyncio.Task[None], watch: Watch) -> None:
        self.reason: FailureReason | None = None
        self.deadline = math.inf
        self._task: asyncio.Task[None] | None = task
        self._watch = watch
        self._blame = FailureReason.TIMEOUT
        self._unless: Callable[[], float] | None = None
        self._set_at = watch.now()
        watch.add(self)

    def within(self, seconds: float, blame: FailureReason, unless: Callable[[], float] | None = None) -> None:
        """What is waited for next must come within `seconds`, else the leash is pulled for `blame`.

        Replaces the deadline before. math.inf: no deadline. unless: asked when the time is over; the seconds that it
        tells are waited on, and it is asked again; 0 or less pulls.
        """
        self._blame = blame
        self._unless = unless
        self._set_at = now = self._watch.now()
        self.deadline = now + seconds
        self._watch.look_at(self.deadline)

    def silence(self, blame: FailureReason) -> float:
        """Seconds that somebody who could be blamed so has been waited for; 0 where somebody else is."""
        return self._watch.now() - self._set_at if self._blame is blame else 0.0

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
        self._task = self._unless = None
        self._watch.discard(self)

    def ring(self) -> None:
        """The deadline is here."""
        self.deadline = math.inf
        more = 0.0 if self._unless is None else self._unless()
        if more > 0.0:
            self.within(more, self._blame, self._unless)
        else:
            self.pull(self._blame)
