"""Feedback from the data plane's access log: how requests ended whose responses do not pass through here.

`AccessLog` serves it; where several processes do, what it tells is kept in one of them: an entry may come to another
than its request did. `Feedback` owns the requests that have been routed and not heard of since, and their promise: each
gets exactly one terminal fact, told by the log, or when it would be over by prediction where there is no log, or at
shutdown.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from picker.core.scheduler import Scheduler
from picker.errors import WireError
from picker.exchange import REQUEST_HEADER
from picker.frontends.grpc_server import Call, Code, Handler
from picker.gate import Gate
from picker.types import Decision, Failed, FailureReason, Finished, ResponseStarted
from picker.wire.als import REPLY, SERVICE, Counted, Ended, decode

log = logging.getLogger("picker.als")

# Seconds that a request may run unheard of while its data plane tells us of others: longer than most generations, so
# that only what the log has lost is released by it.
_PATIENCE = 300.0
# How many times longer than predicted it may run besides.
_ALLOWANCE = 4.0
# Why a request ends of which nobody has told: nobody's fault.
_UNHEARD = FailureReason.UNHEARD
_KEEP = 0.98

Predict = Callable[[Decision], float]
"""Seconds that a request will take from its decision to the end of its response."""


@dataclass(slots=True)
class _Waiting:
    """A request in the hands of the data plane since then. alias: its `x-request-id`. predicted: seconds it takes."""

    id: int
    alias: str
    since: float
    predicted: float


class Elsewhere(Protocol):
    """Other pickers that the same data plane asks: any of us may be told of any of our requests."""

    def hears(self, logs: int) -> None:
        """So many logs are open here."""
        ...

    def pass_on(self, ended: Ended) -> None:
        """An entry is not about a request of ours."""
        ...


def marked(request_id: int, secret: str) -> str:
    """What a request is sent on with as `x-picker-request-id`."""
    return f"{request_id}-{secret}"


class AccessLog(abc.ABC):
    """Serves the access log service to data planes; what becomes of entries is up to those who inherit."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {f"/{SERVICE}/StreamAccessLogs": self._listen}

    async def _listen(self, call: Call) -> None:
        self.opened()
        try:
            while (message := await call.read()) is not None:
                for ended in decode(message, REQUEST_HEADER):
                    self.hear(ended)
            await call.write(REPLY)
        except WireError as error:
            self.gate.telemetry.internal_error("als-protocol")
            log.warning("the access log cannot be read: %s", error.message)
            call.end(Code.INVALID_ARGUMENT, error.message)
        finally:
            self.lost()

    @abc.abstractmethod
    def __len__(self) -> int:
        """Requests whose end is awaited here."""

    @abc.abstractmethod
    def opened(self) -> None:
        """A log begins."""

    @abc.abstractmethod
    def lost(self) -> None:
        """A log has ended or broken off."""

    @abc.abstractmethod
    def hear(self, ended: Ended) -> None:
        """An entry: a request has ended, ours or somebody else's."""

    @abc.abstractmethod
    def mark(self, request_id: int) -> str:
        """What a request is sent on with as `x-picker-request-id`."""

    @abc.abstractmethod
    def expect(self, decision: Decision, alias: str, now: float) -> None:
        """A request has left for its endpoint. alias: its `x-request-id`, "" without one."""

    @abc.abstractmethod
    def sweep(self, now: float) -> None:
        """End those that must be over. To be called now and then."""

    @abc.abstractmethod
    def close(self, reason: FailureReason) -> None:
        """End all that are left."""

    @abc.abstractmethod
    async def drained(self, timeout: float) -> None:
        """Wait until every request has been heard of, at most `timeout` seconds."""


class Feedback(AccessLog):
    """Requests routed in lean mode, until their end is known.

    predict: how long a request will take; corrected by how long those took that the log told of. secret: in marks;
    clients and engines see those of their own requests, and cannot make up others'. None: a new one. elsewhere: who
    is told what is not ours; None: nobody.
    """

    def __init__(self, gate: Gate, predict: Predict, *, patience: float = _PATIENCE, secret: str | None = None) -> None:
        super().__init__(gate)
        self.secret = secret or secrets.token_hex(8)
        self.elsewhere: Elsewhere | None = None
        self._predict = predict
        self._patience = patience
        self._waiting: dict[int, _Waiting] = {}
        self._aliases: dict[str, int] = {}
        self._none = asyncio.Event()
        self._none.set()
        self._logs = self._logs_elsewhere = 0
        self._lost_at = -1.0
        self._took, self._expected = 1.0, 1.0

    def __len__(self) -> int:
        return len(self._waiting)

    # what the streams tell

    def mark(self, request_id: int) -> str:
        return marked(request_id, self.secret)

    def expect(self, decision: Decision, alias: str, now: float) -> None:
        waiting = _Waiting(decision.request_id, alias, now, self._predict(decision))
        self._waiting[waiting.id] = waiting
        self._none.clear()
        if alias:
            # Of two requests with one id neither may be taken for the other; a mark tells them apart.
            self._aliases[alias] = -1 if alias in self._aliases else waiting.id

    # what the log tells

    def opened(self) -> None:
        self._logs += 1
        if self.elsewhere is not None:
            self.elsewhere.hears(self._logs)

    def lost(self) -> None:
        self._logs -= 1
        self._lost_at = self.gate.clock()
        if self.elsewhere is not None:
            self.elsewhere.hears(self._logs)

    def others_hear(self, logs: int) -> None:
        """So many logs are open elsewhere, from where we are told what is ours."""
        if logs < self._logs_elsewhere:
            self._lost_at = self.gate.clock()
        self._logs_elsewhere = logs

    def hear(self, ended: Ended) -> None:
        if not self.settle(ended) and self.elsewhere is not None:
            self.elsewhere.pass_on(ended)

    def settle(self, ended: Ended) -> bool:
        """Report a request's end, once; whether it was ours."""
        request_id = self._meant(ended)
        if (waiting := self._forget(request_id)) is not None:
            self._report(waiting, ended)
        return request_id >= 0

    def _report(self, waiting: _Waiting, ended: Ended) -> None:
        if ended.duration is not None and ended.failure is None:
            self._took = self._took * _KEEP + ended.duration
            self._expected = self._expected * _KEEP + waiting.predicted
        emit = self.gate.emit
        if ended.status and ended.upstream is not None:
            emit(ResponseStarted(waiting.id, ended.status, ended.upstream))
        if ended.failure is not None or not ended.status:
            emit(Failed(waiting.id, ended.failure or _UNHEARD))
        else:
            emit(Finished(waiting.id, ended.status, ended.usage if isinstance(ended, Counted) else None))

    def _meant(self, ended: Ended) -> int:
        """The id of the request that an entry is about; -1 for somebody else's."""
        if ended.mark is not None:
            number, _, secret = ended.mark.partition("-")
            ours = secrets.compare_digest(secret.encode(), self.secret.encode())
            return int(number) if ours and number.isdecimal() else -1
        # A client that left before the verdict was carried out: the request never got its mark.
        return self._aliases.get(ended.request_id, -1) if ended.failure is FailureReason.CLIENT_GONE else -1

    def _forget(self, request_id: int) -> _Waiting | None:
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None and waiting.alias:
            self._aliases.pop(waiting.alias, None)
        if not self._waiting:
            self._none.set()
        return waiting

    # what nobody tells

    def sweep(self, now: float) -> None:
        """End those that must be over: by prediction without a log to wait for, else after a long time."""
        scale = min(max(self._took / self._expected, 0.1), 10.0)
        over = [each.id for each in self._waiting.values() if now >= self._until(each, scale)]
        for request_id in over:
            self._forget(request_id)
            self.gate.emit(Failed(request_id, _UNHEARD))

    def _until(self, waiting: _Waiting, scale: float) -> float:
        predicted = waiting.predicted * scale
        # A log that broke off may have had the entries of all that were under way then.
        if not (self._logs or self._logs_elsewhere) or waiting.since <= self._lost_at:
            return waiting.since + predicted
        return waiting.since + max(self._patience, _ALLOWANCE * predicted)

    def close(self, reason: FailureReason) -> None:
        for request_id in list(self._waiting):
            self._forget(request_id)
            self.gate.emit(Failed(request_id, reason))

    async def drained(self, timeout: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._none.wait()


def predicted_seconds(scheduler: Scheduler, decision: Decision) -> float:
    """How long a request should take at its endpoint: its prefill, and an answer of usual length in today's company."""
    learned, pool = scheduler.learned, scheduler.pool
    row = pool.row(decision.endpoint.name)
    if row is None:
        return 0.0
    prefill = learned.work(decision.prompt_tokens - decision.matched_tokens, decision.prompt_tokens)
    fixed, sequence, token = learned.decode.coefficients.tolist()
    step = fixed + pool.inflight.item(row) * (sequence + token * decision.prompt_tokens)
    return prefill + float(step * learned.output_tokens.value)
