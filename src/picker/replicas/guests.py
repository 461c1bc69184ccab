"""Other replicas' requests, under ids of ours: their words in, facts out. Pure.

A replica that is not heard of any more takes its requests along: they are released, and nobody is blamed. When it comes
back, it says what is still under way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from picker.replicas.words import Began, Broke, Ended, Routed, Standing, Token, booked, fact_of
from picker.types import Fact, Failed, FailureReason, FirstToken, LateFirstToken

MOST = 100_000  # open requests of one replica that are followed
# Seconds: the end of a prefill that is heard later tells nothing of its length, among ends of our own that are heard at
# once. With 20 ms learning from all or from our own made no difference in simulation, with 100 ms it did.
LATE = 0.03

_OVER = FailureReason.UNHEARD


class Guests:
    """Ids are negative: those of our own requests are not. ignored: requests beyond `most`, which were not followed."""

    def __init__(self, most: int = MOST) -> None:
        self.ignored = 0
        self._most = most
        self._ids: Iterator[int] = itertools.count(-1, -1)
        self._open: dict[str, dict[int, int]] = {}  # by replica: ours by theirs

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    def open(self, replica: str) -> int:
        """How many requests of a replica are followed."""
        return len(self._open.get(replica, ()))

    def facts(
        self, replica: str, word: Routed | Standing | Began | Token | Ended | Broke, *, late: bool = False
    ) -> list[Fact]:
        """What follows from a word of a replica; nothing from words about requests that nobody knows.

        late: it is heard more than `LATE` after it was said.
        """
        match word:
            case Routed():
                return self._routed(replica, word)
            case Standing():
                return self._standing(replica, word)
            case Began() | Token():
                ours = self._open.get(replica, {}).get(word.id)
            case Ended() | Broke():
                ours = self._open.get(replica, {}).pop(word.id, None)
        if ours is None:
            return []
        return [LateFirstToken(ours) if late and isinstance(word, Token) else fact_of(word, ours)]

    def gone(self, replica: str) -> list[Fact]:
        """A replica is lost: nobody will tell how its requests end."""
        return [Failed(ours, _OVER) for ours in self._open.pop(replica, {}).values()]

    def _routed(self, replica: str, word: Routed) -> list[Fact]:
        known = self._open.setdefault(replica, {})
        before = known.pop(word.id, None)
        facts: list[Fact] = [] if before is None else [Failed(before, _OVER)]
        if len(known) >= self._most:
            self.ignored += 1
            return facts
        ours = known[word.id] = next(self._ids)
        facts.append(booked(word, ours))
        if word.begun:
            facts.append(FirstToken(ours))
        return facts

    def _standing(self, replica: str, word: Standing) -> list[Fact]:
        """All that it has open: the rest has ended unheard, or is news."""
        known = self._open.setdefault(replica, {})
        there = {each.id for each in word.routed}
        facts: list[Fact] = [Failed(known.pop(theirs), _OVER) for theirs in known.keys() - there]
        for each in word.routed:
            if each.id not in known:
                facts += self._routed(replica, each)
            elif each.begun:
                facts.append(FirstToken(known[each.id]))
        return facts
