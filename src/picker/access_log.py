"""The access log: one JSON line for each request that has ended, with who, what, where and how long, never its text.

Front ends tell of requests that begin and are answered, the runtime of decisions and facts. Lines are collected and
written about once a second off the loop's thread, so that a slow disk delays no request; one that takes nothing at all
costs lines, which are counted. Decides nothing and is asked nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from picker.errors import ConfigError
from picker.types import Decision, Fact, Failed, FailureReason, Finished, FirstToken, Outcome, Request, ResponseStarted

log = logging.getLogger("picker.access_log")

STDOUT = "-"
_FLUSH_SECONDS = 1.0
_FLUSH_BYTES = 64 * 1024
# Lines that wait for a disk that takes none; what comes then is lost.
_MOST_WAITING = 8 * 1024 * 1024
# Of what clients can make as long as they like.
_LONGEST_TEXT = 256
_MODE = 0o640


class Line(msgspec.Struct, gc=False):
    """A line; its fields are the keys, always all of them, and what is not known is null.

    time: when the request came, UTC. id: picker's own; request_id: of `x-request-id`. key: name of the API key. path:
    without its query. model: that the client asked for; target_model: that the endpoint was asked for. endpoint: who
    answered, or was last tried. attempts: endpoints tried. cached_tokens: of the prompt, as the engine says. ttft_s:
    until the first token, or the first byte where tokens are not seen; duration_s: until the end of the response.
    error: why there is no whole response, in the words of the metrics.
    """

    time: datetime
    id: int
    request_id: str | None
    client: str | None
    key: str | None
    method: str
    path: str
    model: str | None = None
    target_model: str | None = None
    status: int | None = None
    endpoint: str | None = None
    attempts: int = 0
    stream: bool = False
    prompt_bytes: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    ttft_s: float | None = None
    duration_s: float | None = None
    error: str | None = None


@dataclass(slots=True)
class _Open:
    """A request that has not ended. since: by the runtime's clock; address: of the endpoint it was sent to last."""

    line: Line
    since: float
    address: str | None = None


class RequestLog:
    """Writes lines to a file, or to stdout.

    clock: that of the runtime, monotonic; now: the time of day in seconds since 1970. A request is over when the
    front end says `ended`.
    """

    def __init__(
        self,
        target: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.lost = 0
        self._path = None if target == STDOUT else Path(target)
        self._clock = clock
        self._now = now
        self._encode = msgspec.json.Encoder().encode
        self._open: dict[int, _Open] = {}
        self._lines: list[bytes] = []
        self._bytes = 0
        self._full = asyncio.Event()
        self._reopen = False
        self._failing = False
        self._file = self._opened()

    # what front ends tell

    def begin(
        self,
        request_id: int,
        method: str,
        path: str,
        *,
        client: str | None,
        alias: str | None = None,
        key: str | None = None,
    ) -> None:
        """A request has come. alias: its `x-request-id`; key: the name of the API key that it has shown."""
        at = datetime.fromtimestamp(self._now(), UTC)
        path = path.partition("?")[0]
        line = Line(at, request_id, _short(alias), client, key, method, _short(path) or "")
        self._open[request_id] = _Open(line, self._clock())

    def keyed(self, request_id: int, key: str) -> None:
        """The name of the API key that a request has shown."""
        if (found := self._open.get(request_id)) is not None:
            found.line.key = key

    def answered(self, request_id: int, status: int) -> None:
        """picker answers a request by itself."""
        if (found := self._open.get(request_id)) is not None:
            found.line.status = status

    def measured(
        self, request_id: int, *, first_byte: float | None, duration: float | None, attempts: int | None = None
    ) -> None:
        """What a data plane says of a request that it has served; seconds from its beginning."""
        if (found := self._open.get(request_id)) is not None:
            line = found.line
            line.ttft_s, line.duration_s = _seconds(first_byte), _seconds(duration)
            line.attempts = attempts or line.attempts

    def ended(self, request_id: int) -> None:
        """The request is over; harmless when it has been before."""
        if (found := self._open.pop(request_id, None)) is not None:
            self._add(found.line, found.since)

    # what the runtime tells, as a watcher of its telemetry

    def decision(self, outcome: Outcome, seconds: float, request: Request | None) -> None:
        if (found := self._open.get(outcome.request_id)) is None:
            return
        line = found.line
        if request is not None:
            line.model = line.target_model = _short(request.model)
            line.stream = request.streaming
            if request.rewritten is not None:
                line.model = _short(request.rewritten.asked)
            line.prompt_bytes = request.prompt_bytes + request.extra_bytes
        if isinstance(outcome, Decision):
            line.endpoint, line.attempts = outcome.endpoint.name, line.attempts + 1
            found.address = outcome.endpoint.address
        else:
            line.status, line.error = outcome.status, outcome.reason.value

    def fact(self, fact: Fact) -> None:
        match fact:
            case FirstToken(request_id):
                if (found := self._open.get(request_id)) is not None:
                    found.line.ttft_s = _seconds(self._clock() - found.since)
            case ResponseStarted(request_id, status, served_by):
                self._started(request_id, status, served_by)
            case Finished() | Failed():
                self._over(fact)
            case _:
                pass

    def _started(self, request_id: int, status: int, served_by: str | None) -> None:
        if (found := self._open.get(request_id)) is not None:
            found.line.status, found.line.error = status, None
            if served_by not in (None, found.address):  # a data plane has walked on by itself
                found.line.endpoint = served_by

    def _over(self, fact: Finished | Failed) -> None:
        if (found := self._open.get(fact.request_id)) is None:
            return
        line = found.line
        if isinstance(fact, Failed):
            line.error = fact.reason.value
        else:
            line.status, line.error = fact.status, None
            if fact.usage is not None:
                line.prompt_tokens, line.output_tokens = fact.usage.prompt_tokens, fact.usage.completion_tokens
                line.cached_tokens = fact.usage.cached_tokens

    def _add(self, line: Line, since: float) -> None:
        if line.duration_s is None:
            line.duration_s = _seconds(self._clock() - since)
        if line.status is None and line.error is None:
            line.error = FailureReason.CLIENT_GONE.value
        if self._bytes > _MOST_WAITING:
            self.lost += 1
            return
        text = self._encode(line) + b"\n"
        self._lines.append(text)
        self._bytes += len(text)
        if self._bytes > _FLUSH_BYTES:
            self._full.set()

    # writing

    def reopen(self) -> None:
        """Go on in a new file of the same name at once; one that has been moved away is noticed with the next line."""
        self._reopen = self._path is not None
        self._full.set()

    def move(self, target: str) -> None:
        """Go on in another file, or on stdout, at once."""
        self._path = None if target == STDOUT else Path(target)
        self._reopen = True
        self._full.set()

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Write now and then while the block runs, and the rest at its end."""
        try:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(self._write_forever())
                yield
                task.cancel()
        finally:
            self.close()

    async def _write_forever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_SECONDS):
                    await self._full.wait()
            self._full.clear()
            lines, again = self._taken()
            if lines or again:
                await asyncio.to_thread(self._write, lines, again)

    def _taken(self) -> tuple[list[bytes], bool]:
        lines, self._lines, self._bytes = self._lines, [], 0
        again, self._reopen = self._reopen, False
        return lines, again

    def _write(self, lines: list[bytes], again: bool) -> None:
        try:
            if again or self._moved():
                self._replace(self._opened())
            rest = memoryview(b"".join(lines))
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except (OSError, ConfigError) as error:
            self.lost += len(lines)
            if not self._failing:
                log.error("the access log takes no lines: %s", error)
            self._failing = True
        else:
            self._failing = False

    def _moved(self) -> bool:
        """Whether the file has another name, or none: rotated, and nobody has told us."""
        if self._path is None:
            return False
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return True

    def _replace(self, file: int) -> None:
        os.close(self._file)
        self._file = file

    def _opened(self) -> int:
        return _open(self._path)

    def close(self) -> None:
        """Write what is left, also of requests that have not ended, and close the file; harmless a second time."""
        if self._file < 0:
            return
        for request_id in list(self._open):
            self.ended(request_id)
        self._write(*self._taken())
        os.close(self._file)
        self._file = -1


def check_target(target: str) -> None:
    """Raises ConfigError for a file that cannot be written; makes one that is not there."""
    os.close(_open(None if target == STDOUT else Path(target)))


def _open(path: Path | None) -> int:
    if path is None:
        return os.dup(1)
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _MODE)
    except OSError as error:
        raise ConfigError(f"--access-log: cannot write {path}: {error.strerror or error}") from None


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "..."


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
