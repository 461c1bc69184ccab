"""Ctrl-C while processes are started: the one that starts them decides what it means. Owns no process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes that are started within the block are deaf to Ctrl-C; here it counts as soon as the block ends.

    Ctrl-C reaches all processes of a terminal, those that are still importing as well. A signal mask is inherited
    and loses nothing, other than a handler that ignores.
    """
    # Its start unblocks what is blocked here.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
