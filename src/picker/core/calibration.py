"""Whether predictions of cached tokens come true, by row: a source that lies is found out by what engines report.

Two witnesses: the cached tokens of each answer and, for engines that do not give them, the prefix-cache counters
between two scrapes. Pure counting; what follows from a verdict is decided elsewhere.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from picker.types import BoolArray

_RECENT = 32  # predictions that a verdict rests on
_WRONG = 8  # of them, and a row is doubted
_RIGHT = 30  # of them, and it is believed again
_NEARLY = 0.05  # of all prompt tokens: the counters are about our requests, and agree with the predictions


@dataclass(slots=True)
class Record:
    """One row's predictions. over, under: more or less was predicted than was cached. error: tokens, absolute."""

    predictions: int = 0
    over: int = 0
    under: int = 0
    error: float = 0.0
    nothing: int = 0  # of the over: nothing at all was cached
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=_RECENT))
    # since the counters were last compared
    prompt: float = 0.0
    expected: float = 0.0
    told: int = 0
    queries: float | None = None
    hits: float | None = None

    @property
    def right(self) -> int:
        return self.predictions - self.over - self.under

    @property
    def unwitnessed(self) -> str | None:
        """Why nobody can tell whether predictions come true, in plain words; None where somebody can."""
        if self.predictions or self.queries is not None or self.told < _WRONG:
            return None
        return (
            "predictions are compared with nothing: its answers do not tell cached_tokens "
            "(--enable-prompt-tokens-details) and its metrics show no prefix-cache counters; were they renamed?"
        )


class Calibration:
    """Compares predictions with reports. doubted: (rows,) whose predictions keep failing."""

    def __init__(self, rows: int) -> None:
        self.doubted: BoolArray = np.zeros(rows, dtype=bool)
        self._rows = [Record() for _ in range(rows)]

    def record(self, row: int) -> Record:
        return self._rows[row]

    def reported(self, row: int, *, least: float, most: float, cached: int) -> bool:
        """An answer says how much was cached; predicted was at least and at most so much. True: the verdict changed.

        The two differ by what requests in flight were expected to leave there before this one was looked at.
        """
        mine = self._rows[row]
        wrong = max(least - cached, cached - most, 0.0)
        mine.predictions += 1
        mine.error += wrong
        if cached < least:
            mine.over += 1
            mine.nothing += not cached
        elif cached > most:
            mine.under += 1
        return self._judge(row, good=wrong == 0.0)

    def silent(self, row: int, *, prompt: float, expected: float) -> None:
        """An answer does not say how much was cached; so much was expected to be, of so many prompt tokens."""
        mine = self._rows[row]
        mine.prompt += prompt
        mine.expected += expected
        mine.told += 1

    def counted(self, row: int, queries: float, hits: float) -> bool:
        """The engine's counters, in tokens since its start. True: the verdict changed.

        Compared once enough answers were silent, and only if what was asked meanwhile is about what we sent.
        """
        mine = self._rows[row]
        if mine.queries is None or mine.hits is None or queries < mine.queries:
            self._restart(mine, queries, hits)
            return False
        if mine.told < _WRONG:
            return False
        asked, found = queries - mine.queries, hits - mine.hits
        ours, wrong = abs(asked - mine.prompt) <= _NEARLY * mine.prompt, abs(found - mine.expected) > _NEARLY * asked
        samples = mine.told if ours else 0
        self._restart(mine, queries, hits)
        changes = [self._judge(row, good=not wrong) for _ in range(min(samples, _RECENT))]
        return any(changes)

    def forget(self, row: int) -> None:
        """A new stream of knowledge, or another endpoint: nothing is held against it."""
        self._rows[row] = Record()
        self.doubted[row] = False

    def grow(self, rows: int) -> None:
        extra = rows - len(self._rows)
        self._rows += [Record() for _ in range(extra)]
        self.doubted = np.concatenate([self.doubted, np.zeros(extra, dtype=bool)])

    def complaint(self, row: int) -> str:
        """What is wrong with a doubted row, and the likely reason, in plain words."""
        mine = self._rows[row]
        share = f"{mine.over + mine.under} of {mine.predictions} predictions were wrong"
        if mine.nothing and mine.nothing >= mine.over * 0.9:
            return f"{share}: the engine found nothing where its events say blocks are; is prefix caching on?"
        if mine.over > mine.under:
            return f"{share}, mostly too high: the engine's block size, tokenizer or chat template is another"
        if mine.under:
            return f"{share}, mostly too low: events are missing, or its tokenizer or chat template is another"
        return "the engine's prefix-cache counters contradict the predictions: tokenizer or chat template is another"

    def _judge(self, row: int, *, good: bool) -> bool:
        recent, before = self._rows[row].recent, bool(self.doubted[row])
        recent.append(good)
        wrong = len(recent) - sum(recent)
        if wrong >= _WRONG:
            self.doubted[row] = True
        elif len(recent) - wrong >= _RIGHT:
            self.doubted[row] = False
        return bool(self.doubted[row]) != before

    def _restart(self, mine: Record, queries: float, hits: float) -> None:
        mine.queries, mine.hits = queries, hits
        mine.prompt = mine.expected = 0.0
        mine.told = 0
