"""Picks that were handed out and whose end has not been told: owns their promise of exactly one terminal fact each.

A pick ends when its end is reported, when it should be over and nobody follows it, or when its reporter has gone. The
times are those of `proto/picker/v1/picker.proto`; what comes in and goes out over the wire is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from picker.gate import Gate
from picker.types import Decision, Failed, FailureReason, Finished, FirstToken, ResponseStarted
from picker.wire.api import Ended, FirstOutput, Started

# Seconds that a pick may run while its reporter is connected, and how many times longer than predicted besides: as
# long as a request may run unheard of that was routed in lean mode.
_PATIENCE = 300.0
_ALLOWANCE = 4.0
# Seconds that a reporter has to come back whose last stream has ended: enough for a connection that is made anew.
_ABSENCE = 5.0

Predict = Callable[[Decision], float]
"""Seconds that a request will take from its decision to the end of its response."""


class FullError(Exception):
    """So many picks are open that no more are made."""


@dataclass(slots=True)
class _Open:
    """One pick. addresses: of its endpoints, by name. status: of its response, once it has begun."""

    id: str
    number: int
    since: float
    predicted: float
    addresses: dict[str, str]
    reporter: str
    status: int = 0
    token: bool = False


@dataclass(slots=True)
class _Reporter:
    """Whoever tells of picks. left_at: when the last of its streams ended, if none is open."""

    streams: int = 0
    picks: int = 0
    left_at: float | None = None


class Picks:
    """The table of open picks and of those who report them. most: picks open at a time."""

    def __init__(self, gate: Gate, predict: Predict, *, most: int) -> None:
        self._gate = gate
        self._predict = predict
        self._most = most
        self._secret = secrets.token_hex(8)  # clients can neither make up others' ids nor those of an earlier process
        self._open: dict[str, _Open] = {}
        self._reporters: dict[str, _Reporter] = {}
        self._nameless: Iterator[int] = itertools.count(1)
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._open)

    # picks

    def check_room(self) -> None:
        """Raises FullError."""
        if len(self._open) >= self._most:
            raise FullError

    def add(self, decision: Decision, reporter: str, now: float) -> str:
        """A request was routed; returns the id to report it by. reporter: "" where none was named."""
        number = decision.request_id
        ends = (decision.endpoint, *decision.fallbacks)
        pick = _Open(
            f"{number}-{self._secret}",
            number,
            now,
            self._predict(decision),
            {each.name: each.address for each in reversed(ends)},
            reporter,
        )
        self._open[pick.id] = pick
        self._none.clear()
        if reporter:
            self._reporters.setdefault(reporter, _Reporter()).picks += 1
        return pick.id

    def take_back(self, pick_id: str) -> None:
        """Whoever asked has gone before the answer was sent."""
        self._end(pick_id, Ended(failure=FailureReason.CLIENT_GONE))

    # reporters

    def nameless(self) -> str:
        """A name for a stream that gives none; no client can give the same."""
        return f"\0{next(self._nameless)}"

    def joined(self, reporter: str) -> None:
        """A stream of this reporter begins."""
        entry = self._reporters.setdefault(reporter, _Reporter())
        entry.streams += 1
        entry.left_at = None

    def left(self, reporter: str) -> None:
        """It has ended, in whatever way."""
        entry = self._reporters[reporter]
        entry.streams -= 1
        if not entry.streams:
            entry.left_at = self._gate.clock()
        self._tidy(reporter)

    def hear(self, pick_id: str, told: Started | FirstOutput | Ended, reporter: str) -> bool:
        """What a stream of this reporter tells; whether the pick is open."""
        pick = self._open.get(pick_id)
        if pick is None:
            return False
        self._claim(pick, reporter)
        match told:
            case Started():
                self._started(pick, told)
            case FirstOutput():
                self._first_output(pick)
            case Ended():
                self._end(pick_id, told)
        return True

    def _claim(self, pick: _Open, reporter: str) -> None:
        """A pick belongs to the reporter it was asked for, as long as that is there, else to who tells of it."""
        if pick.reporter == reporter or (pick.reporter and self._reporters[pick.reporter].streams):
            return
        before, pick.reporter = pick.reporter, reporter
        self._reporters[reporter].picks += 1
        if before:
            self._reporters[before].picks -= 1
            self._tidy(before)

    def _started(self, pick: _Open, told: Started) -> None:
        if pick.status:
            return
        pick.status = told.status
        served_by = None if told.endpoint is None else pick.addresses.get(told.endpoint, told.endpoint)
        self._gate.emit(ResponseStarted(pick.number, told.status, served_by))

    def _first_output(self, pick: _Open) -> None:
        # Of an error's body nothing can be learned.
        if not pick.token and pick.status < 400:
            pick.token = True
            self._gate.emit(FirstToken(pick.number))

    def _end(self, pick_id: str, told: Ended) -> None:
        pick = self._open.pop(pick_id)
        if pick.reporter:
            self._reporters[pick.reporter].picks -= 1
            self._tidy(pick.reporter)
        if not self._open:
            self._none.set()
        if told.failure is not None:
            self._gate.emit(Failed(pick.number, told.failure))
        else:
            self._gate.emit(Finished(pick.number, told.status or pick.status or 200, told.usage))

    def _tidy(self, name: str) -> None:
        entry = self._reporters[name]
        if not entry.streams and not entry.picks:
            del self._reporters[name]

    # what nobody tells

    def sweep(self, now: float) -> None:
        """End those that must be over. To be called now and then."""
        for pick in list(self._open.values()):
            until, why = self._until(pick)
            if now >= until:
                self._end(pick.id, Ended(failure=why))

    def _until(self, pick: _Open) -> tuple[float, FailureReason]:
        entry = self._reporters.get(pick.reporter)
        patience = pick.since + max(_PATIENCE, _ALLOWANCE * pick.predicted)
        if entry is None or (not entry.streams and entry.left_at is None):
            return pick.since + pick.predicted, FailureReason.UNHEARD
        if entry.streams:
            return patience, FailureReason.UNHEARD
        assert entry.left_at is not None
        # A pick made while its reporter was away waits as long for it.
        return min(patience, max(entry.left_at, pick.since) + _ABSENCE), FailureReason.CLIENT_GONE

    def close(self, reason: FailureReason) -> None:
        """End all that are left."""
        for pick_id in list(self._open):
            self._end(pick_id, Ended(failure=reason))

    async def drained(self, timeout: float) -> None:
        """Wait until the end of every pick is known, at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._none.wait()
