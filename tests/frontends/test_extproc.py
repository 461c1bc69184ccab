"""Streams spoken message by message, as a gateway speaks them, against a scheduler that does what the test says."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from fakes import ManualClock
from picker.errors import ConfigError
from picker.exchange import Action, Event, Exchange
from picker.frontends.extproc import Bounds, ExtProc, Mode
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
    Reading,
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
        self.notices: deque[str] = deque()
        self.queued = asyncio.Event()
        self._decided: list[Outcome] = []

    def submit(self, request: Request, now: float, reading: Reading | None = None) -> Outcome | Queued:
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

    async def request_headers(self, *, end: bool = False, more: Sequence[tuple[str, str]] = ()) -> None:
        message = ProcessingRequest()
        http = message.request_headers
        for name, value in ((":method", "POST"), (":path", "/v1/completions"), *more):
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

    def sweep(self) -> None:
        assert self.service.feedback is not None
        self.service.feedback.sweep(self.clock())

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
    bounds: Bounds | None = None,
    mode: Mode = Mode.FULL,
    predicted: float = 0.0,
    health: bool = False,
) -> AsyncIterator[Rig]:
    scheduler, clock = scheduler or FakeScheduler(), ManualClock()
    made = runtime_of(scheduler, clock, runtime)
    this = Rig(scheduler, made, ExtProc(made, mode=mode, bounds=bounds, predict=lambda _: predicted), clock)
    bound: asyncio.Future[tuple[int, int | None]] = asyncio.get_running_loop().create_future()
    serving = this.service.serve(
        "127.0.0.1", 0, health_port=0 if health else None, grace=60.0, ready=lambda *ports: bound.set_result(ports)
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
        assert sent == {
            "content-type": b"application/json",
            "retry-after": b"2",
            "x-llm-d-request-dropped-reason": b"rejected-saturated",
        }
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
        assert await stream.end() is grpc.StatusCode.CANCELLED
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


QUICK = Bounds(request=0.04, decision=0.04, silence=0.04)


async def test_a_silent_stream_is_given_up_and_blamed_on_the_endpoint_it_waits_for() -> None:
    async with rig(bounds=QUICK) as this:
        silent = this.gateway.stream()
        await silent.route()
        this.clock.advance(1.0)
        assert await silent.end() is grpc.StatusCode.DEADLINE_EXCEEDED
        await this.no_streams()
    assert this.scheduler.of(1) == [Failed(1, FailureReason.TIMEOUT)]


async def answer_of(stream: Stream, this: Rig) -> ProcessingResponse:
    """The next reply, while time passes."""
    async with asyncio.TaskGroup() as tasks:
        reply = tasks.create_task(stream.reply())
        while not reply.done():
            this.clock.advance(1.0)
            await asyncio.sleep(0)
    return reply.result()


async def test_a_body_that_never_ends_is_answered_408_however_many_pieces_come() -> None:
    async with rig(bounds=Bounds(request=10.0, decision=0.04)) as this:
        slow = this.gateway.stream()
        await slow.request_headers()
        for _ in range(3):
            await slow.request_body(b"{", end=False)
            this.clock.advance(3.0)
        answer = (await answer_of(slow, this)).immediate_response
        assert answer.status.code == 408
        assert "in time" in json.loads(answer.body)["error"]["message"]
        assert await slow.end() is grpc.StatusCode.OK
        await this.no_streams()
    assert this.scheduler.of(1) == []


async def test_a_decision_that_never_comes_is_answered_503_and_taken_back() -> None:
    scheduler = FakeScheduler(lambda request: Queued(request.id))
    async with rig(scheduler, bounds=QUICK) as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.request_body(BODY)
        await scheduler.queued.wait()
        assert (await answer_of(stream, this)).immediate_response.status.code == 503
        assert await stream.end() is grpc.StatusCode.OK
        await this.no_streams()
    assert scheduler.of(1) == gone(1)


async def test_an_answer_of_the_data_planes_own_that_stands_still_is_given_up() -> None:
    async with rig(bounds=QUICK) as this:
        stream = this.gateway.stream()
        await stream.request_headers()
        await stream.response_headers(408)
        await stream.reply()
        async with asyncio.TaskGroup() as tasks:
            ended = tasks.create_task(stream.end())
            while not ended.done():
                this.clock.advance(1.0)
                await asyncio.sleep(0)
        assert ended.result() is grpc.StatusCode.DEADLINE_EXCEEDED


# --- lean --------------------------------------------------------------------------------------------------


LEFT = ("downstream_connection_termination",)


class Log:
    """A data plane's access log, on its way to the service."""

    def __init__(self, gateway: Gateway) -> None:
        self._call = gateway.channel.stream_unary(
            "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs",
            request_serializer=als_pb2.StreamAccessLogsMessage.SerializeToString,
            response_deserializer=als_pb2.StreamAccessLogsResponse.FromString,
        )()

    async def tell(self, *entries: accesslog_pb2.HTTPAccessLogEntry) -> None:
        message = als_pb2.StreamAccessLogsMessage()
        message.http_logs.log_entry.extend(entries)
        await self._call.write(message)

    def hang_up(self) -> None:
        self._call.cancel()


def entry(
    mark: str | None, status: int = 200, *, served_by: str = "", request_id: str = "", flags: Sequence[str] = ()
) -> Any:
    made = accesslog_pb2.HTTPAccessLogEntry()
    if mark is not None:
        made.request.request_headers["x-picker-request-id"] = mark
    made.request.request_id = request_id
    if status:
        made.response.response_code.value = status
    if served_by:
        host, _, port = served_by.rpartition(":")
        made.common_properties.upstream_remote_address.socket_address.address = host
        made.common_properties.upstream_remote_address.socket_address.port_value = int(port)
    for name in flags:
        setattr(made.common_properties.response_flags, name, True)
    return made


def mark_of(reply: ProcessingResponse) -> str:
    """What a request was sent on with for the log to name."""
    options = reply.request_headers.response.header_mutation.set_headers
    (mark,) = [
        str(option.header.raw_value.decode()) for option in options if option.header.key == "x-picker-request-id"
    ]
    return mark


async def lean_route(this: Rig, request_id: str = "") -> str:
    """Send a whole request, see its stream ended by the service, and return its mark."""
    stream = this.gateway.stream()
    await stream.request_headers(more=(("x-request-id", request_id),) if request_id else ())
    await stream.request_body(BODY)
    verdict = await stream.reply()
    assert (await stream.reply()).request_body.response.body_mutation.streamed_response.body == BODY
    assert await stream.end() is grpc.StatusCode.OK
    return mark_of(verdict)


async def told(this: Rig, count: int = 1) -> None:
    while len(this.scheduler.facts) < count:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_lean_ends_the_stream_with_the_request_and_the_log_tells_the_rest() -> None:
    async with rig(mode=Mode.LEAN) as this:
        log = Log(this.gateway)
        mark = await lean_route(this)
        await this.no_streams()
        assert this.scheduler.of(1) == []
        await log.tell(entry(mark, 200, served_by="10.0.0.2:8000"))
        await told(this, 2)
    assert this.scheduler.of(1) == [ResponseStarted(1, 200, "10.0.0.2:8000"), Finished(1, 200)]


async def test_lean_requests_are_decided_as_those_whose_first_token_nobody_sees() -> None:
    seen: list[Request] = []

    def answer(request: Request) -> Outcome:
        seen.append(request)
        return Decision(request.id, BEST)

    for mode in Mode:
        async with rig(FakeScheduler(answer), mode=mode) as this:
            stream = this.gateway.stream()
            await stream.request_headers()
            await stream.request_body(b'{"model": "m", "prompt": "x", "stream": true}')
            await stream.reply()
    assert [request.streaming for request in seen] == [True, False]


@pytest.mark.parametrize(
    ("flag", "status", "reason"),
    [
        ("downstream_connection_termination", 0, FailureReason.CLIENT_GONE),
        ("downstream_connection_termination", 200, FailureReason.CLIENT_GONE),
        ("upstream_connection_failure", 503, FailureReason.CONNECT),
        ("upstream_remote_reset", 503, FailureReason.RESET),
        ("upstream_request_timeout", 504, FailureReason.TIMEOUT),
    ],
)
async def test_the_log_tells_why_a_request_failed(flag: str, status: int, reason: FailureReason) -> None:
    async with rig(mode=Mode.LEAN) as this:
        log = Log(this.gateway)
        await log.tell(entry(await lean_route(this), status, flags=(flag,)))
        await told(this)
    assert this.scheduler.of(1) == [Failed(1, reason)]


async def test_a_request_is_told_of_once_whatever_the_log_repeats_or_makes_up() -> None:
    async with rig(mode=Mode.LEAN) as this:
        log, mark = Log(this.gateway), await lean_route(this)
        forged = f"{mark.partition('-')[0]}-0123456789abcdef"
        others = [entry(other) for other in (None, "", "-", forged, "1", f"x{mark}", f"99{mark}")]
        await log.tell(*others)
        await log.tell(entry(mark), entry(mark), entry(mark, 503))
        await told(this)
        await log.tell(entry(mark, 503))
        await lean_route(this)
    assert this.scheduler.of(1) == [Finished(1, 200)]


async def test_a_client_that_left_before_the_verdict_took_effect_is_known_by_its_own_id() -> None:
    async with rig(mode=Mode.LEAN) as this:
        log = Log(this.gateway)
        await lean_route(this, "the-clients-id")
        await log.tell(entry(None, 200, request_id="the-clients-id"))  # not ended by its client: somebody else's
        await log.tell(entry(None, 0, request_id="the-clients-id", flags=LEFT))
        await told(this)
    assert this.scheduler.of(1) == gone(1)


async def test_two_requests_with_one_id_are_not_taken_for_each_other() -> None:
    async with rig(mode=Mode.LEAN) as this:
        log = Log(this.gateway)
        marks = [await lean_route(this, "the-same") for _ in range(2)]
        await log.tell(entry(None, 0, request_id="the-same", flags=LEFT))
        await log.tell(entry(marks[1], 201))
        await told(this)
        assert this.scheduler.facts == [Finished(2, 201)]


async def test_without_a_log_requests_are_over_when_they_should_be() -> None:
    async with rig(mode=Mode.LEAN, predicted=5.0, bounds=QUICK) as this:
        await lean_route(this)
        this.clock.advance(4.0)
        this.sweep()
        assert this.scheduler.facts == []
        this.clock.advance(1.0)
        await told(this)
    assert [type(fact) for fact in this.scheduler.of(1)] == [Failed]


async def test_with_a_log_requests_may_take_longer_than_they_should() -> None:
    async with rig(mode=Mode.LEAN, predicted=5.0, bounds=QUICK) as this:
        log = Log(this.gateway)
        await log.tell()
        await lean_route(this)
        this.clock.advance(100.0)
        this.sweep()
        assert this.scheduler.facts == []
        log.hang_up()  # with whatever it had to say of this request
        await told(this)
    assert [type(fact) for fact in this.scheduler.of(1)] == [Failed]


async def test_a_shutdown_waits_for_the_log_and_ends_what_it_does_not_tell() -> None:
    async with rig(mode=Mode.LEAN) as this:
        log = Log(this.gateway)
        marks = [await lean_route(this) for _ in range(2)]
        this.service.shutdown()
        await log.tell(entry(marks[0]))
        await told(this)
        this.task.cancel()
        await asyncio.wait([this.task])
    assert this.scheduler.facts == [Finished(1, 200), Failed(2, FailureReason.SHUTDOWN)]


async def test_bytes_that_are_no_log_end_the_log_and_nothing_else() -> None:
    async with rig(mode=Mode.LEAN) as this:
        call = this.gateway.channel.stream_unary(
            "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs",
            request_serializer=bytes,
            response_deserializer=bytes,
        )()
        await call.write(b"\xff\xff")
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert this.errors("als-protocol") == 1
        await lean_route(this)


async def test_full_mode_serves_no_access_log() -> None:
    async with rig() as this:
        call = this.gateway.channel.stream_unary(
            "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs",
            request_serializer=bytes,
            response_deserializer=bytes,
        )()
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


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
    # gRPC's client complains of events of the loops of earlier tests.
    assert len([record for record in caplog.records if record.exc_info and record.name != "asyncio"]) == 1


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


async def test_a_watcher_is_told_of_every_change_of_readiness() -> None:
    async with rig() as this:
        stub = health_pb2_grpc.HealthStub(this.gateway.channel)
        ready, alive, odd = (
            stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("readiness", "liveness", "odd")
        )
        status = health_pb2.HealthCheckResponse
        assert [(await watch.read()).status for watch in (ready, alive, odd)] == [
            *(status.SERVING, status.SERVING, status.SERVICE_UNKNOWN)
        ]
        this.service.set_serving(False)
        assert (await ready.read()).status == status.NOT_SERVING
        this.service.set_serving(True)
        assert (await ready.read()).status == status.SERVING


async def test_watchers_do_not_hold_up_a_shutdown() -> None:
    async with rig() as this:
        watch = health_pb2_grpc.HealthStub(this.gateway.channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        this.service.shutdown()
        async with asyncio.timeout(30):
            await this.task


async def test_nobody_is_told_what_else_is_served() -> None:
    async with rig() as this:
        reflection = this.gateway.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=bytes,
            response_deserializer=bytes,
        )()
        assert await Stream(reflection).end() is grpc.StatusCode.UNIMPLEMENTED


async def test_requests_are_still_taken_while_gateways_are_asked_to_leave() -> None:
    async with rig() as this:
        assert await this.gateway.stream().route() == "10.0.0.1:8000"
        async with asyncio.TaskGroup() as tasks:
            parting = tasks.create_task(this.service.part(60.0))
            while await this.gateway.health("readiness") == "SERVING":
                pass
            for _ in range(3):
                assert await this.gateway.stream().route() == "10.0.0.1:8000"
            assert not parting.done()
            parting.cancel()


async def test_nobody_is_waited_for_where_nobody_is_connected() -> None:
    async with rig() as this:
        async with asyncio.timeout(30):
            await this.service.part(60.0)


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
