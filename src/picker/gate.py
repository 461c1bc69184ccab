"""What front ends know of picker: one request's life is opened, fed and closed here, wherever the decision is made.

Feeds the `Exchange`, carries out what concerns picker itself (ask for a decision, pass facts on) and hands the rest to
the front end for its wire. `Runtime` decides in this process, `workers.remote` asks the process that does; front ends
cannot tell them apart.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from picker.exchange import (
    Action,
    Closed,
    Decided,
    Event,
    Exchange,
    Limits,
    Phase,
    Report,
    Submit,
)
from picker.prefix.blocks import BlockHasher
from picker.types import NO_HEADERS, Fact, FailureReason, Outcome, Request

Clock = Callable[[], float]


class UndecidedError(Exception):
    """Nobody decides just now. The data plane's own rule for a picker that fails is to be followed."""


class ErrorCount(Protocol):
    """Where front ends tell of errors of picker's own."""

    def internal_error(self, where: str) -> None: ...


class Gate(abc.ABC):
    """clock: seconds, monotonic; the only clock that front ends use. telemetry: told of their own errors."""

    telemetry: ErrorCount

    def __init__(self, clock: Clock, limits: Limits) -> None:
        self.clock = clock
        self.limits = limits
        self._ids: Iterator[int] = itertools.count(1)

    @abc.abstractmethod
    async def decide(self, request_id: int, submit: Submit) -> Outcome:
        """Where a request goes. Waits while it is read or queued; whoever gives up waiting closes its exchange.

        Raises UndecidedError.
        """

    @abc.abstractmethod
    def emit(self, fact: Fact) -> None:
        """Pass a fact on to whoever decides."""

    def open(self) -> Exchange:
        """Begin a request. Every exchange must be ended by its own last event or by `Closed`. Raises UndecidedError."""
        return Exchange(next(self._ids), self.limits)

    async def receive(self, exchange: Exchange, event: Event) -> list[Action]:
        """Feed one event; returns the actions for the front end. Waits only while the request is read or queued.

        If the caller is cancelled while waiting, it must still feed `Closed`, which takes the request out of the queue.
        Raises UndecidedError.
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
            pending = exchange.receive(Decided(await self.decide(exchange.id, asked)))
        return actions

    async def ask(self, exchange: Exchange, submit: Submit) -> list[Action]:
        """Have decided what `follow` has left open; the actions are those of `receive`. Raises UndecidedError."""
        return self.follow(exchange, Decided(await self.decide(exchange.id, submit)))

    def follow(self, exchange: Exchange, event: Event) -> list[Action]:
        """As `receive`, but without waiting: a `Submit` may be the last of the actions, and is for `ask`.

        Of what comes after a response head only a request that may be sent `again` has any.
        """
        actions: list[Action] = []
        for action in exchange.receive(event):
            if isinstance(action, Report):
                self.emit(action.fact)
            else:
                actions.append(action)
        return actions

    def close(self, exchange: Exchange, reason: FailureReason = FailureReason.CLIENT_GONE) -> None:
        """End an exchange that has not ended by itself; harmless when it has."""
        if exchange.phase is Phase.DONE:
            return
        for action in exchange.receive(Closed(reason)):
            if isinstance(action, Report):
                self.emit(action.fact)


def prepare(
    request_id: int, submit: Submit, hasher: BlockHasher, asked: frozenset[str], now: float, deadline: float | None
) -> Request:
    """What a scheduler may know of a call: hashes and sizes, no text. asked: headers that decisions depend on."""
    call = submit.call
    return Request(
        id=request_id,
        model=call.model,
        arrived_at=now,
        block_hashes=hasher.hash(call.prompt, root=hasher.root(call.model, call.salt)),
        prompt_bytes=len(call.prompt),
        extra_bytes=call.extra_bytes,
        prompt_tokens=call.prompt_tokens,
        max_tokens=call.max_tokens,
        priority=call.priority,
        session=call.session,
        streaming=call.stream,
        subset=submit.subset,
        exclude=submit.exclude,
        deadline=deadline,
        headers=_asked_for(submit.headers, asked) if asked else NO_HEADERS,
        rewritten=call.rewritten,
    )


def _asked_for(headers: Mapping[str, str], asked: frozenset[str]) -> Mapping[str, str]:
    """What the policy may see of a request's headers."""
    return {name: headers[name] for name in asked if name in headers}
