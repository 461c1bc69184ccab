"""Joins `Exchange` and `Scheduler` under asyncio: one clock, one timer, one table of waiting futures.

Front ends call `receive` and get back only what they must do on their own wire; sources call `emit`. A decision is a
synchronous call on the loop's thread: there is no `await` between asking the scheduler and having its charge booked.
When the decision code itself fails, the request is routed uncharged to a healthy endpoint, counted and logged.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from picker.core.scheduler import Scheduler
from picker.exchange import (
    Action,
    Closed,
    Decided,
    Event,
    Exchange,
    Limits,
    Report,
    ResponseBody,
    ResponseHead,
    Submit,
    UpstreamFailed,
)
from picker.prefix.blocks import BlockHasher
from picker.telemetry import Telemetry
from picker.types import (
    NO_HEADERS,
    Call,
    Fact,
    Failed,
    FailureReason,
    Finished,
    Outcome,
    Queued,
    Reading,
    Rejection,
    RejectReason,
    Request,
    Unread,
    Usage,
)

log = logging.getLogger("picker.runtime")

Clock = Callable[[], float]
Listener = Callable[[Fact], None]


class Reader(Protocol):
    """Reads prompts as the engines will (`picker.tokenizers`). Neither verb raises for what a client can send."""

    def read_now(self, call: Call) -> Reading | Unread | None:
        """The reading, None where there is none, or `UNREAD` where making it would take too long for the loop."""
        ...

    async def read(self, call: Call) -> Reading | None:
        """The same off the loop's thread; None when the time budget ran out."""
        ...


@dataclass(slots=True)
class Record:
    """What `/debug/decisions/{id}` shows of one request; never its text."""

    request: Request
    outcome: Outcome
    decided_at: float
    seconds: float
    ended_at: float | None = None
    status: int | None = None
    failure: FailureReason | None = None
    usage: Usage | None = None


class Runtime:
    """Owns the futures of queued requests and the records of recent decisions; the scheduler owns the rest.

    clock: seconds, monotonic; the only clock that front ends and sources use. listeners: told every fact after the
    scheduler (the scraper follows discovery this way). records: how many recent decisions are kept for debugging.
    reader: reads prompts for exact matching. headers: names, in lower case, of the request headers that decisions
    depend on.
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
    ) -> None:
        self.scheduler = scheduler
        self.telemetry = telemetry
        self.clock = clock
        self.limits = limits or Limits()
        self.draining = False
        self._hasher = hasher
        self._reader = reader
        self._headers = headers
        self._queue_timeout = queue_timeout
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Outcome]] = {}
        self._queued: dict[int, Request] = {}
        self._records: OrderedDict[int, Record] = OrderedDict()
        self._keep = records
        self._listeners: list[Listener] = []
        self._timer: asyncio.TimerHandle | None = None

    # front ends

    def open(self) -> Exchange:
        """Begin a request. Every exchange must be ended by its own last event or by `Closed`."""
        return Exchange(next(self._ids), self.limits)

    async def receive(self, exchange: Exchange, event: Event) -> list[Action]:
        """Feed one event; returns the actions for the front end. Waits only while the request is read or queued.

        If the caller is cancelled while waiting, it must still feed `Closed`, which takes the request out of the queue.
        """
        actions: list[Action] = []
        pending = exchange.receive(event)
        while pending:
            asked: Submit | None = None
            for action in pending:
                match action:
                    case Report(fact):
                        self.emit(fact)
                    case Submit():
                        asked = action
                    case _:
                        actions.append(action)
            if asked is None:
                return actions
            reading = None if self._reader is None else await self._read(self._reader, asked.call)
            outcome = self._submit(exchange.id, asked, reading)
            if isinstance(outcome, Queued):
                outcome = await self._wait(exchange.id)
            pending = exchange.receive(Decided(outcome))
        return actions

    def follow(self, exchange: Exchange, event: ResponseHead | ResponseBody | UpstreamFailed) -> list[Action]:
        """As `receive`, for what comes after a response head: no more is to be decided, and nothing to wait for."""
        actions: list[Action] = []
        for action in exchange.receive(event):
            if isinstance(action, Report):
                self.emit(action.fact)
            else:
                actions.append(action)
        return actions

    def close(self, exchange: Exchange, reason: FailureReason = FailureReason.CLIENT_GONE) -> None:
        """End an exchange that has not ended by itself; harmless when it has."""
        for action in exchange.receive(Closed(reason)):
            if isinstance(action, Report):
                self.emit(action.fact)

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
        self._note_end(fact, now)
        self._say_notices()
        self.telemetry.fact(fact)
        for listener in self._listeners:
            listener(fact)
        self._poll(now)

    def listen(self, listener: Listener) -> None:
        """Have every fact handed on after the scheduler has seen it."""
        self._listeners.append(listener)

    def drain(self) -> None:
        """Take nothing new: every further request is answered 503, what runs goes on."""
        self.draining = True

    # debugging

    def record(self, request_id: int) -> Record | None:
        return self._records.get(request_id)

    def recent(self, limit: int = 50) -> Sequence[Record]:
        """The latest decisions, newest first."""
        return list(itertools.islice(reversed(self._records.values()), limit))

    # deciding

    def prepare(self, request_id: int, submit: Submit, now: float) -> Request:
        """What the scheduler may know of a call: hashes and sizes, no text."""
        call = submit.call
        return Request(
            id=request_id,
            model=call.model,
            arrived_at=now,
            block_hashes=self._hasher.hash(call.prompt, root=self._hasher.root(call.model, call.salt)),
            prompt_bytes=len(call.prompt),
            extra_bytes=call.extra_bytes,
            prompt_tokens=call.prompt_tokens,
            max_tokens=call.max_tokens,
            priority=call.priority,
            session=call.session,
            streaming=call.stream,
            subset=submit.subset,
            exclude=submit.exclude,
            deadline=None if self._queue_timeout is None else now + self._queue_timeout,
            headers=self._asked_for(submit.headers) if self._headers else NO_HEADERS,
        )

    def _asked_for(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """What the policy may see of a request's headers."""
        return {name: headers[name] for name in self._headers if name in headers}

    async def _read(self, reader: Reader, call: Call) -> Reading | None:
        """Others are decided meanwhile: one long prompt delays nobody else."""
        reading = reader.read_now(call)
        return await reader.read(call) if isinstance(reading, Unread) else reading

    def _submit(self, request_id: int, submit: Submit, reading: Reading | None) -> Outcome | Queued:
        now = self.clock()
        if self.draining and not submit.exclude:  # a second attempt is of a request that runs
            message = "The gateway is shutting down."
            refusal = Rejection(request_id, RejectReason.SHUTDOWN, 503, message, retry_after=1.0)
            self._settle(_bare(request_id, submit, now), refusal, now)
            return refusal
        request: Request | None = None
        outcome: Outcome | Queued
        try:
            request = self.prepare(request_id, submit, now)
            outcome = self.scheduler.submit(request, now, reading)
        except Exception:
            # Supervision: a bug in a scorer costs the quality of one decision, never the request.
            self.telemetry.internal_error("submit")
            log.exception("deciding request %d failed; it is routed uncharged", request_id)
            request = request or _bare(request_id, submit, now)
            outcome = self.scheduler.fallback(request)
        if isinstance(outcome, Queued):
            self._queued[request_id] = request
            self._arm()
        else:
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
                if (record := self._records.get(request_id)) is not None:
                    record.ended_at, record.failure = now, reason
            case _:
                pass

    # the queue

    async def _wait(self, request_id: int) -> Outcome:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        try:
            return await future
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
    return Request(request_id, submit.call.model, now, subset=submit.subset, exclude=submit.exclude)
