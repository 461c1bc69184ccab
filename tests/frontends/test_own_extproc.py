"""Requests in one message: decided on the spot, and each of them leaves once, whatever becomes of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2

from fakes import ManualClock
from picker.exchange import Limits, RequestHead, Respond, Submit
from picker.frontends.extproc import Bounds
from picker.frontends.grpc_server import Call
from picker.frontends.loops import Via
from picker.frontends.own_extproc import OwnExtProc
from picker.gate import Gate
from picker.types import Decision, Endpoint, Fact, Failed, Outcome, Queued, Rejection, RejectReason
from wire.test_own_envoy import message

ProcessingResponse = external_processor_pb2.ProcessingResponse
BEST = Endpoint("a", "10.0.0.1:8000")
CHAT = b'{"messages": [{"role": "user", "content": "Hello"}]}'


class Errors:
    def __init__(self) -> None:
        self.where: list[str] = []

    def internal_error(self, where: str) -> None:
        self.where.append(where)


class Room(Gate):
    """A gate with its ears, a desk with an answer prepared, feedback and porter that remember."""

    def __init__(self, outcome: Callable[[int], Outcome | Queued]) -> None:
        self.telemetry = Errors()
        super().__init__(ManualClock(), Limits(max_body_bytes=1000))
        self.outcome = outcome
        self.facts: list[Fact] = []
        self.later: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.expected: list[int] = []
        self.inside: list[int] = []
        self.statuses: list[int] = []
        self.refusal: Respond | None = None
        self.handlers: dict[str, Any] = {}
        self.waiting = False
        self.limit: int | None = None
        self.retries_left = True

    # gate

    async def decide(self, request_id: int, submit: Submit) -> Outcome:
        raise AssertionError

    def emit(self, fact: Fact) -> None:
        self.facts.append(fact)

    # desk

    def place(self, request_id: int, submit: Submit) -> Outcome | Queued:
        return self.outcome(request_id)

    async def wait(self, request_id: int) -> Outcome:
        self.waiting = True
        try:
            return await self.later
        finally:
            self.waiting = False

    # feedback

    def mark(self, request_id: int) -> str:
        return str(request_id)

    def expect(self, decision: Decision, alias: str, now: float) -> None:
        self.expected.append(decision.request_id)

    # porter

    def came(self, request_id: int, head: RequestHead) -> Respond | None:
        self.inside.append(request_id)
        return self.refusal

    def body_limit(self, request_id: int) -> int | None:
        return self.limit

    # retries

    def allowed(self, now: float) -> bool:
        return self.retries_left

    def answered(self, request_id: int, status: int) -> None:
        self.statuses.append(status)

    def left(self, request_id: int) -> None:
        self.inside.remove(request_id)


class Connection:
    """What a call needs of its connection."""

    paused = None

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.forgotten: list[bool] = []
        self.loop = asyncio.get_running_loop()

    def answer(self, stream_id: int, data: bytes) -> None:
        self.answers.append(data)

    def send(self, stream_id: int, data: bytes) -> bool:
        self.answers.append(data)
        return True

    def end(self, stream_id: int, code: int, text: str) -> None:
        pass

    def forget(self, stream_id: int, *, give_up: bool) -> None:
        self.forgotten.append(give_up)


class Server:
    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group

    def start(self, call: Call, handler: Callable[[Call], Awaitable[None]]) -> asyncio.Task[None]:
        async def serve() -> None:
            try:
                await handler(call)
            finally:
                call.close()

        return self._group.create_task(serve())


class Scene:
    def __init__(self, room: Room, group: asyncio.TaskGroup) -> None:
        self.room = room
        self.connection = Connection()
        anything: Any = room
        self.extproc = OwnExtProc(
            room,
            anything,
            porter=anything,
            retries=anything,
            addresses={},
            bounds=Bounds(),
            max_message_bytes=1000,
            desk=anything,
            via=Via("me"),
        )
        self.extproc._server = cast(Any, Server(group))
        (self._early,) = self.extproc._early_answers().values()

    def send(self, body: bytes = CHAT, *, told: dict[str, str] | None = None) -> tuple[Call, bool]:
        call = Call(cast(Any, self.connection), 1, "/x")
        return call, self._early(
            call, message(body, {"request.path": "/v1/chat/completions"} if told is None else told)
        )

    @property
    def answer(self) -> Any:
        (only,) = self.connection.answers
        return ProcessingResponse.FromString(only)


@asynccontextmanager
async def scene(
    outcome: Callable[[int], Outcome | Queued] = lambda number: Decision(number, BEST),
) -> AsyncIterator[Scene]:
    async with asyncio.TaskGroup() as group:
        yield Scene(Room(outcome), group)


async def test_a_request_is_decided_and_answered_at_once_and_handed_on() -> None:
    async with scene() as this:
        call, done = this.send()
        assert (done, call.task) == (True, None)
        told = this.answer.dynamic_metadata.fields["envoy.lb"].struct_value.fields
        assert told["x-gateway-destination-endpoint"].string_value == BEST.address
        assert told["x-picker-request-id"].string_value == "1"
        assert (this.room.expected, this.room.inside, this.extproc.open_streams) == ([1], [1], 0)


async def test_what_is_not_a_whole_request_is_left_to_the_handler() -> None:
    async with scene() as this:
        assert this.send(told={})[1] is False
        call = Call(cast(Any, this.connection), 1, "/x")
        assert this._early(call, b"\x22\xff") is False
        assert (this.connection.answers, this.room.inside) == ([], [])


async def test_a_body_that_cannot_be_routed_is_refused_and_has_left() -> None:
    for body, status in ((b"{", 400), (b" " * 1001, 413)):
        async with scene() as this:
            assert this.send(body)[1]
            assert this.answer.immediate_response.status.code == status
            assert (this.room.statuses, this.room.inside, this.room.facts) == ([status], [], [])


async def test_who_is_not_let_in_is_told_so_and_has_left() -> None:
    async with scene() as this:
        this.room.refusal = Respond(401, (), b"no")
        assert this.send()[1]
        assert this.answer.immediate_response.status.code == 401
        assert (this.room.statuses, this.room.inside) == ([401], [])


async def test_a_body_beyond_the_limit_of_its_key_is_refused() -> None:
    async with scene() as this:
        this.room.limit = len(CHAT) - 1
        assert this.send()[1]
        assert this.answer.immediate_response.status.code == 413


async def test_a_request_that_has_been_here_before_is_refused() -> None:
    for said, status in (("1.1 me", 508), ("1.1 picker-other", 0)):
        async with scene() as this:
            assert this.send(told={"request.path": "/v1/chat/completions", "request.headers['via']": said})[1]
            assert this.answer.immediate_response.status.code == status


async def test_where_no_retries_are_left_envoy_is_told_so() -> None:
    for left, told in ((True, ""), (False, "0")):
        async with scene() as this:
            this.room.retries_left = left
            assert this.send()[1]
            fields = this.answer.dynamic_metadata.fields["envoy.lb"].struct_value.fields
            assert fields["x-envoy-max-retries"].string_value == told


async def test_a_rejection_is_the_clients_answer() -> None:
    async with scene(lambda number: Rejection(number, RejectReason.SATURATED, 429, "full", retry_after=2.0)) as this:
        assert this.send()[1]
        assert this.answer.immediate_response.status.code == 429
        assert (this.room.statuses, this.room.inside) == ([429], [])


async def test_a_bug_is_answered_500_and_its_request_has_left() -> None:
    def broken(number: int) -> Outcome:
        raise ZeroDivisionError

    async with scene(broken) as this:
        assert this.send()[1]
        assert this.answer.immediate_response.status.code == 500
        assert (this.room.telemetry.where, this.room.inside) == (["extproc"], [])  # type: ignore[attr-defined]


async def test_a_queued_request_gets_a_task_and_its_answer_when_there_is_one() -> None:
    async with scene(Queued) as this:
        call, done = this.send()
        assert done
        assert call.task is not None
        this.room.later.set_result(Decision(1, BEST))
        await call.task
        assert this.answer.dynamic_metadata.fields["envoy.lb"].struct_value.fields
        assert (this.room.expected, this.room.inside, this.extproc.open_streams) == ([1], [1], 0)


@pytest.mark.parametrize("turns", [0, 1, 3])
async def test_a_queued_request_whose_client_leaves_is_closed_once(turns: int) -> None:
    async with scene(Queued) as this:
        call, _ = this.send()
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        assert call.task is not None
        await asyncio.wait([call.task])
        await asyncio.sleep(0)
        assert [type(fact) for fact in this.room.facts] == [Failed]
        assert (this.room.waiting, this.room.inside, this.extproc.open_streams) == (False, [], 0)
        assert this.connection.forgotten
