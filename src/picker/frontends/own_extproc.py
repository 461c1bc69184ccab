"""ext-proc for an Envoy of picker's own: a request that comes in one message is decided and answered on the spot.

No task, no stream that is kept, one message each way; the same `Exchange`, and the same promises as `ExtProc`, which
follows everything else: requests that have to wait, and those that come in the ordinary way.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

import msgspec

from picker.errors import WireError
from picker.exchange import (
    REQUEST_HEADER,
    Action,
    Decided,
    Forward,
    Report,
    RequestBody,
    RequestHead,
    Respond,
    Submit,
)
from picker.frontends import loops
from picker.frontends.als import AccessLog
from picker.frontends.extproc import Bounds, ExtProc, Mode, Stream, error_answer
from picker.frontends.grpc_server import Call, Early
from picker.frontends.models import asks_for_models
from picker.frontends.own_feedback import OwnPorter, RetryWatch
from picker.gate import Gate, UndecidedError
from picker.types import Outcome, Queued
from picker.wire import own_envoy
from picker.wire.extproc import SERVICE

log = logging.getLogger("picker.extproc")

NO_RETRY = ("x-envoy-max-retries", "0")


class Desk(Protocol):
    """Decides in this process, and at once."""

    def place(self, request_id: int, submit: Submit) -> Outcome | Queued:
        """Where a request goes, or that it has to `wait`."""
        ...

    async def wait(self, request_id: int) -> Outcome:
        """The outcome of a request that was queued."""
        ...


Models = Callable[[str, Iterable[tuple[bytes, bytes]]], Awaitable[Respond]]
"""The answer to a question for models, from its path and headers."""


class OwnExtProc(ExtProc):
    """desk: whom requests in one message are asked of; None: there are none such. See `ExtProc`.

    retries: what is left of them. models: None where an endpoint is to say which models there are. via: tells requests
    that have been here before; None: nobody looks.
    """

    def __init__(
        self,
        runtime: Gate,
        feedback: AccessLog,
        *,
        porter: OwnPorter,
        retries: RetryWatch,
        addresses: Mapping[str, str],
        bounds: Bounds,
        max_message_bytes: int,
        desk: Desk | None,
        models: Models | None = None,
        via: loops.Via | None = None,
    ) -> None:
        super().__init__(
            runtime,
            mode=Mode.LEAN,
            feedback=feedback,
            bounds=bounds,
            max_message_bytes=max_message_bytes,
            addresses=addresses,
            porter=porter,
            whole=True,
        )
        self._desk = desk
        self._own_feedback = feedback
        self._own_porter = porter
        self._retries = retries
        self._models = models
        self._via = via

    # requests whose head comes first

    async def _met(self, stream: Stream, head: RequestHead) -> Respond | None:
        if (refusal := self._let_in(stream, head)) is not None:
            return refusal
        path = head.path.partition("?")[0]
        if self._models is None or head.method != "GET" or not asks_for_models(path):
            return None
        stream.until = self._runtime.clock() + self._bounds.decision
        return await self._models(
            path, [(name.encode(), value.encode("latin-1")) for name, value in head.headers.items()]
        )

    def _let_in(self, stream: Stream, head: RequestHead) -> Respond | None:
        exchange = stream.exchange
        if (refusal := self._own_porter.came(exchange.id, head)) is not None:
            return refusal
        said = head.headers.get(loops.NAME)
        if said is not None and self._via is not None and self._via.has_passed([(loops.FIELD, said.encode("latin-1"))]):
            return error_answer(loops.STATUS, loops.MESSAGE)
        most = self._own_porter.body_limit(exchange.id)
        if most is not None and most < exchange.limits.max_body_bytes:
            exchange.limits = replace(exchange.limits, max_body_bytes=most)
        return None

    def _outgoing(self, forward: Forward) -> Forward:
        if self._retries.allowed(self._runtime.clock()):
            return forward
        return msgspec.structs.replace(forward, set_headers=(*forward.set_headers, NO_RETRY))

    # requests in one message

    def _early_answers(self) -> dict[str, Early]:
        return {} if self._desk is None else {f"/{SERVICE}/Process": partial(self._answered, self._desk)}

    def _answered(self, desk: Desk, call: Call, message: bytes) -> bool:
        """See `Early`. What goes wrong before there is a request is for the handler to find again, and to say."""
        try:
            request = own_envoy.decode(message)
            if request is None:
                return False
            stream = self._opened(call)
        except (WireError, UndecidedError):
            return False
        try:
            self._carry_out(stream, self._actions(desk, stream, request))
        except Exception:
            # Supervision: a bug of ours ends one request, and says so.
            self._runtime.telemetry.internal_error("extproc")
            log.exception("request %d failed in the ext-proc front end", stream.exchange.id)
            self._say(stream, error_answer(500, "The gateway failed to handle this request."))
        return True

    def _actions(self, desk: Desk, stream: Stream, request: own_envoy.Whole) -> list[Action]:
        """What is to be done for a request now; nothing when it has to wait, and has a task for that."""
        exchange = stream.exchange
        stream.alias = request.headers.get("x-request-id", "")
        head = RequestHead("POST", request.path, request.headers, followed=False, walked=True)
        if (refusal := self._let_in(stream, head)) is not None:
            return [refusal]
        actions = exchange.receive(head) or exchange.receive(RequestBody(request.body, end=True))
        if not (actions and isinstance(submit := actions[-1], Submit)):
            return actions
        outcome = desk.place(exchange.id, submit)
        if isinstance(outcome, Queued):
            self._queue(stream, desk)
            return []
        return exchange.receive(Decided(outcome))

    def _carry_out(self, stream: Stream, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Report):
                self._runtime.emit(action.fact)
            elif isinstance(action, Forward):
                self._send_on(stream, action)
            elif isinstance(action, Respond):
                self._say(stream, action)

    def _send_on(self, stream: Stream, action: Forward) -> None:
        headers = (*self._outgoing(action).set_headers, (REQUEST_HEADER, self._own_feedback.mark(stream.exchange.id)))
        body = None if action.edit is None else action.body
        stream.call.answer(own_envoy.verdict(stream.codec.destination(action.decision), headers, body))
        self._hand_on(stream, action, self._own_feedback)

    def _say(self, stream: Stream, answer: Respond) -> None:
        """Answer a request ourselves, for which there is nothing more to do."""
        (reply,) = stream.codec.encode(answer)
        stream.call.answer(reply.SerializeToString())
        self._own_porter.answered(stream.exchange.id, answer.status)
        self._leave_off(stream)

    # requests that wait

    def _queue(self, stream: Stream, desk: Desk) -> None:
        """Give the request a task, which a client that leaves may end before it has begun."""
        assert self._server is not None
        self._streams.add(stream)
        call = stream.call
        call.task = self._server.start(call, lambda call: self._follow(stream, self._decided(stream, desk)))
        call.task.add_done_callback(lambda task: self._unbegun(stream))

    async def _decided(self, stream: Stream, desk: Desk) -> list[Action]:
        outcome = await desk.wait(stream.exchange.id)
        return await self._runtime.receive(stream.exchange, Decided(outcome))

    def _unbegun(self, stream: Stream) -> None:
        if stream in self._streams:  # else its task has seen to it
            self._streams.discard(stream)
            self._leave_off(stream)
            stream.call.close()
