"""What is known of the engines' caches on disk, for a warm restart: written now and then and at the end, read once.

Owns the file, its key and the moment at which index and streams agree. A file holds numbers, keyed hashes, and names of
endpoints: no text, no token ids, no salts. One that is damaged, foreign or too large is named in the log and ignored.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Protocol

import msgspec

from picker.errors import ConfigError
from picker.prefix.exact import Exact, Stream
from picker.prefix.precise import PreciseIndex
from picker.prefix.precise_snapshot import Saved, copied, load, sealed, unsealed
from picker.sources.kv_stream import Mark
from picker.types import EndpointAdded, EndpointRemoved, Fact

log = logging.getLogger(__name__)

KEY_BYTES = 32
SETTLE = 5.0  # seconds until what was read is worked off
ARRIVAL = 2.0  # seconds that saved endpoints have to be discovered
LAST = 10.0  # seconds for the snapshot of the end
_TRIES = 3
_SPARE = 1 << 20  # bytes beside the index: names, marks


class Rows(Protocol):
    """The scheduler's rows, by endpoint name (`core.pool`)."""

    def row(self, name: str) -> int | None: ...


class Streams(Protocol):
    """The streams that facts come from (`kv_events.KvEventSource`)."""

    def quiet(self) -> AbstractAsyncContextManager[None]: ...

    def marks(self) -> Mapping[str, Mark]: ...

    def resume(self, marks: Mapping[str, Mark], resumed: Callable[[str], None]) -> None: ...


class _Kept(msgspec.Struct, array_like=True):
    """One endpoint: where its stream had got to, and how it stood."""

    mark: Mark
    stream: Stream


class _Note(msgspec.Struct, array_like=True):
    """fingerprint: of all that keys depend on. at: unix seconds."""

    fingerprint: bytes
    at: float
    endpoints: dict[str, _Kept]


class _MovedError(Exception):
    """Endpoints came or went while the index was copied: what was copied is of no use."""


def read_key(path: Path) -> bytes:
    """The key that a snapshot's hashes are made with: beside it, for its owner alone, made when there is none.

    Raises ConfigError where it cannot be read or made.
    """
    place = path.with_name(path.name + ".key")
    try:
        if not place.exists():
            with open(place, "xb", opener=_private) as file:
                file.write(os.urandom(KEY_BYTES))
        key = place.read_bytes()
    except OSError as error:
        raise ConfigError(f"exact.snapshot: cannot use {place}: {error.strerror}") from None
    if len(key) != KEY_BYTES:
        raise ConfigError(f"exact.snapshot: {place} is no key of {KEY_BYTES} bytes; remove it to begin anew")
    return key


def write(path: Path, parts: Sequence[bytes]) -> int:
    """Put a file in its place at once, whole and for its owner alone; returns its bytes. Raises OSError."""
    made = path.with_name(path.name + ".new")
    with suppress(FileNotFoundError):
        made.unlink()
    with open(made, "xb", opener=_private) as file:
        size = sum([file.write(part) for part in parts])
        file.flush()
        os.fsync(file.fileno())
    made.replace(path)
    return size


class Snapshots:
    """Saves what `exact` and the streams behind `events` know, and takes it up again.

    fingerprint: of all that the index's keys depend on beside the secret: another one makes a snapshot foreign. idle:
    whether everything that `events` emitted has reached `exact`. rows: of endpoints. fresh: makes an index that knows
    nothing. interval: seconds between snapshots. Show it every fact, and have it `restore` before `events` runs.
    """

    def __init__(
        self,
        path: Path,
        *,
        secret: bytes,
        fingerprint: bytes,
        exact: Exact,
        events: Streams,
        idle: Callable[[], bool],
        rows: Rows,
        fresh: Callable[[], PreciseIndex],
        interval: float,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._secret = secret
        self._fingerprint = fingerprint
        self._exact = exact
        self._events = events
        self._idle = idle
        self._rows = rows
        self._fresh = fresh
        self._interval = interval
        self._wall = wall
        self._clock = clock
        self._moves = 0
        self._came = asyncio.Event()
        self._saving = asyncio.Lock()

    def observe(self, fact: Fact) -> None:
        """Follow the pool."""
        if isinstance(fact, EndpointAdded | EndpointRemoved):
            self._moves += 1
            self._came.set()

    # --- reading ---

    async def restore(self) -> None:
        """Take up what was saved, for the endpoints that are there; whatever is wrong with it is told and ignored."""
        try:
            saved, note = await asyncio.to_thread(self._read)
        except FileNotFoundError:
            log.info("%s: there is no snapshot yet", self._path)
            return
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            reason = getattr(error, "strerror", None) or error
            log.warning("%s: the snapshot is ignored, and all is learned anew: %s", self._path, reason)
            return
        await self._until_there(note.endpoints)
        index, moves = self._fresh(), self._moves
        rows = self._places(note.endpoints)
        await asyncio.to_thread(load, index, saved, rows, self._secret)
        if self._moves != moves:
            log.warning("%s: the snapshot is ignored: endpoints came and went while it was read", self._path)
            return
        self._exact.adopt(index, {row: note.endpoints[name].stream for name, row in rows.items()})
        self._events.resume({name: note.endpoints[name].mark for name in rows}, self._resumed)
        age = self._wall() - note.at
        log.info("%s: read; %d endpoints, %d blocks, %.0f s old", self._path, len(rows), index.blocks, age)

    def _read(self) -> tuple[Saved, _Note]:
        """Raises OSError, and ValueError with the reason in words."""
        limit = self._exact.index.budget_bytes + _SPARE
        with open(self._path, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ValueError("it is larger than exact.budget_bytes")
        saved = unsealed(data, self._secret)
        note = msgspec.msgpack.decode(saved.note, type=_Note)
        if note.fingerprint != self._fingerprint:
            raise ValueError("it was made with another tokenizer, or to match in another way")
        return saved, note

    async def _until_there(self, names: Mapping[str, object]) -> None:
        """Wait a little for endpoints that are discovered after the start."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ARRIVAL):
                while len(self._places(names)) < len(names):
                    self._came.clear()
                    await self._came.wait()

    def _places(self, names: Mapping[str, object]) -> dict[str, int]:
        rows = {name: self._rows.row(name) for name in names}
        return {name: row for name, row in rows.items() if row is not None}

    def _resumed(self, name: str) -> None:
        row = self._rows.row(name)
        if row is not None:
            self._exact.resume(row)

    # --- writing ---

    async def run(self) -> None:
        """Save every so often until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            await self.save()

    async def finish(self) -> None:
        """Save for the last time, if that can be done soon."""
        try:
            async with asyncio.timeout(LAST):
                await self.save()
        except TimeoutError:
            log.warning("%s: no snapshot was saved at the end: it took longer than %.0f s", self._path, LAST)

    async def save(self) -> bool:
        """Save once; whether that succeeded. Failures are told in the log, and the last snapshot stays."""
        async with self._saving:
            try:
                began = self._clock()
                pieces, endpoints = await self._copied()
                size = await asyncio.to_thread(self._write, pieces)
            except (OSError, TimeoutError, _MovedError) as error:
                log.warning("%s: no snapshot was saved: %s", self._path, getattr(error, "strerror", None) or error)
                return False
        took = self._clock() - began
        log.info("%s: saved %d endpoints, %.1f MB, in %.2f s", self._path, endpoints, size / 1e6, took)
        return True

    def _write(self, pieces: Sequence[bytes]) -> int:
        return write(self._path, list(sealed(pieces, self._secret)))

    async def _copied(self) -> tuple[list[bytes], int]:
        """(the pieces, number of endpoints) of a moment at which nothing is under way."""
        for _ in range(_TRIES):
            async with self._events.quiet():
                await self._settled()
                with suppress(_MovedError):
                    return await self._copy()
        raise _MovedError("endpoints come and go all the time")

    async def _settled(self) -> None:
        until = self._clock() + SETTLE
        while not self._idle():
            if self._clock() > until:
                raise TimeoutError("events come faster than they can be worked on")
            await asyncio.sleep(0.005)

    async def _copy(self) -> tuple[list[bytes], int]:
        """Others have their turn after each piece. Raises _MovedError."""
        exact, moves, marks = self._exact, self._moves, self._events.marks()
        rows = self._places(marks)
        kept = {name: _Kept(marks[name], stream) for name, row in rows.items() if (stream := exact.kept(row))}
        note = msgspec.msgpack.encode(_Note(self._fingerprint, self._wall(), kept))
        pieces = []
        for piece in copied(exact.index, {rows[name]: name for name in kept}, note):
            pieces.append(piece)
            await asyncio.sleep(0)
            if self._moves != moves:
                raise _MovedError("endpoints came or went")
        return pieces, len(kept)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
