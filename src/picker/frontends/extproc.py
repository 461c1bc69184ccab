"""The ext-proc service: one gRPC stream from Envoy is one `Exchange`.

Owns the streams and the health service. Every stream that was opened is closed in the runtime exactly once, whoever
ends it; what a message means is `wire.extproc`'s business, what to do about it the `Exchange`'s.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2

from picker.errors import WireError
from picker.exchange import (
    Action,
    Event,
    Exchange,
    PassBody,
    PassHead,
    Phase,
    RequestBody,
    RequestHead,
    Respond,
    ResponseBody,
    ResponseHead,
)
from picker.frontends.grpc_server import Call, Code, GrpcServer
from picker.frontends.serving import listen, port_of
from picker.runtime import Runtime
from picker.types import FailureReason
from picker.wire import openai
from picker.wire.extproc import SERVICE, Codec, ProcessingRequest

log = logging.getLogger("picker.extproc")

LIVENESS = "liveness"
# The names that gateways and Kubernetes probes of llm-d's endpoint picker ask for.
READINESS = ("", "readiness", SERVICE)

_BEFORE_UPSTREAM = frozenset({Phase.HEAD, Phase.BODY, Phase.DECIDING})


class _Stream:
    """One call of Envoy's.

    heard_at: of the latest message. queued: its request waits for a decision. overtaken: the decision is not wanted
    any more. idle: given up by us.
    """

    __slots__ = ("call", "codec", "exchange", "heard_at", "idle", "overtaken", "queued")

    def __init__(self, call: Call, exchange: Exchange, codec: Codec, now: float) -> None:
        self.call = call
        self.exchange = exchange
        self.codec = codec
        self.heard_at = now
        self.idle = False
        self.queued = False
        self.overtaken = False

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
    return message is not None and bool(ProcessingRequest.FromString(message).HasField("response_headers"))


class ExtProc:
    """Serves Envoy until `shutdown`; one object, one port, one `serve`.

    fallbacks: name further endpoints for Envoy's retries (needs the override_host policy there), else only the best.
    stream_timeout: seconds without a message after which a stream is given up. max_message_bytes: of one gRPC message;
    bodies come in many.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        fallbacks: bool = True,
        stream_timeout: float = 600.0,
        max_message_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self._runtime = runtime
        self._fallbacks = fallbacks
        self._stream_timeout = stream_timeout
        self._max_message_bytes = max_message_bytes
        self._streams: set[_Stream] = set()
        self._serving = False
        self._stop = asyncio.Event()
        self._stopping = False

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
        drain: float = 0.0,
        grace: float = 30.0,
        ready: Callable[[int, int | None], None] = lambda port, health_port: None,
    ) -> None:
        """Serve until `shutdown`, gracefully, or until cancelled, at once; raises ConfigError for a port in use.

        port, health_port: 0 takes a free one; `ready` is called with those that are bound. health_port is for the
        health service alone, to the very end. drain: seconds for which streams are still taken after readiness is
        off, so that gateways notice. grace: seconds that open streams then have to end.
        """
        check = {"/grpc.health.v1.Health/Check": self._check}
        process = {f"/{SERVICE}/Process": self._process}
        listener = listen(host, port)
        probes_listener = None if health_port is None else listen(host, health_port)
        async with asyncio.TaskGroup() as tasks:
            server = GrpcServer(check | process, tasks, max_message_bytes=self._max_message_bytes)
            probes = GrpcServer(check, tasks)
            sweeper = tasks.create_task(self._sweep_forever())
            try:
                if probes_listener is not None:
                    await probes.serve(probes_listener)
                await server.serve(listener, tls=tls)
                self.set_serving(True)
                ready(port_of(listener), None if probes_listener is None else port_of(probes_listener))
                await self._stop.wait()
                self.set_serving(False)
                await asyncio.sleep(drain)
                self._stopping = True
                await server.stop(grace)
            finally:
                self._stopping = True
                await server.stop(None)
                await probes.stop(None)
                sweeper.cancel()

    def shutdown(self) -> None:
        """Let `serve` drain and return."""
        self._stop.set()

    def set_serving(self, serving: bool) -> None:
        """Turn readiness on or off; liveness holds as long as the loop turns."""
        self._serving = serving

    async def _check(self, call: Call) -> None:
        asked = health_pb2.HealthCheckRequest.FromString(await call.read() or b"").service
        if asked != LIVENESS and asked not in READINESS:
            call.end(Code.NOT_FOUND, "unknown service")
            return
        status = health_pb2.HealthCheckResponse
        serving = asked == LIVENESS or self._serving
        answer = status(status=status.SERVING if serving else status.NOT_SERVING)
        await call.write(answer.SerializeToString())

    # one stream

    async def _process(self, call: Call) -> None:
        stream = _Stream(call, self._runtime.open(), Codec(fallbacks=self._fallbacks), self._runtime.clock())
        self._streams.add(stream)
        try:
            await self._converse(stream)
        except WireError as error:
            self._runtime.telemetry.internal_error("extproc-protocol")
            log.warning("the data plane broke the ext-proc protocol: %s", error.message)
            call.end(Code.INVALID_ARGUMENT, error.message)
        except asyncio.CancelledError:
            if not stream.idle:
                raise
            call.end(Code.DEADLINE_EXCEEDED, f"no message for {self._stream_timeout:g} s")
        except Exception:
            # Supervision: a bug of ours ends one request, and says so.
            self._runtime.telemetry.internal_error("extproc")
            log.exception("request %d failed in the ext-proc front end", stream.exchange.id)
            await self._apologise(stream)
        finally:
            self._streams.discard(stream)
            self._runtime.close(stream.exchange, self._reason(stream))

    async def _converse(self, stream: _Stream) -> None:
        """Answer every message until the exchange is over or the data plane has no more to say."""
        exchange = stream.exchange
        # Ending the stream ourselves after the last byte spares a read, and Envoy a reset.
        while exchange.phase is not Phase.DONE and (message := await stream.call.read()) is not None:
            stream.heard_at = self._runtime.clock()
            event = stream.codec.decode(_parsed(message))
            if isinstance(event, ResponseHead) and exchange.phase in _BEFORE_UPSTREAM:
                return await self._pass_on(stream, event)
            for action in await self._receive(stream, event):
                await stream.send(action)
        return None

    async def _pass_on(self, stream: _Stream, head: ResponseHead) -> None:
        """Hand back the data plane's own answer (its timeout, its limit) to a request that is not decided yet."""
        await stream.send(PassHead((), head.end))
        ended = head.end
        while not ended and (message := await stream.call.read()) is not None:
            event = stream.codec.decode(_parsed(message))
            if isinstance(event, ResponseBody):
                await stream.send(PassBody(event.data, event.end))
                ended = event.end

    async def _receive(self, stream: _Stream, event: Event) -> list[Action]:
        """Feed the exchange; while its request is queued, listen for a data plane that does not want it any more."""
        if not (isinstance(event, RequestHead | RequestBody) and event.end):
            return await self._runtime.receive(stream.exchange, event)
        # Runs only if the request has to wait: a decision made at once gives the loop no turn.
        looking = asyncio.get_running_loop().call_soon(stream.look)
        stream.call.on_arrival, stream.queued = stream.look, True
        try:
            return await self._runtime.receive(stream.exchange, event)
        except asyncio.CancelledError:
            if not stream.overtaken or stream.uncancel():
                raise
            return []
        finally:
            stream.call.on_arrival, stream.queued = None, False
            looking.cancel()

    async def _apologise(self, stream: _Stream) -> None:
        """Answer 500 while that is possible, else end the call with a status of failure."""
        if stream.exchange.phase in (Phase.RESPONSE, Phase.DONE):
            stream.call.end(Code.INTERNAL, "picker failed; its log says why")
            return
        body = openai.error_body(500, "The gateway failed to handle this request.")
        await stream.send(Respond(500, (("content-type", "application/json"),), body))

    def _reason(self, stream: _Stream) -> FailureReason:
        """Why an exchange that is still open ends with its stream."""
        if self._stopping:
            return FailureReason.SHUTDOWN
        waiting = stream.exchange.phase in (Phase.UPSTREAM, Phase.RESPONSE)
        return FailureReason.TIMEOUT if stream.idle and waiting else FailureReason.CLIENT_GONE

    # idle streams

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(self._stream_timeout / 8)
            self._sweep(self._runtime.clock())

    def _sweep(self, now: float) -> None:
        """Give up the streams that nobody has spoken on for too long."""
        for stream in self._streams:
            if now - stream.heard_at > self._stream_timeout and not stream.idle:
                stream.idle = True
                stream.call.cancel()


def _parsed(message: bytes) -> ProcessingRequest:
    try:
        return ProcessingRequest.FromString(message)
    except DecodeError:
        raise WireError("The data plane sent bytes that are no ext-proc message.") from None
