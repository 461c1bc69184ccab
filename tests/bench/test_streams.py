"""The benchmark of many streams: what it calls broken, different and late; and a small one of it through picker."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from bench.streams import Listener, Run, Stream, chunks_of, delays_of, figures, measure, starved

from bench import streams


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return False


async def heard(*, said: int = 3, lost: int | None = None, swapped: bool = False) -> tuple[Stream, Listener]:
    """A stream and who listened to it. lost: this write never arrived; swapped: two chunks came in the wrong order."""
    stream, transport = Stream(1), FakeTransport()
    stream.arrive(transport)
    for _ in range(said):
        stream.say_more()
    stream.finish()
    writes = list(transport.written)
    if lost is not None:
        del writes[lost]
    if swapped:
        writes[2], writes[3] = writes[3], writes[2]
    listener = Listener(1, asyncio.Queue())
    for write in writes:
        listener.data_received(write)
    return stream, listener


async def judged(pair: tuple[Stream, Listener]) -> tuple[int, int, int]:
    stream, listener = pair
    found = figures([stream], [listener], Run(rss=[1.0], chunks=1, seconds=1.0))
    return found["broken"], found["different"], found["starved"]


async def test_a_stream_that_arrives_as_it_was_sent_is_whole() -> None:
    assert await judged(await heard()) == (0, 0, 0)


async def test_a_lost_chunk_a_lost_end_and_a_wrong_order_are_told_apart() -> None:
    assert await judged(await heard(lost=3)) == (0, 1, 1)
    assert await judged(await heard(lost=-1)) == (1, 0, 0)
    assert await judged(await heard(swapped=True)) == (0, 1, 0)


async def test_a_stream_is_starved_when_a_chunk_takes_too_long() -> None:
    stream, listener = await heard()
    assert len(delays_of(stream, listener)) == len(stream.sent_at)
    assert not starved(stream, np.full(len(stream.sent_at), 0.9))
    assert starved(stream, np.array([0.0, 1.1, 0.0, 0.0, 0.0]))
    assert starved(stream, np.array([0.0]))


def test_every_shape_of_a_stream_is_the_same_every_time() -> None:
    for number in range(5):
        digests = set()
        for _ in range(2):
            stream = Stream(number)
            stream.arrive(FakeTransport())
            stream.say_more()
            stream.finish()
            digests.add(stream.digest.digest())
        assert len(digests) == 1


def test_only_whole_chunks_are_taken_out_of_a_buffer() -> None:
    buffer = bytearray(b"2\r\nab\r\n3\r\ncd")
    assert list(chunks_of(buffer)) == [b"ab"]
    assert buffer == b"3\r\ncd"


@pytest.mark.e2e
async def test_picker_carries_streams_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # This machine may be slow.
    monkeypatch.setattr(streams, "_LONGEST_WAIT", 30.0)
    found = await measure("picker", streams=10, seconds=1.0, gap=0.02)
    assert (found["broken"], found["different"], found["starved"]) == (0, 0, 0)
    assert found["chunks"] >= 100
    assert found["rss_mb"] > 1
