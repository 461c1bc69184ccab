"""One connection to an endpoint, byte by byte: a transport that remembers, and responses cut wherever they can be."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.frontends.upstream_connection import Reply, UpstreamConnection
from picker.types import FailureReason

SIZED = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nX: 1\r\n\r\nhello"


class Wire:
    """A transport and an owner of one connection."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.aborted = self.paused = False
        self.unsent = 0
        self.rests = self.losses = 0
        self.connection = UpstreamConnection(asyncio.get_running_loop(), self, ("http", "h:1"))
        self.connection.connection_made(cast(asyncio.Transport, self))

    # the transport

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    # the owner

    def made(self, connection: UpstreamConnection) -> None:
        pass

    def rested(self, connection: UpstreamConnection) -> None:
        self.rests += 1

    def lost(self, connection: UpstreamConnection) -> None:
        self.losses += 1

    # the endpoint

    def end(self, error: Exception | None = None) -> None:
        if error is None:
            self.connection.eof_received()
        self.connection.connection_lost(error)

    async def answer(self, *pieces: bytes, head_only: bool = False) -> Reply | None:
        """Ask, and let the response come in these pieces."""
        asked = asyncio.get_running_loop().create_future()

        async def ask() -> None:
            asked.set_result(await self.connection.ask(b"GET / HTTP/1.1\r\n\r\n", b"", head_only=head_only))

        async with asyncio.TaskGroup() as group:
            group.create_task(ask())
            await asyncio.sleep(0)
            for piece in pieces:
                self.connection.data_received(piece)
            if b"\r\n\r\n" not in b"".join(pieces):
                self.end()
        return cast(Reply | None, asked.result())


class Bucket:
    """Takes what is poured into it. wants_more: what it says to that."""

    def __init__(self, *, wants_more: bool = True) -> None:
        self.got: list[tuple[bytes, bool]] = []
        self.wants_more = wants_more

    def __call__(self, data: bytes, last: bool) -> bool:
        self.got.append((data, last))
        return self.wants_more

    @property
    def data(self) -> bytes:
        return b"".join(data for data, _ in self.got)


async def body_of(reply: Reply | None) -> bytes:
    """The body of a response that is there to its end."""
    assert reply is not None
    bucket = Bucket()
    assert await reply.pour(bucket) is None
    assert [last for _, last in bucket.got] == [False] * (len(bucket.got) - 1) + [True]
    return bucket.data


# --- framing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response", [SIZED, CHUNKED], ids=["sized", "chunked"])
async def test_a_whole_response_ends_and_the_connection_rests(response: bytes) -> None:
    wire = Wire()
    reply = await wire.answer(response)
    assert reply is not None
    assert (reply.status, reply.complete, wire.rests, wire.aborted) == (200, True, 1, False)
    assert await body_of(reply) == b"hello"
    assert reply.ended


@settings(max_examples=60)
@given(st.sampled_from([SIZED, CHUNKED]), st.lists(st.integers(1, 70), max_size=6))
def test_where_a_response_is_cut_changes_nothing(response: bytes, cuts: list[int]) -> None:
    async def run() -> None:
        wire = Wire()
        places = sorted({0, len(response), *(cut for cut in cuts if cut < len(response))})
        pieces = [response[a:b] for a, b in itertools.pairwise(places)]
        assert await body_of(await wire.answer(*pieces)) == b"hello"
        assert (wire.rests, wire.aborted) == (1, False)

    asyncio.run(run())


async def test_every_byte_by_itself_is_the_same_response() -> None:
    for response in (SIZED, CHUNKED):
        wire = Wire()
        assert await body_of(await wire.answer(*[bytes([byte]) for byte in response])) == b"hello"
        assert wire.rests == 1


async def test_a_body_without_a_length_ends_with_the_connection() -> None:
    wire = Wire()
    reply = await wire.answer(UNTIL_CLOSE)
    assert reply is not None
    assert not reply.complete
    wire.end()
    assert await body_of(reply) == b"hello"
    assert (wire.rests, wire.losses) == (0, 1)


async def test_a_coding_other_than_chunked_ends_with_the_connection() -> None:
    wire = Wire()
    reply = await wire.answer(b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n5\r\nhello")
    wire.end()
    assert await body_of(reply) == b"5\r\nhello"


@pytest.mark.parametrize(
    "partial",
    [
        SIZED[:-1],
        CHUNKED[:-1],
        CHUNKED[:-9],
        CHUNKED.replace(b"Transfer", b"transfer-encoding: gzip\r\ntransfer")[:-5],
    ],
)
async def test_a_connection_that_ends_within_a_framed_body_breaks_it_off(partial: bytes) -> None:
    wire = Wire()
    reply = await wire.answer(partial)
    assert reply is not None
    wire.end()
    bucket = Bucket()
    assert await reply.pour(bucket) is FailureReason.RESET
    assert b"hello".startswith(bucket.data), "what came before is still handed on"
    assert not reply.ended


async def test_a_reset_is_no_end_of_a_body_without_a_length() -> None:
    wire = Wire()
    reply = await wire.answer(UNTIL_CLOSE)
    assert reply is not None
    wire.end(ConnectionResetError())
    assert await reply.pour(lambda data, last: True) is FailureReason.RESET


@pytest.mark.parametrize("status", [204, 304])
async def test_some_statuses_have_no_body_whatever_they_announce(status: int) -> None:
    for framing in (b"", b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n"):
        wire = Wire()
        reply = await wire.answer(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, framing))
        assert await body_of(reply) == b""
        assert wire.rests == 1


async def test_a_response_to_head_has_no_body_and_ends_the_connection() -> None:
    for framing in (b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n", b""):
        wire = Wire()
        reply = await wire.answer(b"HTTP/1.1 200 OK\r\n%b\r\n" % framing, head_only=True)
        assert reply is not None
        assert reply.complete
        assert await body_of(reply) == b""
        assert (wire.rests, wire.aborted) == (0, True), "the parser waits for a body that never comes"


async def test_interim_responses_are_passed_over() -> None:
    wire = Wire()
    hints = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    reply = await wire.answer(hints[:30], hints[30:] + SIZED)
    assert reply is not None
    assert reply.raw_headers == [(b"content-length", b"5")]
    assert await body_of(reply) == b"hello"
    assert wire.rests == 1


async def test_trailers_do_not_reach_the_headers() -> None:
    wire = Wire()
    reply = await wire.answer(CHUNKED[:-2] + b"x-sum: 1\r\n\r\n")
    assert reply is not None
    assert reply.raw_headers == [(b"transfer-encoding", b"chunked")]
    assert await body_of(reply) == b"hello"


# --- what is not HTTP --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nonsense",
    [
        b"hello there\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\x00b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"x" * 70_000,
    ],
)
async def test_a_malformed_head_is_no_response(nonsense: bytes) -> None:
    wire = Wire()
    assert await wire.answer(nonsense) is None
    assert (wire.aborted, wire.rests, wire.connection.open) == (True, 0, False)
    assert not wire.connection.silent


async def test_a_malformed_chunk_breaks_the_body_off() -> None:
    wire = Wire()
    reply = await wire.answer(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\nzz\r\n")
    assert reply is not None
    bucket = Bucket()
    assert await reply.pour(bucket) is FailureReason.RESET
    assert (bucket.data, wire.aborted) == (b"he", True)


@pytest.mark.parametrize("surplus", [SIZED, b"HTTP/1.1 20", b"junk"])
async def test_more_than_was_asked_for_ends_the_connection_but_not_the_response(surplus: bytes) -> None:
    wire = Wire()
    assert await body_of(await wire.answer(SIZED + surplus)) == b"hello"
    assert (wire.rests, wire.aborted) == (0, True)


async def test_bytes_on_an_idle_connection_end_it() -> None:
    wire = Wire()
    await wire.answer(SIZED)
    wire.connection.data_received(SIZED)
    assert (wire.aborted, wire.connection.open) == (True, False)
    assert await wire.connection.ask(b"", b"", head_only=False) is None


# --- endings -----------------------------------------------------------------------------------------------


async def test_an_end_before_the_head_is_silent_only_if_nothing_came() -> None:
    for pieces, silent in (((), True), ((b"HTTP/1.1 20",), False)):
        wire = Wire()
        assert await wire.answer(*pieces) is None
        assert wire.connection.silent is silent


async def test_one_connection_carries_one_request_after_another() -> None:
    wire = Wire()
    for _ in range(3):
        for response in (SIZED, CHUNKED):
            assert await body_of(await wire.answer(response)) == b"hello"
    assert (wire.rests, len(wire.written)) == (6, 6)


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    ],
)
async def test_an_endpoint_that_will_close_is_not_asked_again(response: bytes) -> None:
    wire = Wire()
    assert await body_of(await wire.answer(response)) == b"hello"
    assert (wire.rests, wire.aborted) == (0, True)


async def test_an_answer_that_comes_before_the_request_has_gone_out_ends_the_connection() -> None:
    wire = Wire()
    wire.unsent = 1
    assert await body_of(await wire.answer(SIZED)) == b"hello"
    assert (wire.rests, wire.aborted) == (0, True)


async def test_closing_a_reply_before_its_end_aborts_and_after_it_does_not() -> None:
    for response, aborted in ((SIZED[:-1], True), (SIZED, False)):
        wire = Wire()
        reply = await wire.answer(response)
        assert reply is not None
        reply.close()
        assert wire.aborted is aborted


@pytest.mark.parametrize("pieces", [(), (SIZED[:-1],)], ids=["head", "body"])
async def test_who_is_cancelled_while_waiting_gives_the_response_up(pieces: tuple[bytes, ...]) -> None:
    wire = Wire()

    async def wait() -> None:
        reply = await wire.connection.ask(b"x", b"", head_only=False)
        assert reply is not None
        await reply.pour(lambda data, last: True)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(wait())
        await asyncio.sleep(0)
        for piece in pieces:
            wire.connection.data_received(piece)
        await asyncio.sleep(0)
        task.cancel()
    assert (wire.aborted, wire.connection.open) == (True, False)


async def test_a_cancel_that_comes_after_the_end_leaves_the_connection_to_others() -> None:
    wire = Wire()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(wire.connection.ask(b"x", b"", head_only=False))
        await asyncio.sleep(0)
        wire.connection.data_received(SIZED)
        task.cancel()
    assert task.cancelled()
    assert (wire.rests, wire.aborted, wire.connection.open) == (1, False, True)
    assert await body_of(await wire.answer(SIZED)) == b"hello"


# --- pouring -----------------------------------------------------------------------------------------------


async def test_a_body_is_poured_as_it_comes_within_the_reading() -> None:
    wire = Wire()
    reply = await wire.answer(CHUNKED[:47])
    assert reply is not None
    bucket = Bucket()
    got = bucket.got
    async with asyncio.TaskGroup() as group:
        task = group.create_task(reply.pour(bucket))
        await asyncio.sleep(0)
        wire.connection.data_received(b"2\r\nhe\r\n")
        assert got == [(b"he", False)]
        wire.connection.data_received(b"3\r\nllo\r\n0\r\n")
        assert got[1:] == [(b"llo", False)]
        wire.connection.data_received(b"\r\n")
        assert got[2:] == [(b"", True)]
    assert task.result() is None


async def test_a_sink_that_wants_no_more_gets_the_rest_when_it_pours_again() -> None:
    wire = Wire()
    reply = await wire.answer(SIZED[:-3])
    bucket = Bucket(wants_more=False)
    assert reply is not None
    assert await reply.pour(bucket) is None
    wire.connection.data_received(b"l")
    wire.connection.data_received(b"lo")
    assert bucket.got == [(b"he", False)]
    assert await reply.pour(bucket) is None
    assert bucket.got[1:] == [(b"llo", True)]


async def test_what_a_sink_raises_is_raised_to_whoever_pours() -> None:
    def broken(data: bytes, last: bool) -> bool:
        raise ZeroDivisionError

    wire = Wire()
    reply = await wire.answer(SIZED[:-5])
    assert reply is not None
    loop = asyncio.get_running_loop()
    loop.call_soon(wire.connection.data_received, b"he")
    with pytest.raises(ZeroDivisionError):
        await reply.pour(broken)


async def test_an_endpoint_has_to_wait_when_nobody_takes_its_body() -> None:
    wire = Wire()
    reply = await wire.answer(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
    assert reply is not None
    for _ in range(5):
        wire.connection.data_received(bytes(60_000))
    assert wire.paused
    assert len(reply.take()) == 300_000
    assert not wire.paused


# --- whole chunks past the parser ---------------------------------------------------------------------------

CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Lane:
    """Takes chunks past the parser, and what comes the other way, in the order they came."""

    def __init__(self, *, takes: bool = True) -> None:
        self.bucket = Bucket()
        self.taken: list[bytes] = []
        self._takes = takes

    def shortcut(self, chunk: bytes, begin: int, end: int) -> bool:
        if self._takes:
            self.taken.append(chunk)
            self.bucket.got.append((chunk[begin:end], False))
        return self._takes

    async def watch(self, wire: Wire, *pieces: bytes) -> FailureReason | None:
        """What became of a chunked response whose pieces come while it is poured."""
        reply = await wire.answer(CHUNKED_HEAD)
        assert reply is not None
        done = asyncio.get_running_loop().create_future()

        async def pour() -> None:
            done.set_result(await reply.pour(self.bucket, self.shortcut))

        async with asyncio.TaskGroup() as group:
            group.create_task(pour())
            await asyncio.sleep(0)
            for piece in pieces:
                wire.connection.data_received(piece)
            if not reply.complete:
                wire.end()
        return cast(FailureReason | None, done.result())


async def test_a_chunk_that_comes_by_itself_takes_the_shortcut_as_it_is() -> None:
    wire, lane = Wire(), Lane()
    assert await lane.watch(wire, b"1\r\na\r\n", b"2\r\nbc\r\n", b"0A\r\n0123456789\r\n", b"0\r\n\r\n") is None
    assert lane.taken == [b"2\r\nbc\r\n", b"0A\r\n0123456789\r\n"], "the first shows where chunks begin"
    assert lane.bucket.data == b"abc0123456789"
    assert wire.rests == 1


async def test_a_chunk_that_is_not_taken_goes_the_usual_way() -> None:
    wire, lane = Wire(), Lane(takes=False)
    assert await lane.watch(wire, b"1\r\na\r\n", b"2\r\nbc\r\n", b"0\r\n\r\n") is None
    assert lane.bucket.data == b"abc"


@pytest.mark.parametrize(
    "piece",
    [
        b"2\r\nbc",
        b"2\r\nbc\r",
        b"2\r\nbcxx",
        b"2;x=y\r\nbc\r\n",
        b"1\r\nb\r\n1\r\nc\r\n",
        b"2\r\nbc\r\n0\r\n\r\n",
        b"0\r\n\r\n",
        b"",
        *(
            b"+2\r\nbc\r\n",
            b"0x2\r\nbc\r\n",
            b" 2\r\nbc\r\n",
            b"0_2\r\nbc\r\n",
            b"2\nbc\r\n",
            b"\r\nbc\r\n",
            b"3\r\nbc\r\n",
        ),
    ],
)
async def test_only_one_whole_chunk_takes_the_shortcut(piece: bytes) -> None:
    lane = Lane()
    await lane.watch(Wire(), b"1\r\na\r\n", piece)
    assert lane.taken == []


@pytest.mark.parametrize(
    "pieces",
    [
        (b"1", b"1\r\nx\r\n", b"12345678901234\r\n"),
        (b"11\r", b"\n1\r\nx\r\n", b"12345678901\r\n"),
        (b"11\r\n", b"1\r\nx\r\n", b"12345678901\r\n"),
        (b"11\r\n12345", b"1\r\nx\r\n", b"123456\r\n"),
    ],
)
async def test_bytes_that_look_like_a_chunk_within_another_are_none(pieces: tuple[bytes, ...]) -> None:
    wire, lane = Wire(), Lane()
    assert await lane.watch(wire, b"1\r\na\r\n", *pieces, b"0\r\n\r\n") is None
    assert lane.taken == []
    assert lane.bucket.data == b"a" + b"".join(pieces).partition(b"\r\n")[2][:17]


async def test_a_body_with_a_length_knows_no_chunks() -> None:
    wire, lane = Wire(), Lane()
    reply = await wire.answer(b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n1\r\na\r\n")
    assert reply is not None
    async with asyncio.TaskGroup() as group:
        group.create_task(reply.pour(lane.bucket, lane.shortcut))
        await asyncio.sleep(0)
        wire.connection.data_received(b"1\r\nb\r\n")
    assert (lane.taken, lane.bucket.data) == ([], b"1\r\na\r\n1\r\nb\r\n")


async def test_a_connection_forgets_the_chunks_of_its_last_response() -> None:
    wire, lane = Wire(), Lane()
    assert await lane.watch(wire, b"1\r\na\r\n", b"1\r\nb\r\n", b"0\r\n\r\n") is None
    again = Lane()
    assert await again.watch(wire, b"1\r\nc\r\n", b"0\r\n\r\n") is None
    assert (again.taken, again.bucket.data) == ([], b"c")


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(0, 300), max_size=8), st.randoms())
def test_the_body_is_the_same_whichever_way_its_chunks_go(contents: list[bytes], cuts: list[int], lots: Any) -> None:
    async def run() -> None:
        chunks = [b"%x\r\n%b\r\n" % (len(content), content) for content in contents if content]
        body = b"".join(chunks) + b"0\r\n\r\n"
        edges = {0, len(body), *(cut for cut in cuts if cut < len(body))}
        edges |= {edge for edge in itertools.accumulate(map(len, chunks)) if lots.random() < 0.7}
        wire, lane = Wire(), Lane()
        assert await lane.watch(wire, *(body[a:b] for a, b in itertools.pairwise(sorted(edges)))) is None
        assert lane.bucket.data == b"".join(contents)
        assert (wire.rests, wire.aborted) == (1, False)

    asyncio.run(run())
