import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from picker.workers import frames, link
from picker.workers.link import Link


class End:
    """A link, and what came of it."""

    def __init__(self, **options: Any) -> None:
        self.heard: list[Any] = []
        self.batches = 0
        self.lost = 0
        self.news = asyncio.Event()
        self.link = Link(frames.from_worker, self._take, self._lose, **options)

    def _take(self, messages: list[Any]) -> None:
        self.heard += messages
        self.batches += 1
        self.news.set()

    def _lose(self) -> None:
        self.lost += 1
        self.news.set()

    async def until(self, count: int) -> None:
        while len(self.heard) < count:
            self.news.clear()
            await self.news.wait()


@asynccontextmanager
async def joined(one: End, two: End) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    pair = socket.socketpair()
    for end, sock in zip((one, two), pair, strict=True):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await loop.create_unix_connection(lambda end=end: end.link, sock=sock)  # type: ignore[misc]
    try:
        yield
    finally:
        for end in (one, two):
            end.link.abort()
            await end.link.closed


BIG = frames.Trouble("x" * 30_000)


async def test_what_one_turn_says_goes_as_one_frame_and_in_order() -> None:
    one, two = End(), End()
    async with joined(one, two):
        for number in range(3):
            one.link.send(frames.Token(number))
        await two.until(3)
        assert two.heard == [frames.Token(0), frames.Token(1), frames.Token(2)]
        assert two.batches == 1
        one.link.send(frames.Token(3))
        await two.until(4)
        assert two.batches == 2


async def test_whoever_asks_waits_while_the_peer_does_not_read() -> None:
    one, two = End(room=10_000), End()
    async with joined(one, two):
        await one.link.writable()
        two.link._transport.pause_reading()  # type: ignore[union-attr]
        for _ in range(10):
            one.link.send(BIG)
        await asyncio.sleep(0)
        waiting = asyncio.gather(one.link.writable(), one.link.writable())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        two.link._transport.resume_reading()  # type: ignore[union-attr]
        await waiting
        await two.until(10)


async def test_a_patient_end_reads_no_more_than_its_peer_does() -> None:
    """Answers are bounded by not taking questions."""
    one, two = End(room=10_000, patient=True), End()
    async with joined(one, two):
        two.link._transport.pause_reading()  # type: ignore[union-attr]
        for _ in range(10):
            one.link.send(BIG)
        await asyncio.sleep(0)
        two.link.send(frames.Token(1))
        for _ in range(5):
            await asyncio.sleep(0)
        assert one.heard == []
        two.link._transport.resume_reading()  # type: ignore[union-attr]
        await one.until(1)


async def test_a_peer_that_never_reads_is_given_up_before_memory_runs_out() -> None:
    one, two = End(room=10_000, limit=200_000), End()
    async with joined(one, two):
        two.link._transport.pause_reading()  # type: ignore[union-attr]
        for _ in range(20):
            one.link.send(BIG)
        await one.link.closed
        assert one.lost == 1
        await one.link.writable()  # nobody waits for what is gone
        one.link.send(BIG)


async def test_a_silent_peer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = End(), End()
    async with joined(one, two):
        one.link.look()
        assert one.link.alive
        monkeypatch.setattr(link, "SILENCE", -1.0)
        one.link.look()
        await one.link.closed
        await two.link.closed
        assert (one.lost, two.lost) == (1, 1)


async def test_what_is_no_message_ends_the_connection_and_nothing_else() -> None:
    one, two = End(), End()
    async with joined(one, two):
        one.link._transport.write(frames.frame([b"\xc1"]))  # type: ignore[union-attr]
        await two.link.closed
        assert two.lost == 1


async def test_closing_says_what_is_left_to_say() -> None:
    one, two = End(), End()
    async with joined(one, two):
        one.link.send(frames.Token(1))
        one.link.close()
        await two.until(1)
        await two.link.closed
