"""The decider's side of the bus: workers' requests are decided here, by the one runtime that there is.

Owns what each worker has open, and its promise: every request that a worker's connection leaves behind is reported as
ended at once. A request that is in the data plane's hands (lean mode) stays: the access log may tell of it elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from picker.frontends.als import Feedback
from picker.rewrites import Choice, Rewriting, Rule
from picker.runtime import Runtime
from picker.types import Decision, Failed, FailureReason, Outcome, Queued, Reading
from picker.workers import frames
from picker.workers.frames import ID_BITS, FromWorker
from picker.workers.link import BEAT, Link

log = logging.getLogger("picker.workers")

# Ranges of ids that one decider gives out; the next one that is started begins behind them.
_RANGES = 4096
_GOING = 5.0  # seconds beyond their own that workers get to go


@dataclass(frozen=True, slots=True)
class Terms:
    """What workers are told. secret: of prefix hashes. reads: prompts are read here.

    start: which start of the decider this is, 0 and up: ids of different starts must not meet.
    """

    secret: bytes
    block_bytes: int
    headers: frozenset[str] = frozenset()
    reads: bool = False
    start: int = 0


@dataclass(slots=True)
class Account:
    """What one worker, by its number, has asked and used over all its lives. cpu: seconds, of the present life."""

    requests: int = 0
    streams: int = 0
    cpu: float = 0.0


class Desk(Collector):
    """Serves workers until told to stop. feedback: in lean mode.

    on_workers: told the number of workers whenever it changes.
    """

    def __init__(self, runtime: Runtime, terms: Terms, feedback: Feedback | None = None) -> None:
        self.runtime = runtime
        self.terms = terms
        self.feedback = feedback
        self.on_workers: Callable[[int], None] = lambda count: None
        self.accounts: dict[int, Account] = {}
        self._serving = True
        self._visitors: set[_Visitor] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._given = 0
        self._none = asyncio.Event()
        self._none.set()
        self.rewriting: Rewriting | None = None
        self.rules: dict[str, frames.Rules] = {}  # by origin

    def follow(self, rewriting: Rewriting) -> None:
        """Have workers know the rules that are put there, and count there what comes of them."""
        self.rewriting, rewriting.on_put = rewriting, self._rules_changed

    def _rules_changed(self, origin: str, rules: Sequence[Rule]) -> None:
        told = self.rules[origin] = frames.Rules(origin, list(rules))
        for visitor in self._visitors:
            visitor.link.send(told)

    @property
    def workers(self) -> int:
        """How many have said hello and are connected."""
        return sum(visitor.account is not None for visitor in self._visitors)

    async def serve(self, listener: socket.socket, stop: asyncio.Event, *, grace: float = 30.0) -> None:
        """Serve a listening local socket until `stop` is set and the workers have gone, or `grace` seconds later."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as self._tasks:
            server = await loop.create_unix_server(self._visited, sock=listener)
            watch = self._tasks.create_task(self._watch())
            try:
                await stop.wait()
                await self._settle(grace)
            finally:
                watch.cancel()
                server.close()
                for visitor in list(self._visitors):
                    visitor.link.close()
                    visitor.lost()
                if self.feedback is not None:
                    self.feedback.close(FailureReason.SHUTDOWN)

    async def _settle(self, grace: float) -> None:
        """Let workers end what they have open, and tell them when nothing is left to hear of."""
        until = asyncio.get_running_loop().time() + grace
        try:
            async with asyncio.timeout_at(until + _GOING):
                if self.feedback is not None:
                    await self.feedback.drained(grace)
                for visitor in self._visitors:
                    visitor.link.send(frames.Settled())
                await self._none.wait()
        except TimeoutError:
            log.warning("%d workers have not gone in time", len(self._visitors))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            for visitor in list(self._visitors):
                visitor.link.look()
            if self.feedback is not None:
                self.feedback.sweep(self.runtime.clock())

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what may have to wait, for as long as the desk is served."""
        assert self._tasks is not None
        return self._tasks.create_task(self._supervised(work))

    async def _supervised(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            # Supervision: one request must not end the bus for all; its front end gives it up in time.
            self.runtime.telemetry.internal_error("bus")
            log.exception("a request could not be decided")

    # comings and goings

    def _visited(self) -> Link:
        visitor = _Visitor(self)
        self._visitors.add(visitor)
        self._none.clear()
        return visitor.link

    def welcome(self) -> frames.Welcome:
        """A range of ids of its own for whoever has come, and all else that he needs."""
        terms = self.terms
        number = terms.start * _RANGES + self._given % _RANGES
        self._given += 1
        mark = "" if self.feedback is None else self.feedback.secret
        return frames.Welcome(
            (number << ID_BITS) + 1, terms.secret, terms.block_bytes, sorted(terms.headers), mark, terms.reads
        )

    def set_serving(self, serving: bool) -> None:
        """Have workers say whether they are ready. Asked without being so, they are answered all the same.

        Those who are so no more ask their gateways to connect anew.
        """
        if serving != self._serving:
            self._serving = serving
            for visitor in self._visitors:
                visitor.link.send(frames.Serving(self.wants, part=not serving))

    @property
    def wants(self) -> bool:
        """Whether new requests are wanted."""
        return self._serving and not self.runtime.draining

    def changed(self) -> None:
        self.on_workers(self.workers)

    def left(self, visitor: _Visitor) -> None:
        self._visitors.discard(visitor)
        if not self._visitors:
            self._none.set()
        self.changed()

    # figures

    def collect(self) -> Iterator[Metric]:
        """What workers do, for the registry."""
        yield GaugeMetricFamily("picker_workers", "Workers connected to the decider.", value=self.workers)
        yield CounterMetricFamily("picker_worker_arrivals", "Times a worker has connected.", value=self._given)
        streams = sum(account.streams for account in self.accounts.values())
        yield GaugeMetricFamily("picker_extproc_streams", "Open ext-proc streams.", value=streams)
        asked = CounterMetricFamily("picker_worker_requests", "Requests asked about, by worker.", labels=["worker"])
        cpu = GaugeMetricFamily("picker_worker_cpu_seconds", "CPU time of a worker's process.", labels=["worker"])
        for index, account in sorted(self.accounts.items()):
            asked.add_metric([str(index)], account.requests)
            cpu.add_metric([str(index)], account.cpu)
        yield asked
        yield cpu
        help_text = "CPU time of the decider's process."
        yield GaugeMetricFamily("picker_decider_cpu_seconds", help_text, value=time.process_time())


class _Visitor:
    """One connection of a worker. account: None until it has said who it is.

    open: its requests that have been asked about and not ended; decided ones with their decision. pending: those that
    are read or queued.
    """

    def __init__(self, desk: Desk) -> None:
        self.link = Link(frames.from_worker, self.take, self.lost, patient=True)
        self.account: Account | None = None
        self._desk = desk
        self._runtime = desk.runtime
        self._open: dict[int, Decision | None] = {}
        self._pending: dict[int, asyncio.Task[None]] = {}
        self._logs = 0
        self._gone = False

    def take(self, messages: Sequence[FromWorker]) -> None:
        for message in messages:
            try:
                self._handle(message)
            except Exception:
                # Supervision: one message of one worker must not end the bus for all.
                self._runtime.telemetry.internal_error("bus")
                log.exception("a %s of a worker could not be handled", type(message).__name__)

    def _handle(self, message: FromWorker) -> None:
        match message:
            case frames.Ask():
                self._ask(message)
            case frames.Started() | frames.Token():
                if message.id in self._open:
                    self._runtime.emit(frames.fact_of(message))
            case frames.Done() | frames.Broke():
                self._end(message)
            case frames.HandedOn(id, alias):
                self._handed_on(id, alias)
            case frames.Logged():
                if self._desk.feedback is not None:
                    self._desk.feedback.hear(frames.ended_of(message))
            case frames.Pulse(streams, cpu):
                self._pulse(streams, cpu)
            case _:
                self._rarely(message)

    def _rarely(self, message: frames.Hello | frames.LogOpened | frames.LogLost | frames.Trouble) -> None:
        match message:
            case frames.Hello(index):
                self.account = self._desk.accounts.setdefault(index, Account())
                for told in self._desk.rules.values():
                    self.link.send(told)
                self.link.send(self._desk.welcome())
                self.link.send(frames.Serving(self._desk.wants))
                self._desk.changed()
            case frames.Trouble(where):
                self._runtime.telemetry.internal_error(where)
            case frames.LogOpened():
                self._log(1)
            case frames.LogLost():
                self._log(-1)

    # requests

    def _ask(self, ask: frames.Ask) -> None:
        assert self.account is not None
        self.account.requests += 1
        if ask.rewritten is not None and self._desk.rewriting is not None:
            asked, by = ask.rewritten
            self._desk.rewriting.count(asked, Choice(ask.model or "", by))
        self._open[ask.id] = None
        if self._desk.terms.reads:
            self._later(ask.id, self._read_and_decide(ask))
        elif isinstance(outcome := self._place(ask), Queued):
            self._later(ask.id, self._wait(ask.id))
        else:
            self._answer(ask.id, outcome)

    def _place(self, ask: frames.Ask, reading: Reading | None = None) -> Outcome | Queued:
        now = self._runtime.clock()
        return self._runtime.place(frames.request_of(ask, now, self._runtime.deadline(now)), reading)

    async def _read_and_decide(self, ask: frames.Ask) -> None:
        reading = await self._runtime.read(frames.call_of(ask))
        if isinstance(outcome := self._place(ask, reading), Queued):
            await self._wait(ask.id)
        else:
            self._answer(ask.id, outcome)

    async def _wait(self, request_id: int) -> None:
        self._answer(request_id, await self._runtime.wait(request_id))

    def _later(self, request_id: int, work: Coroutine[Any, Any, None]) -> None:
        task = self._desk.spawn(work)
        self._pending[request_id] = task
        task.add_done_callback(partial(self._no_more_pending, request_id))

    def _no_more_pending(self, request_id: int, task: asyncio.Task[None]) -> None:
        if self._pending.get(request_id) is task:
            del self._pending[request_id]

    def _answer(self, request_id: int, outcome: Outcome) -> None:
        if isinstance(outcome, Decision):
            self._open[request_id] = outcome
        else:
            del self._open[request_id]
        self.link.send(frames.answer(outcome))

    def _end(self, message: frames.Done | frames.Broke) -> None:
        if message.id not in self._open:
            return
        del self._open[message.id]
        self._give_up_waiting(message.id)
        self._runtime.emit(frames.fact_of(message))

    def _give_up_waiting(self, request_id: int) -> None:
        if (task := self._pending.pop(request_id, None)) is not None:
            task.cancel()

    def _handed_on(self, request_id: int, alias: str) -> None:
        decision = self._open.pop(request_id, None)
        if decision is not None and self._desk.feedback is not None:
            self._desk.feedback.expect(decision, alias, self._runtime.clock())

    # the connection

    def _pulse(self, streams: int, cpu: float) -> None:
        if self.account is not None:
            self.account.streams, self.account.cpu = streams, cpu
        self.link.send(frames.Pulse())

    def _log(self, change: int) -> None:
        self._logs += change
        if (feedback := self._desk.feedback) is not None:
            feedback.opened() if change > 0 else feedback.lost()

    def lost(self) -> None:
        """The worker has gone: all that it had open has ended."""
        if self._gone:
            return
        self._gone = True
        if self.account is not None:
            self.account.streams = 0
        open_requests, self._open = list(self._open), {}
        for request_id in open_requests:
            self._give_up_waiting(request_id)
            self._runtime.emit(Failed(request_id, FailureReason.SHUTDOWN))
        while self._logs:
            self._log(-1)
        self._desk.left(self)
