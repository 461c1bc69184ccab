"""Who serves which connection: one process accepts, and hands each to the worker with the fewest.

Gateways hold few connections and keep them for long. Left to the kernel (SO_REUSEPORT), four connections fall on four
different workers in less than a tenth of all cases; and those that wait to be accepted by a worker that dies are lost
with it. When the shares have become uneven (a worker died, its gateways have gone to the others), the worker with the
most asks one of its gateways to connect anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger("picker.workers")

_COUNT = struct.Struct("<II")  # connections taken so far, and those of them that are open
_MANY = 64  # file descriptors in a message
_TELL_EVERY = 0.5  # seconds
_EVEN_OUT_EVERY = 2.0  # seconds: a gateway that is asked to connect anew has done so by then
_HERE, _PART = b".", b"p"  # with a connection; on its own
_REST = 1.0  # seconds, when there are no file descriptors left


@dataclass(slots=True, eq=False)
class _Way:
    """To one worker. given: connections handed to it so far; taken, open: as it said last, at heard_at."""

    name: str
    socket: socket.socket
    heard_at: float
    given: int = 0
    taken: int = 0
    open: int = 0
    ready: bool = False

    @property
    def load(self) -> int:
        return self.open + self.given - self.taken


class Doorman:
    """Accepts connections of a listening socket for workers. Begins with the first worker that is ready."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._listener.setblocking(False)
        self._ways: set[_Way] = set()
        self._open = False
        self._changed = asyncio.Event()
        self._evened_at = -_EVEN_OUT_EVERY

    def way(self, name: str) -> socket.socket:
        """For a new worker: its end, which it must be given and which is closed here then."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        way = _Way(name, ours, loop.time())
        self._ways.add(way)
        loop.add_reader(ours, self._hear, way)
        return theirs

    def silent(self, seconds: float) -> list[str]:
        """Workers that were ready and have said nothing for so long: nothing of them moves."""
        now = asyncio.get_running_loop().time()
        return [way.name for way in self._ways if way.ready and now > way.heard_at + seconds]

    async def ready(self, count: int) -> None:
        """Wait until so many workers are."""
        while sum(way.ready for way in self._ways) < count:
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        self._shut()
        self._listener.close()
        for way in list(self._ways):
            self._lose(way)

    def _hear(self, way: _Way) -> None:
        try:
            data = way.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose(way)
            return
        if len(data) % _COUNT.size == 0:  # what is cut is said again soon
            way.taken, way.open = _COUNT.unpack(data[-_COUNT.size :])
        way.ready, way.heard_at = True, asyncio.get_running_loop().time()
        self._changed.set()
        if not self._open:
            self._open = True
            asyncio.get_running_loop().add_reader(self._listener, self._accept)
        self._even_out()

    def _even_out(self) -> None:
        """Have the worker with the most part from one, if another could take it and then have fewer."""
        ways, now = [way for way in self._ways if way.ready], asyncio.get_running_loop().time()
        if now < self._evened_at + _EVEN_OUT_EVERY or any(way.given != way.taken for way in ways):
            return
        most, least = (extreme(ways, key=lambda way: way.load) for extreme in (max, min))
        if most.load >= least.load + 2:
            self._evened_at = now
            with contextlib.suppress(OSError):
                most.socket.send(_PART)

    def _lose(self, way: _Way) -> None:
        self._ways.discard(way)
        asyncio.get_running_loop().remove_reader(way.socket)
        way.socket.close()
        if not any(each.ready for each in self._ways):
            self._shut()

    def _shut(self) -> None:
        """Connections wait with the kernel until there is somebody to serve them."""
        if self._open:
            self._open = False
            asyncio.get_running_loop().remove_reader(self._listener)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.error("connections cannot be accepted: %s", error.strerror)
            self._shut()
            asyncio.get_running_loop().call_later(_REST, self._reopen)
            return
        with connection:
            self._hand_on(connection)

    def _reopen(self) -> None:
        if not self._open and self._listener.fileno() >= 0 and any(way.ready for way in self._ways):
            self._open = True
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _hand_on(self, connection: socket.socket) -> None:
        """To whoever has the fewest and takes it; a connection that nobody takes is closed."""
        for way in sorted((way for way in self._ways if way.ready), key=lambda way: way.load):
            try:
                socket.send_fds(way.socket, [_HERE], [connection.fileno()])
            except OSError:  # it has just gone, or is held up
                continue
            way.given += 1
            return
        log.warning("no worker could take a connection")


class Door:
    """A worker's end: gives what comes through to `take`, and tells how many connections there are.

    count: of the connections served now. part: asks one of them to go. gone: set when the other end is closed.
    """

    def __init__(
        self,
        way: socket.socket,
        take: Callable[[socket.socket], None],
        count: Callable[[], int],
        part: Callable[[], None],
    ) -> None:
        self.gone = asyncio.Event()
        self._way = way
        self._way.setblocking(False)
        self._take = take
        self._count = count
        self._part = part
        self._taken = 0

    async def serve(self) -> None:
        """Take connections until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._way, self._arrived)
        try:
            while not self.gone.is_set():
                self._tell()
                await asyncio.sleep(_TELL_EVERY)
        finally:
            loop.remove_reader(self._way)
            self._way.close()

    def _tell(self) -> None:
        with contextlib.suppress(OSError):
            self._way.send(_COUNT.pack(self._taken, self._count()))

    def _arrived(self) -> None:
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._way, 4096, _MANY)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data, descriptors = b"", []
            for descriptor in descriptors:
                self._taken += 1
                self._take(socket.socket(fileno=descriptor))
            if _PART in data:
                self._part()
            if not data:
                asyncio.get_running_loop().remove_reader(self._way)
                self.gone.set()
                return
