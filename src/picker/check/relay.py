"""A picker's stand-in towards Envoy: hands every frame on to the real one, keeps a copy, and fails on command.

What a picker did is read here, off the wire, and not asked of the picker; and a picker of which nothing is known but
its address can be made to hang, to die and to vanish.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from picker.check import frames
from picker.check.frames import ProcessingRequest, ProcessingResponse
from picker.check.gateway import Heard, Target, open_channel
from picker.check.pods import MARK_HEADER

_KEEP = 2_000


class Mode(enum.Enum):
    """HANG: streams are taken and never answered. CLOSE: ended with OK at the first frame.

    DIE_EARLY, DIE_LATE: ended with an error after the first frame, or when the first response chunk has gone back.
    """

    FORWARD = "forward"
    HANG = "hang"
    CLOSE = "close"
    DIE_EARLY = "die-early"
    DIE_LATE = "die-late"


@dataclass(slots=True)
class Passed:
    """The frames of one stream, in order."""

    up: list[ProcessingRequest] = field(default_factory=list)
    down: list[ProcessingResponse] = field(default_factory=list)
    _mark: str | None = None

    @property
    def mark(self) -> str | None:
        """What the client called its request; it stands in the first frame."""
        if self._mark is None and self.up and self.up[0].HasField("request_headers"):
            self._mark = frames.header_fields(self.up[0].request_headers.headers).get(MARK_HEADER)
        return self._mark

    @property
    def heard(self) -> Heard:
        return Heard(replies=self.down)

    @property
    def served(self) -> str | None:
        """Who answered, as Envoy told the picker."""
        told = [frames.served_of(frame) for frame in self.up if frame.HasField("response_headers")]
        return told[0] if told else None


class Relay:
    """address: where Envoy finds it. target: the picker behind it, exchangeable while it runs."""

    def __init__(self, target: Target) -> None:
        self.mode = Mode.FORWARD
        self.address = "127.0.0.1:0"
        self.streams: deque[Passed] = deque(maxlen=_KEEP)
        self._server: grpc.aio.Server | None = None
        self._channel = open_channel(target)

    async def aim(self, target: Target) -> None:
        """Put another picker behind it."""
        await self._channel.close()
        self._channel = open_channel(target)

    async def up(self) -> None:
        """Serve, at the address of before."""
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
        process = grpc.stream_stream_rpc_method_handler(
            self._process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString
        )
        check = grpc.unary_unary_rpc_method_handler(
            _alive, health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
        )
        handlers = (
            grpc.method_handlers_generic_handler(frames.SERVICE, {"Process": process}),
            grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),
        )
        self._server.add_generic_rpc_handlers(handlers)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(self.address)}"
        await self._server.start()

    async def down(self) -> None:
        """Refuse connections from here on; open streams break off."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    async def close(self) -> None:
        await self.down()
        await self._channel.close()

    def of(self, mark: str) -> list[Passed]:
        """The streams of the requests with this mark."""
        return [stream for stream in self.streams if stream.mark == mark]

    # one stream

    async def _process(self, _: object, context: grpc.aio.ServicerContext) -> None:
        stream = Passed()
        self.streams.append(stream)
        match self.mode:
            case Mode.HANG:
                await asyncio.Event().wait()
            case Mode.CLOSE:
                await context.read()
            case Mode.DIE_EARLY:
                await context.read()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the picker died")
            case _:
                await self._forward(stream, context)

    async def _forward(self, stream: Passed, context: grpc.aio.ServicerContext) -> None:
        call = self._channel.stream_stream(
            frames.PROCESS,
            request_serializer=ProcessingRequest.SerializeToString,
            response_deserializer=ProcessingResponse.FromString,
        )()
        status: Callable[[], Awaitable[None]] = _nothing
        async with asyncio.TaskGroup() as tasks:
            pump = tasks.create_task(_pump(stream, context, call))
            try:
                status = await self._return(stream, context, call)
            finally:
                pump.cancel()
                call.cancel()
        await status()

    async def _return(
        self,
        stream: Passed,
        context: grpc.aio.ServicerContext,
        call: grpc.aio.StreamStreamCall[ProcessingRequest, ProcessingResponse],
    ) -> Callable[[], Awaitable[None]]:
        """Hand the replies on; how the stream is to end."""
        try:
            while (reply := await call.read()) is not grpc.aio.EOF:
                stream.down.append(reply)
                await context.write(reply)
                if self.mode is Mode.DIE_LATE and reply.HasField("response_body"):
                    return lambda: context.abort(grpc.StatusCode.UNAVAILABLE, "the picker died")
            code, details = await call.code(), await call.details()
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details()
        if code is grpc.StatusCode.OK:
            return _nothing
        return lambda: context.abort(code, details or "")


async def _pump(
    stream: Passed,
    context: grpc.aio.ServicerContext,
    call: grpc.aio.StreamStreamCall[ProcessingRequest, ProcessingResponse],
) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while (message := await context.read()) is not grpc.aio.EOF:
            stream.up.append(message)
            await call.write(message)
        await call.done_writing()


async def _nothing() -> None:
    return


async def _alive(
    asked: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@contextlib.asynccontextmanager
async def relaying(target: Target) -> AsyncIterator[Relay]:
    relay = Relay(target)
    await relay.up()
    try:
        yield relay
    finally:
        await relay.close()
