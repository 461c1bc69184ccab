"""A pod that fails as it is told to: the few routes of vLLM that a gateway needs, in one small process.

python -m bench.fault_pod --port N [--model NAME] [--on-term vllm|drain]

POST /_mode with one of `MODES` in the body changes how it answers. SIGTERM ends it as vLLM ends: by default the port
closes at once and open responses hang; with `drain` (its --shutdown-timeout) what runs goes on, and whatever is new
gets an empty answer that says `abort`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
from collections.abc import Awaitable, Callable

MODES = ("ok", "error", "busy", "garbage", "reset", "reset-mid", "loris", "abort", "metrics-gone", "metrics-reset")
TOKENS = 12
STEP_S = 0.02
PREFILL_S = 0.05
_HUNG_S = 3600.0

Write = Callable[[bytes], Awaitable[None]]


class Pod:
    """Everything that a pod remembers."""

    def __init__(self, model: str, on_term: str) -> None:
        self.mode = "ok"
        self.model = model
        self.on_term = on_term
        self.running = 0
        self.served = 0
        self.leaving = asyncio.Event()
        self.busy: set[asyncio.StreamWriter] = set()
        self.idle: set[asyncio.StreamWriter] = set()
        self.frozen = False
        self.quiet = asyncio.Event()  # nothing is being answered
        self.quiet.set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.idle.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = head[0].split(" ")
                fields = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
                body = await reader.readexactly(int(fields.get("content-length", "0")))
                self.idle.discard(writer)
                self.busy.add(writer)
                self.quiet.clear()
                await self.answer(method, target, body, writer)
                self.rests(writer)
                self.idle.add(writer)
        self.idle.discard(writer)
        self.rests(writer)
        writer.close()

    def rests(self, writer: asyncio.StreamWriter) -> None:
        self.busy.discard(writer)
        if not self.busy:
            self.quiet.set()

    async def answer(self, method: str, target: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if target == "/_mode":
            self.mode = body.decode()
            await _send(writer, 200, b"{}")
        elif target == "/metrics":
            await self.metrics(writer)
        elif target == "/health":
            await _send(writer, 200, b"", "text/plain")
        elif target == "/v1/models":
            entry = {"id": self.model, "object": "model", "owned_by": "vllm", "parent": None, "max_model_len": 4096}
            await _send(writer, 200, json.dumps({"object": "list", "data": [entry]}).encode())
        elif method == "POST":
            await self.generate(bool(json.loads(body).get("stream")), writer)
        else:
            await _send(writer, 404, b'{"detail":"Not Found"}')

    async def metrics(self, writer: asyncio.StreamWriter) -> None:
        if self.mode == "metrics-gone":
            return await _send(writer, 404, b"not here", "text/plain")
        if self.mode == "metrics-reset":
            return _reset(writer)
        labels = f'{{engine="0",model_name="{self.model}"}}'
        values = {"num_requests_running": self.running, "num_requests_waiting": 0, "kv_cache_usage_perc": 0.1}
        lines = [f"# TYPE vllm:{name} gauge\nvllm:{name}{labels} {value}" for name, value in values.items()]
        lines.append(f"# TYPE vllm:prefix_cache_queries counter\nvllm:prefix_cache_queries_total{labels} {self.served}")
        return await _send(writer, 200, ("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4")

    async def generate(self, stream: bool, writer: asyncio.StreamWriter) -> None:
        match self.mode:
            case "error" | "busy":
                status = 500 if self.mode == "error" else 503
                await _send(writer, status, json.dumps({"error": {"message": "told to", "code": status}}).encode())
            case "garbage":
                writer.write(b"\x16\x03\x01\x00\xff this is not HTTP \r\n\r\n\x00\x00")
                writer.close()
            case "reset":
                _reset(writer)
            case "loris":
                for byte in b"HTTP/1.1 200 OK\r\nx-slow: " + b"x" * 3600:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.3)
            case _ if self.mode == "abort" or self.leaving.is_set():
                await self.give_up(stream, writer)
            case _:
                self.running += 1
                try:
                    await (self.stream(writer) if stream else self.whole(writer))
                finally:
                    self.running -= 1
                    self.served += 100

    async def give_up(self, stream: bool, writer: asyncio.StreamWriter) -> None:
        """vLLM while it drains."""
        if stream:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            writer.write(head + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            return await writer.drain()
        choice = {"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "abort"}
        return await _send(writer, 200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode())

    async def whole(self, writer: asyncio.StreamWriter) -> None:
        await self.work(PREFILL_S + TOKENS * STEP_S)
        choice = {"index": 0, "message": {"role": "assistant", "content": "x" * TOKENS}, "finish_reason": "length"}
        usage = {"prompt_tokens": 100, "completion_tokens": TOKENS, "prompt_tokens_details": {"cached_tokens": 0}}
        body = {"object": "chat.completion", "choices": [choice], "usage": usage}
        await _send(writer, 200, json.dumps(body).encode())

    async def stream(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        await self.work(PREFILL_S)
        writer.write(_event({"role": "assistant", "content": ""}))
        for number in range(TOKENS):
            if self.mode == "reset-mid" and number == TOKENS // 2:
                return _reset(writer)
            writer.write(_event({"content": "x"}))
            await writer.drain()
            await self.work(STEP_S)
        writer.write(_event({}, "length") + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        return await writer.drain()

    async def work(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self.frozen:
            await asyncio.sleep(_HUNG_S)

    async def serve(self, port: int) -> None:
        server = await asyncio.start_server(self.handle, "127.0.0.1", port, backlog=512)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.leaving.set)
        await self.leaving.wait()
        if self.on_term == "vllm":
            self.frozen = True
            server.close()
            for writer in list(self.idle):
                writer.close()
        else:
            await asyncio.sleep(0.5)
        await self.quiet.wait()  # vLLM waits for its clients, frozen or not
        os._exit(0)


def _event(delta: dict[str, str], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return _chunk(b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _send(writer: asyncio.StreamWriter, status: int, body: bytes, kind: str = "application/json") -> None:
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the peer sees a reset, not an end."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="m")
    parser.add_argument("--on-term", choices=("vllm", "drain"), default="vllm")
    told = parser.parse_args()
    asyncio.run(Pod(told.model, told.on_term).serve(told.port))
