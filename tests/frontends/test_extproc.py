"""Streams spoken message by message, as a gateway speaks them, against a scheduler that does what the test says."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from fakes import ManualClock
from picker.errors import ConfigError
from picker.exchange import Action, Event, Exchange
from picker.frontends.extproc import ExtProc
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import (
    Decision,
    Endpoint,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    Outcome,
    Queued,
    Rejection,
    RejectReason,
    Request,
    ResponseStarted,
    Usage,
)
from picker.wire.extproc import SERVICE, ProcessingRequest, ProcessingResponse

BODY = b'{"model": "m", "prompt": "Once upon a time"}'
ANSWER = (
    b'{"choices": [{"index": 0, "text": "there", "finish_reason": "stop"}],'
    b' "usage": {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}}'
)
BEST = Endpoint("a", "10.0.0.1:8000")


class FakeScheduler:
    """Answers every request as told, remembers every fact, hands out queued requests on `release`."""

    def __init__(self, answer: Callable[[Request], Outcome | Queued] | None = None) -> None:
        self.answer = answer or (lambda request: Decision(request.id, BEST))
        self.facts: list[Fact] = []
        self.queued = asyncio.Event()
        self._decided: list[Outcome] = []

    def submit(self, request: Request, now: float) -> Outcome | Queued:
        outcome = self.answer(request)
        if isinstance(outcome, Queued):
            self.queued.set()
        return outcome

    def fallback(self, request: Request) -> Outcome:
        return Decision(request.id, BEST, charged=False)

    def apply(self, fact: Fact, now: float) -> None:
        self.facts.append(fact)

    def poll(self, now: float) -> Sequence[Outcome]:
        decided, self._decided = self._decided, []
        return decided

    def next_wakeup(self) -> float | None:
        return None

    def release(self, runtime: Runtime, request_id: int) -> None:
        self._decided.append(Decision(request_id, BEST, waited=1.0))
        runtime.emit(FirstToken(999))

    def ends_of(self, request_id: int) -> int:
        return sum(isinstance(fact, Finished | Failed) for fact in self.of(request_id))

    def of(self, request_id: int) -> list[Fact]:
        return [fact for fact in self.facts if getattr(fact, "request_id", None) == request_id]


class Gateway:
    """The other side of the wire: opens streams and asks after health."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._process = self.channel.stream_stream(
            f"/{SERVICE}/Process",
            request_serializer=ProcessingRequest.SerializeToString,
            response_deserializer=ProcessingResponse.FromString,
        )

    def stream(self) -> "Stream":
        return Stream(self._process())

    async def health(self, service: str) -> str:
        stub = health_pb2_grpc.HealthStub(self.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


class Stream:
    def __init__(self, call: "grpc.aio.StreamStreamCall[ProcessingRequest, ProcessingResponse]") -> None:
        self.call = call

    async def request_headers(self, *, end: bool = False) -> None:
        message = ProcessingRequest()
        http = message.request_headers
        for name, value in ((":method", "POST"), (":path", "/v1/completions")):
            http.headers.headers.add(key=name, raw_value=value.encode())
        http.end_of_stream = end
        await self.call.write(message)

    async def request_body(self, data: bytes, *, end: bool = True) -> None:
        message = ProcessingRequest()
        message.request_body.body = data
        message.request_body.end_of_stream = end
        await self.call.write(message)

    async def request_trailers(self) -> None:
        message = ProcessingRequest()
        message.request_trailers.SetInParent()
        await self.call.write(message)

    async def response_headers(self, status: int = 200, *, end: bool = False) -> None:
        message = ProcessingRequest()
        http = message.response_headers
        for name, value in ((":status", str(status)), ("content-type", "application/json")):
            http.headers.headers.add(key=name, raw_value=value.encode())
        http.end_of_stream = end
        await self.call.write(message)

    async def response_body(self, data: bytes, *, end: bool) -> None:
        message = ProcessingRequest()
        message.response_body.body = data
        message.response_body.end_of_stream = end
        await self.call.write(message)

    async def reply(self) -> ProcessingResponse:
        message = await self.call.read()
        assert message is not grpc.aio.EOF, f"the stream ended: {await self.call.code()} {await self.call.details()}"
        return message

    async def route(self) -> str:
        """Send a whole request; the destination of the verdict, its body taken off the wire."""
        await self.request_headers()
        await self.request_body(BODY)
        destination = _destination(await self.reply())
        assert (await self.reply()).request_body.response.body_mutation.streamed_response.body == BODY
        return destination

    async def end(self) -> grpc.StatusCode:
        """The status the service ends the stream with, after no further message."""
        try:
            assert await self.call.read() is grpc.aio.EOF
        except grpc.aio.AioRpcError as error:
            return error.code()
        return await self.call.code()


def _destination(reply: ProcessingResponse) -> str:
    return str(
        reply.dynamic_metadata.fields["envoy.lb"].struct_value.fields["x-gateway-destination-endpoint"].string_value
    )


class Rig:
    """One running service and what a test needs to see of it."""

    def __init__(self, scheduler: FakeScheduler, runtime: Runtime, service: ExtProc, clock: ManualClock) -> None:
        self.scheduler = scheduler
        self.runtime = runtime
        self.service = service
        self.clock = clock
        self.gateway: Gateway
        self.health_port: int | None
        self.task: asyncio.Task[None]

    async def streams(self, count: int) -> None:
        """Wait until the service has this many open: the other end of a stream is not told when it is noticed."""
        while self.service.open_streams != count:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def no_streams(self) -> None:
        await self.streams(0)

    def errors(self, where: str) -> float:
        value = self.runtime.telemetry.registry.get_sample_value("picker_internal_errors_total", {"where": where})
        return value or 0.0


def runtime_of(scheduler: FakeScheduler, clock: ManualClock, kind: type[Runtime] = Runtime) -> Runtime:
    return kind(scheduler, BlockHasher(b"a secret"), Telemetry(CollectorRegistry()), clock=clock)  # type: ignore[arg-type]


@asynccontextmanager
async def rig(
    scheduler: FakeScheduler | None = None,
    *,
    runtime: type[Runtime] = Runtime,
    stream_timeout: float = 600.0,
    health: bool = False,
) -> AsyncIterator[Rig]:
    scheduler, clock = scheduler or FakeScheduler(), ManualClock()
    made = runtime_of(scheduler, clock, runtime)
    this = Rig(scheduler, made, ExtProc(made, stream_timeout=stream_timeout), clock)
    bound: asyncio.Future[tuple[int, int | None]] = asyncio.get_running_loop().create_future()
    serving = this.service.serve(
        "127.0.0.1", 0, health_port=0 if health else None, grace=5.0, ready=lambda *ports: bound.set_result(ports)
    )
    async with asyncio.TaskGroup() as tasks:
        this.task = tasks.create_task(serving)
        port, this.health_port = await bound
        this.gateway = Gateway(port)
        try:
            async with this.gateway.channel:
                yield this
        finally:
            this.task.cancel()


# --- the playbook ------------------------------------------------------------------------------------------


async def test_a_request_is_routed_and_its_response_followed_to_the_end() -> None:
    async with rig() as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(BODY[:10], end=False)
        await stream.request_body(BODY[10:])
        verdict = await stream.reply()
        assert _destination(verdict) == "10.0.0.1:8000"
        body = (await stream.reply()).request_body.response.body_mutation.streamed_response
        assert (body.body, body.end_of_stream) == (BODY, True)
        await stream.response_headers()
        assert (await stream.reply()).WhichOneof("response") == "response_headers"
        await stream.response_body(ANSWER[:20], end=False)
        assert (await stream.reply()).response_body.response.body_mutation.streamed_response.body == ANSWER[:20]
        await stream.response_body(ANSWER[20:], end=True)
        last = (await stream.reply()).response_body.response.body_mutation.streamed_response
        assert (last.body, last.end_of_stream) == (ANSWER[20:], True)
        assert await stream.end() is grpc.StatusCode.OK
        await this.no_streams()
    assert this.scheduler.of(1) == [ResponseStarted(1, 200), FirstToken(1), Finished(1, 200, Usage(4, 1))]


async def test_a_bodyless_request_is_routed_on_its_headers() -> None:
    async with rig() as this:
        stream = this.gateway.stream()
        await stream.request_headers(end=True)
        assert _destination(await stream.reply()) == "10.0.0.1:8000"
        await stream.response_headers(end=True)
        assert (await stream.reply()).WhichOneof("response") == "response_headers"
        assert await stream.end() is grpc.StatusCode.OK
    assert this.scheduler.of(1)[0] == ResponseStarted(1, 200)
    assert this.scheduler.ends_of(1) == 1


async def test_nothing_is_answered_before_the_body_is_complete() -> None:
    async with rig() as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(BODY[:10], end=False)
        await stream.request_body(BODY[10:])
        assert (await stream.reply()).WhichOneof("response") == "request_headers"
        stream.call.cancel()


async def test_a_rejection_is_an_immediate_response() -> None:
    scheduler = FakeScheduler(
        lambda request: Rejection(request.id, RejectReason.SATURATED, 429, "Try later.", retry_after=2.0)
    )
    async with rig(scheduler) as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(BODY)
        immediate = (await stream.reply()).immediate_response
        assert immediate.status.code == 429
        assert json.loads(immediate.body)["error"]["message"] == "Try later."
        sent = {option.header.key: option.header.raw_value for option in immediate.headers.set_headers}
        assert sent == {"content-type": b"application/json", "retry-after": b"2"}
        assert await stream.end() is grpc.StatusCode.OK
    assert scheduler.of(1) == []


async def test_a_body_that_is_not_json_is_answered_400() -> None:
    async with rig() as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(b"{")
        assert (await stream.reply()).immediate_response.status.code == 400
        assert await stream.end() is grpc.StatusCode.OK


async def test_streams_do_not_wait_for_each_other() -> None:
    scheduler = FakeScheduler(
        lambda request: Queued(request.id) if request.id == 1 else Decision(request.id, BEST),
    )
    async with rig(scheduler) as this:
        first = this.gateway.stream()
        await first.request_headers()
        await first.request_body(BODY)
        await scheduler.queued.wait()
        assert await this.gateway.stream().route() == "10.0.0.1:8000"
        scheduler.release(this.runtime, 1)
        assert _destination(await first.reply()) == "10.0.0.1:8000"


# --- ends that come early ----------------------------------------------------------------------------------


def gone(request_id: int) -> list[Fact]:
    return [Failed(request_id, FailureReason.CLIENT_GONE)]


async def test_a_client_that_leaves_before_the_decision_costs_nothing() -> None:
    async with rig() as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(BODY[:10], end=False)
        await this.streams(1)
        stream.call.cancel()
        await this.no_streams()
    assert this.scheduler.of(1) == []


async def test_a_reset_while_queued_takes_the_request_out_once() -> None:
    scheduler = FakeScheduler(lambda request: Queued(request.id))
    async with rig(scheduler) as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(BODY)
        await scheduler.queued.wait()
        stream.call.cancel()
        await this.no_streams()
    assert scheduler.of(1) == gone(1)


async def test_a_half_close_while_queued_takes_the_request_out_once() -> None:
    scheduler = FakeScheduler(lambda request: Queued(request.id))
    async with rig(scheduler) as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(BODY)
        await scheduler.queued.wait()
        await stream.call.done_writing()
        await this.no_streams()
    assert scheduler.of(1) == gone(1)


async def test_a_message_that_comes_while_queued_is_not_lost() -> None:
    scheduler = FakeScheduler(lambda request: Queued(request.id))
    async with rig(scheduler) as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(BODY)
        await scheduler.queued.wait()
        await stream.request_body(b"out of order")
        scheduler.release(this.runtime, 1)
        assert _destination(await stream.reply()) == "10.0.0.1:8000"
        await stream.reply()
        assert await stream.end() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_data_planes_own_answer_to_an_unfinished_request_is_passed_on() -> None:
    async with rig() as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(BODY[:10], end=False)
        await stream.response_headers(408)
        assert (await stream.reply()).WhichOneof("response") == "response_headers"
        await stream.response_body(b"too slow", end=True)
        assert (await stream.reply()).response_body.response.body_mutation.streamed_response.body == b"too slow"
        assert await stream.end() is grpc.StatusCode.OK
        await this.no_streams()
        assert this.errors("extproc-protocol") == 0
    assert this.scheduler.of(1) == []


async def test_the_data_planes_own_answer_takes_a_request_out_of_the_queue() -> None:
    scheduler = FakeScheduler(lambda request: Queued(request.id))
    async with rig(scheduler) as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(BODY)
        await scheduler.queued.wait()
        await stream.response_headers(504, end=True)
        assert (await stream.reply()).WhichOneof("response") == "response_headers"
        assert await stream.end() is grpc.StatusCode.OK
        await this.no_streams()
    assert scheduler.of(1) == gone(1)


@pytest.mark.parametrize("half_close", [False, True])
async def test_a_client_that_leaves_mid_response_ends_its_request_once(half_close: bool) -> None:
    async with rig() as this:
        stream = this.gateway.stream()
        await stream.route()
        await stream.response_headers()
        await stream.reply()
        await stream.response_body(ANSWER[:10], end=False)
        await stream.reply()
        if half_close:
            await stream.call.done_writing()
            assert await stream.end() is grpc.StatusCode.OK
        else:
            stream.call.cancel()
        await this.no_streams()
    assert this.scheduler.of(1)[-1:] == gone(1)
    assert this.scheduler.ends_of(1) == 1


async def test_a_silent_stream_is_given_up_and_blamed_on_the_endpoint_it_waits_for() -> None:
    async with rig(stream_timeout=0.04) as this:
        silent = this.gateway.stream()
        await silent.route()
        this.clock.advance(1.0)
        assert await silent.end() is grpc.StatusCode.DEADLINE_EXCEEDED
        await this.no_streams()
    assert this.scheduler.of(1) == [Failed(1, FailureReason.TIMEOUT)]


async def test_a_client_that_never_finishes_its_body_is_given_up_without_blame() -> None:
    async with rig(stream_timeout=0.04) as this:
        silent = this.gateway.stream()
        await silent.request_headers()
        await this.streams(1)
        while this.service.open_streams:
            this.clock.advance(1.0)
            await asyncio.sleep(0)
        assert await silent.end() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert this.scheduler.of(1) == []


# --- faults ------------------------------------------------------------------------------------------------


async def test_messages_out_of_order_end_the_stream_and_are_counted() -> None:
    async with rig() as this:
        stream = this.gateway.stream()
        await stream.route()
        await stream.request_body(b"again")
        assert await stream.end() is grpc.StatusCode.INVALID_ARGUMENT
        await this.no_streams()
        assert this.errors("extproc-protocol") == 1
    assert this.scheduler.of(1) == gone(1)


async def test_a_decision_that_fails_does_not_fail_the_request() -> None:
    def explode(request: Request) -> Outcome:
        raise ZeroDivisionError

    async with rig(FakeScheduler(explode)) as this:
        assert await this.gateway.stream().route() == "10.0.0.1:8000"
        assert this.errors("submit") == 1


class BrokenRuntime(Runtime):
    """Fails at the first event it is asked to, as a bug of ours would."""

    async def receive(self, exchange: Exchange, event: Event) -> list[Action]:
        if type(event).__name__ == self.breaks_on:
            raise RuntimeError("a bug")
        return await super().receive(exchange, event)

    breaks_on = "RequestBody"


class LateBrokenRuntime(BrokenRuntime):
    breaks_on = "ResponseBody"


async def test_a_bug_before_the_response_is_answered_500(caplog: pytest.LogCaptureFixture) -> None:
    async with rig(runtime=BrokenRuntime) as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(BODY)
        immediate = (await stream.reply()).immediate_response
        assert immediate.status.code == 500
        assert json.loads(immediate.body)["error"]["code"] == 500
        assert await stream.end() is grpc.StatusCode.OK
        assert this.errors("extproc") == 1
    assert len([record for record in caplog.records if record.exc_info]) == 1


async def test_a_bug_within_the_response_ends_the_stream_and_the_request_once() -> None:
    async with rig(runtime=LateBrokenRuntime) as this:
        stream = this.gateway.stream()
        await stream.route()
        await stream.response_headers()
        await stream.reply()
        await stream.response_body(ANSWER, end=True)
        assert await stream.end() is grpc.StatusCode.INTERNAL
        await this.no_streams()
    assert this.scheduler.of(1)[1:] == gone(1)


# --- the service -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "readiness", SERVICE])
async def test_readiness_can_be_turned_off_while_liveness_holds(name: str) -> None:
    async with rig() as this:
        assert await this.gateway.health(name) == "SERVING"
        this.service.set_serving(False)
        assert await this.gateway.health(name) == "NOT_SERVING"
        assert await this.gateway.health("liveness") == "SERVING"


async def test_an_unknown_health_name_is_not_found() -> None:
    async with rig() as this:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await this.gateway.health("somebody-else")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_shutdown_lets_open_streams_end_and_takes_no_new_ones() -> None:
    async with rig() as this:
        stream = this.gateway.stream()
        await stream.route()
        this.service.shutdown()
        await stream.response_headers(204, end=True)
        await stream.reply()
        assert await stream.end() is grpc.StatusCode.OK
        await this.task
        with pytest.raises(grpc.aio.AioRpcError):
            await this.gateway.health("")
    assert this.scheduler.of(1)[-1] == Finished(1, 204)


async def test_streams_that_outlive_the_service_are_closed_as_shutdown() -> None:
    async with rig() as this:
        stream = this.gateway.stream()
        await stream.route()
        this.task.cancel()
        await asyncio.wait([this.task])
    assert this.scheduler.of(1) == [Failed(1, FailureReason.SHUTDOWN)]


async def test_a_port_in_use_is_a_config_error() -> None:
    async with rig() as this:
        port = this.gateway.port
        with pytest.raises(ConfigError, match=str(port)):
            await ExtProc(this.runtime).serve("127.0.0.1", port)


async def test_health_has_a_port_of_its_own_that_serves_nothing_else() -> None:
    async with rig(health=True) as this:
        assert this.health_port is not None
        probes = Gateway(this.health_port)
        async with probes.channel:
            assert await probes.health("readiness") == "SERVING"
            assert await probes.stream().end() is grpc.StatusCode.UNIMPLEMENTED
