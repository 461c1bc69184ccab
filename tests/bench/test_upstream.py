"""The far end of a benchmark, without any gateway."""

import asyncio
import json

import pytest

from picker.bench.client import dechunk
from picker.bench.upstream import Ask, Upstream, request_size, streamed, whole
from picker.wire.sse import observer_for


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))


def asked(chunks: int) -> tuple[Ask, FakeTransport]:
    """A request in lock-step that has arrived at the upstream."""
    response = streamed(chunks, prompt_tokens=100)
    ask, transport = Upstream().expect(response, chunks=chunks, gap=None), FakeTransport()
    ask.arrive(transport)
    return ask, transport


def test_a_stream_is_what_an_engine_sends() -> None:
    response = streamed(3, prompt_tokens=100)
    body = b"".join(payload(part) for part in (response.chunk, response.chunk, response.last))
    observer = observer_for("text/event-stream", stream=True)
    observer.feed(body, end=True)
    assert observer.first_token
    assert observer.done
    assert observer.usage is not None
    assert (observer.usage.prompt_tokens, observer.usage.cached_tokens) == (100, 50)
    assert response.total_bytes == len(body)


def payload(framed: bytes) -> bytes:
    size, rest = framed.split(b"\r\n", 1)
    return rest[: int(size, 16)]


def test_a_json_answer_has_its_length() -> None:
    head, _, body = whole(prompt_tokens=8).last.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    assert json.loads(body)["usage"]["prompt_tokens"] == 8


def test_in_lock_step_a_chunk_is_sent_when_the_one_before_has_arrived_whole() -> None:
    ask, transport = asked(3)
    assert len(transport.written) == 2, "head and first chunk"
    size = len(payload(transport.written[1]))
    assert ask.received(size - 1) == 0
    assert len(transport.written) == 2
    assert ask.received(1) == 1
    assert len(transport.written) == 3


def test_a_stream_ends_after_as_many_chunks_as_were_asked_for() -> None:
    ask, transport = asked(3)
    for number in range(1, 4):
        size, rest, ended = dechunk(transport.written[number])
        assert ended == (number == 3)
        assert not rest
        ask.received(size)
    assert len(transport.written) == 4
    assert len(ask.delays) == 3


def test_chunks_that_arrive_together_count_for_each() -> None:
    response = streamed(3, prompt_tokens=100)
    ask = Upstream().expect(response, chunks=3, gap=3600.0)
    ask._transport = FakeTransport()
    for _ in range(3):
        ask._send()
    assert ask.received(response.chunk_bytes * 2 + 1) == 2
    assert ask.received(response.total_bytes - response.chunk_bytes * 2 - 1) == 1


def test_an_answer_that_the_upstream_never_gave_counts_for_nothing() -> None:
    ask = Upstream().expect(whole(prompt_tokens=8), chunks=1, gap=None)
    assert ask.received(10_000) == 0


def test_an_expected_request_is_taken_once() -> None:
    upstream = Upstream()
    ask = upstream.expect(whole(prompt_tokens=8), chunks=1, gap=None)
    request = bytearray(f'{{"user": "#{ask.id};"}}'.encode())
    assert upstream.take(request) is ask
    assert upstream.take(request) is None


@pytest.mark.parametrize(
    ("head", "size"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", 27),
        (b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n", 38 + 5),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 0),
        (b"POST / HTTP/1.1\r\nContent-Len", None),
    ],
)
def test_the_size_of_a_request_is_read_from_its_head(head: bytes, size: int | None) -> None:
    assert request_size(bytearray(head)) == size


async def test_requests_that_are_no_benchmark_are_answered_as_an_engine_would() -> None:
    async with Upstream().running(2) as upstream:
        assert len(set(upstream.ports)) == 2
        assert b"vllm:num_requests_running" in await get(upstream.ports[0], "/metrics")
        assert b'"id": "bench"' in await get(upstream.ports[1], "/v1/models")
        assert b" 200 " in await get(upstream.ports[0], "/health")
        assert b" 404 " in await get(upstream.ports[0], "/v1/elsewhere")


async def get(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    writer.close()
    await writer.wait_closed()
    return head + body
