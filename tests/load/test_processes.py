from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace
from multiprocessing.context import SpawnProcess

import pytest
import uvloop

from load.fake_openai import FakeAnswer, Json, answer_well, chunk, fake_server
from picker.load.client import Record, Target
from picker.load.processes import Job, LostProcessError, _measure, _Worker, dealt, drive_job, merged, useful
from picker.load.schedule import Pace, Progress, Run
from picker.load.text import PLAIN, Piece, PseudoWords
from picker.load.workload import Plan, Planned, Turn


def plan(count: int, *, apart: float = 0.0, tokens: int = 2) -> Plan:
    return Plan("test", tuple(Planned(i * apart, (Turn((Piece(i, 8),), tokens),)) for i in range(count)))


def job(count: int, pace: Pace | None = None, url: str = "http://x:1", **options: object) -> Job:
    return Job(plan(count, **options), pace or Pace(), Target(url, model="m"), PLAIN)  # type: ignore[arg-type]


def test_every_conversation_is_dealt_once_and_knows_its_place() -> None:
    parts = dealt(job(10), 3)
    whole = plan(10).conversations
    found = {number: part.plan.conversations[i] for part in parts for i, number in enumerate(part.numbers)}
    assert found == dict(enumerate(whole))
    assert [len(part.plan.conversations) for part in parts] == [4, 3, 3]


def test_users_slots_and_starts_are_divided() -> None:
    parts = dealt(job(10, Pace(closed=5, cap=7, starts=(1.0, 2.0, 3.0, 4.0, 5.0))), 2)
    assert [(part.pace.closed, part.pace.cap, part.pace.starts) for part in parts] == [
        (3, 4, (1.0, 3.0, 5.0)),
        (2, 3, (2.0, 4.0)),
    ]


@pytest.mark.parametrize(
    ("planned", "pace", "expected"),
    [
        (plan(100, apart=1.0), Pace(), 1),
        (plan(4000, apart=0.0005), Pace(), 2),
        (plan(4000, apart=0.0005), Pace(cap=1), 1),
        (plan(100, apart=0.01, tokens=1000), Pace(), 2),
        (plan(4000, apart=0.5), Pace(time_scale=1000), 2),
        (plan(4000), Pace(closed=8), 1),
        (plan(4000), Pace(closed=1000), 2),
        (plan(1), Pace(), 1),
    ],
)
def test_as_many_processes_as_sending_takes(planned: Plan, pace: Pace, expected: int) -> None:
    assert useful(planned, pace, cores=2) == expected


def record(at: float) -> Record:
    return Record(intended_at=at, sent_at=at, ended_at=at)


def test_merged_runs_are_one_in_order() -> None:
    first = Run(plan(0), Pace(), started_at=1.0, ended_at=5.0, sent=2, records=[record(1.0), record(3.0)], cpu_s=0.5)
    second = Run(plan(0), Pace(), started_at=1.0, ended_at=6.0, sent=1, records=[record(2.0)], cpu_s=0.25, stopped=True)
    whole = merged([first, second], plan(3), Pace())
    assert [each.intended_at for each in whole.records] == [1.0, 2.0, 3.0]
    assert (whole.started_at, whole.ended_at, whole.sent, whole.processes) == (1.0, 6.0, 3, 2)
    assert (whole.cpu_s, whole.stopped) == (0.75, True)


async def test_processes_send_the_whole_plan_together() -> None:
    seen: list[Progress] = []
    async with fake_server() as server:
        asked = replace(job(20, url=server.url, apart=0.005), wording=PseudoWords(2.0))
        run = await drive_job(asked, 2, stop=asyncio.Event(), on_progress=seen.append)
    assert (len(run.records), run.failed, run.processes) == (20, 0, 2)
    assert [each.conversation for each in run.records] == list(range(20))
    assert {len(request["messages"][0]["content"]) for request in server.requests} == {8 * 2 * 4}
    assert all(each.intended_at - run.started_at == pytest.approx(i * 0.005) for i, each in enumerate(run.records))
    assert (seen[-1].planned, seen[-1].done) == (20, 20)
    assert run.cpu_s > 0


async def test_stopping_stops_all_processes() -> None:
    stop = asyncio.Event()

    async def hang_after_two(request: Json, answer: FakeAnswer) -> None:
        if len(server.requests) <= 2:
            await answer_well(request, answer)
            return
        await answer.start()
        await answer.send(chunk("x"))
        if len(server.requests) == 4:
            stop.set()
        await asyncio.Event().wait()

    async with fake_server(hang_after_two) as server:
        run = await drive_job(job(6, url=server.url), 2, stop=stop)
    assert run.stopped
    assert len(run.records) == 2
    assert len(run.records) + run.cancelled == run.sent


async def test_a_process_that_breaks_is_an_error_and_not_a_shorter_run() -> None:
    broken = replace(job(2), wording=None)  # type: ignore[arg-type]
    with pytest.raises((LostProcessError, ExceptionGroup)):
        await drive_job(broken, 2, stop=asyncio.Event())


@dataclass(frozen=True, slots=True)
class FakeProcess:
    """Ends when the other end of `sentinel` is closed."""

    sentinel: int
    exitcode: int = 3

    def join(self, timeout: float) -> None:
        pass


def test_what_a_process_said_last_is_heard_when_its_pipe_is_reset() -> None:
    async def hear() -> list[object]:
        ours, theirs = multiprocessing.Pipe()
        sentinel, end = os.pipe()
        worker = _Worker(FakeProcess(sentinel), ours)
        worker.tell_stop()
        theirs.send("almost done")
        theirs.send("the run")
        theirs.close()  # with "stop" unread: this resets it
        os.close(end)
        async with asyncio.timeout(20):
            heard = [await worker.next(), await worker.next()]
            with pytest.raises(LostProcessError, match="status 3"):
                await worker.next()
        ours.close()
        os.close(sentinel)
        return heard

    # What libuv does with a reset pipe, the loop of the standard library does not.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(hear()) == ["almost done", "the run"]


async def test_a_process_reads_that_it_shall_stop() -> None:
    async def hang(request: Json, answer: FakeAnswer) -> None:
        ours.send("stop")
        await asyncio.Event().wait()

    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ours.send(time.monotonic())
        async with fake_server(hang) as server:
            run = await _measure(theirs, job(1, url=server.url))
        assert (run.stopped, theirs.poll()) == (True, False)


async def test_ctrl_c_while_processes_start_is_not_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    start = SpawnProcess.start

    def interrupted(process: SpawnProcess) -> None:
        start(process)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)

    monkeypatch.setattr(SpawnProcess, "start", interrupted)
    async with fake_server() as server:
        run = await drive_job(job(4, url=server.url), 2, stop=asyncio.Event())
    assert (len(run.records), run.failed) == (4, 0)
