"""A trace of live traffic that gives nobody's text away: times, lengths and keyed block hashes, in Mooncake's format.

A watcher of the telemetry: it is told decisions and ends, and costs nothing where nobody asks for it. A line is written
when its request has ended. Hashes are those that decisions are made by, under a secret of the process that is never
written, so equal prefixes show and nothing can be tried out against them. Decides nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from picker.errors import ConfigError
from picker.types import Fact, Failed, Finished, Outcome, Request, Usage

log = logging.getLogger("picker.record")

# Mooncake's block, and what a token is taken for where only bytes are hashed: blocks must end at the same bytes in
# every request, so lengths are bytes, whatever a model's tokens are.
BLOCK_TOKENS = 512
BYTES_PER_TOKEN = 4
_BLOCK_BYTES = BLOCK_TOKENS * BYTES_PER_TOKEN
_FLUSH_SECONDS = 1.0
# Lines that wait for a disk that takes none; what comes then is lost.
_MOST_WAITING = 8 * 1024 * 1024
_MODE = 0o600
# JSON readers that hold numbers as doubles keep 53 bits.
_ID_SHIFT = 11


class Line(msgspec.Struct, gc=False, omit_defaults=True):
    """A line. timestamp: milliseconds since recording began. input_length: prompt bytes / 4; each 512 have an id.

    prompt_tokens, cached_tokens: as the engine counted them, where it did.
    """

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class _Asked:
    at: float
    prompt_bytes: int
    hash_ids: list[int]
    max_tokens: int | None


class Recorder:
    """Writes a line for each request that was routed and ended. Raises ConfigError where it cannot.

    block_bytes: of the runtime's block hashes. clock: that of the runtime.
    """

    def __init__(self, path: Path, *, block_bytes: int, clock: Callable[[], float]) -> None:
        if _BLOCK_BYTES % block_bytes:
            raise ConfigError(f"record: index.block_bytes must divide {_BLOCK_BYTES}, and {block_bytes} does not")
        self.lines = 0
        self.lost = 0
        self._per_id = _BLOCK_BYTES // block_bytes
        self._clock = clock
        self._began = clock()
        self._open: dict[int, _Asked] = {}
        self._waiting: list[bytes] = []
        self._bytes = 0
        self._failing = False
        self._file = _created(path)

    # what the telemetry tells

    def decision(self, outcome: Outcome, seconds: float, request: Request | None) -> None:
        """A request has been routed, or sent elsewhere again."""
        if request is None or not request.prompt_bytes or request.id in self._open or outcome.request_id != request.id:
            return
        ids = hash_ids(request, self._per_id)
        self._open[request.id] = _Asked(request.arrived_at, request.prompt_bytes, ids, request.max_tokens)

    def fact(self, fact: Fact) -> None:
        match fact:
            case Finished(request_id, _, usage):
                self._ended(request_id, usage)
            case Failed(request_id, _):
                self._ended(request_id, None)
            case _:
                pass

    def _ended(self, request_id: int, usage: Usage | None) -> None:
        asked = self._open.pop(request_id, None)
        if asked is None:
            return
        if self._bytes > _MOST_WAITING:
            self.lost += 1
            return
        line = Line(
            timestamp=max(0, round((asked.at - self._began) * 1000)),
            input_length=-(-asked.prompt_bytes // BYTES_PER_TOKEN),
            output_length=max(1, usage.completion_tokens if usage is not None else asked.max_tokens or 1),
            hash_ids=asked.hash_ids,
            prompt_tokens=usage.prompt_tokens if usage is not None else None,
            cached_tokens=usage.cached_tokens if usage is not None else None,
        )
        text = msgspec.json.encode(line) + b"\n"
        self._waiting.append(text)
        self._bytes += len(text)

    # writing

    async def run(self) -> None:
        """Write once a second, off the loop's thread, and the rest when cancelled."""
        try:
            while True:
                await asyncio.sleep(_FLUSH_SECONDS)
                if self._waiting:
                    await asyncio.to_thread(self._write, self._taken())
        finally:
            self.close()

    def _taken(self) -> list[bytes]:
        lines, self._waiting, self._bytes = self._waiting, [], 0
        return lines

    def _write(self, lines: list[bytes]) -> None:
        try:
            rest = memoryview(b"".join(lines))
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            self.lost += len(lines)
            if not self._failing:
                log.error("the recording takes no lines: %s", error)
            self._failing = True
        else:
            self.lines += len(lines)
            self._failing = False

    def close(self) -> None:
        """Write what is left and close the file; harmless a second time."""
        if self._file < 0:
            return
        self._write(self._taken())
        os.close(self._file)
        self._file = -1
        log.info("recorded %d requests%s", self.lines, f", {self.lost} were lost" if self.lost else "")


def hash_ids(request: Request, per_id: int) -> list[int]:
    """An id for each 512 tokens of the prompt, the last one also for fewer. per_id: hashed blocks of an id.

    A block's hash covers all before it, so one stands for the whole prefix that ends there.
    """
    hashes = request.block_hashes
    ids = [int(each) >> _ID_SHIFT for each in hashes[per_id - 1 :: per_id].tolist()]
    if request.prompt_bytes % _BLOCK_BYTES or len(ids) < -(-request.prompt_bytes // _BLOCK_BYTES):
        last = int(hashes[-1]) if len(hashes) else request.id
        ids.append(_derived(last, request.prompt_bytes))
    return ids


def _derived(last: int, prompt_bytes: int) -> int:
    """An id for what no full block covers: of all that is known of it."""
    name = last.to_bytes(8, "little") + prompt_bytes.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> _ID_SHIFT


def _created(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    except FileExistsError:
        raise ConfigError(f"record: {path} exists; give a new name, nothing is overwritten") from None
    except OSError as error:
        raise ConfigError(f"record: cannot write {path}: {error.strerror or error}") from None
