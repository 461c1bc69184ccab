"""A run by several processes, one per core: the plan is dealt out, all begin at one instant, the results are merged.

Owns the processes and what goes through their pipes. One Python process sends on time up to about half of a core's
work; beyond that its own delays would be the server's in the figures.
"""

from __future__ import annotations

import asyncio
import gc
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from picker.load.client import Client, Target
from picker.load.interrupts import interrupts_held
from picker.load.schedule import Pace, Progress, Run, drive
from picker.load.text import Wording
from picker.load.workload import Plan

# CPU seconds of this generator on the machine it was written on (`bench/generator.py`): for a request, for a streamed
# token, and for a token of a prompt. They only decide how many processes are worth their start.
_REQUEST, _CHUNK, _TOKEN = 250e-6, 20e-6, 0.03e-6
# A process that is busier than this share of its core sends late when arrivals bunch up.
_BUSY = 0.4
# Users of a closed loop that one process certainly serves.
_FEW_USERS = 64
# Between the last process being ready and the first request.
_LEAD = 0.2


class LostProcessError(RuntimeError):
    """A process of the run ended before it had told what it measured."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a process does. first, step: its conversations' places in the whole plan."""

    plan: Plan
    pace: Pace
    target: Target
    wording: Wording
    first: int = 0
    step: int = 1

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + self.step * len(self.plan.conversations), self.step)


def dealt(job: Job, count: int) -> list[Job]:
    """The job as `count` jobs: conversations in turn, users and slots divided."""
    return [
        replace(
            job,
            plan=replace(job.plan, conversations=job.plan.conversations[number::count]),
            pace=_part(job.pace, number, count),
            first=number,
            step=count,
        )
        for number in range(count)
    ]


def _part(pace: Pace, number: int, count: int) -> Pace:
    closed = None if pace.closed is None else len(range(number, pace.closed, count))
    cap = None if pace.cap is None else len(range(number, pace.cap, count))
    return replace(pace, closed=closed, cap=cap, starts=pace.starts[number::count])


def useful(plan: Plan, pace: Pace, cores: int | None = None) -> int:
    """How many processes a plan is worth on this machine, by what sending it takes in its busiest seconds."""
    cores = cores or os.cpu_count() or 1
    most = max(1, min(cores, len(plan.conversations), pace.closed or cores, pace.cap or cores))
    if pace.closed is not None:
        return most if pace.closed > _FEW_USERS else 1
    return max(1, min(most, math.ceil(_cores_needed(plan, pace) / _BUSY)))


def _cores_needed(plan: Plan, pace: Pace) -> float:
    requests = plan.requests
    if not requests:
        return 0.0
    seconds = np.array([conversation.at for conversation in plan.conversations]) / pace.time_scale
    busiest = float(np.percentile(np.bincount(seconds.astype(int)), 99)) * requests / len(seconds)
    tokens = sum(turn.max_tokens for conversation in plan.conversations for turn in conversation.turns)
    return busiest * (_REQUEST + _CHUNK * tokens / requests + _TOKEN * plan.prompt_tokens / requests)


def merged(runs: Sequence[Run], plan: Plan, pace: Pace) -> Run:
    """One run of all: records in the order in which they were meant to be sent."""
    records = sorted((record for run in runs for record in run.records), key=lambda record: record.intended_at)
    return Run(
        plan=plan,
        pace=pace,
        started_at=min(run.started_at for run in runs),
        ended_at=max(run.ended_at for run in runs),
        sent=sum(run.sent for run in runs),
        records=records,
        cancelled=sum(run.cancelled for run in runs),
        lost_turns=sum(run.lost_turns for run in runs),
        stopped=any(run.stopped for run in runs),
        processes=len(runs),
        cpu_s=sum(run.cpu_s for run in runs),
    )


# --- here ----------------------------------------------------------------------------------------------------


async def drive_job(
    job: Job,
    count: int,
    *,
    stop: asyncio.Event,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Do the job in `count` processes, or in this one. Setting `stop` ends the run early."""
    if count == 1:
        async with Client(job.target) as client:
            with _steady():
                return await drive(job.plan, client, job.pace, stop=stop, on_progress=on_progress, wording=job.wording)
    with _workers(dealt(job, count)) as workers:
        await asyncio.gather(*(worker.next() for worker in workers))  # they are ready
        begin_at = time.monotonic() + _LEAD
        for worker in workers:
            worker.pipe.send(begin_at)
        return merged(await _runs(workers, stop, on_progress), job.plan, job.pace)


async def _runs(
    workers: Sequence[_Worker], stop: asyncio.Event, on_progress: Callable[[Progress], None] | None
) -> list[Run]:
    async def pass_on_stop() -> None:
        await stop.wait()
        for worker in workers:
            worker.tell_stop()

    latest: dict[_Worker, Progress] = {}

    async def run_of(worker: _Worker) -> Run:
        while not isinstance(told := await worker.next(), Run):
            latest[worker] = told
            if on_progress is not None and len(latest) == len(workers):
                on_progress(_together(list(latest.values())))
        return told

    async with asyncio.TaskGroup() as group:
        stopping = group.create_task(pass_on_stop())
        runs = await asyncio.gather(*(run_of(worker) for worker in workers))
        stopping.cancel()
    return runs


def _together(parts: Sequence[Progress]) -> Progress:
    ttfts = [part.ttft for part in parts if part.ttft is not None]
    return Progress(
        ttft=sum(ttfts) / len(ttfts) if ttfts else None,
        planned=sum(part.planned for part in parts),
        sent=sum(part.sent for part in parts),
        done=sum(part.done for part in parts),
        failed=sum(part.failed for part in parts),
        elapsed=max(part.elapsed for part in parts),
    )


class _Worker:
    """A process and this end of its pipe. What comes is read by the event loop."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self.process = process
        self.pipe = pipe
        self._told: asyncio.Queue[Any] = asyncio.Queue()
        _watch(pipe, self._read)
        # A pipe that is closed before all in it was read is reset, and libuv watches it no more: what came before
        # that is still in it, and only the end of the process says so.
        asyncio.get_running_loop().add_reader(process.sentinel, self._ended)

    def _read(self) -> None:
        try:
            self._told.put_nowait(self.pipe.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self.pipe.fileno())

    def _ended(self) -> None:
        """Read what it said last; nothing comes after that."""
        self._unwatch()
        try:
            while self.pipe.poll():
                self._told.put_nowait(self.pipe.recv())
        except (EOFError, OSError):
            pass
        self._told.put_nowait(None)

    def _unwatch(self) -> None:
        for watched in (self.pipe.fileno(), self.process.sentinel):
            asyncio.get_running_loop().remove_reader(watched)

    async def next(self) -> Any:
        """The next thing it says. Raises LostProcessError when it has gone."""
        told = await self._told.get()
        if told is None:
            self.process.join(1.0)  # its status comes a moment after its end
            raise LostProcessError(f"a process of the load run ended early (status {self.process.exitcode})")
        return told

    def tell_stop(self) -> None:
        try:
            self.pipe.send("stop")
        except OSError:
            pass  # it has ended by itself

    def close(self) -> None:
        self._unwatch()
        self.pipe.close()
        self.process.join(1.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _watch(pipe: Connection, read: Callable[[], None]) -> None:
    asyncio.get_running_loop().add_reader(pipe.fileno(), read)
    # libuv makes what it watches non-blocking, and then a message longer than the pipe's buffer breaks off.
    os.set_blocking(pipe.fileno(), True)


@contextmanager
def _workers(jobs: Sequence[Job]) -> Iterator[list[_Worker]]:
    # Spawned, not forked: libraries' threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    workers = []
    try:
        for job in jobs:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, job), daemon=True)
            with interrupts_held():
                process.start()
            theirs.close()
            workers.append(_Worker(process, ours))
        yield workers
    finally:
        for worker in workers:
            worker.close()


# --- there ---------------------------------------------------------------------------------------------------


def _work(pipe: Connection, job: Job) -> None:
    """The whole life of a process: say that it is ready, be told when to begin, tell what was measured."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        run = runner.run(_measure(pipe, job))
    pipe.send(replace(run, plan=Plan(run.plan.name, ())))
    pipe.close()


async def _measure(pipe: Connection, job: Job) -> Run:
    pipe.send("ready")
    begin_at = pipe.recv()
    stop = asyncio.Event()

    def told_to_stop() -> None:
        try:
            pipe.recv()  # what is left unread when the pipe is closed resets it
        except (EOFError, OSError):
            pass  # nobody is left to tell
        asyncio.get_running_loop().remove_reader(pipe.fileno())
        stop.set()

    _watch(pipe, told_to_stop)
    async with Client(job.target) as client:
        with _steady():
            run = await drive(
                job.plan,
                client,
                job.pace,
                stop=stop,
                on_progress=pipe.send,
                wording=job.wording,
                begin_at=begin_at,
                numbers=job.numbers,
            )
    asyncio.get_running_loop().remove_reader(pipe.fileno())
    return run


@contextmanager
def _steady() -> Iterator[None]:
    """Keep the collector from walking the whole plan while requests are due: it takes tens of milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
