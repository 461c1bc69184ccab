"""Workers and their decider over a real socket: one truth, and nothing left behind by whoever goes."""

import asyncio
import json
import random
from contextlib import AsyncExitStack

import pytest

from fakes import scheduler
from picker.core.scheduler import Scheduler
from picker.exchange import Exchange, Forward, RequestBody, RequestHead, Respond
from picker.gate import Gate, UndecidedError
from picker.runtime import Runtime
from picker.types import Call, Decision, Failed, FailureReason, Finished, Reading, Request, ResponseStarted, Unread
from picker.wire.als import Ended
from picker.workers import frames
from picker.workers.desk import Desk
from picker.workers.remote import RemoteGate
from workers.bus import Bus, answer, ask, log_of, runtime_of, went_to

BODY = b'{"model": "m", "prompt": "Once upon a time"}'


def metric(desk: Desk, name: str, **labels: str) -> float | None:
    return desk.runtime.telemetry.registry.get_sample_value(name, labels)


def charges(desk: Desk) -> int:
    return len(desk.runtime.scheduler.charges)


# --- one truth ---------------------------------------------------------------------------------------------


def pool() -> Scheduler:
    return scheduler("a", "b", "c", "d", seed=1)


def sequence(seed: int, count: int) -> list[tuple[bytes, bool]]:
    """Bodies of conversations that share beginnings, and whether the oldest open request ends before each."""
    rng = random.Random(seed)
    shared = ["x" * rng.randrange(300, 6000) for _ in range(6)]
    found = []
    for number in range(count):
        prompt = rng.choice(shared) + f"{number % 7}" * rng.randrange(0, 4000)
        found.append((json.dumps({"model": "m", "prompt": prompt}).encode(), rng.random() < 0.5))
    return found


async def played(of: Runtime, gates: list[Gate], asked: list[tuple[bytes, bool]]) -> list[tuple[object, ...]]:
    """The decisions of a sequence that goes through these gates in turn.

    Every report is waited for: one of a worker's and a question of another's come in any order.
    """
    decisions: list[tuple[object, ...]] = []
    running: list[tuple[Gate, Exchange]] = []
    for number, (body, ends) in enumerate(asked):
        if ends and running:
            await answer(*running.pop(0))
            async with asyncio.timeout(60):
                while len(of.scheduler.charges) != len(running):  # noqa: ASYNC110
                    await asyncio.sleep(0)
        gate = gates[number % len(gates)]
        running.append((gate, gate.open()))
        (forward,) = await ask(gate, body, running[-1][1])
        assert isinstance(forward, Forward)
        made = forward.decision
        names = [made.endpoint.name, *(endpoint.name for endpoint in made.fallbacks)]
        decisions.append((*names, made.matched_blocks, made.total_blocks, float(made.matched_tokens)))
    for gate, exchange in running:
        await answer(gate, exchange)
    return decisions


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_the_same_sequence_gets_the_same_decisions_through_any_number_of_workers(bus: Bus, workers: int) -> None:
    asked, alone = sequence(seed=workers, count=60), runtime_of(pool())
    expected = await played(alone, [alone], asked)
    async with AsyncExitStack() as stack:
        desk = await stack.enter_async_context(bus.decider(pool()))
        gates: list[Gate] = [await stack.enter_async_context(bus.welcomed(index)) for index in range(workers)]
        assert await played(desk.runtime, gates, asked) == expected
        await bus.until(lambda: charges(desk) == 0)
    assert len({best for best, *_ in expected}) == 4
    assert any(matched for *_, matched, _, _ in expected)


async def test_two_workers_share_what_is_known_of_prefixes(bus: Bus) -> None:
    body = json.dumps({"model": "m", "prompt": "shared " * 400}).encode()
    async with bus.decider(pool()) as desk, bus.welcomed(0) as one, bus.welcomed(1) as two:
        exchange = one.open()
        first = went_to(await ask(one, body, exchange))
        await answer(one, exchange)
        await bus.until(lambda: charges(desk) == 0)
        (forward,) = await ask(two, body)
        assert isinstance(forward, Forward)
        assert (forward.decision.endpoint.name, forward.decision.matched_blocks) == (first, 10)


async def test_no_two_workers_use_the_same_id_not_even_over_restarts(bus: Bus) -> None:
    seen: list[int] = []
    for start in range(2):
        async with bus.decider(start=start):
            for index in (0, 1, 0):
                async with bus.welcomed(index) as gate:
                    seen += [gate.open().id for _ in range(3)]
    assert len(set(seen)) == len(seen)


async def test_prompts_stay_with_the_worker_unless_the_decider_reads_them(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bytes] = []
    original = frames.encode

    def encode(message: frames.Word) -> bytes:
        said.append(original(message))
        return said[-1]

    monkeypatch.setattr("picker.workers.link.encode", encode)
    async with bus.decider(), bus.welcomed() as gate:
        await ask(gate, BODY)
    assert said
    assert not any(b"Once upon" in each for each in said)


async def test_the_decider_sees_the_headers_it_asks_for_and_no_others(bus: Bus) -> None:
    async with bus.decider(headers=frozenset({"x-asked"})) as desk:
        desk.terms = type(desk.terms)(desk.terms.secret, 256, frozenset({"x-asked"}))
        async with bus.welcomed() as gate:
            await ask(gate, BODY, headers={"x-asked": "yes", "authorization": "secret"})
            assert desk.runtime.recent()[0].request.headers == {"x-asked": "yes"}


# --- endings -----------------------------------------------------------------------------------------------


async def test_reports_reach_the_scheduler_and_end_what_was_booked(bus: Bus) -> None:
    async with bus.decider() as desk, bus.welcomed() as gate:
        exchange = gate.open()
        await ask(gate, BODY, exchange)
        assert charges(desk) == 1
        await answer(gate, exchange)
        await bus.until(lambda: charges(desk) == 0)
        assert [type(fact) for fact in bus.facts][-3:] == [ResponseStarted, type(bus.facts[-2]), Finished]
        record = desk.runtime.record(exchange.id)
        assert record is not None
        assert record.usage is not None
        assert record.usage.completion_tokens == 2


async def test_a_worker_that_dies_leaves_nothing_behind(bus: Bus) -> None:
    async with bus.decider() as desk, bus.welcomed(0) as one, bus.welcomed(1) as two:
        for _ in range(3):
            await ask(one, BODY)
        kept = two.open()
        await ask(two, BODY, kept)
        assert charges(desk) == 4
        assert one._link is not None
        one._link.abort()
        await bus.until(lambda: charges(desk) == 1)
        assert [fact.reason for fact in bus.facts if isinstance(fact, Failed)] == [FailureReason.SHUTDOWN] * 3
        await answer(two, kept)
        await bus.until(lambda: charges(desk) == 0)


async def test_a_worker_that_dies_takes_its_queued_requests_out(bus: Bus) -> None:
    async with bus.decider(scheduler("a", max_inflight=1)) as desk, bus.welcomed(0) as one:
        first = one.open()
        await ask(one, BODY, first)
        async with bus.welcomed(1) as two, asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(refused(two))
            await bus.until(lambda: len(desk.runtime.scheduler.queue) == 1)
            waiting.cancel()
            two._known.clear()  # it dies before it can say so
        await bus.until(lambda: len(desk.runtime.scheduler.queue) == 0)
        await answer(one, first)
        await bus.until(lambda: charges(desk) == 0)


async def refused(gate: Gate) -> None:
    exchange = gate.open()
    with pytest.raises(UndecidedError):
        await ask(gate, BODY, exchange)
    gate.close(exchange)


async def test_a_queued_request_is_answered_when_there_is_room(bus: Bus) -> None:
    async with bus.decider(scheduler("a", max_inflight=1)) as desk, bus.welcomed(0) as one, bus.welcomed(1) as two:
        first = one.open()
        await ask(one, BODY, first)
        async with asyncio.TaskGroup() as tasks:
            second = tasks.create_task(ask(two, BODY))
            await bus.until(lambda: len(desk.runtime.scheduler.queue) == 1)
            await answer(one, first)
        assert went_to(second.result()) == "a"


async def test_a_client_that_leaves_while_queued_takes_its_request_out(bus: Bus) -> None:
    async with bus.decider(scheduler("a", max_inflight=1)) as desk, bus.welcomed() as gate:
        first, second = gate.open(), gate.open()
        await ask(gate, BODY, first)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(ask(gate, BODY, second))
            await bus.until(lambda: len(desk.runtime.scheduler.queue) == 1)
            task.cancel()
        gate.close(second)
        await bus.until(lambda: len(desk.runtime.scheduler.queue) == 0)
        await answer(gate, first)
        await bus.until(lambda: charges(desk) == 0)
        assert not desk.runtime._waiting


async def test_a_rejection_is_answered_as_one(bus: Bus) -> None:
    async with bus.decider(scheduler()) as desk, bus.welcomed() as gate:
        (respond,) = await ask(gate, BODY)
        assert isinstance(respond, Respond)
        assert respond.status == 503
        assert metric(desk, "picker_decisions_total", outcome="no-endpoints") == 1


async def test_a_draining_decider_takes_nothing_new(bus: Bus) -> None:
    async with bus.decider() as desk, bus.welcomed() as gate:
        desk.runtime.drain()
        (respond,) = await ask(gate, BODY)
        assert isinstance(respond, Respond)
        assert (respond.status, charges(desk)) == (503, 0)


async def test_workers_are_ready_when_the_decider_is_and_answer_all_the_same(bus: Bus) -> None:
    told: list[bool] = []
    parted: list[bool] = []
    async with bus.decider() as desk, bus.worker() as gate:
        desk.set_serving(False)
        gate.on_serving, gate.on_part = told.append, lambda: parted.append(True)
        await bus.until(lambda: told == [False])
        assert went_to(await ask(gate, BODY))
        desk.set_serving(True)
        await bus.until(lambda: told == [False, True])
        desk.set_serving(True)  # nothing new
        assert not parted
        desk.set_serving(False)  # another leads
        await bus.until(lambda: told == [False, True, False])
        assert parted == [True]
        assert went_to(await ask(gate, BODY))


# --- no decider --------------------------------------------------------------------------------------------


async def test_without_a_decider_nobody_is_told_where_to_go(bus: Bus) -> None:
    async with bus.worker() as gate:
        with pytest.raises(UndecidedError):
            gate.open()


async def test_a_decider_that_dies_is_waited_for_and_its_successor_is_asked(bus: Bus) -> None:
    told: list[bool] = []
    async with bus.worker() as gate, asyncio.TaskGroup() as tasks:
        gate.on_serving = told.append
        async with bus.decider(scheduler("a", max_inflight=1)) as desk:
            await bus.until(lambda: told == [True])
            old, asked = gate.open(), gate.open()
            await ask(gate, BODY, old)
            waiting = tasks.create_task(ask(gate, BODY, asked))
            await bus.until(lambda: len(desk.runtime.scheduler.queue) == 1)
        late = gate.open()
        waiting_too = tasks.create_task(ask(gate, BODY, late))
        async with bus.decider(scheduler("a"), start=1) as successor:
            assert went_to(await waiting) == went_to(await waiting_too) == "a"
            assert old.id not in gate._known
            await answer(gate, old)  # its charge went with the one who had booked it
            gate.internal_error("marker")
            await bus.until(lambda: metric(successor, "picker_internal_errors_total", where="marker") == 1)
            assert charges(successor) == 2
            await answer(gate, asked)
            await answer(gate, late)
            await bus.until(lambda: charges(successor) == 0)
            assert False not in told


async def test_a_decider_that_does_not_come_back_is_waited_for_so_long_and_no_longer(bus: Bus) -> None:
    told: list[bool] = []
    async with bus.worker(patience=0.01) as gate, asyncio.TaskGroup() as tasks:
        gate.on_serving = told.append
        async with bus.decider(scheduler("a", max_inflight=1)) as desk:
            await bus.until(lambda: told == [True])
            await ask(gate, BODY)
            waiting = tasks.create_task(refused(gate))
            await bus.until(lambda: len(desk.runtime.scheduler.queue) == 1)
        await waiting
        await bus.until(lambda: told == [True, False])
        with pytest.raises(UndecidedError):
            gate.open()
        async with bus.decider(start=1):
            await bus.until(lambda: told == [True, False, True])
            assert went_to(await ask(gate, BODY))


async def test_a_request_that_deciders_die_of_is_not_asked_about_for_ever(bus: Bus) -> None:
    async with bus.worker() as gate, asyncio.TaskGroup() as tasks:
        async with bus.decider(scheduler("a", max_inflight=1)) as first:
            await bus.until(lambda: gate._welcome is not None)
            await ask(gate, BODY)
            waiting = tasks.create_task(refused(gate))
            await bus.until(lambda: len(first.runtime.scheduler.queue) == 1)
        async with bus.decider(scheduler("a", max_inflight=1), start=1) as second:
            second.runtime.place(Request(1, None, 0.0))
            await bus.until(lambda: len(second.runtime.scheduler.queue) == 1)
        await waiting


# --- lean mode ---------------------------------------------------------------------------------------------


async def handed_on(gate: RemoteGate, alias: str = "") -> int:
    exchange = gate.open()
    (forward,) = await ask(gate, BODY, exchange)
    assert isinstance(forward, Forward)
    log_of(gate).expect(forward.decision, alias, 0.0)
    return exchange.id


def ended(mark: str) -> Ended:
    return Ended(mark, "", 200, "a:8000", None, 0.1, 1.0)


async def test_the_access_log_may_tell_another_worker_than_the_one_that_routed(bus: Bus) -> None:
    async with bus.decider(lean=True) as desk, bus.welcomed(0) as one, bus.welcomed(1) as two:
        log_of(two).opened()
        request_id = await handed_on(one)
        log_of(two).hear(ended("1-somebody-elses"))
        log_of(two).hear(ended(log_of(one).mark(request_id)))
        await bus.until(lambda: charges(desk) == 0)
        assert bus.facts[-1] == Finished(request_id, 200)


async def test_a_request_in_the_data_planes_hands_outlives_its_worker_and_is_still_heard_of(bus: Bus) -> None:
    async with bus.decider(lean=True) as desk, bus.welcomed(1) as two:
        log_of(two).opened()
        async with bus.welcomed(0) as one:
            request_id = await handed_on(one)
            mark = log_of(one).mark(request_id)
        await bus.until(lambda: desk.workers == 1)
        assert charges(desk) == 1
        log_of(two).hear(ended(mark))
        await bus.until(lambda: charges(desk) == 0)


async def test_a_worker_that_dies_takes_its_access_logs_along(bus: Bus) -> None:
    """Then prediction ends what nobody will tell of."""
    async with bus.decider(lean=True) as desk, bus.welcomed(1) as two:
        async with bus.welcomed(0) as one:
            log_of(one).opened()
            await handed_on(two)
            assert desk.feedback is not None
            await bus.until(lambda: desk.feedback is not None and len(desk.feedback) == 1)
            desk.feedback.sweep(desk.runtime.clock() + 60.0)
            assert charges(desk) == 1
        await bus.until(lambda: desk.workers == 1)
        desk.feedback.sweep(desk.runtime.clock() + 60.0)
        assert charges(desk) == 0


async def test_a_log_that_was_open_before_the_decider_is_known_to_it(bus: Bus) -> None:
    async with bus.worker() as gate:
        log_of(gate).opened()
        async with bus.decider(lean=True) as desk:
            await bus.until(lambda: gate.mark_secret != "")
            await handed_on(gate)
            assert desk.feedback is not None
            await bus.until(lambda: desk.feedback is not None and len(desk.feedback) == 1)
            desk.feedback.sweep(desk.runtime.clock() + 60.0)
            assert charges(desk) == 1


async def test_a_decider_that_is_stopped_ends_all_that_is_left(bus: Bus) -> None:
    async with bus.decider(lean=True) as desk, bus.welcomed() as gate:
        await handed_on(gate)
        await ask(gate, BODY)
        await bus.until(lambda: desk.feedback is not None and len(desk.feedback) == 1)
        assert charges(desk) == 2
    assert charges(desk) == 0


# --- reading -----------------------------------------------------------------------------------------------


class SlowReader:
    """Reads off the loop's thread, when the test says so."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.go = asyncio.Event()

    def read_now(self, call: Call) -> Reading | Unread | None:
        return Unread.UNREAD

    async def read(self, call: Call) -> Reading | None:
        self.calls.append(call)
        await self.go.wait()
        return None


async def test_where_prompts_are_read_the_decider_gets_the_body(bus: Bus) -> None:
    reader = SlowReader()
    reader.go.set()
    async with bus.decider(scheduler("a"), reads=True, reader=reader), bus.welcomed() as gate:
        assert went_to(await ask(gate, BODY)) == "a"
    (call,) = reader.calls
    assert (call.model, call.body) == ("m", BODY)


async def test_whoever_leaves_while_being_read_is_never_booked(bus: Bus) -> None:
    reader = SlowReader()
    async with bus.decider(scheduler("a"), reads=True, reader=reader) as desk, bus.welcomed() as gate:
        exchange = gate.open()
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(ask(gate, BODY, exchange))
            await bus.until(lambda: len(reader.calls) == 1)
            task.cancel()
        gate.close(exchange)
        await bus.until(lambda: any(isinstance(fact, Failed) for fact in bus.facts))
        reader.go.set()
        assert went_to(await ask(gate, BODY)) == "a"
        assert charges(desk) == 1


# --- figures -----------------------------------------------------------------------------------------------


async def test_all_workers_are_in_one_exposition(bus: Bus) -> None:
    async with bus.decider() as desk, bus.welcomed(0) as one, bus.welcomed(1) as two:
        await ask(one, BODY)
        await ask(two, BODY)
        await ask(two, BODY)
        for gate, streams in ((one, 1), (two, 2)):
            gate.say(frames.Pulse(streams, 0.5))
        two.internal_error("extproc")
        await bus.until(lambda: metric(desk, "picker_internal_errors_total", where="extproc") == 1)
        assert metric(desk, "picker_workers") == 2
        assert metric(desk, "picker_extproc_streams") == 3
        assert metric(desk, "picker_worker_requests_total", worker="1") == 2
        assert metric(desk, "picker_worker_cpu_seconds", worker="0") == 0.5
        assert metric(desk, "picker_decisions_total", outcome="picked") == 3


async def test_a_message_that_cannot_be_handled_costs_nobody_else(bus: Bus) -> None:
    async with bus.decider() as desk, bus.welcomed() as gate:
        gate.say(frames.Ask(1, None, b"odd", 0, 0, None, None, 0, None, False, None, [], {}))
        assert isinstance((await ask(gate, BODY))[0], Forward)
        assert metric(desk, "picker_internal_errors_total", where="bus") == 1


async def test_a_head_without_a_body_is_decided_too(bus: Bus) -> None:
    async with bus.decider(), bus.welcomed() as gate:
        (forward,) = await gate.receive(gate.open(), RequestHead("GET", "/v1/models", {}, end=True))
        assert isinstance(forward, Forward)
        assert isinstance(forward.decision, Decision)
        with pytest.raises(Exception, match="phase"):
            await gate.receive(gate.open(), RequestBody(b"", end=True))
