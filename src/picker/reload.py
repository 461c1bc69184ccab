"""A new configuration for a process that serves: what of it can be in force at once is, the rest is named.

All or nothing: every part of a change is prepared before any of it is made, so that a configuration that does not do
leaves the old one in force. Knows keys and their order of doing; what a key does is told to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from picker.config import Config, Part
from picker.errors import ConfigError

log = logging.getLogger("picker.reload")

Commit = Callable[[], None]
Prepare = Callable[[Config], Commit]
"""Checks what a configuration says of some keys and returns what puts it in force, which may not fail.

Raises ConfigError, and `NeedsRestartError` for values that only a new process can have.
"""


class NeedsRestartError(Exception):
    """The change is possible, and not here; says why."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a new configuration. error: why nothing did; why: of each key in needs_restart."""

    applied: list[str] = field(default_factory=list)
    needs_restart: list[str] = field(default_factory=list)
    error: str | None = None
    why: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        if self.error is not None:
            return f"the configuration stays as it is: {self.error}"
        told = []
        if self.applied:
            told.append(f"in force: {', '.join(self.applied)}")
        if self.needs_restart:
            keys = (f"{key} ({self.why[key]})" if key in self.why else key for key in self.needs_restart)
            told.append(f"only after a restart: {', '.join(keys)}")
        return "; ".join(told) or "nothing has changed"

    def values(self) -> dict[str, Any]:
        return asdict(self) | {"words": self.words}


class Reload:
    """config: in force. live: what puts keys in force, by dotted keys or sections ("limits", "queue.size").

    load: reads the configuration as the command line would. beside: files that are followed on their own (keys,
    certificates), read again whenever this is; each says whether it had changed; more may join while this runs.
    watched: the configuration's file. after: told the configuration in force after each attempt. fixed: why a key or a
    section cannot change while the process runs; those in `live` can unless they are here, too.
    """

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        live: Mapping[tuple[str, ...], Prepare],
        beside: Mapping[str, Callable[[], bool]],
        watched: Path | None = None,
        after: Callable[[Config], None] = lambda config: None,
        fixed: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.latest: Result | None = None
        self._load = load
        self._live = live
        self._beside = beside
        self._watched = watched
        self._after = after
        self._fixed = fixed or {}
        self._seen = self._state()

    async def follow(self, *, interval: float = 1.0) -> None:
        """Look for changes of the files for ever."""
        while True:
            await asyncio.sleep(interval)
            self.look()

    def look(self) -> None:
        """Put in force what has changed in the files since the last time."""
        for refresh in list(self._beside.values()):
            refresh()
        if self._state() != self._seen:
            self.again()

    def again(self) -> Result:
        """Read everything again and put it in force as far as possible; never raises."""
        self._seen = self._state()
        refreshed = [name for name, refresh in list(self._beside.items()) if refresh()]
        try:
            result = self._adopt(self._load(), refreshed)
        except ConfigError as error:
            result = Result(refreshed, error=str(error))
        self.latest = result
        self._after(self.config)
        (log.error if result.error else log.info)("%s", result.words)
        return result

    def _adopt(self, new: Config, refreshed: Sequence[str]) -> Result:
        changed = changes(self.config, new)
        why = {key: reason for key in changed if (reason := self._reason(key)) is not None}
        free = [key for key in changed if key not in why]
        wanted = _merged(self.config, new, free)
        commits: list[Commit] = []
        applied: list[str] = []
        for keys, prepare in self._live.items():
            ours = [key for key in free if any(_is_within(key, each) for each in keys)]
            if ours:
                try:
                    commits.append(prepare(wanted))
                except NeedsRestartError as error:
                    why |= dict.fromkeys(ours, str(error))
                    continue
                applied += [key for key in ours if key not in applied]
        for commit in commits:
            commit()
        self.config = _merged(self.config, new, applied)
        left = [key for key in changed if key not in applied]
        return Result([*refreshed, *applied], left, why={key: why[key] for key in left if key in why})

    def _reason(self, key: str) -> str | None:
        """Why it cannot change, from the longest name that fits."""
        fitting = [name for name in self._fixed if _is_within(key, name)]
        return self._fixed[max(fitting, key=len)] if fitting else None

    def _state(self) -> tuple[int, int, int]:
        try:
            found = None if self._watched is None else self._watched.stat()
        except OSError:
            found = None
        return (0, 0, 0) if found is None else (found.st_ino, found.st_mtime_ns, found.st_size)


def changes(before: Config, after: Config) -> list[str]:
    """The dotted keys whose values differ."""
    found = []
    for name in Config.__struct_fields__:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, Part):
            found += [f"{name}.{each}" for each in old.__struct_fields__ if getattr(old, each) != getattr(new, each)]
        elif old != new:
            found.append(name)
    return found


def _is_within(key: str, name: str) -> bool:
    """Whether a dotted key is this one, or one of this section."""
    return key == name or key.startswith(f"{name}.")


def _merged(old: Config, new: Config, keys: Sequence[str]) -> Config:
    """The old configuration with these keys as the new one has them."""
    merged = old
    for key in keys:
        section, _, name = key.rpartition(".")
        if section:
            part = msgspec.structs.replace(getattr(merged, section), **{name: getattr(getattr(new, section), name)})
            merged = msgspec.structs.replace(merged, **{section: part})
        else:
            merged = msgspec.structs.replace(merged, **{name: getattr(new, name)})
    return merged
