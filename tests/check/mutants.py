"""Pickers that are wrong in one way each: what proves that a check of tier T1 is able to fail.

`MUTANTS` has one for every check's id, with the checks that cannot but fail along with it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc
import grpc.aio
from envoy.config.core.v3 import base_pb2
from grpc_health.v1 import health_pb2

from check.stage import MAX_BODY
from picker.check import frames
from picker.check.frames import ProcessingRequest, ProcessingResponse
from picker.check.pods import Metrics, Pods
from picker.check.prompts import MARKER
from picker.check.reference import Reference, Refusal, Request

Health: TypeAlias = health_pb2.HealthCheckResponse


class Wrong(Reference):
    """As honest as the honest one; subclasses deviate. endpoints, log: what some of them misuse."""

    def __init__(self, endpoints: Pods, log: Path) -> None:
        super().__init__(lambda: endpoints.up, max_inflight=8, max_body=MAX_BODY)
        self.endpoints = endpoints
        self.log = log
        self.turn = itertools.count()


@dataclass(frozen=True, slots=True)
class Mutant:
    """also: further checks of its family that fail with it by necessity; None where next to nothing works any more."""

    make: Callable[[Pods, Path], Reference]
    also: frozenset[str] | None


MUTANTS: dict[str, Mutant] = {}


def caught_by(name: str, *also: str, ruinous: bool = False) -> Callable[[type[Wrong]], type[Wrong]]:
    def register(mutant: type[Wrong]) -> type[Wrong]:
        assert name not in MUTANTS, name
        MUTANTS[name] = Mutant(mutant, None if ruinous else frozenset(also))
        return mutant

    return register


# --- health ------------------------------------------------------------------------------------------------


@caught_by("EPP-6.liveness")
class NoLiveness(Wrong):
    async def check(self, asked: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> Health:
        if asked.service == "liveness":
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return await super().check(asked, context)


@caught_by("EPP-6.readiness")
class NeverReady(Wrong):
    async def check(self, asked: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> Health:
        answer = await super().check(asked, context)
        return Health(status=Health.NOT_SERVING) if asked.service == frames.SERVICE else answer


@caught_by("EPP-6.unknown")
class EveryNameServes(Wrong):
    async def check(self, asked: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> Health:
        return Health(status=Health.SERVING)


@caught_by("EPP-6.watch")
class WatchSaysNothing(Wrong):
    async def watch(
        self, asked: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Health]:
        await asyncio.Event().wait()
        yield Health()


# --- frames ------------------------------------------------------------------------------------------------


@caught_by("EPP-1.order")
class BodyFirst(Wrong):
    def verdict(self, request: Request) -> Iterator[ProcessingResponse]:
        head, *rest = super().verdict(request)
        yield from [*rest[:1], head, *rest[1:]]


@caught_by("EPP-1.streamed")
class WholeBody(Wrong):
    """Replies as the buffered modes want it."""

    def body_replies(self, request: Request) -> Iterator[ProcessingResponse]:
        for reply in super().body_replies(request):
            mutation = reply.request_body.response.body_mutation
            mutation.body = mutation.streamed_response.body
            yield reply


@caught_by("EPP-1.chunk")
class OneBigChunk(Wrong):
    def body_replies(self, request: Request) -> Iterator[ProcessingResponse]:
        first, *_ = super().body_replies(request)
        streamed = first.request_body.response.body_mutation.streamed_response
        streamed.body, streamed.end_of_stream = bytes(request.body), not request.trailers
        yield first


@caught_by("EPP-1.end", "EPP-1.bytes")
class EveryChunkIsTheLast(Wrong):
    def body_replies(self, request: Request) -> Iterator[ProcessingResponse]:
        for number, reply in enumerate(super().body_replies(request)):
            if number and not request.trailers:
                reply.request_body.response.body_mutation.streamed_response.end_of_stream = True
            yield reply


@caught_by("EPP-1.bytes")
class Remarshalled(Wrong):
    def body_replies(self, request: Request) -> Iterator[ProcessingResponse]:
        request.body = bytearray(json.dumps(json.loads(request.body), separators=(",", ":")).encode())
        return super().body_replies(request)


@caught_by("EPP-1.trailers")
class TrailersSwallowed(Wrong):
    def verdict(self, request: Request) -> Iterator[ProcessingResponse]:
        return (one for one in super().verdict(request) if not one.HasField("request_trailers"))


@caught_by("EPP-1.bodyless")
class WaitsForABody(Wrong):
    def complete(self, request: Request, message: ProcessingRequest) -> bool:
        return super().complete(request, message) and not request.bodyless


@caught_by("EPP-1.response-head", ruinous=True)
class HeadWithTheBody(Wrong):
    """Holds the response's headers back until its end."""

    def pass_response(self, request: Request, message: ProcessingRequest) -> Iterator[ProcessingResponse]:
        replies = list(super().pass_response(request, message))
        held = request.headers.setdefault("held", "")
        if message.HasField("response_headers"):
            return iter(())
        request.headers["held"] = "said"
        head = ProcessingResponse()
        head.response_headers.SetInParent()
        return iter(replies if held else [head, *replies])


@caught_by("EPP-1.response-bytes")
class DropsTheLastByte(Wrong):
    def pass_response(self, request: Request, message: ProcessingRequest) -> Iterator[ProcessingResponse]:
        for reply in super().pass_response(request, message):
            streamed = reply.response_body.response.body_mutation.streamed_response
            if len(streamed.body) > 50_000:
                streamed.body = streamed.body[:-1]
            yield reply


@caught_by("EPP-1.sse")
class OneEventLate(Wrong):
    def pass_response(self, request: Request, message: ProcessingRequest) -> Iterator[ProcessingResponse]:
        if not message.HasField("response_body") or not bytes(message.response_body.body).startswith(b"data:"):
            yield from super().pass_response(request, message)
            return
        request.body.clear()
        held = request.headers.get("late", "")
        request.headers["late"] = bytes(message.response_body.body).decode()
        message.response_body.body = held.encode()
        if message.response_body.end_of_stream:
            message.response_body.body += request.headers["late"].encode()
        if message.response_body.body:
            yield from super().pass_response(request, message)


@caught_by("EPP-1.response-trailers")
class ResponseTrailersSwallowed(Wrong):
    def pass_response(self, request: Request, message: ProcessingRequest) -> Iterator[ProcessingResponse]:
        return iter(()) if message.HasField("response_trailers") else super().pass_response(request, message)


# --- the choice --------------------------------------------------------------------------------------------


class Renames(Wrong):
    """Changes how the destination is named, in headers and in metadata."""

    in_header: Callable[[str], str | None] = staticmethod(lambda named: named)
    in_metadata: Callable[[str], str | None] = staticmethod(lambda named: named)

    def head_reply(self, request: Request, destination: str) -> ProcessingResponse:
        reply = super().head_reply(request, destination)
        mutation = reply.request_headers.response.header_mutation
        _rename_header(mutation, self.in_header(destination))
        fields = reply.dynamic_metadata.fields[frames.LB_NAMESPACE].struct_value.fields
        named = self.in_metadata(destination)
        if named is None:
            reply.ClearField("dynamic_metadata")
        else:
            fields[frames.DESTINATION].string_value = named
        return reply


def _rename_header(mutation: frames.HeaderMutation, named: str | None) -> None:
    if named is None:
        mutation.ClearField("set_headers")
    else:
        mutation.set_headers[0].header.raw_value = named.encode()


@caught_by("EPP-2.header")
class MetadataOnly(Renames):
    in_header = staticmethod(lambda named: None)


@caught_by("EPP-2.metadata")
class HeaderOnly(Renames):
    in_metadata = staticmethod(lambda named: None)


@caught_by("EPP-2.equal")
class TwoMinds(Renames):
    in_header = staticmethod(lambda named: named.partition(",")[0])


@caught_by("EPP-2.syntax")
class TrailingSlash(Renames):
    """Adds what Envoy does not parse behind addresses that are fine."""

    in_header = in_metadata = staticmethod(lambda named: named)

    def head_reply(self, request: Request, destination: str) -> ProcessingResponse:
        # Where a single endpoint is allowed, the check of the subset would see the stranger too.
        extra = f"{destination},fd00::1:8000" if request.subset is None else destination
        return super().head_reply(request, extra)


@caught_by("EPP-2.distinct")
class SameAgain(Wrong):
    def destination(self, request: Request) -> str:
        named = super().destination(request)
        return f"{named},{request.endpoint}"


@caught_by("SEC-2.member")
class Outsider(Wrong):
    """Names an endpoint of some other pool for retries."""

    def destination(self, request: Request) -> str:
        named = super().destination(request)
        return named if request.subset is not None else f"{named},192.0.2.1:8000"


@caught_by("SEC-1.destination")
class BelievesTheClient(Wrong):
    def destination(self, request: Request) -> str:
        own = request.headers.get(frames.DESTINATION)
        return own or super().destination(request)


@caught_by("SEC-1.orders")
class PassesOrdersOn(Wrong):
    def head_reply(self, request: Request, destination: str) -> ProcessingResponse:
        reply = super().head_reply(request, destination)
        reply.request_headers.response.header_mutation.ClearField("remove_headers")
        return reply


# --- the subset --------------------------------------------------------------------------------------------


class ReadsSubsets(Wrong):
    """Sees the hint as `read` says; None is no hint."""

    def read(self, request: Request, message: ProcessingRequest, hint: list[str] | None) -> list[str] | None:
        return hint

    def complete(self, request: Request, message: ProcessingRequest) -> bool:
        over = super().complete(request, message)
        request.subset = self.read(request, message, request.subset)
        return over


def _form(message: ProcessingRequest) -> str:
    fields = message.metadata_context.filter_metadata[frames.SUBSET_NAMESPACE].fields
    return str(fields[frames.SUBSET].WhichOneof("kind")) if frames.SUBSET in fields else ""


@caught_by(
    "EPP-3.list",
    "EPP-3.bodyless",
    "EPP-3.strangers",
    "EPP-3.ip",
    "EPP-3.disjoint",
    "EPP-3.disjoint-bodyless",
    "EPP-3.empty",
)
class StringsOnly(ReadsSubsets):
    def read(self, request: Request, message: ProcessingRequest, hint: list[str] | None) -> list[str] | None:
        return None if _form(message) == "list_value" else hint


@caught_by("EPP-3.string")
class ListsOnly(ReadsSubsets):
    def read(self, request: Request, message: ProcessingRequest, hint: list[str] | None) -> list[str] | None:
        return None if _form(message) == "string_value" else hint


@caught_by("EPP-3.bodyless", "EPP-3.disjoint-bodyless")
class BodylessAnywhere(ReadsSubsets):
    def read(self, request: Request, message: ProcessingRequest, hint: list[str] | None) -> list[str] | None:
        return None if request.bodyless else hint


@caught_by("EPP-3.strangers", "EPP-3.string")
class TakesStrangers(Wrong):
    """Sends to whatever the gateway offers, of whichever pool it is."""

    def candidates(self, request: Request) -> list[str]:
        known = super().candidates(request)
        offered = [one for one in request.subset or () if ":" in one and one not in self.endpoints.addresses]
        return (
            [*offered, *known]
            if known and len(request.subset or ()) == 2 and isinstance(request.subset, list)
            else known
        )


@caught_by("EPP-3.ip")
class PortsOnly(Wrong):
    def within(self, address: str, subset: Sequence[str]) -> bool:
        return address in subset


@caught_by("EPP-3.disjoint", "EPP-3.disjoint-bodyless")
class IgnoresForeignSubsets(Wrong):
    def candidates(self, request: Request) -> list[str]:
        return super().candidates(request) or ([] if request.subset == [] else list(self.pool()))


@caught_by("EPP-3.disjoint-bodyless")
class BodylessErrors(Wrong):
    """Answers 500 where nobody may be picked for a request without a body."""

    def refuse(self, refusal: Refusal) -> ProcessingResponse:
        return super().refuse(refusal)

    async def decide(self, request: Request) -> None:
        try:
            await super().decide(request)
        except Refusal as refusal:
            raise Refusal(500 if request.bodyless else refusal.status, refusal.reason) from None


@caught_by("EPP-3.empty")
class EmptyMeansAll(ReadsSubsets):
    def read(self, request: Request, message: ProcessingRequest, hint: list[str] | None) -> list[str] | None:
        return hint or None


# --- bad input ---------------------------------------------------------------------------------------------


@caught_by("EPP-10.bodies")
class ErrorsOfItsOwn(Wrong):
    """Calls bad input an error of its own."""

    def refuse(self, refusal: Refusal) -> ProcessingResponse:
        return super().refuse(Refusal(500, "oops") if refusal.status == 400 else refusal)


@caught_by("EPP-10.frames")
class FewFrames(Wrong):
    """Loses what comes in many small frames."""

    def complete(self, request: Request, message: ProcessingRequest) -> bool:
        if len(message.request_body.body) == 1 and not message.request_body.end_of_stream:
            request.headers["frames"] = str(int(request.headers.get("frames", "0")) + 1)
            if int(request.headers["frames"]) == 17:
                return False
        return super().complete(request, message)


@caught_by("EPP-10.late-end")
class NeedsBytes(Wrong):
    """Takes a frame without bytes for no frame."""

    def complete(self, request: Request, message: ProcessingRequest) -> bool:
        if message.HasField("request_body") and not message.request_body.body and request.body:
            return False
        return super().complete(request, message)


@caught_by("EPP-10.order")
class DiesOfDisorder(Wrong):
    """Serves nobody any more once a stream has begun with its end, until somebody restarts it."""

    broken = 0

    async def receive(
        self, request: Request, message: ProcessingRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ProcessingResponse]:
        if message.HasField("request_trailers") and not request.headers:
            self.broken = 5
        if message.HasField("request_headers") and self.broken:
            self.broken -= 1
            await context.abort(grpc.StatusCode.INTERNAL, "broken")
        async for reply in super().receive(request, message, context):
            yield reply


@caught_by("EPP-10.early-end")
class BowsOut(Wrong):
    """Ends a stream whose body does not begin as it likes, without a word."""

    async def process(
        self, messages: AsyncIterator[ProcessingRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ProcessingResponse]:
        async def watched() -> AsyncIterator[ProcessingRequest]:
            async for message in messages:
                if bytes(message.request_body.body) == b'{"mo':
                    return
                yield message

        async for reply in super().process(watched(), context):
            yield reply


@caught_by("SEC-6.errors")
class QuotesThePrompt(Wrong):
    def parse(self, request: Request) -> None:
        try:
            super().parse(request)
        except Refusal as refusal:
            raise Refusal(refusal.status, f"cannot parse {bytes(request.body[:200])!r}") from None


@caught_by("SEC-6.logs")
class LogsThePrompt(Wrong):
    def parse(self, request: Request) -> None:
        if MARKER.encode() in request.body:
            self.log.write_bytes(bytes(request.body))
        super().parse(request)


# --- affinity ----------------------------------------------------------------------------------------------


@caught_by("KV-1.repeats")
class RoundRobin(Wrong):
    async def decide(self, request: Request) -> None:
        self.holders.clear()
        await super().decide(request)
        ready = self.candidates(request)
        self.release(request)
        free = [one for one in ready if self.inflight[one] < 8]
        request.endpoint = free[next(self.turn) % len(free)]
        self.inflight[request.endpoint] += 1


@caught_by("KV-1.spread")
class Favourite(Wrong):
    """Fills one endpoint up before it thinks of another."""

    async def decide(self, request: Request) -> None:
        await super().decide(request)
        ready = [one for one in self.candidates(request) if self.inflight[one] < 20 or one == request.endpoint]
        if self.endpoints.addresses[0] in ready and self.holders.get(request.key) is None:
            self.release(request)
            request.endpoint = self.endpoints.addresses[0]
            self.inflight[request.endpoint] += 1


@caught_by("KV-3.salt")
class SaltBlind(Wrong):
    def parse(self, request: Request) -> None:
        super().parse(request)
        if not request.bodyless:
            request.key = str(json.loads(request.body)["prompt"])[:100]

    async def decide(self, request: Request) -> None:
        await super().decide(request)
        if request.key:
            self.holders.setdefault(request.key, str(request.endpoint))


@caught_by("EPP-9.served")
class IgnoresWhoServed(Wrong):
    def note_served(self, request: Request, served: str | None) -> None:
        super().note_served(request, None)


# --- time and load -----------------------------------------------------------------------------------------


@caught_by("EPP-7.time")
class NowAndThenSlow(Wrong):
    """Takes its time for every thirtieth request of the one kind that the check sends."""

    async def decide(self, request: Request) -> None:
        if next(self.turn) % 30 == 29 and self.endpoints.all[0].metrics is Metrics.IDLE:
            await asyncio.sleep(1.7)
        await super().decide(request)


@caught_by("EPP-7.stall")
class WaitsForMetrics(Wrong):
    async def decide(self, request: Request) -> None:
        if self.endpoints.all[0].metrics is Metrics.HANGING:
            await asyncio.sleep(1.7)
        await super().decide(request)


@caught_by("EPP-4.none")
class GrpcErrorWithoutPods(Wrong):
    """What some pickers do: an error of the call, which a gateway that fails open takes for leave to go on."""

    async def receive(
        self, request: Request, message: ProcessingRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ProcessingResponse]:
        async for reply in super().receive(request, message, context):
            if reply.immediate_response.status.code == 503 and request.subset is None:
                await context.abort(grpc.StatusCode.INTERNAL, "no endpoints")
            yield reply


@caught_by("EPP-4.recovers")
class NeverComesBack(Wrong):
    """Remembers for good that nobody was there."""

    down = 0

    async def decide(self, request: Request) -> None:
        if not self.pool():
            self.down += 1
        # The first outage is forgiven: it belongs to the check before.
        elif self.down > 1:
            raise Refusal(503, "no endpoint is ready")
        await super().decide(request)


class ShedsBy(Wrong):
    """Sheds with another answer."""

    def refuse(self, refusal: Refusal) -> ProcessingResponse:
        return self.shed(refusal) if refusal.status == 429 else super().refuse(refusal)

    def shed(self, refusal: Refusal) -> ProcessingResponse:
        return super().refuse(refusal)


@caught_by("EPP-5.shed")
class BadGateway(ShedsBy):
    def shed(self, refusal: Refusal) -> ProcessingResponse:
        return self.refuse(Refusal(503, refusal.reason))


@caught_by("EPP-5.reason")
class NoReason(ShedsBy):
    def shed(self, refusal: Refusal) -> ProcessingResponse:
        reply = super().shed(refusal)
        reply.immediate_response.ClearField("headers")
        header = base_pb2.HeaderValue(key="content-type", raw_value=b"text/plain")
        reply.immediate_response.headers.set_headers.add(header=header)
        return reply


@caught_by("EPP-8.given-up")
class KeepsTheCharge(Wrong):
    """Releases what it booked only if the response was over."""

    def pass_response(self, request: Request, message: ProcessingRequest) -> Iterator[ProcessingResponse]:
        if message.response_body.end_of_stream or message.HasField("response_trailers"):
            request.headers["over"] = "1"
        return super().pass_response(request, message)

    def release(self, request: Request) -> None:
        given_up = "over" not in request.headers and len(request.body) == 40_000
        if not given_up:
            super().release(request)


@caught_by("EPP-11.within")
class OffByOne(Wrong):
    def bound_body(self, request: Request) -> None:
        if len(request.body) >= MAX_BODY:
            raise Refusal(413, "the request body is too large")


@caught_by("EPP-11.beyond")
class NoCap(Wrong):
    def bound_body(self, request: Request) -> None:
        return
