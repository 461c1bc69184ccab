"""Predicted beside reported: what picker thought an engine had cached of a prompt, and what the engine said it had.

Plain values and their table. A prediction is right when it is the reported number of tokens exactly.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Row:
    """One request. kind: its step's name. endpoint: who served it. prompt, predicted, cached: tokens."""

    number: int
    kind: str
    endpoint: str
    prompt: int
    predicted: float
    cached: int

    @property
    def exact(self) -> bool:
        return round(self.predicted) == self.cached


@dataclass(frozen=True, slots=True)
class Comparison:
    """rows: every request that can be judged. skipped: why others cannot, with how many."""

    rows: list[Row] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row | str) -> None:
        """A row, or why there is none."""
        if isinstance(row, Row):
            self.rows.append(row)
        else:
            self.skipped[row] += 1

    def wrong(self) -> list[Row]:
        return [row for row in self.rows if not row.exact]

    def __str__(self) -> str:
        return "\n".join([table(self.rows), *(f"{count} not compared: {why}" for why, count in self.skipped.items())])


def exact_share(rows: Sequence[Row]) -> float:
    return sum(row.exact for row in rows) / len(rows)


def table(rows: Sequence[Row]) -> str:
    """By kind of request: how many, the share predicted to the token, and the mean error in tokens both ways."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row.kind].append(row)
    lines = [f"{'':10} {'requests':>8} {'exact':>7} {'cached':>8} {'over':>7} {'under':>7}   tokens, means"]
    return "\n".join(lines + [_line(kind, some) for kind, some in [*sorted(kinds.items()), ("all", list(rows))]])


def _line(kind: str, rows: Sequence[Row]) -> str:
    cached = sum(row.cached for row in rows) / len(rows)
    over = sum(max(row.predicted - row.cached, 0.0) for row in rows) / len(rows)
    under = sum(max(row.cached - row.predicted, 0.0) for row in rows) / len(rows)
    return f"{kind:10} {len(rows):8} {exact_share(rows):7.1%} {cached:8.1f} {over:7.1f} {under:7.1f}"
