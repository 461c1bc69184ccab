"""An honest endpoint picker, small enough to be read: what a pool other than the checked one is served by.

It keeps every clause that the checks of tier T1 ask for, and is what their mutants deviate from, one method each. Not a
picker for production: one dictionary is its cache knowledge, a count per endpoint its load.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
from envoy.config.core.v3 import base_pb2
from grpc_health.v1 import health_pb2

from picker.check import frames
from picker.check.frames import ProcessingRequest, ProcessingResponse
from picker.check.gateway import Target

_CHUNK = 62_000
_SERVED_NAMES = ("", "liveness", "readiness", frames.SERVICE)
_OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_PREFIX = 128


@dataclass(slots=True)
class Request:
    """One request as far as it is known. key: who shares it shares a cached prefix."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    bodyless: bool = False
    trailers: bool = False
    subset: list[str] | None = None
    key: str = ""
    endpoint: str | None = None
    streaming: bool = False


class Refusal(Exception):  # noqa: N818 - no error of ours: an answer to the client
    """Answer with this status instead of forwarding."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Reference:
    """pool: the endpoints that are ready at this moment. max_inflight: requests an endpoint gets before more are shed.

    max_body: bytes; larger requests are refused. fallbacks: name further endpoints behind the choice.
    """

    def __init__(
        self,
        pool: Callable[[], Sequence[str]],
        *,
        max_inflight: int | None = None,
        max_body: int | None = None,
        fallbacks: bool = True,
    ) -> None:
        self.pool = pool
        self.fallbacks = fallbacks
        self.max_inflight = max_inflight
        self.max_body = max_body
        self.inflight: Counter[str] = Counter()
        self.holders: dict[str, str] = {}

    # the stream

    async def process(
        self, messages: AsyncIterator[ProcessingRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ProcessingResponse]:
        request = Request()
        try:
            async for message in messages:
                async for reply in self.receive(request, message, context):
                    yield reply
                    if reply.WhichOneof("response") == "immediate_response":
                        return
        finally:
            self.release(request)

    async def receive(
        self, request: Request, message: ProcessingRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ProcessingResponse]:
        """The replies to one message."""
        kind = message.WhichOneof("request")
        if kind is None or (request.endpoint is None and kind.startswith("response")):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "out of order")
        if kind is not None and kind.startswith("response"):
            for reply in self.pass_response(request, message):
                yield reply
            return
        try:
            if self.complete(request, message):
                await self.decide(request)
                for reply in self.verdict(request):
                    yield reply
        except Refusal as refusal:
            yield self.refuse(refusal)

    def complete(self, request: Request, message: ProcessingRequest) -> bool:
        """Take one message of the request in; True when it was the last."""
        hint = frames.subset_of(message)
        request.subset = request.subset if hint is None else hint
        match message.WhichOneof("request"):
            case "request_headers":
                request.headers = frames.header_fields(message.request_headers.headers)
                request.bodyless = bool(message.request_headers.end_of_stream)
                return request.bodyless
            case "request_body":
                request.body += message.request_body.body
                self.bound_body(request)
                return bool(message.request_body.end_of_stream)
            case _:
                request.trailers = True
                return True

    def bound_body(self, request: Request) -> None:
        if self.max_body is not None and len(request.body) > self.max_body:
            raise Refusal(413, "the request body is too large")

    # deciding

    async def decide(self, request: Request) -> None:
        """Choose an endpoint; raises Refusal."""
        self.parse(request)
        ready = self.candidates(request)
        if not ready:
            raise Refusal(503, "no endpoint is ready")
        holder = self.holders.get(request.key)
        free = [one for one in ready if self.max_inflight is None or self.inflight[one] < self.max_inflight]
        if not free:
            raise Refusal(429, "the pool is saturated")
        request.endpoint = holder if holder in free else min(free, key=lambda one: (self.inflight[one], one))
        self.inflight[request.endpoint] += 1

    def candidates(self, request: Request) -> list[str]:
        return [one for one in self.pool() if request.subset is None or self.within(one, request.subset)]

    def within(self, address: str, subset: Sequence[str]) -> bool:
        return address in subset or address.rpartition(":")[0].strip("[]") in subset

    def parse(self, request: Request) -> None:
        """Read what affinity needs; raises Refusal for a body that is no request."""
        if request.bodyless:
            return
        try:
            asked = json.loads(request.body)
            prompt, salt = str(asked["prompt"]), str(asked.get("cache_salt", ""))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Refusal(400, "the body is no completion request") from None
        request.key = hashlib.sha256(f"{salt}|{prompt[:_PREFIX]}".encode("utf-8", "replace")).hexdigest()

    def release(self, request: Request) -> None:
        if request.endpoint is not None:
            self.inflight[request.endpoint] -= 1

    # replies

    def verdict(self, request: Request) -> Iterator[ProcessingResponse]:
        yield self.head_reply(request, self.destination(request))
        if not request.bodyless:
            yield from self.body_replies(request)
        if request.trailers:
            yield self.trailers_reply()

    def destination(self, request: Request) -> str:
        """The list to name: the choice, then another candidate for retries."""
        others = [one for one in self.candidates(request) if one != request.endpoint] if self.fallbacks else []
        return ",".join([str(request.endpoint), *others[:2]])

    def head_reply(self, request: Request, destination: str) -> ProcessingResponse:
        reply = ProcessingResponse()
        common = reply.request_headers.response
        common.clear_route_cache = True
        common.header_mutation.remove_headers.extend(frames.ORDER_HEADERS)
        common.header_mutation.set_headers.add(
            header=base_pb2.HeaderValue(key=frames.DESTINATION, raw_value=destination.encode()),
            append_action=_OVERWRITE,
        )
        inner = reply.dynamic_metadata.fields[frames.LB_NAMESPACE].struct_value
        inner.fields[frames.DESTINATION].string_value = destination
        return reply

    def body_replies(self, request: Request) -> Iterator[ProcessingResponse]:
        body = bytes(request.body)
        starts = range(0, max(1, len(body)), _CHUNK)
        for start in starts:
            last = start + _CHUNK >= len(body)
            yield _streamed("request_body", body[start : start + _CHUNK], end=last and not request.trailers)

    def trailers_reply(self) -> ProcessingResponse:
        reply = ProcessingResponse()
        reply.request_trailers.SetInParent()
        return reply

    def refuse(self, refusal: Refusal) -> ProcessingResponse:
        reply = ProcessingResponse()
        immediate = reply.immediate_response
        immediate.status.code = refusal.status
        immediate.body = json.dumps({"error": {"message": refusal.reason, "code": refusal.status}}).encode()
        if refusal.status in (429, 503):
            immediate.headers.set_headers.add(header=base_pb2.HeaderValue(key="retry-after", raw_value=b"1"))
        return reply

    def pass_response(self, request: Request, message: ProcessingRequest) -> Iterator[ProcessingResponse]:
        reply = ProcessingResponse()
        match message.WhichOneof("request"):
            case "response_headers":
                self.note_served(request, frames.served_of(message))
                reply.response_headers.SetInParent()
            case "response_body":
                body = message.response_body
                reply = _streamed("response_body", body.body, end=body.end_of_stream)
            case _:
                reply.response_trailers.SetInParent()
        yield reply

    def note_served(self, request: Request, served: str | None) -> None:
        """Whoever answered holds the prefix, whoever was named."""
        if request.key and request.endpoint is not None:
            self.holders[request.key] = served or request.endpoint

    # health

    async def check(
        self, asked: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if asked.service not in _SERVED_NAMES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def watch(
        self, asked: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        await asyncio.Event().wait()


def _streamed(kind: str, data: bytes, *, end: bool) -> ProcessingResponse:
    reply = ProcessingResponse()
    streamed = getattr(reply, kind).response.body_mutation.streamed_response
    streamed.body, streamed.end_of_stream = data, end
    return reply


@asynccontextmanager
async def serving(picker: Reference, *, credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[Target]:
    """Serve a picker on a free loopback port for the length of the block."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    process = grpc.stream_stream_rpc_method_handler(
        picker.process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(frames.SERVICE, {"Process": process}), _health(picker))
    )
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield Target(f"127.0.0.1:{port}", tls=credentials is not None)
    finally:
        await server.stop(None)


def _health(picker: Reference) -> grpc.GenericRpcHandler:
    decode, encode = health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
    methods = {
        "Check": grpc.unary_unary_rpc_method_handler(picker.check, decode, encode),
        "Watch": grpc.unary_stream_rpc_method_handler(picker.watch, decode, encode),
    }
    name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    return grpc.method_handlers_generic_handler(name, methods)
