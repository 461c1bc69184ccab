"""The bus without a server of its own: every replica listens, and calls every other.

Who calls is told; so between two replicas there are two connections. Others are found by name: all addresses of a name
count, so one headless Service is enough, and one's own address among them is recognised and left alone.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence

from picker.replicas import words
from picker.replicas.circle import BEAT, LEASE, Circle
from picker.replicas.line import ID, Line, answer, call

log = logging.getLogger("picker.replicas")

Address = tuple[str, int]
Resolve = Callable[[str, int], Awaitable[list[Address]]]

_MEETING = 5.0  # seconds
_LEAST, _MOST = 0.1, 2.0  # seconds between two calls
_STRANGERS = 32  # that have not shown yet that they know the secret
_FIRST = 4096  # bytes of what they may say
_ENDS = (OSError, EOFError, ValueError, TimeoutError)


class Direct:
    """peers: (name, port) to look for, `every` so many seconds. resolve: a name to its addresses."""

    def __init__(
        self,
        circle: Circle,
        listener: socket.socket,
        peers: Sequence[Address],
        secret: bytes,
        *,
        rng: random.Random,
        resolve: Resolve | None = None,
        every: float = 2.0,
    ) -> None:
        self._circle = circle
        self._listener = listener
        self._peers = peers
        self._secret = secret
        self._rng = rng
        self._resolve = resolve or _resolved
        self._every = every
        self.id = secrets.token_bytes(ID)
        self._lines: set[Line] = set()  # of those who are told
        self._speakers: dict[str, Line] = {}  # of those who tell, by id
        self._strangers = 0
        self._own: set[Address] = set()
        self._troubles: dict[Address, str] = {}
        self._callers: dict[Address, asyncio.Task[None]] = {}
        circle.tell = self._tell
        circle.tell_one = self._tell_one
        circle.lateness.own = self.id.hex()

    async def run(self) -> None:
        """Listen and call until cancelled."""
        server = await asyncio.start_server(self._called, sock=self._listener)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._beat())
                while not self._circle.ready:  # noqa: ASYNC110 - of what nobody here can be told
                    await asyncio.sleep(0.02)
                while True:
                    await self._look(group)
                    await asyncio.sleep(self._every)
        finally:
            server.close()
            for line in [*self._lines, *self._speakers.values()]:
                line.abort()

    def _tell(self, encoded: bytes) -> None:
        for line in self._lines:
            line.pass_on(encoded)

    def _tell_one(self, replica: str, encoded: bytes) -> None:
        for line in self._lines:
            if line.replica == replica:
                line.pass_on(encoded)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            alive = words.encode(self._circle.alive())
            self._tell(alive)
            for line in self._speakers.values():
                line.pass_on(alive)
            self._note()
            self._circle.sweep()

    def _note(self) -> None:
        others = [address for address in self._callers if address not in self._own]
        troubles = [f"{each[0]}:{each[1]}: {self._troubles[each]}" for each in others if each in self._troubles]
        said = f"{len(troubles)} of {len(others)} replicas cannot be heard: {troubles[0]}" if troubles else None
        self._circle.note(said)

    # --- being called ---

    async def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line: Line | None = None
        try:
            line = await self._met(reader, writer)
            if line is not None:
                await self._serve(line)
        except _ENDS as error:
            if isinstance(error, ValueError):
                self._circle.refused += 1
                log.warning("a replica's call is refused: %s", error)
        finally:
            if line is not None:
                self._lines.discard(line)
            writer.transport.abort()

    async def _met(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Line | None:
        """Who calls has shown that it knows the secret and can be understood; None: it is ourselves."""
        if self._strangers >= _STRANGERS:
            raise ValueError("too many at once")
        self._strangers += 1
        try:
            async with asyncio.timeout(_MEETING):
                line = await answer(reader, writer, self.id, self._secret)
                if line.replica == self.id.hex():
                    return None
                greeting, *_ = await line.hear(largest=_FIRST)
        finally:
            self._strangers -= 1
        if not isinstance(greeting, words.Greeting):
            raise ValueError("a replica does not say who it is")
        return line

    async def _serve(self, line: Line) -> None:
        # No await from here to the set: what is decided between would be told to nobody.
        line.say(self._circle.greeting())
        line.say(self._circle.standing())
        self._lines.add(line)
        while True:
            async with asyncio.timeout(2 * LEASE):
                said = await line.hear()
            for wanted in [word for word in said if isinstance(word, words.Wanted)][:1]:
                await line.tell(self._circle.knowledge(wanted))
                line.say(words.Handed())

    # --- calling ---

    async def _look(self, group: asyncio.TaskGroup) -> None:
        """Call whoever is new under the names, and no more who has left them."""
        found: set[Address] = set()
        for name, port in self._peers:
            try:
                found.update(await self._resolve(name, port))
            except OSError as error:
                log.debug("%s cannot be resolved: %s", name, error)
                found.update(self._callers)  # who was there stays
        for address in self._callers.keys() - found:
            self._callers.pop(address).cancel()
            self._troubles.pop(address, None)
        for address in found - self._callers.keys():
            self._callers[address] = group.create_task(self._follow(address))

    async def _follow(self, address: Address) -> None:
        """Call until it is there, and again when it is lost."""
        pause = _LEAST
        while address not in self._own:
            try:
                async with asyncio.timeout(_MEETING):
                    reader, writer = await asyncio.open_connection(*address)
                try:
                    await self._listen(reader, writer, address)
                    pause = _MOST  # it is one that is heard by another address
                finally:
                    writer.transport.abort()
            except _ENDS as error:
                self._circle.refused += isinstance(error, ValueError)
                pause = _LEAST if self._troubles.get(address) is None else min(2 * pause, _MOST)
                self._troubles[address] = str(error) or type(error).__name__
            await asyncio.sleep(pause * (0.5 + self._rng.random()))

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: Address) -> None:
        async with asyncio.timeout(_MEETING):
            line = await call(reader, writer, self.id, self._secret)
            if line.replica == self.id.hex():
                self._own.add(address)
            if line.replica == self.id.hex() or line.replica in self._speakers:
                return
            line.say(self._circle.greeting())
            try:
                first, *rest = await line.hear()
            except EOFError:
                raise ConnectionError("it hangs up: its secret may be another") from None
        if not isinstance(first, words.Greeting):
            raise ValueError("a replica does not say who it is")
        self._circle.greeted(line.replica, first)
        self._troubles.pop(address, None)
        self._speakers[line.replica] = line
        try:
            self._circle.hear(line.replica, rest)
            await self._attend(line)
        finally:
            del self._speakers[line.replica]
            self._circle.lost(line.replica)

    async def _attend(self, line: Line) -> None:
        while True:
            if self._circle.wants(line.replica):
                line.say(words.Wanted(lessons=True))
            async with asyncio.timeout(LEASE):
                said = await line.hear()
            self._circle.hear(line.replica, said)
            await asyncio.sleep(0)  # others are served between two frames of many


async def _resolved(name: str, port: int) -> list[Address]:
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((str(info[4][0]), port) for info in found))
