"""An event loop whose clock jumps to the next timer when nothing is left to do, with real sockets.

Sockets of one process reach each other in no time that matters, so a moment without any is the end of what can happen
before the next timer. Tests of minutes take milliseconds, and none depends on how fast the machine is.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_MOMENT = 0.002  # real seconds
_DEADLOCK = 60.0


class _Selector(selectors.DefaultSelector):
    """jumped: seconds that were not waited for. busy: pieces of work that threads have in hand, which take real time
    and wake the loop when they are done.
    """

    jumped = 0.0
    busy = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        jumps = timeout is not None and not self.busy
        ready = super().select(_MOMENT if jumps else _DEADLOCK)
        if not ready:
            assert jumps, "nothing will ever happen again"
            self.jumped += timeout or 0.0
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumps = _Selector()
        super().__init__(self._jumps)

    def time(self) -> float:
        return 1000.0 + self._jumps.jumped

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        work = super().run_in_executor(executor, func, *args)
        self._jumps.busy += 1
        work.add_done_callback(self._has_ended)
        return work

    def _has_ended(self, _: object) -> None:
        self._jumps.busy -= 1


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on such a loop; `asyncio.get_running_loop().time` is the clock to hand in."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(*args, **kwargs))

    # pytest-asyncio would look through the wrapper and take the test for one of its own.
    del run.__wrapped__
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run
