"""Real processes, as small as they get."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from picker.workers import processes
from picker.workers.processes import Launch, Part, Processes, StartError

# Tells its process id and what it was told, and stays until it is asked to go, or its parent has gone.
STAYS = (
    "import os, sys; line = sys.stdin.readline(); os.write({fd}, (str(os.getpid()) + line).encode()); sys.stdin.read()"
)
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + STAYS


class Stage:
    """Starts parts that say when they run. told: by each life, in order."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.processes = Processes(tasks)
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        self.told: list[str] = []

    def start(self, name: str, code: str = STAYS) -> None:
        def launch(life: int) -> Launch:
            return Launch([sys.executable, "-S", "-c", code.format(fd=self.write)], b" life %d" % life, [self.write])

        self.processes.start(Part(name, launch))

    async def until(self, count: int) -> list[str]:
        async with asyncio.timeout(60):
            while len(self.told) < count:
                try:
                    self.told += os.read(self.read, 4096).decode().splitlines()
                except BlockingIOError:
                    await asyncio.sleep(0.005)
        return self.told


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    async with asyncio.TaskGroup() as tasks:
        made = Stage(tasks)
        try:
            yield made
        finally:
            os.close(made.read)
            os.close(made.write)


def alive(line: str) -> bool:
    """Whether the process that said this is still there."""
    return Path(f"/proc/{line.split()[0]}").exists()


async def test_who_ends_is_started_again_and_told_how_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_LONGEST_PAUSE", 0.01)
    async with stage() as this:
        this.start("one")
        await this.until(1)
        this.processes.begun()
        for life in range(1, 3):
            pid = this.processes.pid("one")
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert (await this.until(life + 1))[-1].endswith(f" life {life}")
        assert this.processes.restarts == 2
        this.processes.tell(["one"])
        await this.processes.gone(["one"], 5.0)
        assert not any(map(alive, this.told))


async def test_who_ends_before_all_are_ready_ends_everything_and_leaves_nobody_behind() -> None:
    told: list[str] = []

    async def run() -> None:
        async with stage() as this:
            this.start("steady")
            told.extend(await this.until(1))
            this.start("faulty", "raise SystemExit(2)")
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        await run()
    (error,) = caught.value.exceptions
    assert isinstance(error, StartError)
    assert error.status == 2
    assert "faulty" in str(error)
    assert not any(map(alive, told))


async def test_who_does_not_go_in_time_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    async with stage() as this:
        this.start("deaf", DEAF)
        await this.until(1)
        this.processes.begun()
        this.processes.tell(["deaf"])
        await this.processes.gone(["deaf"], 0.05)
        assert not any(map(alive, this.told))
    assert "deaf has not gone in time" in caplog.text


async def test_whoever_cancels_leaves_nobody_behind() -> None:
    async with asyncio.TaskGroup() as tasks:
        begun: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            async with stage() as this:
                this.start("one", DEAF)
                begun.set_result(await this.until(1))
                await asyncio.Event().wait()

        task = tasks.create_task(run())
        told = await begun
        task.cancel()
        await asyncio.wait([task])
        assert not any(map(alive, told))
