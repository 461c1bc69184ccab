"""The far end of a benchmark: a server that costs next to nothing, and what both ends know of a request (`Ask`).

Client and upstream share one process and one clock, so that the way there and the way back are each measured, and
so that a chunk can be sent the moment the one before has arrived. Speaks just enough HTTP/1.1 for well-behaved
gateways: no pipelining, no trailers. Not a model of an engine (see `sim`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, cast

MODEL = "bench"
_MARK = re.compile(rb"#(\d+);")
_LAST_CHUNK = b"0\r\n\r\n"


# --- what is answered --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Response:
    """What the upstream sends, as it goes over the wire. chunks: writes of the body, all but the last alike.

    chunk_bytes, total_bytes: of the body without its framing. head: empty when it goes with the (only) chunk.
    """

    chunks: int
    head: bytes
    chunk: bytes
    last: bytes
    chunk_bytes: int
    total_bytes: int


def streamed(chunks: int, *, prompt_tokens: int) -> Response:
    """A stream of `chunks` SSE events; the last comes with usage (half of the prompt cached) and the end marker."""
    event = _event(choices=[_choice(" word", None)])
    usage = _usage(prompt_tokens, chunks)
    last = _event(choices=[_choice(" word", "stop")]) + _event(choices=[], usage=usage) + b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    total = (chunks - 1) * len(event) + len(last)
    return Response(chunks, head, _framed(event), _framed(last) + _LAST_CHUNK, len(event), total)


def whole(*, prompt_tokens: int) -> Response:
    """One JSON answer that is not streamed."""
    message = {"index": 0, "message": {"role": "assistant", "content": "word"}, "finish_reason": "stop"}
    answer = {"id": "chatcmpl-bench", "object": "chat.completion", "model": MODEL, "choices": [message]}
    body = json.dumps({**answer, "usage": _usage(prompt_tokens, 1)}).encode()
    return Response(1, b"", b"", _plain(body), len(body), len(body))


def _event(**fields: Any) -> bytes:
    event = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 0, "model": MODEL, **fields}
    return f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()


def _choice(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish_reason}


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    cached = {"cached_tokens": prompt_tokens // 2}
    total = prompt_tokens + completion_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": total,
        "prompt_tokens_details": cached,
    }


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _plain(body: bytes, content_type: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (content_type, len(body), body)


# --- one request -------------------------------------------------------------------------------------------


class Ask:
    """One request, seen from both of its ends; the client's connection and the upstream's report to it.

    gap: seconds between chunks. None is lock-step: a chunk is sent as soon as the one before has arrived, so that
    every chunk crosses the gateway by itself, however busy it is.
    delays: seconds from sent to received, by chunk. chunks: how many this request gets of the response's.
    """

    __slots__ = (
        "_gap",
        "_received",
        "_response",
        "_sent_at",
        "_transport",
        "asked_at",
        "chunks",
        "delays",
        "id",
        "way",
    )

    def __init__(self, number: int, response: Response, chunks: int, gap: float | None) -> None:
        self.id = number
        self.chunks = chunks
        self.asked_at = 0.0
        self.way = 0.0
        self.delays: list[float] = []
        self._response = response
        self._gap = gap
        self._sent_at: list[float] = []
        self._received = 0
        self._transport: asyncio.WriteTransport | None = None

    @property
    def first_byte(self) -> float:
        """Seconds the request took to the upstream plus those the first chunk took back."""
        return self.way + self.delays[0]

    def arrive(self, transport: asyncio.WriteTransport) -> None:
        """The upstream has the whole request."""
        self.way = perf_counter() - self.asked_at
        self._transport = transport
        if not self._response.head:
            self._send()
            return
        transport.write(self._response.head)
        # The first chunk waits for nobody: a gateway may hold the head back until there is something behind it.
        if self._gap is None:
            self._send()
        else:
            self._send_at(asyncio.get_running_loop().time() + self._gap)

    def received(self, size: int) -> int:
        """The client has `size` more bytes of the body; returns how many chunks they completed.

        Bytes of an answer that the upstream has not given complete none.
        """
        now = perf_counter()
        if self._transport is None:
            return 0
        response, before = self._response, len(self.delays)
        self._received += size
        missing = response.total_bytes - (response.chunks - self.chunks) * response.chunk_bytes - self._received
        arrived = self.chunks if missing <= 0 else min(self._received // response.chunk_bytes, self.chunks - 1)
        self.delays.extend(now - sent_at for sent_at in self._sent_at[before:arrived])
        if self._gap is None and len(self._sent_at) == arrived < self.chunks:
            self._send()
        return arrived - before

    def _send(self) -> None:
        assert self._transport is not None
        self._sent_at.append(perf_counter())
        ended = len(self._sent_at) == self.chunks
        self._transport.write(self._response.last if ended else self._response.chunk)

    def _send_at(self, at: float) -> None:
        asyncio.get_running_loop().call_at(at, self._send_paced, at)

    def _send_paced(self, at: float) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        self._send()
        if len(self._sent_at) < self.chunks and self._gap is not None:
            self._send_at(at + self._gap)


# --- the server --------------------------------------------------------------------------------------------


class Arriving(Protocol):
    """What becomes of a request once the upstream has all of it."""

    def arrive(self, transport: asyncio.WriteTransport) -> None: ...


class Upstream:
    """What is behind the gateways: several addresses, one server. ports: on loopback, one for each endpoint."""

    def __init__(self) -> None:
        self.ports: tuple[int, ...] = ()
        self._asks: dict[int, Ask] = {}
        self._ids = itertools.count()

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.0.1:{port}" for port in self.ports]

    @property
    def urls(self) -> list[str]:
        return [f"http://{address}" for address in self.addresses]

    def endpoint_flags(self) -> list[str]:
        """How picker is told of them."""
        return [flag for url in self.urls for flag in ("--endpoint", url)]

    def expect(self, response: Response, *, chunks: int, gap: float | None) -> Ask:
        """Register a request before it is sent; its body must hold `mark(ask)`, and no other `#` before it."""
        ask = Ask(next(self._ids), response, chunks, gap)
        self._asks[ask.id] = ask
        return ask

    def forget(self, ask: Ask) -> None:
        """Harmless when it has arrived."""
        self._asks.pop(ask.id, None)

    def take(self, request: bytearray) -> Arriving | None:
        """The expected request that these bytes are, once; None for any other."""
        found = _MARK.search(request)
        return None if found is None else self._asks.pop(int(found[1]), None)

    @asynccontextmanager
    async def running(self, endpoints: int) -> AsyncIterator[Upstream]:
        """Listen on free ports for the length of the block."""
        loop = asyncio.get_running_loop()
        servers = [
            await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=1024) for _ in range(endpoints)
        ]
        self.ports = tuple(server.sockets[0].getsockname()[1] for server in servers)
        try:
            yield self
        finally:
            for server in servers:
                server.close()


def mark(ask: Ask) -> str:
    """What tells the upstream which request it has."""
    return f"#{ask.id};"


_METRICS = f"""\
vllm:num_requests_running{{model_name="{MODEL}"}} 0
vllm:num_requests_waiting{{model_name="{MODEL}"}} 0
vllm:kv_cache_usage_perc{{model_name="{MODEL}"}} 0.1
vllm:cache_config_info{{block_size="16",num_gpu_blocks="100000"}} 1
""".encode()
_MODELS = json.dumps(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 1_000_000}]}
).encode()
# What gateways ask of their servers besides. The names of the model are for those of SGLang's family.
_ABOUT = json.dumps({"status": "ok", "model_path": MODEL, "served_model_name": MODEL, "model_id": MODEL}).encode()
_PAGES = {
    b"GET /metrics": _plain(_METRICS, b"text/plain; version=0.0.4"),
    b"GET /v1/models": _plain(_MODELS),
    **dict.fromkeys((b"GET /health", b"GET /server_info", b"GET /model_info", b"GET /version"), _plain(_ABOUT)),
}
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


class _Connection(asyncio.Protocol):
    """One kept-alive connection from a gateway. need: bytes of the whole request, 0 for chunked."""

    __slots__ = ("_buffer", "_need", "_transport", "_upstream")

    _transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._buffer = bytearray()
        self._need: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._need is None:
            self._need = request_size(self._buffer)
        if self._need is None or not self._complete(self._need):
            return
        request, self._buffer, self._need = self._buffer, bytearray(), None
        self._answer(request)

    def _complete(self, need: int) -> bool:
        return len(self._buffer) >= need if need else self._buffer.endswith(_LAST_CHUNK)

    def _answer(self, request: bytearray) -> None:
        # The whole path: some ask a server to render a prompt before they send it.
        if request.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n"):
            ask = self._upstream.take(request)
            if ask is not None:
                ask.arrive(self._transport)
                return
        answer = _PAGES.get(bytes(request[:200]).split(b" HTTP/1.", 1)[0])
        if answer is not None:
            self._transport.write(answer)
        elif request.startswith((b"GET ", b"POST ")):
            self._transport.write(_NOT_FOUND)
        else:  # some try first whether a server speaks HTTP/2
            self._transport.close()


def request_size(begun: bytearray) -> int | None:
    """Bytes of the whole request, 0 when its end has to be looked for (chunked), None while its head is not there."""
    end = begun.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(begun[:end]).lower()
    if b"\ntransfer-encoding: chunked" in head:
        return 0
    _, found, length = head.partition(b"\ncontent-length:")
    return end + 4 + (int(length.split(b"\r\n", 1)[0]) if found else 0)
