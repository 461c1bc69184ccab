"""What is wrong in one way between a client and its endpoint: pickers and Envoy configurations.

`MUTANTS` has one for every check's id of tier T2: the proof that the check is able to fail.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from check.envoys import ROOM, Late, Maker, honest
from picker.check import rig
from picker.check.frames import DESTINATION, ProcessingRequest, ProcessingResponse
from picker.check.pods import Pods
from picker.check.reference import Reference, Request
from picker.envoy import POOL, Json, Topology

A, B = Topology.OVERRIDE_HOST, Topology.ORIGINAL_DST


def _same(config: Json) -> None:
    return


@dataclass(frozen=True, slots=True)
class Mutant:
    """topology: where it shows. make: the picker. change: what is done to Envoy's configuration. tls: it is about."""

    topology: Topology = A
    make: Maker | None = None
    change: Callable[[Json], None] = _same
    tls: bool = False


class Wrong(Reference):
    def __init__(self, endpoints: Pods) -> None:
        super().__init__(Late(endpoints), max_inflight=ROOM)
        self.endpoints = endpoints


# --- pickers -----------------------------------------------------------------------------------------------


class BodylessMuddle(Wrong):
    """Says where a request without a body goes in the header alone, which this Envoy does not look at."""

    def head_reply(self, request: Request, destination: str) -> ProcessingResponse:
        reply = super().head_reply(request, destination)
        if request.bodyless:
            reply.ClearField("dynamic_metadata")
        return reply


class SubsetBlind(Wrong):
    def within(self, address: str, subset: Sequence[str]) -> bool:
        return True


class OneForAll(Wrong):
    """Takes one port of a host for the host."""

    def candidates(self, request: Request) -> list[str]:
        return super().candidates(request)[:1]

    async def decide(self, request: Request) -> None:
        self.inflight.clear()
        await super().decide(request)


class FirstChunkOnly(Wrong):
    def body_replies(self, request: Request) -> Iterator[ProcessingResponse]:
        first, *_ = super().body_replies(request)
        first.request_body.response.body_mutation.streamed_response.end_of_stream = True
        yield first


class Buffers(Wrong):
    """Keeps a stream until its end."""

    def pass_response(self, request: Request, message: ProcessingRequest) -> Iterator[ProcessingResponse]:
        if not message.HasField("response_body"):
            return super().pass_response(request, message)
        request.body += message.response_body.body
        if not message.response_body.end_of_stream:
            return iter(())
        message.response_body.body = bytes(request.body)
        return super().pass_response(request, message)

    async def decide(self, request: Request) -> None:
        await super().decide(request)

    def verdict(self, request: Request) -> Iterator[ProcessingResponse]:
        yield from super().verdict(request)
        request.body.clear()


class LosesUnderLoad(Wrong):
    def pass_response(self, request: Request, message: ProcessingRequest) -> Iterator[ProcessingResponse]:
        if sum(self.inflight.values()) > 4 and len(message.response_body.body) > 1:
            message.response_body.body = message.response_body.body[:-1]
        return super().pass_response(request, message)


class ErrorsFor(Wrong):
    """Ends the call with an error where it should refuse: no verdict, for a gateway that fails open."""

    status = 0

    async def receive(
        self, request: Request, message: ProcessingRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ProcessingResponse]:
        async for reply in super().receive(request, message, context):
            if reply.immediate_response.status.code == self.status:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no")
            yield reply


class ErrorFor503(ErrorsFor):
    status = 503


class ErrorFor429(ErrorsFor):
    status = 429


class KeepsOrders(Wrong):
    def head_reply(self, request: Request, destination: str) -> ProcessingResponse:
        reply = super().head_reply(request, destination)
        reply.request_headers.response.header_mutation.ClearField("remove_headers")
        return reply


class Obeys(Wrong):
    """Names whatever the client has named."""

    def destination(self, request: Request) -> str:
        return request.headers.get(DESTINATION) or str(request.endpoint)


class NeverNotices(Wrong):
    def __init__(self, endpoints: Pods) -> None:
        super().__init__(endpoints)
        self.pool = lambda: endpoints.addresses


class HoldsAGrudge(Wrong):
    """After it has seen everybody fail it trusts one again and nobody else."""

    outage = False

    def candidates(self, request: Request) -> list[str]:
        ready = super().candidates(request)
        self.outage = self.outage or not ready
        return ready[:1] if self.outage else ready


# --- configurations ----------------------------------------------------------------------------------------


def change(what: Callable[[Json], object]) -> Callable[[Json], None]:
    def apply(config: Json) -> None:
        what(config)

    return apply


def host(config: Json, name: str) -> Json:
    found: Json = rig.manager(rig.listener(config, name))["route_config"]["virtual_hosts"][0]
    return found


def route(config: Json, name: str) -> Json:
    found: Json = host(config, name)["routes"][0]["route"]
    return found


def unstripped(config: Json) -> None:
    for listener in config["static_resources"]["listeners"]:
        rig.manager(listener).pop("early_header_mutation_extensions")


def by_header(config: Json) -> None:
    """ORIGINAL_DST by header, and nobody takes the client's away."""
    unstripped(config)
    rig.cluster(config, POOL)["original_dst_lb_config"] = {"use_http_header": True, "http_header_name": DESTINATION}


def mirrored(config: Json) -> None:
    route(config, rig.CLOSE)["request_mirror_policies"] = [{"cluster": f"{POOL}-{rig.SECOND}"}]


def misweighted(config: Json) -> None:
    weighted = next(one for one in host(config, rig.ROUTES)["routes"] if one["match"]["prefix"] == "/weighted")
    first, second = weighted["route"]["weighted_clusters"]["clusters"]
    first["weight"], second["weight"] = 30, 70


def crossed(config: Json) -> None:
    host(config, rig.ROUTES)["routes"][0]["route"]["cluster"] = POOL


def retryless(config: Json) -> None:
    route(config, rig.CLOSE).pop("retry_policy")


def distrusting(config: Json) -> None:
    wrong = rig.cluster(config, f"ext-proc-{rig.MISTRUSTED}")["transport_socket"]
    rig.cluster(config, f"ext-proc-{rig.VERIFIED}")["transport_socket"] = wrong


def trusting(config: Json) -> None:
    socket = rig.cluster(config, f"ext-proc-{rig.MISTRUSTED}")["transport_socket"]
    socket["typed_config"]["common_tls_context"].pop("validation_context")


def filter_of(name: str, **settings: object) -> Callable[[Json], None]:
    return change(lambda config: rig.ext_proc(rig.listener(config, name)).update(settings))


MUTANTS: dict[str, Mutant] = {
    "ROUTE-2.obeyed": Mutant(change=filter_of(rig.CLOSE, metadata_options={})),
    "ROUTE-2.bodyless": Mutant(make=BodylessMuddle),
    "ROUTE-2.pinned": Mutant(make=SubsetBlind),
    "ROUTE-2.ports": Mutant(make=OneForAll),
    "ROUTE-3.weights": Mutant(change=misweighted),
    "ROUTE-5.paths": Mutant(change=crossed),
    "ROUTE-5.listeners": Mutant(change=change(lambda config: route(config, rig.SECOND).update(cluster=POOL))),
    "ROUTE-5.none": Mutant(change=change(lambda config: host(config, rig.ROUTES).update(domains=["*"]))),
    "ROUTE-5.no-picker": Mutant(change=filter_of(rig.ROUTES, failure_mode_allow=True)),
    "ROUTE-6.served": Mutant(change=filter_of(rig.CLOSE, response_attributes=[])),
    "ROUTE-4.fallback": Mutant(change=retryless),
    "EPP-12.bytes": Mutant(make=FirstChunkOnly),
    "EPP-12.sse": Mutant(make=Buffers),
    "EPP-12.load": Mutant(make=LosesUnderLoad),
    "SEC-2.canary": Mutant(B, Obeys, unstripped),
    "SEC-1.forwarded": Mutant(A, KeepsOrders, unstripped),
    "SEC-3.verified": Mutant(change=distrusting, tls=True),
    "SEC-3.mistrusted": Mutant(change=trusting, tls=True),
    "VERDICT-1.503": Mutant(make=ErrorFor503),
    "VERDICT-2.429": Mutant(make=ErrorFor429),
    "FAIL-1.close": Mutant(change=filter_of(rig.CLOSE, failure_mode_allow=True)),
    "FAIL-2.open": Mutant(change=filter_of(rig.OPEN, failure_mode_allow=False)),
    "FAIL-3.spoofed": Mutant(B, honest(B), by_header),
    "FAIL-4.hang": Mutant(
        change=change(lambda config: rig.manager(rig.listener(config, rig.SHORT)).update(stream_idle_timeout="0s"))
    ),
    "FAIL-5.early": Mutant(change=filter_of(rig.CLOSE, status_on_error={"code": 200})),
    "FAIL-5.late": Mutant(change=mirrored),
    "FAIL-6.clean": Mutant(change=mirrored),
    "CHURN-1.leave": Mutant(make=NeverNotices),
    "CHURN-2.outage": Mutant(make=HoldsAGrudge),
}
