"""One end of the bus: frames over a local socket, with a bound on what waits to be sent.

All that one turn of the loop has to say goes out as one frame. A peer that does not read makes `writable` wait, and is
given up when even so too much is left to say; one that has not been heard of for long is given up, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, cast

import msgspec

from picker.workers.frames import Frames, Word, encode, frame

log = logging.getLogger("picker.workers")

# Bytes that wait to be sent: from the first on nobody may ask, at the second the peer is given up.
ROOM = 1024 * 1024
LIMIT = 64 * 1024 * 1024
_LARGEST_FRAME = 1024 * 1024 * 1024
# Seconds: a sign of life is given every so often, and a peer that has given none for so long is taken as lost.
BEAT = 1.0
SILENCE = 10.0


class Link(asyncio.Protocol):
    """decode: the payload of a frame to its messages. take: told them. lost: told once that the connection is over.

    patient: stop reading while the peer does not; of two ends, one may.
    """

    def __init__(
        self,
        decode: Callable[[bytes], list[Any]],
        take: Callable[[list[Any]], None],
        lost: Callable[[], None],
        *,
        patient: bool = False,
        room: int = ROOM,
        limit: int = LIMIT,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._decode = decode
        self._take = take
        self._lost = lost
        self._patient = patient
        self._room = room
        self._limit = limit
        self._frames = Frames(_LARGEST_FRAME)
        self._out: list[bytes] = []
        self._waiting = 0
        self._transport: asyncio.Transport | None = None
        self._paused: asyncio.Future[None] | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.heard_at = self._loop.time()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but ancestry
        self._transport.set_write_buffer_limits(high=self._room)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        try:
            batches = [self._decode(payload) for payload in self._frames.feed(data)]
        except (ValueError, msgspec.MsgspecError) as error:
            log.error("the bus carries what is no message: %s", error)
            self.abort()
            return
        for batch in batches:
            self._take(batch)

    def pause_writing(self) -> None:
        self._paused = self._loop.create_future()
        if self._patient and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._resume()
        if self._patient and self._transport is not None:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._out.clear()
        self._resume()
        if not self.closed.done():
            self.closed.set_result(None)
            self._lost()

    # our side

    @property
    def alive(self) -> bool:
        return self._transport is not None

    def send(self, message: Word) -> None:
        """Say something at the end of this turn of the loop; to a peer that is lost, nothing."""
        if self._transport is None:
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        data = encode(message)
        self._out.append(data)
        self._waiting += len(data)
        if self._waiting + self._transport.get_write_buffer_size() > self._limit:
            log.error("the other end of the bus does not read: it is given up")
            self.abort()

    async def writable(self) -> None:
        """Wait while the peer does not keep up."""
        if self._paused is not None:
            await asyncio.shield(self._paused)  # several wait for the same

    def look(self) -> None:
        """To be called now and then: gives a peer up that is silent."""
        if self._transport is not None and self._loop.time() > self.heard_at + SILENCE:
            log.error("the other end of the bus has been silent for %g s: it is given up", SILENCE)
            self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """End the connection when all is said."""
        if self._transport is not None:
            self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        if self._out and self._transport is not None:
            self._transport.write(frame(self._out))
        self._out.clear()
        self._waiting = 0

    def _resume(self) -> None:
        if self._paused is not None:
            self._paused.set_result(None)
            self._paused = None
