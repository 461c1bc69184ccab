"""A worker's side of the bus: a `Gate` and an `AccessLog` behind which another process decides.

Owns the questions that wait for their answers. Requests are prepared here (parsed, hashed) and asked about by their
features. A decider that dies has a successor soon: requests wait for it a while and are asked about once more. What is
to be reported of those that the old one had decided is dropped: their charges went with it, and their responses go on.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from picker.exchange import Exchange, Limits, Submit
from picker.frontends.als import AccessLog, marked
from picker.gate import Clock, Gate, UndecidedError, prepare
from picker.prefix.blocks import BlockHasher
from picker.types import Decision, Fact, FailureReason, Outcome, Rejection
from picker.wire.als import Ended
from picker.workers import frames
from picker.workers.frames import FromDecider
from picker.workers.link import BEAT, Link

log = logging.getLogger("picker.workers")

_AWAY = "nobody decides just now"
# Seconds that requests wait for a decider to come back: as long as starting one takes, with some to spare.
PATIENCE = 5.0
_ATTEMPTS = 2  # a request that deciders die of must not be the death of every one
_PARTING = 1.0  # seconds that our last words may take
_AGAIN = 0.1  # seconds until the next attempt to reach the decider


class _LostError(Exception):
    """The decider has gone before it answered."""


class RemoteGate(Gate):
    """index: this worker's number. patience: seconds that requests wait for a decider that has gone.

    on_serving: told whether new requests are wanted: no to begin with, and when the decider does not come back in time.
    on_part: told that gateways are to go elsewhere. streams: how many are open, for the pulse.
    """

    def __init__(self, index: int, *, clock: Clock, limits: Limits, patience: float = PATIENCE) -> None:
        super().__init__(clock, limits)
        self.telemetry = self
        self.on_serving: Callable[[bool], None] = lambda serving: None
        self.on_part: Callable[[], None] = lambda: None
        self.streams: Callable[[], int] = lambda: 0
        self.logs = 0
        self.settled = asyncio.Event()
        self._index = index
        self._patience = patience
        self._leaving = False
        self._link: Link | None = None
        self._welcome: frames.Welcome | None = None
        self._here = asyncio.Event()  # a decider that has said welcome
        self._given_up = True
        self._timer: asyncio.TimerHandle | None = None
        self._hasher: BlockHasher | None = None
        self._asked: frozenset[str] = frozenset()
        self._mark = ""
        self._waiting: dict[int, asyncio.Future[Outcome]] = {}
        # What the present decider knows of.
        self._known: set[int] = set()

    # front ends

    def open(self) -> Exchange:
        if self._given_up:
            raise UndecidedError(_AWAY)
        return super().open()

    async def decide(self, request_id: int, submit: Submit) -> Outcome:
        for _ in range(_ATTEMPTS):
            link, welcome = await self._decider()
            ask = self._prepared(request_id, submit, welcome)
            await link.writable()
            try:
                return await self._answered(link, ask)
            except _LostError:
                continue
        raise UndecidedError(_AWAY)

    async def _decider(self) -> tuple[Link, frames.Welcome]:
        if not self._here.is_set() and not self._given_up:
            try:
                async with asyncio.timeout(self._patience):
                    await self._here.wait()
            except TimeoutError:
                raise UndecidedError(_AWAY) from None
        if self._link is None or self._welcome is None:
            raise UndecidedError(_AWAY)
        return self._link, self._welcome

    async def _answered(self, link: Link, ask: frames.Ask) -> Outcome:
        if not link.alive:
            raise _LostError
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting[ask.id] = future
        self._known.add(ask.id)
        link.send(ask)
        try:
            outcome = await future
        finally:
            self._waiting.pop(ask.id, None)
        if isinstance(outcome, Rejection):
            self._known.discard(ask.id)
        return outcome

    def _prepared(self, request_id: int, submit: Submit, welcome: frames.Welcome) -> frames.Ask:
        assert self._hasher is not None
        request = prepare(request_id, submit, self._hasher, self._asked, 0.0, None)
        return frames.ask(request, submit.call if welcome.reads else None)

    def emit(self, fact: Fact) -> None:
        message = frames.told(fact)
        if message is None or message.id not in self._known:
            return
        if isinstance(message, frames.Done | frames.Broke):
            self._known.discard(message.id)
        self.say(message)

    def internal_error(self, where: str) -> None:
        self.say(frames.Trouble(where))

    def handed_on(self, request_id: int, alias: str) -> None:
        """A request has left, and what comes of it is told by the access log."""
        if request_id in self._known:
            self._known.discard(request_id)
            self.say(frames.HandedOn(request_id, alias))

    @property
    def mark_secret(self) -> str:
        """What marks of lean mode carry; the same for all deciders of a parent."""
        return self._mark

    def say(self, message: frames.Word) -> None:
        """Tell the decider; nothing is said while there is none."""
        if self._link is not None:
            self._link.send(message)

    # the bus

    async def run(self, path: Path) -> None:
        """Stay connected to the decider's socket until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    link = Link(frames.from_decider, self._take, self._lost)
                    await loop.create_unix_connection(lambda link=link: link, str(path))  # type: ignore[misc]
                except OSError:
                    await asyncio.sleep(_AGAIN)
                    continue
                self._link = link
                link.send(frames.Hello(self._index))
                await self._beat(link)
                await asyncio.sleep(_AGAIN)
        finally:
            self._leaving = True
            if self._link is not None:
                self._link.close()
                await asyncio.wait((self._link.closed,), timeout=_PARTING)

    async def _beat(self, link: Link) -> None:
        """Give signs of life until the connection is lost."""
        while link.alive:
            self.say(frames.Pulse(self.streams(), time.process_time()))
            await asyncio.wait((link.closed,), timeout=BEAT)
            if self._welcome is not None:  # a decider that has just begun has much to do before it answers
                link.look()

    def _take(self, messages: Sequence[FromDecider]) -> None:
        for message in messages:
            match message:
                case frames.Picked() | frames.Refused():
                    future = self._waiting.get(message.id)
                    if future is not None and not future.done():
                        future.set_result(frames.outcome_of(message))
                case frames.Welcome():
                    self._welcomed(message)
                case frames.Serving(serving, part):
                    self.on_serving(serving)
                    if part:
                        self.on_part()
                case frames.Rules(origin, rules):
                    if self.limits.rewriting is not None:
                        self.limits.rewriting.put(origin, rules)
                case frames.Settled():
                    self.settled.set()
                case frames.Pulse():
                    pass

    def _welcomed(self, welcome: frames.Welcome) -> None:
        self._welcome = welcome
        self._hasher = BlockHasher(welcome.secret, welcome.block_bytes)
        self._asked = frozenset(welcome.headers)
        self._ids = itertools.count(welcome.first_id)
        self._mark = welcome.mark
        self._given_up = False
        self._here.set()
        if self._timer is not None:
            self._timer.cancel()
        self.settled.clear()
        for _ in range(self.logs):
            self.say(frames.LogOpened())

    def _lost(self) -> None:
        self._link = self._welcome = None
        self._here.clear()
        self._known.clear()
        self.settled.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_LostError())
        if not self._leaving and not self._given_up:
            log.warning("the decider is away: requests wait for it up to %g s", self._patience)
            self._timer = asyncio.get_running_loop().call_later(self._patience, self._give_up)

    def _give_up(self) -> None:
        if not self._leaving:
            log.error("the decider does not come back: requests go as the data plane's failure mode says")
            self._given_up = True
            self.on_serving(False)


class RemoteLog(AccessLog):
    """What the access log tells goes to the decider, whichever worker the request had gone through."""

    gate: RemoteGate

    def __len__(self) -> int:
        return 0

    def opened(self) -> None:
        self.gate.logs += 1
        self.gate.say(frames.LogOpened())

    def lost(self) -> None:
        self.gate.logs -= 1
        self.gate.say(frames.LogLost())

    def hear(self, ended: Ended) -> None:
        self.gate.say(frames.logged(ended))

    def mark(self, request_id: int) -> str:
        return marked(request_id, self.gate.mark_secret)

    def expect(self, decision: Decision, alias: str, now: float) -> None:
        self.gate.handed_on(decision.request_id, alias)

    def sweep(self, now: float) -> None:
        """The decider does."""

    def close(self, reason: FailureReason) -> None:
        """The decider does, when the last worker has gone: until then the log may tell another."""

    async def drained(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self.gate.settled.wait()
        except TimeoutError:
            return
