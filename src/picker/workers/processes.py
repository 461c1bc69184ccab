"""Who starts whom: one parent that only starts, watches and stops, so that nothing a request does can end it.

Owns the processes of a picker with several workers: one that ends by itself is started again, and none outlives the
parent. What they run is said by those who make `Part`s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from picker.children import die_with_parent

log = logging.getLogger("picker.workers")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds before a process that keeps ending is started again
_STEADY = 10.0  # seconds that it must have run to be none of those
_KILLED = 5.0  # seconds


class StartError(RuntimeError):
    """A process ended before all were ready; it has said why itself. status: its exit status."""

    def __init__(self, name: str, status: int) -> None:
        super().__init__(f"{name} ended at the start ({ended_how(status)})")
        self.status = status


@dataclass(frozen=True, slots=True)
class Launch:
    """How a process is started. told: a line it reads on stdin, which stays open until the parent is gone.

    descriptors: that it inherits, by their numbers. after: called when it has them.
    """

    command: Sequence[str]
    told: bytes
    descriptors: Sequence[int] = ()
    after: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Part:
    """One process, over all its lives. launch: makes what a life needs, by its number, 0 and up."""

    name: str
    launch: Callable[[int], Launch]


class Processes:
    """Parts that are kept running until they are told to go."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._begun = False
        self._stopping = asyncio.Event()
        self._running: dict[str, Process] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self.restarts = 0

    def start(self, part: Part) -> None:
        """Keep a part running. Until `begun`, its end is an error (StartError) of the task group."""
        self._keepers[part.name] = self._tasks.create_task(self._keep(part))

    def begun(self) -> None:
        """All are ready: from now on, who ends is started again."""
        self._begun = True

    def pid(self, name: str) -> int | None:
        """Of the life that runs, if any."""
        process = self._running.get(name)
        return None if process is None else process.pid

    def kill(self, name: str) -> None:
        """End the present life of a part; unless told to go, it is started again."""
        self._signal(name, signal.SIGKILL)

    def tell(self, names: Sequence[str]) -> None:
        """Ask parts to go. Nothing is started again from now on."""
        self._stopping.set()
        for name in names:
            self._signal(name, signal.SIGTERM)

    async def gone(self, names: Sequence[str], seconds: float) -> None:
        """Wait until parts have gone that were told to; kill those that have not within `seconds`."""
        await self._wait(names, seconds)
        for name in names:
            if name in self._running:
                log.warning("%s has not gone in time and is killed", name)
                self.kill(name)
        await self._wait(names, _KILLED)

    async def _wait(self, names: Sequence[str], seconds: float) -> None:
        if names:
            await asyncio.wait([self._keepers[name] for name in names], timeout=seconds)

    def _signal(self, name: str, number: signal.Signals) -> None:
        if (process := self._running.get(name)) is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    async def _keep(self, part: Part) -> None:
        loop, life, pause = asyncio.get_running_loop(), 0, _FIRST_PAUSE
        while not self._stopping.is_set():
            started_at = loop.time()
            status = await self._live(part, life)
            if self._stopping.is_set():
                return
            if not self._begun:
                raise StartError(part.name, status)
            pause = _FIRST_PAUSE if loop.time() > started_at + _STEADY else min(2 * pause, _LONGEST_PAUSE)
            log.error("%s ended (%s); it is started again", part.name, ended_how(status))
            life, self.restarts = life + 1, self.restarts + 1
            await self._pause(pause)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _live(self, part: Part, life: int) -> int:
        """One life of a part, from beginning to end; returns how it ended."""
        launch = part.launch(life)
        try:
            process = await asyncio.create_subprocess_exec(
                *launch.command,
                stdin=asyncio.subprocess.PIPE,
                pass_fds=launch.descriptors,
                # Ctrl-C goes to the whole foreground group; the parent decides in which order they end.
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        finally:
            launch.after()
        self._running[part.name] = process
        try:
            assert process.stdin is not None
            with contextlib.suppress(ConnectionError):
                process.stdin.write(launch.told + b"\n")
                await process.stdin.drain()
            return await process.wait()
        finally:
            await self._end(process)
            self._running.pop(part.name, None)

    async def _end(self, process: Process) -> None:
        """Whoever leaves takes the process along: a parent that fails leaves nobody behind."""
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def ended_how(status: int) -> str:
    """An exit status, or the name of the signal."""
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name
