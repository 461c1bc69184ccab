"""Joins `Exchange` and `Scheduler` under asyncio: one clock, one timer, one table of waiting futures.

Front ends use it as a `Gate`; sources call `emit`; whoever has prepared a request elsewhere calls `place`. A decision
is a synchronous call on the loop's thread: there is no `await` between asking the scheduler and having its charge
booked. When the decision code itself fails, the request is routed uncharged to a healthy endpoint, counted and logged.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from picker.core import filters
from picker.core.scheduler import Scheduler
from picker.exchange import Limits, Submit
from picker.gate import Clock, Gate, prepare
from picker.prefix.blocks import BlockHasher
from picker.telemetry import Telemetry
from picker.types import (
    Call,
    Endpoint,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    Outcome,
    Queued,
    Reading,
    Rejection,
    RejectReason,
    Request,
    ResponseStarted,
    Unread,
    Usage,
)

log = logging.getLogger("picker.runtime")

Listener = Callable[[Fact], None]

_OF_REQUESTS = (FirstToken, Finished, ResponseStarted, Failed)


class Reader(Protocol):
    """Reads prompts as the engines will (`picker.tokenizers`). Neither verb raises for what a client can send."""

    def read_now(self, call: Call) -> Reading | Unread | None:
        """The reading, None where there is none, or `UNREAD` where making it would take too long for the loop."""
        ...

    async def read(self, call: Call) -> Reading | None:
        """The same off the loop's thread; None when the time budget ran out."""
        ...


class Record(msgspec.Struct, eq=False, gc=False):
    """What `/debug/decisions/{id}` shows of one request; never its text."""

    request: Request
    outcome: Outcome
    decided_at: float
    seconds: float
    ended_at: float | None = None
    status: int | None = None
    failure: FailureReason | None = None
    usage: Usage | None = None


class Runtime(Gate):
    """Owns the futures of queued requests and the records of recent decisions; the scheduler owns the rest.

    clock: seconds, monotonic; the only clock that front ends and sources use. listeners: told every fact about
    endpoints, after the scheduler (the scraper follows discovery this way). records: how many recent decisions are kept
    for debugging.
    reader: reads prompts for exact matching. headers: names, in lower case, of the request headers that decisions
    depend on. patience: seconds that any response may take to begin before `patience_with` is asked. reports: what
    sources say of themselves, for `/readyz`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        hasher: BlockHasher,
        telemetry: Telemetry,
        *,
        clock: Clock,
        limits: Limits | None = None,
        reader: Reader | None = None,
        headers: frozenset[str] = frozenset(),
        queue_timeout: float | None = None,
        records: int = 256,
        patience: float = math.inf,
    ) -> None:
        super().__init__(clock, limits or Limits())
        self.scheduler = scheduler
        self.telemetry: Telemetry = telemetry
        self.leaving = False  # still serving, and about to drain
        self.draining = False
        self.patience = patience
        self._hasher = hasher
        self._reader = reader
        self.headers = headers
        self.queue_timeout = queue_timeout
        self._waiting: dict[int, asyncio.Future[Outcome]] = {}
        self._queued: dict[int, Request] = {}
        self._records: OrderedDict[int, Record] = OrderedDict()
        self._keep = records
        self.reports: dict[str, Callable[[], Mapping[str, Any]]] = {}
        self._listeners: list[Listener] = []
        self._timer: asyncio.TimerHandle | None = None

    # front ends

    async def decide(self, request_id: int, submit: Submit) -> Outcome:
        reading = await self.read(submit.call)
        outcome = self._submit(request_id, submit, reading)
        return await self.wait(request_id) if isinstance(outcome, Queued) else outcome

    # sources

    def emit(self, fact: Fact) -> None:
        """Tell the scheduler a fact and let queued requests go."""
        now = self.clock()
        try:
            self.scheduler.apply(fact, now)
        except Exception:
            # Supervision: one bad fact must not end a source or a stream.
            self.telemetry.internal_error("apply")
            log.exception("applying a %s failed; it is ignored", type(fact).__name__)
        self.telemetry.fact(fact)
        if isinstance(fact, _OF_REQUESTS):
            self._note_end(fact, now)
        else:
            for listener in self._listeners:
                listener(fact)
        self._say_notices()
        self._poll(now)

    def learn(self, facts: Sequence[Fact]) -> None:
        """Tell the scheduler what other replicas have decided and seen; nobody else here needs to know."""
        now = self.clock()
        for fact in facts:
            try:
                self.scheduler.apply(fact, now)
            except Exception:
                # Supervision: one bad fact of another replica must not end the bus.
                self.telemetry.internal_error("learn")
                log.exception("applying another replica's %s failed; it is ignored", type(fact).__name__)
        self._say_notices()
        self._poll(now)

    def listen(self, listener: Listener) -> None:
        """Have each fact about endpoints handed on, after the scheduler; of requests `Telemetry.watch` tells."""
        self._listeners.append(listener)

    def drain(self) -> None:
        """Take nothing new: every further request is answered 503, what runs goes on."""
        self.draining = True

    def patience_with(self, request_id: int) -> float:
        """How many more seconds a request may be waited for where it went; 0 or less: its endpoint hangs."""
        return math.inf if self.patience == math.inf else self.scheduler.patience(request_id, self.clock())

    # endpoints

    def answers(self, name: str) -> bool:
        """Whether an endpoint is in the pool and can be reached, as far as is known."""
        row = self.scheduler.pool.row(name)
        return row is not None and bool(filters.alive(self.scheduler.pool, self.clock())[row])

    def answering(self) -> list[Endpoint]:
        """The endpoints that can be reached, as far as is known."""
        alive = filters.alive(self.scheduler.pool, self.clock())
        return [endpoint for row, endpoint in self.scheduler.pool if alive[row]]

    # debugging

    def record(self, request_id: int) -> Record | None:
        return self._records.get(request_id)

    def recent(self, limit: int = 50) -> Sequence[Record]:
        """The latest decisions, newest first."""
        return list(itertools.islice(reversed(self._records.values()), limit))

    # deciding

    def prepare(self, request_id: int, submit: Submit, now: float) -> Request:
        """What the scheduler may know of a call: hashes and sizes, no text."""
        return prepare(request_id, submit, self._hasher, self.headers, now, self.deadline(now))

    def deadline(self, now: float) -> float | None:
        """Until when a request that comes now may wait."""
        return None if self.queue_timeout is None else now + self.queue_timeout

    async def read(self, call: Call) -> Reading | None:
        """The call as the engines will read it; None without exact matching, or where it cannot be read in time."""
        return None if self._reader is None else await self._read(self._reader, call)

    async def _read(self, reader: Reader, call: Call) -> Reading | None:
        """Others are decided meanwhile: one long prompt delays nobody else."""
        reading = reader.read_now(call)
        return await reader.read(call) if isinstance(reading, Unread) else reading

    def _submit(self, request_id: int, submit: Submit, reading: Reading | None) -> Outcome | Queued:
        now = self.clock()
        if self._refuses(submit.exclude):
            return self._refused(_bare(request_id, submit, now), now)
        try:
            request = self.prepare(request_id, submit, now)
        except Exception:
            return self._uncharged(_bare(request_id, submit, now), now)
        return self._place(request, reading, now)

    def place(self, request: Request, reading: Reading | None = None) -> Outcome | Queued:
        """Decide a request that was prepared elsewhere; if it is queued, `wait` for it."""
        now = self.clock()
        return self._refused(request, now) if self._refuses(request.exclude) else self._place(request, reading, now)

    def _refuses(self, exclude: frozenset[str]) -> bool:
        return self.draining and not exclude  # a second attempt is of a request that runs

    def _refused(self, request: Request, now: float) -> Outcome:
        message = "The gateway is shutting down."
        refusal = Rejection(request.id, RejectReason.SHUTDOWN, 503, message, retry_after=1.0)
        self._settle(request, refusal, now)
        return refusal

    def _place(self, request: Request, reading: Reading | None, now: float) -> Outcome | Queued:
        try:
            outcome = self.scheduler.submit(request, now, reading)
        except Exception:
            return self._uncharged(request, now)
        if isinstance(outcome, Queued):
            self._queued[request.id] = request
            self._waiting[request.id] = asyncio.get_running_loop().create_future()
            self._arm()
        else:
            self._settle(request, outcome, now)
        return outcome

    def _uncharged(self, request: Request, now: float) -> Outcome:
        """Supervision, amid handling an error: a bug in a scorer costs a decision its quality, never the request."""
        self.telemetry.internal_error("submit")
        log.exception("deciding request %d failed; it is routed uncharged", request.id)
        outcome = self.scheduler.fallback(request)
        self._settle(request, outcome, now)
        return outcome

    def _settle(self, request: Request, outcome: Outcome, started_at: float) -> None:
        now = self.clock()
        self.telemetry.decision(outcome, now - started_at, request)
        self._records[request.id] = Record(request, outcome, decided_at=now, seconds=now - started_at)
        while len(self._records) > self._keep:
            self._records.popitem(last=False)

    def _say_notices(self) -> None:
        notices = self.scheduler.notices
        while notices:
            log.warning("%s", notices.popleft())

    def _note_end(self, fact: Fact, now: float) -> None:
        match fact:
            case Finished(request_id, status, usage):
                if (record := self._records.get(request_id)) is not None:
                    record.ended_at, record.status, record.usage = now, status, usage
            case Failed(request_id, reason):
                # It may have been queued, and nobody have begun to wait.
                self._queued.pop(request_id, None)
                self._waiting.pop(request_id, None)
                if (record := self._records.get(request_id)) is not None:
                    record.ended_at, record.failure = now, reason
            case _:
                pass

    # the queue

    async def wait(self, request_id: int) -> Outcome:
        """The outcome of a request that was queued, once there is one."""
        try:
            return await self._waiting[request_id]
        finally:
            self._waiting.pop(request_id, None)
            self._queued.pop(request_id, None)

    def _poll(self, now: float) -> None:
        """Hand out what the scheduler has decided meanwhile, then re-arm the one timer."""
        if not self._queued:
            return
        for outcome in self._served(now):
            request = self._queued.pop(outcome.request_id, None)
            if request is None:
                continue  # Its client has left; closing the exchange will release what was booked.
            self._settle(request, outcome, now)
            future = self._waiting[outcome.request_id]
            if not future.done():  # it is when its task has been cancelled and has not run since
                future.set_result(outcome)
        self._arm()

    def _served(self, now: float) -> Sequence[Outcome]:
        """What the scheduler lets go. If that fails, all who wait go uncharged: nobody may wait for ever."""
        try:
            return self.scheduler.poll(now)
        except Exception:
            # Supervision: whoever told the fact that made room is not to blame.
            self.telemetry.internal_error("poll")
            log.exception("serving the queue failed; the %d requests in it are routed uncharged", len(self._queued))
            return [self._released(request, now) for request in self._queued.values()]

    def _released(self, request: Request, now: float) -> Outcome:
        self.scheduler.apply(Failed(request.id, FailureReason.SHUTDOWN), now)
        return self.scheduler.fallback(request)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wakeup = self.scheduler.next_wakeup()
        if wakeup is not None and self._queued:
            delay = max(0.0, wakeup - self.clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._poll(self.clock())


def _bare(request_id: int, submit: Submit, now: float) -> Request:
    """What is known of a request without looking at its prompt."""
    call = submit.call
    return Request(request_id, call.model, now, subset=submit.subset, exclude=submit.exclude, rewritten=call.rewritten)
