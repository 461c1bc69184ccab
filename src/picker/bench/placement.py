"""Which core is whose during a measurement: what is measured has one to itself, so that nobody else's work is in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

Cores = Set[int]


@dataclass(frozen=True, slots=True)
class Placement:
    """subject: what is measured. gateway: Envoy. load: client and upstream. None: nobody is pinned."""

    subject: Cores | None
    gateway: Cores | None
    load: Cores | None


def placement(cores: Sequence[int] | None = None) -> Placement:
    """Three parties on as many cores as there are: alone if possible, and never with the subject.

    cores: those we may run on; nobody is pinned to a single one, or where the system does not let us.
    """
    if cores is None:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ()
    if len(cores) < 2:
        return Placement(None, None, None)
    *others, last = cores
    gateway = others[-1:]
    return Placement(frozenset({last}), frozenset(gateway), frozenset(others[:-1] or gateway))


@contextlib.contextmanager
def pinned(cores: Cores | None) -> Iterator[None]:
    """Run this thread on these cores within the block; a process started meanwhile stays on them.

    From its first instruction, because servers count the cores they have to size their thread pools.
    """
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def move(pid: int, cores: Cores) -> None:
    """Have a process that runs already, all of its threads, run on these cores from here on (Linux)."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)
