"""One request's life as a state machine: events in, actions out, exactly one terminal report.

Both front ends turn their own wire into these events and these actions into their own wire; what happens between
is decided here, once. An `Exchange` parses the body a single time, asks for a decision, follows the response for its
first token and usage, and promises: every decision it accepts is followed by exactly one `Finished` or `Failed`.
No IO, no clock, no knowledge of how a decision is made.

    HEAD -> BODY -> DECIDING -> UPSTREAM -> RESPONSE -> DONE
                        ^----------'----------'  (an endpoint failed before its first byte: decide again)

A front end that owns the upstream has the beginning of a response held back here until it is worth passing on: a 503,
or the empty answer of an engine that is shutting down, is then another endpoint's to better.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from picker.errors import WireError
from picker.rewrites import Rewriting
from picker.types import (
    NO_HEADERS,
    Call,
    CallKind,
    Decision,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    Outcome,
    Rejection,
    RejectReason,
    ResponseStarted,
    Rewritten,
)
from picker.wire import openai, sse
from picker.wire.model_restore import Restorer, restorable
from picker.wire.model_span import Edit, model_edit

Headers = tuple[tuple[str, str], ...]

ENDPOINT_HEADER = "x-picker-endpoint"
REQUEST_HEADER = "x-picker-request-id"
DROPPED_HEADER = "x-llm-d-request-dropped-reason"
# By their new and old names: the new one counts.
OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
SESSION_HEADERS = ("x-session-id", "session-id", "x-session-affinity", "x-claude-code-session-id")


# --- events: what happened ---------------------------------------------------------------------------------

# Events and actions are structs rather than frozen dataclasses, which take five times as long to make: a request makes
# some fifteen of them, and a streamed token two.


def _bodyless_repr(of: msgspec.Struct) -> str:
    """Everything but what clients and engines have said."""
    told = [f"{name}={getattr(of, name)!r}" for name in of.__struct_fields__ if name not in ("data", "body")]
    return f"{type(of).__name__}({', '.join(told)})"


class RequestHead(msgspec.Struct, frozen=True, gc=False):
    """Request line and headers (names in lower case). end: there is no body.

    subset: addresses the data plane restricts this request to, when it says so. followed: the response will be fed in,
    too; else nobody can tell when its first token comes. walked: the data plane tries a decision's fallbacks by itself,
    and who has answered is known only if it says so. again: the front end can send the request to another endpoint as
    long as nothing of a response has been passed on; it must be ready for `Submit` among the actions of a response.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    end: bool = False
    subset: frozenset[str] | None = None
    followed: bool = True
    walked: bool = False
    again: bool = False


class RequestBody(msgspec.Struct, frozen=True, gc=False):
    data: bytes
    end: bool = False
    subset: frozenset[str] | None = None

    __repr__ = _bodyless_repr


class Decided(msgspec.Struct, frozen=True, gc=False):
    outcome: Outcome


class UpstreamFailed(msgspec.Struct, frozen=True, gc=False):
    """The endpoint could not be reached, or broke off; only a front end that owns the upstream sends this.

    hung: it gave no sign of life for much longer than it should have taken; another one is worth a try.
    """

    reason: FailureReason
    hung: bool = False


class ResponseHead(msgspec.Struct, frozen=True, gc=False):
    """served_by: "ip:port" that answered, when the data plane says so. end: there is no body."""

    status: int
    headers: Mapping[str, str]
    end: bool = False
    served_by: str | None = None


class ResponseBody(msgspec.Struct, frozen=True, gc=False):
    data: bytes
    end: bool = False

    __repr__ = _bodyless_repr


class Closed(msgspec.Struct, frozen=True, gc=False):
    """The client, the stream or the process went away; nothing more will come."""

    reason: FailureReason = FailureReason.CLIENT_GONE


Event = RequestHead | RequestBody | Decided | UpstreamFailed | ResponseHead | ResponseBody | Closed


# --- actions: what the shell must do -----------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, gc=False):
    """Decide where this goes and answer with `Decided`. exclude: endpoint names that failed it already.

    headers: the client's, of which a policy sees those that it asks for.
    """

    call: Call
    subset: frozenset[str] | None = None
    exclude: frozenset[str] = frozenset()
    headers: Mapping[str, str] = msgspec.field(default_factory=lambda: NO_HEADERS)


class Forward(msgspec.Struct, frozen=True, gc=False):
    """Send the request to `decision.endpoint` with these headers set.

    body: as the client sent it, but for `edit`, which has been made and is for those who keep the client's.
    """

    decision: Decision
    body: bytes
    set_headers: Headers = ()
    bodyless: bool = False
    edit: Edit | None = None

    __repr__ = _bodyless_repr


class Respond(msgspec.Struct, frozen=True, gc=False):
    """Answer the client ourselves; the exchange is over."""

    status: int
    headers: Headers
    body: bytes


class PassHead(msgspec.Struct, frozen=True, gc=False):
    """Hand the response head on to the client with these headers set.

    resized: the body's length will be another than the head says.
    """

    set_headers: Headers
    end: bool = False
    resized: bool = False


class PassBody(msgspec.Struct, frozen=True, gc=False):
    data: bytes
    end: bool = False

    __repr__ = _bodyless_repr


class Cut(msgspec.Struct, frozen=True, gc=False):
    """The response cannot be completed after its head was sent: break the client's connection off."""

    reason: FailureReason


class Report(msgspec.Struct, frozen=True, gc=False):
    fact: Fact


Action = Submit | Forward | Respond | PassHead | PassBody | Cut | Report


# --- the machine -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """max_body_bytes: larger requests get 413. max_attempts: endpoints tried before the first response byte.

    name_endpoint: tell the client which endpoint served it (`x-picker-endpoint`) and our request id. objectives: the
    priorities of the objectives that requests may name in a header; a name that is not there has the priority 0.
    retry_statuses: answers of an endpoint that another one may better. rewriting: which models requests get instead of
    those they name, live; None where nobody says.
    """

    max_body_bytes: int = 32 * 1024 * 1024
    max_attempts: int = 3
    retry_statuses: frozenset[int] = frozenset((502, 503, 504))
    name_endpoint: bool = True
    objectives: Mapping[str, int] = field(default_factory=dict)
    rewriting: Rewriting | None = None


class Phase(enum.Enum):
    HEAD = "head"
    BODY = "body"
    DECIDING = "deciding"
    UPSTREAM = "upstream"
    RESPONSE = "response"
    DONE = "done"


_STATUS_OF_FAILURE = {FailureReason.TIMEOUT: 504, FailureReason.SHUTDOWN: 503}
# Why there is no answer from an endpoint, in the words of llm-d's endpoint picker.
_DROPPED = {
    RejectReason.NO_ENDPOINTS: "rejected-no-endpoints",
    RejectReason.NO_MATCH: "rejected-no-endpoints",
    RejectReason.SATURATED: "rejected-saturated",
    RejectReason.EXPIRED: "rejected-ttl-expired",
    RejectReason.SHUTDOWN: "rejected-shutting-down",
}
# So much of a response is held back at most: a refusal is a few hundred bytes, an empty answer one or two KB.
_HELD_BYTES = 64 * 1024
_EMPTY_ANSWER_BYTES = 4 * 1024
_END_MARKER = b"data: [DONE]"
_KEPT_OF_REFUSALS = ("content-type", "retry-after")


class Exchange:
    """One request. Feed it every event in order; do every action it returns, in order.

    `Submit` must be answered by `Decided` before anything but `Closed`. Events that come after the end are ignored:
    data planes send them (a body still arriving after a 413, a close after the last byte).
    """

    __slots__ = (
        "_attempts",
        "_body",
        "_decision",
        "_edit",
        "_failed",
        "_head",
        "_held",
        "_held_bytes",
        "_observer",
        "_pieces",
        "_refusal",
        "_restorer",
        "_size",
        "_status",
        "_submit",
        "_subset",
        "id",
        "limits",
        "phase",
    )

    def __init__(self, request_id: int, limits: Limits) -> None:
        self.id = request_id
        self.limits = limits
        self.phase = Phase.HEAD
        self._head: RequestHead | None = None
        self._body: list[bytes] = []
        self._size = 0
        self._subset: frozenset[str] | None = None
        self._submit: Submit | None = None
        self._decision: Decision | None = None
        self._observer: sse.Observer | None = None
        self._attempts = 0
        self._failed: FailureReason | None = None
        self._status = 0
        self._held: PassHead | None = None  # the response's head, while it may still be replaced by another's
        self._pieces: list[bytes] = []  # and what has come of its body
        self._held_bytes = 0
        self._refusal: Respond | None = None  # the answer if nobody has a better one
        self._edit: Edit | None = None  # what was changed of the body
        self._restorer: Restorer | None = None  # of a response that is changed, too

    def receive(self, event: Event) -> list[Action]:
        """Advance by one event; raises `WireError` when the data plane sends events out of order."""
        if self.phase is Phase.DONE:
            return []
        match event:
            case ResponseBody():
                return self._response_body(event)
            case RequestHead():
                return self._request_head(event)
            case RequestBody():
                return self._request_body(event)
            case Decided(outcome):
                return self._decided(outcome)
            case ResponseHead():
                return self._response_head(event)
            case UpstreamFailed(reason, hung):
                return self._upstream_failed(reason, hung)
            case Closed(reason):
                return self._end([], self._failure(reason))

    @property
    def passes(self) -> Callable[[bytes, int, int], bool]:
        """Tells whether data[start:end], the next of a body, may go to the client with nothing to be done for it.

        A shortcut for most of a stream, from the response's head on: what it does not let pass has to be received as
        an event, and so has the end. Nothing passes while a response is held back.
        """
        return _nothing_passes if self._observer is None or self._restorer is not None else self._observer.passes

    # request side

    def _request_head(self, head: RequestHead) -> list[Action]:
        self._expect(Phase.HEAD)
        self._head, self._subset = head, head.subset
        if head.end:
            return self._ask(Call(kind=CallKind.OTHER, model=None, session=self._session()))
        self.phase = Phase.BODY
        return self._too_large() if self._announces_too_much(head.headers.get("content-length", "")) else []

    def _announces_too_much(self, length: str) -> bool:
        # Longer numbers are not converted: `int` is slow with thousands of digits, and then refuses them.
        return length.isdecimal() and (len(length) > 18 or int(length) > self.limits.max_body_bytes)

    def _request_body(self, event: RequestBody) -> list[Action]:
        self._expect(Phase.BODY)
        self._size += len(event.data)
        if self._size > self.limits.max_body_bytes:
            return self._too_large()
        self._body.append(event.data)
        if event.subset is not None:
            self._subset = event.subset
        return self._parse() if event.end else []

    def _parse(self) -> list[Action]:
        assert self._head is not None
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = [body]
        try:
            call = openai.parse_call(self._head.path, body)
        except WireError as error:
            return self._answer(error.status, error.message, kind=error.kind, param=error.param)
        if self.limits.rewriting is not None:
            call = self._rewritten(call, body, self.limits.rewriting)
        session = self._session()
        return self._ask(call if session is None else msgspec.structs.replace(call, session=session))

    def _rewritten(self, call: Call, body: bytes, rewriting: Rewriting) -> Call:
        """The call as somebody wants it to be who says which models are served, and the body with it."""
        assert self._head is not None
        choice = rewriting.choose(call.model, self._head.headers)
        if choice is None:
            return call
        asked, model = call.model, choice.model
        if model != asked:
            # Where nothing is generated, a body without a model may well be about something else.
            insert = call.kind is not CallKind.OTHER or bool(call.prompt)
            self._edit = edit = model_edit(body, model, insert=insert)
            if edit is None:
                return call
            self._body = [body := edit.applied(body)]
        rewriting.count(asked, choice)
        whole = body if call.body else b""
        return msgspec.structs.replace(call, model=model, body=whole, rewritten=Rewritten(asked, choice.by))

    def _ask(self, call: Call) -> list[Action]:
        assert self._head is not None
        if call.stream and not self._head.followed:
            call = msgspec.structs.replace(call, stream=False)
        if self.limits.objectives and (objective := self._said(OBJECTIVE_HEADERS)) is not None:
            call = msgspec.structs.replace(call, priority=self.limits.objectives.get(objective, 0))
        self.phase = Phase.DECIDING
        self._submit = Submit(call, self._subset, headers=self._head.headers)
        return [self._submit]

    def _session(self) -> str | None:
        return self._said(SESSION_HEADERS)

    def _said(self, names: tuple[str, ...]) -> str | None:
        """What the first of these headers says that is there."""
        assert self._head is not None
        headers = self._head.headers
        for name in names:
            if said := headers.get(name):
                return said
        return None

    # decision

    def _decided(self, outcome: Outcome) -> list[Action]:
        self._expect(Phase.DECIDING)
        if isinstance(outcome, Rejection):
            return self._reject(outcome)
        assert self._head is not None
        self._decision = outcome
        self._attempts += 1
        self.phase = Phase.UPSTREAM
        rank = outcome.endpoint.rank
        pin: Headers = () if rank is None else (("x-data-parallel-rank", str(rank)),)
        body = self._body[0] if self._body else b""
        return [Forward(outcome, body, pin, bodyless=self._head.end, edit=self._edit)]

    def _reject(self, rejection: Rejection) -> list[Action]:
        if self._refusal is not None:
            return self._end([self._refusal], [])
        if self._failed is not None and rejection.reason is RejectReason.NO_MATCH:
            return self._give_up(self._failed, "there is no other to try")
        retry = rejection.retry_after
        headers: Headers = () if retry is None else (("retry-after", str(max(1, math.ceil(retry)))),)
        if (dropped := _DROPPED.get(rejection.reason)) is not None:
            headers = (*headers, (DROPPED_HEADER, dropped))
        param = "model" if rejection.reason is RejectReason.UNKNOWN_MODEL else None
        message = rejection.message + (self._detour() if param is not None else "")
        return self._answer(rejection.status, message, headers=headers, param=param)

    def _detour(self) -> str:
        """How a request came by a model that nobody serves."""
        rewritten = None if self._submit is None else self._submit.call.rewritten
        if rewritten is None or self._edit is None:
            return ""
        named = "no model" if rewritten.asked is None else f"`{rewritten.asked}`"
        return f" The request names {named}; the rewrite {rewritten.by!r} leads from there."

    # response side

    def _response_head(self, event: ResponseHead) -> list[Action]:
        self._expect(Phase.UPSTREAM)
        assert self._submit is not None
        self.phase = Phase.RESPONSE
        stream = self._submit.call.stream
        self._observer = sse.observer_for(event.headers.get("content-type", ""), stream=stream)
        self._status = event.status
        started = Report(ResponseStarted(self.id, event.status, self._served_by(event)))
        restorer = self._restorer = None if self._edit is None else self._restoring(event)
        first = PassHead(self._names(event.served_by), event.end, restorer is not None)
        if self._replaceable(event):
            self._held, self._held_bytes = first, 0
            if event.status != 200:
                self._refusal = self._as_answer(event, first)
            return [started, *self._refused()] if event.end else [started]
        self._body, self._submit = [], None  # nobody asks again
        actions: list[Action] = [started, first]
        if not event.end:
            return actions
        self._observer.feed(b"", end=True)
        return self._end(actions, self._finished())

    def _restoring(self, event: ResponseHead) -> Restorer | None:
        """What gives the client the name that it asked for; the engine's stays where the client gave none."""
        assert self._submit is not None
        call = self._submit.call
        if event.end or call.rewritten is None or call.rewritten.asked is None or not restorable(event.headers):
            return None
        return Restorer(call.model or "", call.rewritten.asked)

    def _replaceable(self, event: ResponseHead) -> bool:
        """Whether what comes may be of no use, and another endpoint may be asked instead."""
        if not self._may_try_again():
            return False
        if event.status == 200:
            return not event.end
        return event.status in self.limits.retry_statuses

    def _may_try_again(self) -> bool:
        assert self._head is not None
        return self._head.again and self._attempts < self.limits.max_attempts and self._repeatable()

    def _repeatable(self) -> bool:
        assert self._head is not None
        return openai.repeatable(self._head.method, self._head.path)

    def _as_answer(self, event: ResponseHead, first: PassHead) -> Respond:
        kept = tuple((name, event.headers[name]) for name in _KEPT_OF_REFUSALS if name in event.headers)
        return Respond(event.status, kept + first.set_headers, b"")

    def _served_by(self, event: ResponseHead) -> str | None:
        assert self._head is not None
        assert self._decision is not None
        return event.served_by if self._head.walked else event.served_by or self._decision.endpoint.address

    def _names(self, served_by: str | None) -> Headers:
        assert self._decision is not None
        if not self.limits.name_endpoint:
            return ()
        name = self._decision.endpoint.name
        moved = served_by is not None and served_by != self._decision.endpoint.address
        return ((ENDPOINT_HEADER, served_by if moved and served_by else name), (REQUEST_HEADER, str(self.id)))

    def _response_body(self, event: ResponseBody) -> list[Action]:
        self._expect(Phase.RESPONSE)
        observer = self._observer
        assert observer is not None
        if self._held is not None:
            return self._held_body(event, self._held, observer)
        waiting = not observer.first_token
        observer.feed(event.data, end=event.end)
        data = event.data if self._restorer is None else self._restorer.feed(event.data, end=event.end)
        actions: list[Action] = [PassBody(data, event.end)]
        if waiting and observer.first_token and self._status < 400:
            actions.append(Report(FirstToken(self.id)))
        return self._end(actions, self._finished()) if event.end else actions

    def _held_body(self, event: ResponseBody, first: PassHead, observer: sse.Observer) -> list[Action]:
        """More of a response that nobody has seen yet: let it go as soon as it is an answer."""
        assert self._submit is not None
        observer.feed(event.data, end=event.end)
        self._pieces.append(event.data)
        self._held_bytes += len(event.data)
        if self._status != 200:
            if event.end:
                return self._refused()
            return [] if self._held_bytes <= _HELD_BYTES else self._let_go(event, first, observer)
        if observer.empty_abort or (event.end and self._says_nothing()):
            return self._refused()
        if observer.error in self.limits.retry_statuses:
            return self._refused()
        undecided = not event.end and self._undecided(observer)
        return [] if undecided else self._let_go(event, first, observer)

    def _says_nothing(self) -> bool:
        """Whether a generation has ended with not a byte of it."""
        assert self._submit is not None
        return not self._held_bytes and self._submit.call.kind is not CallKind.OTHER

    def _undecided(self, observer: sse.Observer) -> bool:
        """Whether what has come so far may be the beginning of an empty answer."""
        if isinstance(observer, sse.StreamObserver):
            return _END_MARKER.startswith(b"".join(self._pieces).strip())
        assert self._submit is not None
        return self._submit.call.kind is not CallKind.OTHER and self._held_bytes <= _EMPTY_ANSWER_BYTES

    def _let_go(self, event: ResponseBody, first: PassHead, observer: sse.Observer) -> list[Action]:
        pieces, self._pieces, self._held, self._refusal, self._body = self._pieces, [], None, None, []
        self._submit = None
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if self._restorer is not None:
            data = self._restorer.feed(data, end=event.end)
        actions: list[Action] = [first, PassBody(data, event.end)]
        if observer.first_token and self._status < 400:
            actions.append(Report(FirstToken(self.id)))
        return self._end(actions, self._finished()) if event.end else actions

    def _refused(self) -> list[Action]:
        """An endpoint has answered that it does not answer: report how, and ask for another one."""
        observer, body = self._observer, b"".join(self._pieces)
        assert observer is not None
        if self._status != 200 and self._refusal is not None:
            self._refusal = msgspec.structs.replace(self._refusal, body=body)
            report: Fact = Finished(self.id, self._status)
        else:
            self._refusal = self._unavailable()
            report = Finished(self.id, observer.error) if observer.error else Failed(self.id, FailureReason.TRUNCATED)
        return [Report(report), *self._try_another()]

    def _unavailable(self) -> Respond:
        """What an engine should say that gives up every request while it shuts down."""
        message = "The endpoint is shutting down, and there is no other to try."
        headers = (("content-type", "application/json"), ("retry-after", "1"))
        return Respond(503, headers, self._error_body(503, message))

    def _try_another(self) -> list[Action]:
        assert self._submit is not None
        assert self._decision is not None
        tried = self._submit.exclude | {self._decision.endpoint.name}
        self._held, self._pieces, self._decision, self._observer = None, [], None, None
        self._submit = msgspec.structs.replace(self._submit, exclude=tried)
        self.phase = Phase.DECIDING
        return [self._submit]

    def _upstream_failed(self, reason: FailureReason, hung: bool) -> list[Action]:
        if self.phase is Phase.RESPONSE and self._held is None:
            return self._end([Cut(reason)], self._failure(reason))
        if self.phase is not Phase.RESPONSE:
            self._expect(Phase.UPSTREAM)
        failed: list[Action] = [Report(Failed(self.id, reason))]
        self._refusal = None
        if self._worth_another(reason, hung):
            self._failed = reason
            return [*failed, *self._try_another()]
        self._decision = None
        return [*failed, *self._give_up(reason, f"{self._attempts} tried")]

    def _worth_another(self, reason: FailureReason, hung: bool) -> bool:
        """What never reached an endpoint may go to any other; what did, if it may be done twice."""
        if self._attempts >= self.limits.max_attempts:
            return False
        if reason is FailureReason.CONNECT:
            return True
        return (reason is FailureReason.RESET or (reason is FailureReason.TIMEOUT and hung)) and self._repeatable()

    def _give_up(self, reason: FailureReason, why: str) -> list[Action]:
        message = f"The endpoint failed before it answered ({reason.value}); {why}."
        return self._answer(_STATUS_OF_FAILURE.get(reason, 502), message)

    # endings

    def _finished(self) -> list[Action]:
        """The terminal report of a response that came to its end; an end without its marker is a truncation."""
        observer = self._observer
        assert observer is not None
        if self._status == 200 and (observer.empty_abort or not observer.done):
            return self._failure(FailureReason.TRUNCATED)
        self._decision = None
        # An engine that fails amid a stream has sent its 200 already; the error event says what it would be instead.
        status = observer.error if self._status == 200 and observer.error else self._status
        return [Report(Finished(self.id, status, observer.usage))]

    def _failure(self, reason: FailureReason) -> list[Action]:
        """The terminal report, if a decision is open."""
        open_decision = self._decision is not None or self.phase is Phase.DECIDING
        self._decision = None
        return [Report(Failed(self.id, reason))] if open_decision else []

    def _end(self, actions: list[Action], report: list[Action]) -> list[Action]:
        self.phase = Phase.DONE
        self._body = []
        return actions + report

    def _too_large(self) -> list[Action]:
        limit = self.limits.max_body_bytes
        return self._answer(413, f"The request body is larger than the limit of {limit} bytes.")

    def _answer(
        self, status: int, message: str, *, headers: Headers = (), kind: str | None = None, param: str | None = None
    ) -> list[Action]:
        body = self._error_body(status, message, kind=kind, param=param)
        return self._end([Respond(status, (("content-type", "application/json"), *headers), body)], [])

    def _error_body(self, status: int, message: str, *, kind: str | None = None, param: str | None = None) -> bytes:
        path = "" if self._head is None else self._head.path
        return openai.error_body_for(path, status, message, kind=kind, param=param)

    def _expect(self, phase: Phase) -> None:
        if self.phase is not phase:
            detail = f"an event for phase {phase.value} arrived in phase {self.phase.value}"
            raise WireError(f"The data plane broke the protocol: {detail}.", status=500, kind="InternalServerError")


def _nothing_passes(data: bytes, start: int, end: int) -> bool:
    return False
