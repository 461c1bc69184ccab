"""The near end of a benchmark: against its own upstream, and against gateways that misbehave."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dead_port import dead_port
from picker.bench import client
from picker.bench.cases import cases
from picker.bench.client import AnswerError, Traffic, answers, closed_loop, dechunk, open_loop, response_head
from picker.bench.upstream import Upstream

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(autouse=True)
def no_ramp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_RAMP", 0.0)


@asynccontextmanager
async def traffic(chunks: int, *, port: int | None = None) -> AsyncIterator[Traffic]:
    """Requests of one size straight to the upstream, or to another port."""
    (case,) = cases([256], [chunks])
    async with Upstream().running(2) as upstream:
        yield case.traffic(upstream, upstream.ports if port is None else (port,))


@asynccontextmanager
async def gateway(answer: bytes) -> AsyncIterator[int]:
    """A gateway that answers every request by itself and hangs up."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize("chunks", [0, 1, 5])
async def test_an_open_loop_waits_for_every_answer_and_times_every_chunk(chunks: int) -> None:
    async with traffic(chunks) as direct:
        latency = await open_loop(direct, seconds=0.02, rate=400.0)
    assert latency.first_byte.shape == (8,)
    assert latency.chunk.shape == (8 * max(1, chunks),)
    assert (latency.first_byte > 0).all()


@pytest.mark.parametrize("chunks", [0, 1, 5])
async def test_a_closed_loop_counts_requests_and_cpu_time(chunks: int) -> None:
    async with traffic(chunks) as direct:
        throughput = await closed_loop(direct, seconds=0.2, processes={"us": os.getpid()})
    assert throughput.requests_per_s > 0
    assert throughput.cpu_us["us"] > 0
    assert throughput.cores["us"] == pytest.approx(throughput.cpu_us["us"] * throughput.requests_per_s / 1e6)


async def test_a_gateway_that_answers_is_ready() -> None:
    async with traffic(1) as direct:
        assert await answers(direct)


async def test_a_gateway_that_is_not_there_is_not_ready() -> None:
    with dead_port() as address:
        async with traffic(1, port=int(address.rpartition(":")[2])) as nowhere:
            assert not await answers(nowhere)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy", "answered 503: busy"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "after 0 of 1 chunks"),
        (b"", "closed"),
    ],
)
async def test_anything_but_a_complete_answer_ends_the_measurement(answer: bytes, words: str) -> None:
    async with gateway(answer) as port, traffic(1, port=port) as wrong:
        assert not await answers(wrong)
        with pytest.raises(AnswerError, match=words):
            await open_loop(wrong, seconds=0.01, rate=100.0)


def test_a_response_head_tells_status_and_length() -> None:
    assert response_head(b"HTTP/1.1 200 OK\r\nContent-Length: 42\r\nx: y\r\n\r\n") == (200, 42)
    assert response_head(b"HTTP/1.1 503 No\r\ntransfer-encoding: chunked\r\n\r\n") == (503, None)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), st.data())
def test_chunks_are_counted_however_they_are_cut(bodies: list[bytes], data: st.DataObject) -> None:
    wire = b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies) + b"0\r\n\r\n"
    cut = data.draw(st.integers(0, len(wire)))
    first, rest, early = dechunk(wire[:cut])
    second, left, ended = (0, b"", True) if early else dechunk(rest + wire[cut:])
    assert (first + second, left, ended) == (sum(map(len, bodies)), b"", True)
