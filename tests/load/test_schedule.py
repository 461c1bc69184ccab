from __future__ import annotations

import asyncio

from load.fake_openai import DONE, FakeAnswer, FakeServer, Json, answer_well, chunk, fake_server, usage
from picker.load.client import Client, Target
from picker.load.schedule import Pace, Progress, Run, drive
from picker.load.text import Piece, key, render
from picker.load.workload import Plan, Planned, Turn


def single(number: int, at: float = 0.0) -> Planned:
    return Planned(at=at, turns=(Turn((Piece(key("t", number), 8),), max_tokens=2),))


def plan(*conversations: Planned) -> Plan:
    return Plan(name="test", conversations=conversations)


async def run(server: FakeServer, what: Plan, pace: Pace | None = None) -> Run:
    async with Client(Target(server.url, model="m", timeout=60.0)) as client:
        return await drive(what, client, pace)


class Gate:
    """Answers nobody before `count` requests are in flight together."""

    def __init__(self, count: int) -> None:
        self._barrier = asyncio.Barrier(count)

    async def __call__(self, request: Json, answer: FakeAnswer) -> None:
        await self._barrier.wait()
        await answer_well(request, answer)


async def test_an_open_loop_sends_whether_or_not_answers_come() -> None:
    async with fake_server(Gate(300)) as server:
        result = await run(server, plan(*(single(i) for i in range(300))))
    assert (len(result.records), result.failed) == (300, 0)


class Peak:
    """Counts the most requests in flight together."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def __call__(self, request: Json, answer: FakeAnswer) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        await answer_well(request, answer)
        self.now -= 1


async def test_a_cap_bounds_the_requests_in_flight_and_its_wait_is_latency() -> None:
    async with fake_server(peak := Peak()) as server:
        result = await run(server, plan(*(single(i) for i in range(8))), Pace(cap=2))
    assert peak.most <= 2
    # All were due at once: what had to wait was sent after others had ended, and counts from when it was due.
    first_end = min(record.ended_at for record in result.records)
    late = [record for record in result.records if record.sent_at >= first_end]
    assert len(late) >= 6
    assert all((record.e2e or 0.0) >= first_end - result.started_at for record in late)


async def test_a_closed_loop_keeps_that_many_users_and_ignores_the_times() -> None:
    async with fake_server(peak := Peak()) as server:
        result = await run(server, plan(*(single(i, at=1e9) for i in range(9))), Pace(closed=3))
    assert len(result.records) == 9
    assert peak.most <= 3
    assert all(record.delay < 60.0 for record in result.records)


async def test_times_are_divided_by_the_time_scale() -> None:
    async with fake_server() as server:
        result = await run(server, plan(single(0), single(1, at=200.0)), Pace(time_scale=10_000))
    assert [round((r.intended_at - result.started_at) * 10_000) for r in result.records] == [0, 200]
    assert all(record.delay >= 0 for record in result.records)


async def test_a_turn_builds_on_the_answer_that_came() -> None:
    turns = tuple(Turn((Piece(key("turn", i), 4),), max_tokens=2, think=1.0) for i in range(2))
    conversation = Planned(at=0.0, turns=turns, system=(Piece(key("s"), 4),))
    async with fake_server() as server:
        result = await run(server, plan(conversation), Pace(time_scale=1000))
    assert server.requests[1]["messages"] == [
        {"role": "system", "content": render(conversation.system)},
        {"role": "user", "content": render(turns[0].text)},
        {"role": "assistant", "content": "hello world"},
        {"role": "user", "content": render(turns[1].text)},
    ]
    first, second = result.records
    thought = second.intended_at - first.ended_at
    assert 0.001 <= thought < 0.9


async def test_a_failed_turn_ends_its_session_and_counts_what_is_lost() -> None:
    async def refuse(_: Json, answer: FakeAnswer) -> None:
        answer.refuse(500)

    turns = tuple(Turn((Piece(i, 4),), max_tokens=2) for i in range(4))
    async with fake_server(refuse) as server:
        result = await run(server, plan(Planned(at=0.0, turns=turns)))
    assert (len(result.records), result.failed, result.lost_turns) == (1, 1, 3)


async def test_nothing_is_begun_after_the_end() -> None:
    turns = tuple(Turn((Piece(i, 4),), max_tokens=2, think=100.0) for i in range(2))
    async with fake_server() as server:
        result = await run(server, plan(Planned(at=0.0, turns=turns), single(1, at=20.0)), Pace(until=10.0))
    assert len(result.records) == 1


async def test_stopping_keeps_what_was_measured_and_counts_the_rest_apart() -> None:
    async def first_only(request: Json, answer: FakeAnswer) -> None:
        if request["messages"][0]["content"] == render(single(0).turns[0].text):
            await answer_well(request, answer)
            return
        await answer.start()
        await answer.send(chunk("x"))
        await asyncio.Event().wait()

    stop = asyncio.Event()
    seen: list[Progress] = []

    def stop_when_two_hang(progress: Progress) -> None:
        seen.append(progress)
        if progress.done == 1 and progress.in_flight == 2:
            stop.set()

    everything = plan(single(0), single(1), single(2), single(3, at=1e6))
    async with fake_server(first_only) as server, Client(Target(server.url, model="m")) as client:
        result = await drive(everything, client, stop=stop, on_progress=stop_when_two_hang)
    assert (len(result.records), result.cancelled, result.failed) == (1, 2, 0)
    assert result.stopped
    assert (seen[-1].planned, seen[-1].sent) == (4, 3)


async def test_answers_are_counted_by_what_the_server_says() -> None:
    async def three(_: Json, answer: FakeAnswer) -> None:
        await answer.start()
        await answer.send(chunk("several words in one chunk") + usage(5, 3) + DONE)

    async with fake_server(three) as server:
        result = await run(server, plan(single(0)))
    assert result.records[0].output_tokens == 3
