import asyncio
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

import fakes
from fakes import NOW, ManualClock, endpoint, scheduler
from picker.core.profile import Weighted
from picker.core.scheduler import Scheduler
from picker.core.view import PoolView
from picker.exchange import (
    Action,
    Exchange,
    Forward,
    Limits,
    PassBody,
    PassHead,
    RequestBody,
    RequestHead,
    Respond,
    ResponseBody,
    ResponseHead,
    Submit,
    UpstreamFailed,
)
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import (
    Call,
    CallKind,
    Decision,
    EndpointAdded,
    EndpointRemoved,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    HealthObserved,
    Queued,
    Rejection,
    RejectReason,
    Request,
    ResponseStarted,
    ScoreArray,
    Usage,
)

JSON = {"content-type": "application/json"}
ANSWER = b'{"choices": [{"message": {"content": "Hi"}}], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}'


def chat(text: str = "Hello", **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], **fields}).encode()


def running(*names: str, subject: Scheduler | None = None, clock: ManualClock | None = None, **options: Any) -> Runtime:
    """A runtime over these endpoints, each with room for one request unless the scheduler says otherwise."""
    return Runtime(
        subject or scheduler(*names, max_inflight=1),
        BlockHasher(b"secret"),
        Telemetry(CollectorRegistry()),
        clock=clock or ManualClock(),
        **options,
    )


async def ask(runtime: Runtime, body: bytes | None = None, exchange: Exchange | None = None) -> list[Action]:
    """Everything up to the decision."""
    exchange = exchange or runtime.open()
    assert await runtime.receive(exchange, RequestHead("POST", "/v1/chat/completions", {})) == []
    return await runtime.receive(exchange, RequestBody(chat() if body is None else body, end=True))


async def answer(runtime: Runtime, exchange: Exchange, body: bytes = ANSWER) -> None:
    await runtime.receive(exchange, ResponseHead(200, JSON))
    await runtime.receive(exchange, ResponseBody(body, end=True))


@dataclass
class Client:
    """A request that may have to wait, as a front end runs it: whatever happens, its exchange is closed."""

    runtime: Runtime
    exchange: Exchange
    actions: list[Action] = field(default_factory=list)

    async def run(self) -> None:
        try:
            self.actions = await ask(self.runtime, exchange=self.exchange)
        except asyncio.CancelledError:
            self.runtime.close(self.exchange)
            raise


def client(runtime: Runtime) -> Client:
    return Client(runtime, runtime.open())


async def others_run() -> None:
    """Let every task get as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


def went_to(actions: list[Action]) -> str:
    (forward,) = actions
    assert isinstance(forward, Forward)
    return forward.decision.endpoint.name


def refused(actions: list[Action]) -> int:
    (respond,) = actions
    assert isinstance(respond, Respond)
    return respond.status


def metric(runtime: Runtime, name: str, **labels: str) -> float:
    return runtime.telemetry.registry.get_sample_value(name, labels) or 0.0


@dataclass(frozen=True, slots=True)
class Broken:
    """A scorer with a bug."""

    name: str = "broken"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        raise ZeroDivisionError("a bug in a scorer")


@dataclass(slots=True)
class BrokenWhen:
    """A scorer with a bug that shows for some requests only."""

    shows: Callable[[Request], bool]
    name: str = "broken-when"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        if self.shows(request):
            raise ZeroDivisionError("a bug in a scorer")
        return np.ones(view.n, dtype=np.float32)


# --- one request ---


async def test_a_request_is_routed_charged_and_released() -> None:
    runtime = running("a")
    facts: list[Fact] = []
    fakes.Ear(runtime, facts.append)
    exchange = runtime.open()
    assert went_to(await ask(runtime, exchange=exchange)) == "a"
    assert len(runtime.scheduler.charges) == 1
    await answer(runtime, exchange)
    assert len(runtime.scheduler.charges) == 0
    assert facts == [
        ResponseStarted(exchange.id, 200, "a:8000"),
        FirstToken(exchange.id),
        Finished(exchange.id, 200, Usage(9, 2)),
    ]


async def test_requests_are_numbered_by_us() -> None:
    runtime = running("a")
    assert [runtime.open().id, runtime.open().id] == [1, 2]


async def test_a_failed_attempt_goes_elsewhere_within_the_same_call() -> None:
    runtime = running("a", "b")
    exchange = runtime.open()
    first = went_to(await ask(runtime, exchange=exchange))
    second = went_to(await runtime.receive(exchange, UpstreamFailed(FailureReason.CONNECT)))
    assert {first, second} == {"a", "b"}
    assert len(runtime.scheduler.charges) == 1
    await answer(runtime, exchange)
    assert len(runtime.scheduler.charges) == 0


async def test_limits_are_those_of_the_runtime() -> None:
    assert refused(await ask(running("a", limits=Limits(max_body_bytes=3)))) == 413


async def test_closing_ends_a_request_once_and_does_nothing_afterwards() -> None:
    runtime = running("a")
    facts: list[Fact] = []
    fakes.Ear(runtime, facts.append)
    exchange = runtime.open()
    await ask(runtime, exchange=exchange)
    for _ in range(3):
        runtime.close(exchange, FailureReason.SHUTDOWN)
    assert facts == [Failed(exchange.id, FailureReason.SHUTDOWN)]
    assert len(runtime.scheduler.charges) == 0


def test_what_the_scheduler_is_told_of_a_call_is_hashes_and_sizes() -> None:
    runtime = running("a", queue_timeout=7.0)
    call = Call(CallKind.CHAT, "m", b"x" * 600, 30, 150, 99, stream=True, salt="s", session="t", priority=4)
    submit = Submit(call, subset=frozenset({"10.0.0.1"}), exclude=frozenset({"a"}))
    prepared = runtime.prepare(5, submit, NOW)
    assert (prepared.id, prepared.model, prepared.arrived_at, prepared.deadline) == (5, "m", NOW, NOW + 7.0)
    assert (prepared.block_hashes.size, prepared.prompt_bytes, prepared.extra_bytes) == (2, 600, 30)
    assert (prepared.prompt_tokens, prepared.max_tokens, prepared.priority) == (150, 99, 4)
    assert (prepared.session, prepared.streaming) == ("t", True)
    assert (prepared.subset, prepared.exclude) == (submit.subset, submit.exclude)


def test_models_and_salts_share_no_prefix() -> None:
    runtime = running("a")
    hashes = {
        int(runtime.prepare(1, Submit(Call(CallKind.CHAT, model, b"x" * 600, salt=salt)), NOW).block_hashes[0])
        for model in (None, "m", "lora")
        for salt in (None, "s")
    }
    assert len(hashes) == 6


async def test_without_a_time_limit_there_is_no_deadline() -> None:
    assert running("a").prepare(1, Submit(Call(CallKind.CHAT, None)), NOW).deadline is None


# --- the queue ---


async def test_a_request_that_waits_is_decided_when_another_ends() -> None:
    clock = ManualClock()
    runtime = running("a", clock=clock)
    first, second, third = client(runtime), client(runtime), client(runtime)
    async with asyncio.TaskGroup() as group:
        for each in (first, second, third):
            group.create_task(each.run())
        await others_run()
        assert (went_to(first.actions), second.actions, third.actions) == ("a", [], [])
        clock.advance(2.0)
        await answer(runtime, first.exchange)
        await others_run()
        assert (went_to(second.actions), third.actions) == ("a", [])
        runtime.close(second.exchange)
    assert went_to(third.actions) == "a"
    record = runtime.record(second.exchange.id)
    assert record is not None
    assert isinstance(record.outcome, Decision)
    assert record.outcome.waited == 2.0
    runtime.close(third.exchange)
    assert (len(runtime.scheduler.charges), len(runtime.scheduler.queue)) == (0, 0)


async def test_a_request_that_waits_is_decided_when_an_endpoint_joins() -> None:
    runtime = running("a")
    first, second = client(runtime), client(runtime)
    async with asyncio.TaskGroup() as group:
        for each in (first, second):
            group.create_task(each.run())
        await others_run()
        runtime.emit(EndpointAdded(endpoint("b")))
    assert went_to(second.actions) == "b"


async def test_a_client_that_leaves_while_it_waits_is_taken_out_of_the_queue() -> None:
    runtime = running("a")
    facts: list[Fact] = []
    fakes.Ear(runtime, facts.append)
    first, leaves, stays = client(runtime), client(runtime), client(runtime)
    async with asyncio.TaskGroup() as group:
        group.create_task(first.run())
        task = group.create_task(leaves.run())
        group.create_task(stays.run())
        await others_run()
        task.cancel()
        await others_run()
        assert facts == [Failed(leaves.exchange.id, FailureReason.CLIENT_GONE)]
        assert len(runtime.scheduler.queue) == 1
        await answer(runtime, first.exchange)
    assert went_to(stays.actions) == "a"


async def test_a_client_that_leaves_at_the_moment_of_its_decision_gives_its_place_up() -> None:
    runtime = running("a")
    first, leaves, stays = client(runtime), client(runtime), client(runtime)
    async with asyncio.TaskGroup() as group:
        group.create_task(first.run())
        task = group.create_task(leaves.run())
        group.create_task(stays.run())
        await others_run()
        task.cancel()
        runtime.close(first.exchange)
    assert went_to(stays.actions) == "a"
    assert len(runtime.scheduler.charges) == 1


async def test_a_decision_for_a_client_that_has_left_and_is_not_yet_closed_disturbs_nobody() -> None:
    runtime = running("a")
    first, stays = client(runtime), client(runtime)
    leaves = runtime.open()
    async with asyncio.TaskGroup() as group:
        group.create_task(first.run())
        task = group.create_task(ask(runtime, exchange=leaves))
        group.create_task(stays.run())
        await others_run()
        task.cancel()
        await others_run()
        await answer(runtime, first.exchange)
        assert len(runtime.scheduler.charges) == 1
        runtime.close(leaves)
    assert went_to(stays.actions) == "a"
    assert len(runtime.scheduler.charges) == 1


async def test_a_wait_that_is_too_long_ends_by_itself_with_429() -> None:
    clock = ManualClock()
    runtime = running("a", clock=clock, queue_timeout=0.001)
    first, late = client(runtime), client(runtime)
    async with asyncio.TaskGroup() as group:
        for each in (first, late):
            group.create_task(each.run())
        await others_run()
        clock.advance(0.002)
    assert refused(late.actions) == 429
    assert metric(runtime, "picker_decisions_total", outcome="expired") == 1


def placed(number: int) -> Request:
    return Request(number, None, NOW)


async def test_what_is_decided_before_anybody_waits_is_there_when_somebody_does() -> None:
    runtime = running(subject=scheduler("a", max_inflight=1))
    assert isinstance(runtime.place(placed(1)), Decision)
    assert isinstance(runtime.place(placed(2)), Queued)
    runtime.emit(Finished(1, 200))
    outcome = await runtime.wait(2)
    assert isinstance(outcome, Decision)
    runtime.emit(Finished(2, 200))
    assert (len(runtime.scheduler.charges), len(runtime.scheduler.queue)) == (0, 0)


@pytest.mark.parametrize("decided", [False, True])
async def test_who_leaves_before_anybody_waits_leaves_nothing_behind(decided: bool) -> None:
    runtime = running(subject=scheduler("a", max_inflight=1))
    runtime.place(placed(1))
    runtime.place(placed(2))
    if decided:
        runtime.emit(Finished(1, 200))
    runtime.emit(Failed(2, FailureReason.CLIENT_GONE))
    assert len(runtime.scheduler.queue) == 0
    with pytest.raises(KeyError):
        await runtime.wait(2)


async def test_a_full_queue_is_429_at_once() -> None:
    runtime = running(subject=scheduler("a", max_inflight=1, queue_size=0))
    await ask(runtime)
    assert refused(await ask(runtime)) == 429


# --- bugs of our own ---


async def test_a_bug_in_deciding_costs_the_charge_and_not_the_request(caplog: pytest.LogCaptureFixture) -> None:
    runtime = running(subject=scheduler("a", profile=Weighted([(Broken(), 1.0)])))
    exchange = runtime.open()
    actions = await ask(runtime, exchange=exchange)
    assert went_to(actions) == "a"
    assert isinstance(actions[0], Forward)
    assert not actions[0].decision.charged
    assert len(runtime.scheduler.charges) == 0
    assert metric(runtime, "picker_internal_errors_total", where="submit") == 1
    (logged,) = caplog.records
    assert logged.levelno == logging.ERROR
    assert logged.exc_info is not None
    await answer(runtime, exchange)
    record = runtime.record(exchange.id)
    assert record is not None
    assert record.status == 200


async def test_a_bug_in_deciding_keeps_to_the_subset_and_to_the_untried() -> None:
    runtime = running(subject=scheduler("a", "b", "c", profile=Weighted([(Broken(), 1.0)])))
    for _ in range(10):
        exchange = runtime.open()
        head = RequestHead("POST", "/v1/chat/completions", {}, subset=frozenset({"a:8000", "b:8000"}))
        await runtime.receive(exchange, head)
        first = went_to(await runtime.receive(exchange, RequestBody(chat(), end=True)))
        second = went_to(await runtime.receive(exchange, UpstreamFailed(FailureReason.CONNECT)))
        assert {first, second} == {"a", "b"}


async def test_a_bug_in_deciding_without_anyone_healthy_is_503() -> None:
    runtime = running(subject=scheduler("a", profile=Weighted([(Broken(), 1.0)])))
    runtime.emit(EndpointRemoved("a"))
    assert refused(await ask(runtime)) == 503


async def test_a_fact_that_cannot_be_applied_is_counted_logged_and_over(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = running("a")
    facts: list[Fact] = []
    fakes.Ear(runtime, facts.append)
    monkeypatch.setattr(runtime.scheduler, "apply", lambda fact, now: 1 / 0)
    runtime.emit(HealthObserved("a", healthy=False))
    assert metric(runtime, "picker_internal_errors_total", where="apply") == 1
    assert [record.getMessage() for record in caplog.records] == ["applying a HealthObserved failed; it is ignored"]
    assert facts == [HealthObserved("a", healthy=False)]


async def test_a_bug_in_serving_the_queue_is_not_felt_by_whoever_told_the_fact(
    caplog: pytest.LogCaptureFixture,
) -> None:
    profile = Weighted([(BrokenWhen(lambda asked: asked.id == 3), 1.0)])
    runtime = running(subject=scheduler("a", "b", max_inflight=1, profile=profile))
    clients = [client(runtime) for _ in range(5)]
    async with asyncio.TaskGroup() as group:
        for each in clients:
            group.create_task(each.run())
        await others_run()
        await answer(runtime, clients[0].exchange)
    assert {went_to(each.actions) for each in clients[2:]} <= {"a", "b"}
    assert len(runtime.scheduler.queue) == 0
    assert metric(runtime, "picker_internal_errors_total", where="poll") == 1
    assert len(caplog.records) == 1
    for each in clients:
        runtime.close(each.exchange)
    assert (len(runtime.scheduler.charges), len(runtime.scheduler.queue)) == (0, 0)


# --- the end ---


async def test_a_draining_runtime_takes_nothing_new_and_lets_the_rest_end() -> None:
    runtime = running("a")
    exchange = runtime.open()
    await ask(runtime, exchange=exchange)
    runtime.drain()
    assert refused(await ask(runtime)) == 503
    assert metric(runtime, "picker_decisions_total", outcome="shutdown") == 1
    await answer(runtime, exchange)
    assert len(runtime.scheduler.charges) == 0


async def test_who_answers_is_who_can_be_reached() -> None:
    runtime = running("a", "b")
    runtime.emit(HealthObserved("a", False, "refused"))
    assert [endpoint.name for endpoint in runtime.answering()] == ["b"]
    assert [runtime.answers(name) for name in ("a", "b", "nobody")] == [False, True, False]


async def test_patience_is_asked_of_the_scheduler_where_there_is_a_limit() -> None:
    clock = ManualClock()
    subject = scheduler("a", hang_floor_s=10.0)
    runtime = running("a", subject=subject, clock=clock, patience=10.0)
    exchange = runtime.open()
    await ask(runtime, exchange=exchange)
    clock.now += 1000.0
    assert runtime.patience_with(exchange.id) < 0.0
    assert running("a", clock=clock).patience_with(1) == math.inf


async def test_a_draining_runtime_still_serves_those_who_wait() -> None:
    runtime = running("a")
    first, second = client(runtime), client(runtime)
    async with asyncio.TaskGroup() as group:
        for each in (first, second):
            group.create_task(each.run())
        await others_run()
        runtime.drain()
        await answer(runtime, first.exchange)
    assert went_to(second.actions) == "a"


async def test_a_retry_is_not_a_new_request() -> None:
    runtime = running("a", "b")
    exchange = runtime.open()
    await ask(runtime, exchange=exchange)
    runtime.drain()
    assert went_to(await runtime.receive(exchange, UpstreamFailed(FailureReason.CONNECT))) in ("a", "b")


# --- records ---


async def test_a_record_tells_what_was_decided_and_how_it_ended() -> None:
    clock = ManualClock()
    runtime = running("a", clock=clock)
    exchange = runtime.open()
    await ask(runtime, exchange=exchange)
    record = runtime.record(exchange.id)
    assert record is not None
    assert isinstance(record.outcome, Decision)
    assert (record.request.id, record.decided_at, record.ended_at) == (exchange.id, NOW, None)
    clock.advance(3.0)
    await answer(runtime, exchange)
    assert (record.ended_at, record.status, record.usage) == (NOW + 3.0, 200, Usage(9, 2))
    assert runtime.record(99) is None


async def test_a_record_tells_why_a_request_failed_or_was_refused() -> None:
    runtime = running(subject=scheduler(endpoint("a", models=["m"])))
    exchange = runtime.open()
    await ask(runtime, exchange=exchange)
    runtime.close(exchange)
    failed = runtime.record(exchange.id)
    assert failed is not None
    assert failed.failure is FailureReason.CLIENT_GONE
    exchange = runtime.open()
    await ask(runtime, chat(model="x"), exchange=exchange)
    rejected = runtime.record(exchange.id)
    assert rejected is not None
    assert isinstance(rejected.outcome, Rejection)
    assert rejected.outcome.reason is RejectReason.UNKNOWN_MODEL


async def test_only_the_latest_records_are_kept_newest_first() -> None:
    runtime = running(subject=scheduler("a"), records=3)
    for _ in range(7):
        await ask(runtime)
    assert [record.request.id for record in runtime.recent()] == [7, 6, 5]
    assert [record.request.id for record in runtime.recent(limit=2)] == [7, 6]
    assert runtime.record(4) is None


async def test_a_prompt_shows_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    profile = Weighted([(BrokenWhen(lambda asked: asked.id == 2), 1.0)])
    runtime = running(subject=scheduler("a", profile=profile))
    secret = "SECRET " * 100
    for _ in range(3):
        exchange = runtime.open()
        actions = await ask(runtime, chat(secret), exchange=exchange)
        await answer(runtime, exchange, ANSWER.replace(b"Hi", b"SECRET"))
        shown = repr(actions) + repr(runtime.record(exchange.id)) + repr(exchange)
        assert "SECRET" not in shown
    assert metric(runtime, "picker_internal_errors_total", where="submit") == 1
    assert "SECRET" not in caplog.text
    assert "SECRET" not in runtime.telemetry.text().decode()


async def test_following_a_response_reports_its_facts_and_returns_what_to_pass_on() -> None:
    runtime = running("a")
    exchange = runtime.open()
    await ask(runtime, exchange=exchange)
    actions = runtime.follow(exchange, ResponseHead(200, {"content-type": "application/json"}))
    actions += runtime.follow(exchange, ResponseBody(ANSWER, end=True))
    assert [type(action) for action in actions] == [PassHead, PassBody]
    assert metric(runtime, "picker_requests_ended_total", how="finished") == 1
