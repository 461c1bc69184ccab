"""The ext-proc service: one gRPC stream from Envoy is one `Exchange`.

Owns the streams and the health service. Every stream that was opened is closed in the runtime exactly once, whoever
ends it; what a message means is `wire.extproc`'s business, what to do about it the `Exchange`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeAlias

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from picker.errors import ConfigError, WireError
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
from picker.runtime import Runtime
from picker.types import FailureReason
from picker.wire import openai
from picker.wire.extproc import SERVICE, Codec, ProcessingRequest, ProcessingResponse

log = logging.getLogger("picker.extproc")

Context: TypeAlias = "grpc.aio.ServicerContext[ProcessingRequest, ProcessingResponse]"
Status = tuple[grpc.StatusCode, str]

LIVENESS = "liveness"
# The names that gateways and Kubernetes probes of llm-d's endpoint picker ask for.
READINESS = ("", "readiness", SERVICE)

_BEFORE_UPSTREAM = frozenset({Phase.HEAD, Phase.BODY, Phase.DECIDING})

_OPTIONS = (
    # Two processes on one port would share its traffic in silence, each with half the knowledge.
    ("grpc.so_reuseport", 0),
    # Envoy's keepalive pings would otherwise be answered with "too many pings" and a closed connection.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 0),
    ("grpc.http2.max_ping_strikes", 0),
)


class _Stream:
    """One gRPC stream.

    heard_at: of the latest message. queued: its request waits for a decision. ahead: the read begun meanwhile.
    overtaken: that read found that the decision is not wanted any more. idle: given up by us.
    """

    __slots__ = ("ahead", "codec", "context", "exchange", "heard_at", "idle", "overtaken", "queued", "task")

    def __init__(self, context: Context, exchange: Exchange, codec: Codec, now: float) -> None:
        self.context = context
        self.exchange = exchange
        self.codec = codec
        self.heard_at = now
        self.idle = False
        self.queued = False
        self.overtaken = False
        self.ahead: asyncio.Task[object] | None = None
        self.task = asyncio.current_task()

    async def read(self) -> object:
        """The next message, or `grpc.aio.EOF`."""
        if self.ahead is None:
            return await self.context.read()
        ahead, self.ahead = self.ahead, None
        return await ahead

    async def send(self, action: Action) -> None:
        for reply in self.codec.encode(action):
            await self.context.write(reply)

    def cancel(self) -> None:
        assert self.task is not None
        self.task.cancel()

    def uncancel(self) -> int:
        """Take one `cancel` back; returns how many are left."""
        assert self.task is not None
        return self.task.uncancel()


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
        self._options = [
            *_OPTIONS,
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        ]
        self._streams: set[_Stream] = set()
        self._health = health.aio.HealthServicer()
        self._stop = asyncio.Event()
        self._stopping = False
        self._tasks = asyncio.TaskGroup()

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    async def serve(
        self,
        host: str,
        port: int,
        *,
        health_port: int | None = None,
        credentials: grpc.ServerCredentials | None = None,
        drain: float = 0.0,
        grace: float = 30.0,
        ready: Callable[[int, int | None], None] = lambda port, health_port: None,
    ) -> None:
        """Serve until `shutdown`, gracefully, or until cancelled, at once; raises ConfigError for a port in use.

        port, health_port: 0 takes a free one; `ready` is called with those that are bound. health_port is for the
        health service alone, to the very end. drain: seconds for which streams are still taken after readiness is
        off, so that gateways notice. grace: seconds that open streams then have to end.
        """
        server = self._server(process=True)
        probes = None if health_port is None else self._server(process=False)
        bound = _bind(server, host, port, credentials)
        bound_health = None if probes is None else _bind(probes, host, health_port or 0, None)
        async with self._tasks as tasks:
            sweeper = tasks.create_task(self._sweep_forever())
            try:
                for each in filter(None, (probes, server)):
                    await each.start()
                await self.set_serving(True)
                ready(bound, bound_health)
                await self._stop.wait()
                await self.set_serving(False)
                await asyncio.sleep(drain)
                self._stopping = True
                await server.stop(grace)
            finally:
                self._stopping = True
                for each in filter(None, (server, probes)):
                    await each.stop(None)
                sweeper.cancel()

    def shutdown(self) -> None:
        """Let `serve` drain and return."""
        self._stop.set()

    async def set_serving(self, serving: bool) -> None:
        """Turn readiness on or off; liveness holds as long as the loop turns."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(LIVENESS, status.SERVING)
        for name in READINESS:
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    def _server(self, *, process: bool) -> grpc.aio.Server:
        server = grpc.aio.server(options=self._options)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if process:
            handler = grpc.stream_stream_rpc_method_handler(
                self._process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString
            )
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Process": handler}),))
        return server

    # one stream

    async def _process(self, _messages: object, context: Context) -> None:
        stream = _Stream(context, self._runtime.open(), Codec(fallbacks=self._fallbacks), self._runtime.clock())
        self._streams.add(stream)
        failure: Status | None = None
        try:
            await self._converse(stream)
        except WireError as error:
            self._runtime.telemetry.internal_error("extproc-protocol")
            log.warning("the data plane broke the ext-proc protocol: %s", error.message)
            failure = (grpc.StatusCode.INVALID_ARGUMENT, error.message)
        except asyncio.CancelledError:
            if not stream.idle:
                raise
            failure = (grpc.StatusCode.DEADLINE_EXCEEDED, f"no message for {self._stream_timeout:g} s")
        except Exception:
            # Supervision: a bug of ours ends one request, and says so.
            self._runtime.telemetry.internal_error("extproc")
            log.exception("request %d failed in the ext-proc front end", stream.exchange.id)
            failure = await self._apologise(stream)
        finally:
            self._streams.discard(stream)
            self._runtime.close(stream.exchange, self._reason(stream))
        if failure is not None:
            await context.abort(*failure)

    async def _converse(self, stream: _Stream) -> None:
        """Answer every message until the exchange is over or the data plane has no more to say."""
        exchange = stream.exchange
        # Ending the stream ourselves after the last byte spares a read, and Envoy a reset.
        while exchange.phase is not Phase.DONE and (message := await stream.read()) is not grpc.aio.EOF:
            stream.heard_at = self._runtime.clock()
            event = stream.codec.decode(message)
            if isinstance(event, ResponseHead) and exchange.phase in _BEFORE_UPSTREAM:
                return await self._pass_on(stream, event)
            for action in await self._receive(stream, event):
                await stream.send(action)
        return None

    async def _pass_on(self, stream: _Stream, head: ResponseHead) -> None:
        """Hand back the data plane's own answer (its timeout, its limit) to a request that is not decided yet."""
        await stream.send(PassHead((), head.end))
        ended = head.end
        while not ended and (message := await stream.read()) is not grpc.aio.EOF:
            event = stream.codec.decode(message)
            if isinstance(event, ResponseBody):
                await stream.send(PassBody(event.data, event.end))
                ended = event.end

    async def _receive(self, stream: _Stream, event: Event) -> list[Action]:
        """Feed the exchange; while its request is queued, listen for a data plane that does not want it any more."""
        if not (isinstance(event, RequestHead | RequestBody) and event.end):
            return await self._runtime.receive(stream.exchange, event)
        # Runs only if the request has to wait: a decision made at once gives the loop no turn.
        listening = asyncio.get_running_loop().call_soon(self._listen, stream)
        stream.queued = True
        try:
            return await self._runtime.receive(stream.exchange, event)
        except asyncio.CancelledError:
            if not stream.overtaken or stream.uncancel():
                raise
            return []
        finally:
            stream.queued = False
            listening.cancel()

    def _listen(self, stream: _Stream) -> None:
        stream.ahead = self._tasks.create_task(self._read_ahead(stream))

    async def _read_ahead(self, stream: _Stream) -> object:
        try:
            message = await stream.context.read()
        except grpc.aio.UsageError:  # the stream ended meanwhile
            return grpc.aio.EOF
        if stream.queued and (message is grpc.aio.EOF or message.HasField("response_headers")):
            stream.overtaken = True
            stream.cancel()
        return message

    async def _apologise(self, stream: _Stream) -> Status | None:
        """Answer 500 while that is possible; else the status to end the stream with."""
        failure = (grpc.StatusCode.INTERNAL, "picker failed; its log says why")
        if stream.exchange.phase in (Phase.RESPONSE, Phase.DONE):
            return failure
        body = openai.error_body(500, "The gateway failed to handle this request.")
        sorry = Respond(500, (("content-type", "application/json"),), body)
        try:
            await stream.send(sorry)
        except grpc.RpcError:
            return failure
        return None

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
                stream.cancel()


def _bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise ConfigError(f"The ext-proc service cannot listen on {address}: {error}") from None
