"""A running API in front of a real scheduler, under a clock that stands still, and the words to speak to it in."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

import fakes
from fakes import ManualClock
from picker.core.scheduler import Scheduler
from picker.exchange import Limits
from picker.frontends.api import Api
from picker.frontends.api_picks import Picks
from picker.frontends.serving import listen, port_of
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import Fact
from picker.wire.api import SERVICE
from picker.wire.pb import picker_pb2 as pb

BODY = json.dumps({"model": "m", "prompt": "Once upon a time " * 60, "stream": True}).encode()
CALLS: dict[str, tuple[str, Any, Any]] = {
    "Pick": ("unary_unary", pb.PickRequest, pb.PickResponse),
    "Report": ("stream_unary", pb.Outcome, pb.ReportSummary),
    "WatchEndpoints": ("unary_stream", pb.WatchEndpointsRequest, pb.EndpointsUpdate),
}


class Rig:
    """One running service and what a test needs to see of it. facts: what the scheduler was told of requests."""

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self.clock = ManualClock()
        self.scheduler = scheduler
        telemetry = Telemetry(CollectorRegistry())
        self.runtime = Runtime(
            scheduler,
            BlockHasher(b"a secret"),
            telemetry,
            clock=self.clock,
            limits=limits,
        )
        self.facts: list[Fact] = []
        fakes.Ear(self.runtime, self.facts.append)
        self.stop = asyncio.Event()
        self.port = 0
        self.channel: grpc.aio.Channel
        self.api: Api
        self.task: asyncio.Task[None]

    def call(self, method: str) -> Any:
        kind, request, response = CALLS[method]
        make = getattr(self.channel, kind)
        return make(f"/{SERVICE}/{method}", request.SerializeToString, response.FromString)

    async def ask(self, body: bytes = BODY, *, path: str = "/v1/completions", **more: Any) -> Any:
        request = pb.PickRequest(http=pb.HttpRequest(path=path, body=body), **more)
        return await self.call("Pick")(request, timeout=60)

    async def pick(self, body: bytes = BODY, **more: Any) -> Any:
        answer = await self.ask(body, **more)
        assert answer.WhichOneof("outcome") == "picked", answer
        return answer.picked

    async def features(self, **given: Any) -> Any:
        answer = await self.call("Pick")(pb.PickRequest(features=pb.Features(**given)), timeout=60)
        assert answer.WhichOneof("outcome") == "picked", answer
        return answer.picked

    async def report(self, *outcomes: Any) -> Any:
        """Tell these in a stream of their own, to its clean end."""
        return await self.call("Report")(iter(outcomes), timeout=60)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the other end of a call brings about, which nothing tells."""
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0)

    @property
    def picks(self) -> Picks:
        return self.api.picks

    @property
    def charges(self) -> int:
        return len(self.scheduler.charges)

    def of(self, picked: Any) -> list[Fact]:
        number = int(picked.id.partition("-")[0])
        return [fact for fact in self.facts if getattr(fact, "request_id", None) == number]


@asynccontextmanager
async def rig(
    *endpoints: str,
    predicted: float = 30.0,
    key: str | None = None,
    tls: ssl.SSLContext | None = None,
    limits: Limits | None = None,
    grace: float = 0.0,
    stalled: float = 60.0,
    decision: float = 65.0,
    options: Any = (),
    **settings: Any,
) -> AsyncIterator[Rig]:
    made = fakes.scheduler(*(endpoints or ("a", "b", "c")), **settings)
    this = Rig(made, limits or Limits())
    this.api = Api(
        this.runtime,
        predict=lambda _: predicted,
        block_bytes=256,
        key=key,
        stalled=stalled,
        decision=decision,
        most_picks=5,
    )
    listener = listen("127.0.0.1", 0)
    this.port = port_of(listener)
    async with asyncio.TaskGroup() as tasks:
        this.task = tasks.create_task(this.api.serve(listener, this.stop, tls=tls, grace=grace))
        this.channel = grpc.aio.insecure_channel(f"127.0.0.1:{this.port}", options=options)
        async with this.channel:
            yield this
            this.stop.set()
            await this.task


async def fails(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), str(caught.value.details())


def started(picked: Any, status: int = 200, endpoint: str = "") -> Any:
    return pb.Outcome(pick_id=picked.id, started=pb.Started(status=status, endpoint=endpoint))


def first_token(picked: Any) -> Any:
    return pb.Outcome(pick_id=picked.id, first_token=pb.FirstToken())


def finished(picked: Any, status: int = 0, **usage: int) -> Any:
    return pb.Outcome(
        pick_id=picked.id, finished=pb.Finished(status=status, usage=pb.Usage(**usage) if usage else None)
    )


def hello(reporter: str) -> Any:
    return pb.Outcome(hello=pb.Hello(reporter=reporter))
