"""The ext-proc service: one gRPC stream from Envoy is one `Exchange`.

Owns the streams and how long they may take. Every stream that was opened is closed in the runtime exactly once, whoever
ends it, or handed to `Feedback` in lean mode; what a message means is `wire.extproc`'s business, what to do about it
the `Exchange`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import math
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from picker.errors import WireError
from picker.exchange import (
    Action,
    Event,
    Exchange,
    Forward,
    PassBody,
    PassHead,
    Phase,
    RequestBody,
    RequestHead,
    Respond,
    ResponseBody,
    ResponseHead,
)
from picker.frontends.als import AccessLog, Feedback, Predict
from picker.frontends.grpc_server import Call, Code, Early, GrpcServer, Handler
from picker.frontends.health import Health
from picker.frontends.serving import listen, port_of
from picker.gate import Gate, UndecidedError
from picker.types import FailureReason
from picker.wire import openai
from picker.wire.extproc import SERVICE, Codec, ProcessingRequest

log = logging.getLogger("picker.extproc")

_BEFORE_UPSTREAM = frozenset({Phase.HEAD, Phase.BODY, Phase.DECIDING})
_LATE = {
    Phase.HEAD: (408, "The request did not arrive in time."),
    Phase.BODY: (408, "The request did not arrive in time."),
    Phase.DECIDING: (503, "The gateway could not decide in time."),
}
# Seconds that a stream has to take our last word on it.
_PARTING = 5.0
_SWEEP = 1.0


class Mode(enum.Enum):
    """What passes through here; the value is the flag's word.

    FULL: requests and responses, as the endpoint-picker protocol has it. LEAN: requests alone; how they end is told by
    the data plane's access log, or predicted, so that a response costs nothing here however long it is.
    """

    FULL = "full"
    LEAN = "lean"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds that each step of a stream may take; in full-duplex mode the data plane itself bounds none of them.

    request: from the stream's beginning to the end of the request's body. decision: beyond the queue's own limit.
    silence: without a message while an endpoint works.
    """

    request: float = 300.0
    decision: float = 65.0
    silence: float = 600.0


class Stream:
    """One call of Envoy's.

    until: when we give it up. queued: its request waits for a decision. overtaken: the decision is not wanted any more.
    passing: the data plane's own answer goes back. idle: given up by us. alias: the request's `x-request-id`.
    handed_on: `Feedback` answers for its end.
    """

    __slots__ = ("alias", "call", "codec", "exchange", "handed_on", "idle", "overtaken", "passing", "queued", "until")

    def __init__(self, call: Call, exchange: Exchange, codec: Codec, until: float) -> None:
        self.call = call
        self.exchange = exchange
        self.codec = codec
        self.until = until
        self.alias = ""
        self.handed_on = False
        self.idle = False
        self.queued = False
        self.overtaken = False
        self.passing = False

    @property
    def answerable(self) -> bool:
        """The client can still be given an answer of ours."""
        return not self.passing and self.exchange.phase not in (Phase.RESPONSE, Phase.DONE)

    async def send(self, action: Action) -> None:
        for reply in self.codec.encode(action):
            await self.call.write(reply.SerializeToString())

    def look(self) -> None:
        """Has the data plane hung up, or answered by itself, while the request is queued?"""
        message = self.call.peek()
        if self.queued and (self.call.over or _is_response(message)):
            self.overtaken = True
            self.call.cancel()

    def uncancel(self) -> int:
        """Take one `cancel` back; returns how many are left."""
        assert self.call.task is not None
        return self.call.task.uncancel()


def _is_response(message: bytes | None) -> bool:
    try:
        return message is not None and bool(_parsed(message).HasField("response_headers"))
    except WireError:
        return False  # said when it is read


Begin = Callable[[GrpcServer, GrpcServer], Awaitable[None]]


class Porter(Protocol):
    """Sees who comes and goes. Every request that came leaves: here, or where `Feedback` is told of its end."""

    def came(self, request_id: int, head: RequestHead) -> Respond | None:
        """The answer to a request that is not let in; None: it is."""
        ...

    def answered(self, request_id: int, status: int) -> None:
        """picker answers a request by itself."""
        ...

    def left(self, request_id: int) -> None:
        """A request is over without having left for an endpoint, or after its response was followed here."""
        ...


class ExtProc:
    """Serves Envoy until `shutdown`; one object, one port, one `serve`.

    mode: see `Mode`. For lean mode, predict: seconds that a request takes; or feedback, where it is kept elsewhere.
    fallbacks: name further endpoints for
    Envoy's retries (needs the override_host policy there), else only the best. max_message_bytes: of one gRPC message;
    bodies come in many. addresses: "ip:port", live, of endpoints known by name.
    whole: the data plane keeps bodies, see `Codec`.
    """

    def __init__(
        self,
        runtime: Gate,
        *,
        mode: Mode = Mode.FULL,
        predict: Predict = lambda decision: 0.0,
        feedback: AccessLog | None = None,
        fallbacks: bool = True,
        bounds: Bounds | None = None,
        max_message_bytes: int = 64 * 1024 * 1024,
        addresses: Mapping[str, str] = MappingProxyType({}),
        porter: Porter | None = None,
        whole: bool = False,
    ) -> None:
        self._runtime = runtime
        self._addresses = addresses
        self._porter = porter
        self._whole = whole
        self._fallbacks = fallbacks
        self._bounds = bounds or Bounds()
        self._max_message_bytes = max_message_bytes
        self._streams: set[Stream] = set()
        self._health = Health()
        self._stop = asyncio.Event()
        self._stopping = False
        self._server: GrpcServer | None = None
        if feedback is None and mode is Mode.LEAN:
            feedback = Feedback(runtime, predict)
        self.feedback = feedback

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    async def serve(
        self,
        host: str,
        port: int,
        *,
        health_port: int | None = None,
        tls: ssl.SSLContext | None = None,
        grace: float = 30.0,
        ready: Callable[[int, int | None], None] = lambda port, health_port: None,
    ) -> None:
        """Serve until `shutdown`, gracefully, or until cancelled, at once; raises ConfigError for a port in use.

        port, health_port: 0 takes a free one; `ready` is called with those that are bound. health_port is for the
        health service alone, in clear text, to the very end. grace: seconds that open streams have to end.
        """
        listener = listen(host, port)
        probes_listener = None if health_port is None else listen(host, health_port)

        async def begin(server: GrpcServer, probes: GrpcServer) -> None:
            if probes_listener is not None:
                await probes.serve(probes_listener)
            await server.serve(listener, tls=tls)
            self.set_serving(True)
            ready(port_of(listener), None if probes_listener is None else port_of(probes_listener))

        await self.serve_by(begin, grace=grace)

    async def serve_by(self, begin: Begin, *, grace: float = 30.0) -> None:
        """As `serve`. begin: gives our server and the one of the health service what they serve, and says when."""
        async with asyncio.TaskGroup() as tasks:
            server = GrpcServer(
                self._handlers(), tasks, max_message_bytes=self._max_message_bytes, early=self._early_answers()
            )
            self._server = server
            probes = GrpcServer(self._health.handlers, tasks)
            async with self._sweeping(tasks), _closing(server, probes):
                try:
                    await begin(server, probes)
                    await self._stop.wait()
                    await self._leave(server, grace)
                finally:
                    self._stopping = True

    def _early_answers(self) -> dict[str, Early]:
        """For calls that can be answered without a task, by path."""
        return {}

    def _handlers(self) -> dict[str, Handler]:
        handlers = {f"/{SERVICE}/Process": self._process, **self._health.handlers}
        return handlers if self.feedback is None else {**handlers, **self.feedback.handlers}

    async def _leave(self, server: GrpcServer, grace: float) -> None:
        """Take nothing new and let open streams end."""
        self.set_serving(False)
        self._stopping = True
        server.refuse()
        loop = asyncio.get_running_loop()
        until = loop.time() + grace
        # Only our own streams: watchers of our health and access logs stay as long as we do.
        if grace and (running := {stream.call.task for stream in self._streams if stream.call.task is not None}):
            await asyncio.wait(running, timeout=grace)
        if self.feedback is not None:
            await self.feedback.drained(until - loop.time())

    async def part(self, delay: float) -> None:
        """Turn readiness off and serve on for `delay` seconds, so that gateways go elsewhere without losing a request.

        Peers that hold a connection are asked to open another, which a service's address may give to somebody else.
        Nobody is waited for where nobody is connected.
        """
        self.set_serving(False)
        if self._server is not None and self._server.connections:
            self._server.part()
            await asyncio.sleep(delay)

    def shutdown(self) -> None:
        """Let `serve` drain and return."""
        self._stop.set()

    def set_serving(self, serving: bool) -> None:
        """Turn readiness on or off; liveness holds as long as the loop turns."""
        self._health.set_serving(serving)

    # one stream

    async def _process(self, call: Call) -> None:
        try:
            stream = self._opened(call)
        except UndecidedError as error:
            call.end(Code.UNAVAILABLE, str(error))
            return
        await self._follow(stream)

    async def _follow(self, stream: Stream, actions: Awaitable[list[Action]] | None = None) -> None:
        """actions: of a request that was queued before its stream had a task."""
        call = stream.call
        self._streams.add(stream)
        try:
            if actions is not None:
                await self._do(stream, await self._listening(stream, actions))
            if not stream.handed_on:
                await self._converse(stream)
        except UndecidedError as error:
            call.end(Code.UNAVAILABLE, str(error))
        except WireError as error:
            self._runtime.telemetry.internal_error("extproc-protocol")
            log.warning("the data plane broke the ext-proc protocol: %s", error.message)
            call.end(Code.INVALID_ARGUMENT, error.message)
        except asyncio.CancelledError:
            if not stream.idle or stream.uncancel():
                raise
            await self._give_up(stream)
        except Exception:
            # Supervision: a bug of ours ends one request, and says so.
            self._runtime.telemetry.internal_error("extproc")
            log.exception("request %d failed in the ext-proc front end", stream.exchange.id)
            await self._apologise(stream)
        finally:
            self._streams.discard(stream)
            if not stream.handed_on:
                self._leave_off(stream)

    def _leave_off(self, stream: Stream) -> None:
        """A stream ends whose request has not been handed on."""
        self._runtime.close(stream.exchange, self._reason(stream))
        if self._porter is not None:
            self._porter.left(stream.exchange.id)

    def _opened(self, call: Call) -> Stream:
        exchange = self._runtime.open()
        mark = None if self.feedback is None else self.feedback.mark(exchange.id)
        codec = Codec(fallbacks=self._fallbacks, mark=mark, addresses=self._addresses, whole=self._whole)
        return Stream(call, exchange, codec, self._runtime.clock() + self._bounds.request)

    async def _converse(self, stream: Stream) -> None:
        """Answer every message until the exchange is over or the data plane has no more to say."""
        exchange = stream.exchange
        # Ending the stream ourselves after the last byte spares a read, and Envoy a reset.
        while exchange.phase is not Phase.DONE and (message := await stream.call.read()) is not None:
            event = stream.codec.decode(_parsed(message))
            if isinstance(event, ResponseHead) and exchange.phase in _BEFORE_UPSTREAM:
                return await self._pass_on(stream, event)
            actions = await self._receive(stream, event)
            if self._whole and not actions and isinstance(event, RequestHead):
                await self._go_on(stream)
            await self._do(stream, actions)
            if stream.handed_on:
                return None
        if exchange.phase in _BEFORE_UPSTREAM:
            # A clean end without a verdict lets a data plane that still wants one go on unscheduled.
            stream.call.end(Code.CANCELLED, "the stream was half-closed before a verdict")
        return None

    async def _do(self, stream: Stream, actions: list[Action]) -> None:
        """Carry actions out; those of a request that leaves in lean mode hand it on."""
        if stream.exchange.phase not in _BEFORE_UPSTREAM:
            stream.until = self._runtime.clock() + self._bounds.silence
        for action in actions:
            await stream.send(self._outgoing(action) if isinstance(action, Forward) else action)
            if isinstance(action, Forward) and self.feedback is not None:
                self._hand_on(stream, action, self.feedback)
                return
            if isinstance(action, Respond) and self._porter is not None:
                self._porter.answered(stream.exchange.id, action.status)

    def _outgoing(self, forward: Forward) -> Forward:
        """What the data plane is told besides."""
        return forward

    async def _go_on(self, stream: Stream) -> None:
        """Have the data plane send the body of a request whose head it has sent."""
        if (reply := stream.codec.proceed()) is not None:
            await stream.call.write(reply.SerializeToString())

    def _hand_on(self, stream: Stream, forward: Forward, feedback: AccessLog) -> None:
        """The request has left and nothing of its response is wanted: the stream ends here, cleanly.

        Only here: ended between the response's head and its end, a stream takes the bytes along that are under way.
        """
        feedback.expect(forward.decision, stream.alias, self._runtime.clock())
        stream.handed_on = True

    async def _pass_on(self, stream: Stream, head: ResponseHead) -> None:
        """Hand back the data plane's own answer (its timeout, its limit) to a request that is not decided yet."""
        stream.passing, stream.until = True, self._runtime.clock() + self._bounds.silence
        await stream.send(PassHead((), head.end))
        ended = head.end
        while not ended and (message := await stream.call.read()) is not None:
            event = stream.codec.decode(_parsed(message))
            if isinstance(event, ResponseBody):
                await stream.send(PassBody(event.data, event.end))
                ended = event.end

    async def _receive(self, stream: Stream, event: Event) -> list[Action]:
        """Feed the exchange; while its request is queued, listen for a data plane that does not want it any more."""
        if isinstance(event, RequestHead):
            if self.feedback is not None:
                stream.alias = event.headers.get("x-request-id", "")
            if (answer := await self._met(stream, event)) is not None:
                self._runtime.close(stream.exchange)
                return [answer]
        if not (isinstance(event, RequestHead | RequestBody) and event.end):
            return await self._runtime.receive(stream.exchange, event)
        return await self._listening(stream, self._runtime.receive(stream.exchange, event))

    async def _met(self, stream: Stream, head: RequestHead) -> Respond | None:
        """The answer to a request that nothing but its head is needed for; None for most."""
        return None if self._porter is None else self._porter.came(stream.exchange.id, head)

    async def _listening(self, stream: Stream, actions: Awaitable[list[Action]]) -> list[Action]:
        stream.until = self._runtime.clock() + self._bounds.decision
        # Runs only if the request has to wait: a decision made at once gives the loop no turn.
        looking = asyncio.get_running_loop().call_soon(stream.look)
        stream.call.on_arrival, stream.queued = stream.look, True
        try:
            return await actions
        except asyncio.CancelledError:
            if not stream.overtaken or stream.uncancel():
                raise
            return []
        finally:
            stream.call.on_arrival, stream.queued = None, False
            looking.cancel()

    async def _apologise(self, stream: Stream) -> None:
        """Answer 500 while that is possible, else end the call with a status of failure."""
        if not stream.answerable:
            stream.call.end(Code.INTERNAL, "picker failed; its log says why")
            return
        await self._answer(stream, 500, "The gateway failed to handle this request.")

    async def _give_up(self, stream: Stream) -> None:
        """Tell the client while that is possible: an error of ours would be for the data plane to interpret."""
        answer = _LATE.get(stream.exchange.phase)
        if answer is None or stream.passing:
            stream.call.end(Code.DEADLINE_EXCEEDED, f"no message for {self._bounds.silence:g} s")
            return
        stream.until = self._runtime.clock() + _PARTING
        await self._answer(stream, *answer)

    async def _answer(self, stream: Stream, status: int, message: str) -> None:
        await stream.send(error_answer(status, message))

    def _reason(self, stream: Stream) -> FailureReason:
        """Why an exchange that is still open ends with its stream."""
        if self._stopping:
            return FailureReason.SHUTDOWN
        waiting = stream.exchange.phase in (Phase.UPSTREAM, Phase.RESPONSE)
        return FailureReason.TIMEOUT if stream.idle and waiting else FailureReason.CLIENT_GONE

    # what takes too long

    @contextlib.asynccontextmanager
    async def _sweeping(self, tasks: asyncio.TaskGroup) -> AsyncIterator[None]:
        sweeper = tasks.create_task(self._sweep_forever())
        try:
            yield
        finally:
            sweeper.cancel()
            if self.feedback is not None:
                self.feedback.close(FailureReason.SHUTDOWN)

    async def _sweep_forever(self) -> None:
        bounds = self._bounds
        every = min(_SWEEP, bounds.request / 8, bounds.decision / 8, bounds.silence / 8)
        while True:
            await asyncio.sleep(every)
            self._sweep(self._runtime.clock())

    def _sweep(self, now: float) -> None:
        """Give up the streams whose time is over, and requests of which nobody will tell any more."""
        for stream in self._streams:
            if now > stream.until:
                stream.idle, stream.until = True, math.inf
                stream.call.cancel()
        if self.feedback is not None:
            self.feedback.sweep(now)


@contextlib.asynccontextmanager
async def _closing(*servers: GrpcServer) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for server in servers:
            await server.stop(None)


def error_answer(status: int, message: str) -> Respond:
    return Respond(status, (("content-type", "application/json"),), openai.error_body(status, message))


def _parsed(message: bytes) -> ProcessingRequest:
    try:
        return ProcessingRequest.FromString(message)
    except DecodeError:
        raise WireError("The data plane sent bytes that are no ext-proc message.") from None
