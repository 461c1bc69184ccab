"""Child processes that live exactly as long as the block that starts them.

Owns starting, watching and stopping them, and their output files. A child that ends by itself ends the
block with a `ChildFailedError` that carries its last words; a parent that dies, even by SIGKILL, takes its children
along (Linux). Knows nothing of what the children do.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

# Seconds to let requests end; then SIGKILL.
GRACE = 5.0
_LAST_LINES = 12

_GIVEN_AWAY = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUALLY_FROM = 32_768
_LOWEST_PORT, _FEWEST = 10_000, 1_000
_numbers = itertools.count(os.getpid() * 97)  # processes that look at the same time begin at different places


class ChildFailedError(RuntimeError):
    """A child ended, or did not become ready. The message has its last lines of output."""


@dataclass(frozen=True, slots=True, eq=False)
class Child:
    """A process under supervision. log: where its stdout and stderr go."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    def last_lines(self) -> str:
        return last_lines(self.log)


class Children:
    """The children of one block; see `supervised`. folder: temporary, for their output and files."""

    def __init__(self, folder: Path, group: asyncio.TaskGroup, grace: float) -> None:
        self.folder = folder
        self._group = group
        self._grace = grace
        self._children: list[Child] = []
        self._stopping = False

    async def start(self, name: str, *command: str) -> Child:
        """Start a process whose end is an error until the block ends. `name` is for messages and its log file."""
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C goes to the whole foreground group; the parent decides in which order its children end.
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        child = Child(name, process, log)
        self._children.append(child)
        self._group.create_task(self._watch(child))
        return child

    async def start_picker(self, name: str, *arguments: str) -> Child:
        """Start `picker ARGUMENTS` with this interpreter."""
        return await self.start(name, sys.executable, "-m", "picker", *arguments)

    async def announced(self, child: Child, pattern: re.Pattern[str], *, timeout: float, count: int = 1) -> list[str]:
        """The first group of `pattern`, `count` times, once the child has said so: how it tells the ports it took."""
        found: list[str] = []

        async def said() -> bool:
            found[:] = pattern.findall(child.log.read_text(errors="replace"))[:count]
            return len(found) == count

        await self.ready(child, said, timeout=timeout)
        return found

    async def ready(self, child: Child, probe: Callable[[], Awaitable[bool]], *, timeout: float) -> None:
        """Wait until `probe` says yes. Raises ChildFailedError after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    if await probe():
                        return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise ChildFailedError(
                _with_words(f"{child.name} was not ready after {timeout:g} s", child.last_lines())
            ) from None

    async def _watch(self, child: Child) -> None:
        status = await child.process.wait()
        if not self._stopping:
            raise ChildFailedError(_with_words(f"{child.name} ended by itself ({_end(status)})", child.last_lines()))

    async def stop(self) -> None:
        """End all children, the last one started first."""
        self._stopping = True
        for child in reversed(self._children):
            await _end_process(child.process, self._grace)


@contextlib.asynccontextmanager
async def supervised(*, grace: float = GRACE) -> AsyncIterator[Children]:
    """A block that owns children. It ends early with ChildFailedError when one of them does.

    However the block ends, its children have ended when it is left, and their files are gone. grace: seconds between
    SIGTERM and SIGKILL.
    """
    with tempfile.TemporaryDirectory(prefix="picker-") as folder:
        try:
            async with asyncio.TaskGroup() as group:
                children = Children(Path(folder), group, grace)
                try:
                    yield children
                finally:
                    await children.stop()
        except BaseExceptionGroup as errors:
            raise _cause(errors) from None


def _cause(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to show: what a child's end was, else what the block raised."""
    leaves: list[BaseException] = []
    stack: list[BaseException] = [errors]
    while stack:
        error = stack.pop(0)
        if isinstance(error, BaseExceptionGroup):
            stack.extend(error.exceptions)
        else:
            leaves.append(error)
    return next((error for error in leaves if isinstance(error, ChildFailedError)), leaves[0])


async def _end_process(process: asyncio.subprocess.Process, grace: float) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(grace):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    await process.wait()


def die_with_parent() -> Callable[[], None] | None:
    """What a child runs before exec so that the kernel kills it when the thread that started it ends (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    # Loaded before the fork: in the child only calls that take no lock are safe.
    prctl, parent, set_death_signal = ctypes.CDLL(None).prctl, os.getpid(), 1

    def arrange() -> None:
        prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it ended between the fork and the line above
            os._exit(1)

    return arrange


def last_lines(log: Path, count: int = _LAST_LINES) -> str:
    """The end of a log file, without blank lines."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join([line for line in lines if line.strip()][-count:])


def _end(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def _with_words(message: str, words: str) -> str:
    return f"{message}. Its last words:\n{words}" if words else f"{message}, without a word"


def free_ports(count: int) -> list[int]:
    """Loopback ports in a row that nobody has, for programs that cannot choose one by themselves.

    They lie below those that the system gives away of itself, to a connection that anybody makes meanwhile, or to a
    listener on port 0.
    """
    end = int(_GIVEN_AWAY.read_text().split()[0]) if _GIVEN_AWAY.exists() else _USUALLY_FROM
    room = max(end, _LOWEST_PORT + _FEWEST) - _LOWEST_PORT - count
    while True:
        first = _LOWEST_PORT + next(_numbers) * count % room
        if all(map(_is_free, range(first, first + count))):
            return list(range(first, first + count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
