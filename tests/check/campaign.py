"""Many trials at once: most of a trial is waiting, for processes to start and for timers to run out.

A fixture of a module runs those of its tests that were asked for, and each test looks up what came of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeVar

import pytest

R = TypeVar("R")

# Several Envoys and pickers on two cores: more only make each other late.
AT_ONCE = 6


def wanted(request: pytest.FixtureRequest, parameter: str) -> list[str]:
    """The values of this parameter in the tests of the module that are about to run."""
    items = (item for item in request.session.items if isinstance(item, pytest.Function))
    mine = (item for item in items if item.path == request.path and hasattr(item, "callspec"))
    return [str(item.callspec.params[parameter]) for item in mine if parameter in item.callspec.params]


async def trials(
    names: Iterable[str], attempt: Callable[[str], Awaitable[R]], *, alone: frozenset[str] = frozenset()
) -> Mapping[str, R | Exception]:
    """What came of each, in any order; those that measure time are tried alone, after the others."""
    crowd, found = asyncio.Semaphore(AT_ONCE), dict[str, R | Exception]()

    async def one(name: str) -> None:
        try:
            async with crowd:
                found[name] = await attempt(name)
        except Exception as error:
            found[name] = error  # raised by the test that it belongs to

    names = list(names)
    async with asyncio.TaskGroup() as group:
        for name in names:
            if name not in alone:
                group.create_task(one(name))
    for name in names:
        if name in alone:
            await one(name)
    return found


def outcome(found: Mapping[str, R | Exception], name: str) -> R:
    result = found[name]
    if isinstance(result, Exception):
        raise result
    return result
