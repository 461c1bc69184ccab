"""What an import says: the configuration, and what became of each part of the foreign one."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Fate(enum.Enum):
    """What became of a part; the value is what reports say."""

    SAME = "same"  # does here what it does there
    REPLACED = "replaced"  # its work is done by a mechanism of picker's own
    PARTLY = "partly"  # works, with a difference that is named
    MISSING = "missing"  # has no counterpart and does nothing


@dataclass(frozen=True, slots=True)
class Line:
    """One part of a foreign configuration. where: its place there; says: what it is here."""

    where: str
    fate: Fate
    says: str


@dataclass(frozen=True, slots=True)
class Imported:
    """values: a configuration in picker's words, as its file would have them. lines: what became of each part."""

    project: str
    values: Mapping[str, Any]
    lines: tuple[Line, ...] = field(default=())

    @property
    def troubles(self) -> list[Line]:
        """What does not work as it did."""
        return [line for line in self.lines if line.fate in (Fate.PARTLY, Fate.MISSING)]

    def counts(self) -> dict[str, int]:
        """Lines by fate, all fates named."""
        return {fate.value: sum(line.fate is fate for line in self.lines) for fate in Fate}
