"""What is wrong at present, in plain words: one sentence about each thing, told to the log when it changes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

log = logging.getLogger("picker.kubernetes")


class Conditions(Mapping[str, str]):
    """Subject ("pool/a", "pod/b") -> what is wrong with it; subjects with nothing wrong are not there."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}

    def __getitem__(self, about: str) -> str:
        return self._words[about]

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)

    def note(self, about: str, problem: str | None) -> None:
        """This is wrong with it, or nothing is."""
        before = self._words.get(about)
        if problem == before:
            return
        if problem is None:
            del self._words[about]
            log.info("%s: good again", about)
        else:
            self._words[about] = problem
            log.warning("%s: %s", about, problem)

    def forget(self, about: str) -> None:
        """It is gone, and with it what was wrong."""
        self._words.pop(about, None)
