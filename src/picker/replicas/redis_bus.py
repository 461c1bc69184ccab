"""The bus on a Redis or Valkey that is there anyway: publish and subscribe, nothing is stored.

One channel for all and one for each replica, for what only it has asked for. Every message is sealed with the common
secret: who can read Redis learns how much is said, and who can write to it can replay at most a replica that is gone.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from typing import Any

from picker.errors import ConfigError
from picker.replicas import words
from picker.replicas.circle import BEAT, Circle
from picker.replicas.line import ID
from picker.replicas.seal import Seal, derive

log = logging.getLogger("picker.replicas")

_HEAD = ID + 8  # id of the speaker and the number of the message
_PIECE = 256 * 1024  # bytes of words published together, about
_LIMIT = 16 * 1024 * 1024  # bytes that may wait; beyond, what is waiting is dropped and all is said anew
_AT_ONCE = 200  # words of the index published together
_PACE = 0.005  # seconds between two of these
_TIMEOUT = 2.0
_KNOWN = 1000  # replicas remembered, whether they still live or not
_LEAST, _MOST = 0.1, 2.0  # seconds between two attempts


class RedisBus:
    """url: redis://, rediss:// or unix://, with user and password as need be. group: of those who belong together."""

    def __init__(self, circle: Circle, url: str, group: str, secret: bytes, *, rng: random.Random) -> None:
        self._client = _client(url)
        self._circle = circle
        self._channel = f"picker:{group}"
        self._secret = secret
        self._rng = rng
        self.id = secrets.token_bytes(ID)
        self._seal = self._seal_of(self.id)
        self._others: dict[str, Seal] = {}
        self._asked: asyncio.Queue[tuple[str, words.Wanted]] = asyncio.Queue()  # who wants to know what we know
        self._waiting: dict[str, list[bytes]] = {}  # by channel
        self._bytes = 0
        self._something = asyncio.Event()
        self._connected = False
        self._turn = asyncio.Lock()  # messages are published in the order of their numbers
        circle.tell = self._tell
        circle.tell_one = self._tell_one
        circle.lateness.own = self.id.hex()

    async def run(self) -> None:
        """Publish and listen until cancelled; what cannot reach Redis is dropped."""
        while not self._circle.ready:  # noqa: ASYNC110 - of what nobody here can be told
            await asyncio.sleep(0.02)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._beat())
                group.create_task(self._serve())
        finally:
            await self._client.aclose()

    def _tell(self, encoded: bytes) -> None:
        self._say(self._channel, encoded)

    def _tell_one(self, replica: str, encoded: bytes) -> None:
        self._say(self._own_channel(replica), encoded)

    def _say(self, channel: str, encoded: bytes) -> None:
        if not self._connected:
            return
        self._waiting.setdefault(channel, []).append(encoded)
        self._bytes += len(encoded)
        self._something.set()
        if self._bytes > _LIMIT:
            self._drop()
            self._introduce()

    def _drop(self) -> None:
        self._waiting.clear()
        self._bytes = 0

    def _introduce(self) -> None:
        """Say who we are and what stands; everyone who hears it answers with the same."""
        for encoded in self._introduction():
            self._tell(encoded)

    def _introduction(self) -> list[bytes]:
        return [words.encode(self._circle.greeting()), words.encode(self._circle.standing())]

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            self._tell(words.encode(self._circle.alive()))
            self._circle.sweep()

    async def _serve(self) -> None:
        """Come back to a Redis that went away, and say anew what stands."""
        import redis.exceptions

        pause = _LEAST
        while True:
            try:
                await self._talk()
            except* (redis.exceptions.RedisError, OSError, TimeoutError) as group:
                error = group.exceptions[0]
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                pause = _LEAST if self._connected else min(2 * pause, _MOST)
                self._circle.note(f"Redis cannot be used: {error}")
            self._connected = False
            self._drop()
            _end_if_cancelled()
            await asyncio.sleep(pause * (0.5 + self._rng.random()))

    async def _talk(self) -> None:
        async with self._client.pubsub() as pubsub:
            async with asyncio.timeout(_TIMEOUT):
                await pubsub.subscribe(self._channel, self._own_channel(self.id.hex()))
            self._connected = True
            self._circle.note(None)
            self._introduce()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._publish())
                group.create_task(self._hand_over())
                await self._listen(pubsub)

    # --- speaking ---

    async def _publish(self) -> None:
        while True:
            await self._something.wait()
            self._something.clear()
            while self._waiting:
                await self._send(*self._piece())

    def _piece(self) -> tuple[str, list[bytes]]:
        """What one channel gets next, and which; each in its turn."""
        channel = next(iter(self._waiting))
        waiting, size, count = self._waiting.pop(channel), 0, 0
        while count < len(waiting) and size < _PIECE:
            size += len(waiting[count])
            count += 1
        if count < len(waiting):
            self._waiting[channel] = waiting[count:]
        self._bytes -= size
        return channel, waiting[:count]

    async def _send(self, channel: str, encoded: list[bytes]) -> None:
        async with self._turn, asyncio.timeout(_TIMEOUT):
            number = self._seal.count.to_bytes(8, "big")
            await self._client.publish(channel, self.id + number + self._seal.close(words.batch(encoded)))
        _end_if_cancelled()

    async def _hand_over(self) -> None:
        """Tell who has asked, a little at a time: Redis drops who does not read fast enough."""
        while True:
            (replica, wanted), piece = await self._asked.get(), list[bytes]()
            for word in self._circle.knowledge(wanted):
                piece.append(words.encode(word))
                if len(piece) >= _AT_ONCE:
                    await self._send(self._own_channel(replica), piece)
                    piece = []
                    await asyncio.sleep(_PACE)
            await self._send(self._own_channel(replica), [*piece, words.encode(words.Handed())])

    async def _ask(self, replica: str) -> None:
        await self._send(self._own_channel(replica), [words.encode(words.Wanted(lessons=True))])

    # --- listening ---

    async def _listen(self, pubsub: Any) -> None:
        while True:
            message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=_TIMEOUT)
            _end_if_cancelled()
            if message is None:
                continue
            try:
                await self._heard(bytes(message["data"]), to_all=message["channel"] == self._channel.encode())
            except ValueError as error:
                self._circle.refused += 1
                log.warning("a message on %s is refused: %s", self._channel, error)

    async def _heard(self, message: bytes, *, to_all: bool) -> None:
        speaker, number = message[:ID], int.from_bytes(message[ID:_HEAD], "big")
        if speaker == self.id:
            return
        replica = speaker.hex()
        seal = self._others.get(replica) or self._seal_of(speaker)
        seal.skip_to(number)
        said = words.unbatch(seal.open(message[_HEAD:]))
        if replica not in self._others:
            self._others[replica] = seal
            self._others = dict(list(self._others.items())[-_KNOWN:])
        for word in said:
            if isinstance(word, words.Greeting):
                self._circle.greeted(replica, word)
                if to_all:
                    await self._send(self._own_channel(replica), self._introduction())
        self._circle.hear(replica, said)
        for wanted in [word for word in said if isinstance(word, words.Wanted)][:1]:
            self._asked.put_nowait((replica, wanted))
        if self._circle.wants(replica):
            await self._ask(replica)

    def _seal_of(self, replica: bytes) -> Seal:
        return Seal(derive(self._secret, "redis", replica))

    def _own_channel(self, replica: str) -> str:
        return f"{self._channel}:{replica}"


def _end_if_cancelled() -> None:
    """The library keeps being cancelled to itself now and then, and so does a group of tasks that fails meanwhile."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _client(url: str) -> Any:
    try:
        import redis.asyncio
    except ImportError:
        raise ConfigError("replicas.redis: the library is missing: pip install redis") from None
    try:
        return redis.asyncio.from_url(url, socket_connect_timeout=_TIMEOUT)
    except ValueError as error:
        raise ConfigError(f"replicas.redis: {error}") from None
