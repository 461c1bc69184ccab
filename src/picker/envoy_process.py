"""An Envoy that is kept running: started, watched, started again when it dies, and drained before it is ended.

Owns the process and its admin socket. What Envoy is told to do is `data_plane`'s business; that it serves nothing
without picker follows from its being killed with the thread that started it (Linux).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import aiohttp

from picker.data_plane import Folder
from picker.envoy import Json, complaint, find_envoy, said, start, stop
from picker.errors import ConfigError

log = logging.getLogger("picker.envoy")

# Seconds until an Envoy that died is started again: doubled for each that dies soon, up to the second.
_BACK_OFF, _LONGEST_BACK_OFF = 0.1, 5.0
# One that has run for so long did not die of its start.
_GOOD = 30.0
_READY = 30.0
# How often it is looked at where the kernel does not tell of its end.
_LOOK = 0.05
# Seconds without a request after which connections that are still open are taken to be idle.
_QUIET = 0.3
_LAST_LINES = 12
_LONGEST_SOCKET = 100  # bytes of a path; the kernel takes 107

Sleep = Callable[[float], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Running:
    """An Envoy that serves. port: of its listener; version: of Envoy."""

    port: int
    version: str
    pid: int


class KeptEnvoy:
    """One Envoy after another, as long as `run` runs.

    config: for the port it is to listen on; the first one may be given 0, and all others get the port that it took.
    folder: where its files are. threads: of its workers. binary: which Envoy; None: the one that `find_envoy` finds.
    """

    def __init__(
        self,
        config: Callable[[int], Json],
        folder: Folder,
        *,
        port: int,
        threads: int,
        binary: Path | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.running: Running | None = None
        self.restarts = 0
        self._config = config
        self._folder = folder
        self._port = port
        self._threads = threads
        self._binary = binary or find_envoy()
        self._sleep = sleep
        self._process: Popen[bytes] | None = None
        self._leaving = False
        if len(str(folder.admin)) > _LONGEST_SOCKET:
            raise ConfigError(f"{folder.path} is too long a name for a socket in it: set TMPDIR to a shorter one")

    async def run(self, started: Callable[[Running], None]) -> None:
        """Keep it running until cancelled. started: told once, when the first one serves.

        Raises ConfigError, with Envoy's own words, when the first one does not come up; others are tried for ever.
        """
        pause = _BACK_OFF
        try:
            while True:
                since = asyncio.get_running_loop().time()
                try:
                    running = await self._begin()
                    if not self.restarts:
                        started(running)
                    await self._end()
                except ConfigError as error:
                    if not self.restarts and self.running is None:
                        raise
                    log.error("%s", error)
                if self._leaving:
                    return
                if asyncio.get_running_loop().time() - since > _GOOD:
                    pause = _BACK_OFF
                log.error("Envoy ended by itself; it is started again. Its last words:\n%s", self._last_words())
                self.restarts += 1
                await self._sleep(pause)
                pause = min(2 * pause, _LONGEST_BACK_OFF)
        finally:
            await asyncio.shield(asyncio.to_thread(self._stop))

    async def drain(self, grace: float) -> None:
        """Take no new connections, have clients leave those they have, and wait until no request runs, or `grace`.

        Requests on connections that clients still hold are served to the end.
        """
        self._leaving = True
        try:
            # The first makes every response say `connection: close`, the second closes the listening sockets.
            await self.admin("/healthcheck/fail", method="POST")
            await self.admin("/drain_listeners", method="POST")
            async with asyncio.timeout(grace):
                await self._until_quiet()
        except TimeoutError:
            log.warning("requests that still run after %g s are broken off", grace)
        except OSError as error:
            log.error("Envoy does not answer, so it cannot be drained: %s", error)

    async def _until_quiet(self) -> None:
        quiet = 0.0
        while quiet < _QUIET:
            await self._sleep(_LOOK)
            quiet = quiet + _LOOK if not await self.active() else 0.0

    async def active(self) -> int:
        """Requests that it serves just now. Raises OSError when it does not answer."""
        page = json.loads(await self.admin("/stats?format=json&filter=http\\.gateway\\.downstream_rq_active"))
        return sum(each["value"] for each in page["stats"] if "value" in each)

    async def admin(self, path: str, *, method: str = "GET") -> str:
        """The admin interface's answer. Raises OSError when there is none."""
        connector = aiohttp.UnixConnector(path=str(self._folder.admin))
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=5.0)) as session,
                session.request(method, f"http://envoy{path}") as response,
            ):
                return await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise OSError(f"no answer from Envoy's admin socket ({type(error).__name__})") from None

    # one life

    async def _begin(self) -> Running:
        """Start one and wait until it serves; raises ConfigError with its own words when it does not."""
        folder = self._folder
        folder.config.write_text(json.dumps(self._config(self._port)), encoding="utf-8")
        folder.admin.unlink(missing_ok=True)
        options = [*("-c", str(folder.config)), *("-l", "warning"), *("--concurrency", str(self._threads))]
        process = self._process = start([str(self._binary), *options, "--disable-hot-restart"], folder.log)
        until = asyncio.get_running_loop().time() + _READY
        while process.poll() is None:
            if (running := await self._ask(process.pid)) is not None:
                self.running, self._port = running, running.port
                return running
            if asyncio.get_running_loop().time() > until:
                await asyncio.to_thread(self._stop)
                raise ConfigError(f"Envoy was not ready after {_READY:g} s: {self._last_words()}")
            await self._sleep(_LOOK)
        raise ConfigError(f"Envoy did not start: {complaint(folder.log.read_text(errors='replace'))}")

    async def _ask(self, pid: int) -> Running | None:
        """What it says of itself, or None while it is not live."""
        try:
            if not (await self.admin("/ready")).startswith("LIVE"):
                return None
            (listener,) = json.loads(await self.admin("/listeners?format=json"))["listener_statuses"]
            version = json.loads(await self.admin("/server_info"))["version"]
        except OSError:
            return None
        port = listener["local_address"]["socket_address"]["port_value"]
        # "<commit>/<version>/<state of the source>/<build>/<TLS library>"
        return Running(port, version.split("/")[1], pid)

    async def _end(self) -> None:
        assert self._process is not None
        if (descriptor := _watchable(self._process.pid)) is not None:
            await _readable(descriptor)
        while self._process.poll() is None:
            await self._sleep(_LOOK)

    def _stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            stop(self._process)

    def _last_words(self) -> str:
        log = self._folder.log
        lines = said(log.read_text(errors="replace")) if log.exists() else []
        return "\n".join(lines[-_LAST_LINES:]) or "none"


def _watchable(pid: int) -> int | None:
    """A descriptor that can be read from when the process has ended; None where there is no such thing."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


async def _readable(descriptor: int) -> None:
    """Wait until it can be read from, and close it."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
