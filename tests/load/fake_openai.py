"""A server that answers like vLLM, as a test tells it to; for tests of whoever asks one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Json = dict[str, Any]
Script = Callable[[Json, "FakeAnswer"], Awaitable[None]]


def chunk(content: str | None = None, **delta: str) -> bytes:
    """One SSE event with a piece of the answer."""
    body = {"choices": [{"index": 0, "delta": {"content": content, **delta} if content is not None else delta}]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    """The SSE event that ends a stream when usage was asked for."""
    details = None if cached is None else {"cached_tokens": cached}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


class FakeAnswer:
    """The answer to one request, under the script's control."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response: web.StreamResponse | None = None

    async def start(self, headers: dict[str, str] | None = None) -> None:
        self.response = web.StreamResponse(headers={"content-type": "text/event-stream", **(headers or {})})
        await self.response.prepare(self._request)

    async def send(self, data: bytes) -> None:
        assert self.response is not None
        await self.response.write(data)

    def refuse(self, status: int, text: str = "") -> None:
        self.response = web.Response(status=status, text=text)

    def reset(self) -> None:
        assert self._request.transport is not None
        self._request.transport.abort()


async def answer_well(request: Json, answer: FakeAnswer) -> None:
    """Two words, and usage by the rule of four bytes a token, half of it cached."""
    await answer.start({"x-picker-endpoint": "pod-1:8000"})
    await answer.send(chunk("", role="assistant") + chunk("hello ") + chunk("world"))
    tokens = sum(len(message["content"]) for message in request["messages"]) // 4
    await answer.send(usage(tokens, 2, tokens // 2) + DONE)


class FakeServer:
    """requests: the bodies that came, in order. resets: how many had come whenever the cache was emptied."""

    def __init__(self, script: Script, models: list[str]) -> None:
        self.requests: list[Json] = []
        self.resets: list[int] = []
        self.headers: list[dict[str, str]] = []
        self.arrived = asyncio.Condition()
        self.url = ""
        self._script = script
        self._models = models

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in self._models]})

    async def reset(self, request: web.Request) -> web.Response:
        self.resets.append(len(self.requests))
        return web.Response()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        async with self.arrived:
            self.requests.append(body)
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
            self.arrived.notify_all()
        answer = FakeAnswer(request)
        await self._script(body, answer)
        assert answer.response is not None
        return answer.response

    async def wait_for(self, count: int) -> None:
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.requests) >= count)


@asynccontextmanager
async def fake_server(script: Script = answer_well, models: list[str] | None = None) -> AsyncIterator[FakeServer]:
    server = FakeServer(script, ["fake-model"] if models is None else models)
    app = web.Application(client_max_size=1 << 24)
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/reset_prefix_cache", server.reset)
    app.router.add_post("/v1/chat/completions", server.complete)
    app.router.add_post("/v1/completions", server.complete)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
