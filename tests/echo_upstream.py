"""A small HTTP server in the test's own loop that says what reached it: the pod of tests about the way there.

`POST /echo` gives the body back; `GET /health` is empty; `POST /v1/...` answers as an OpenAI server would, streamed if
asked, one event for every `step()`. Every request is remembered in `seen`. Not a model of an engine (see `sim`).
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web


@dataclass(frozen=True, slots=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class EchoUpstream:
    """name: sent in the header `x-served-by` of every response."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = ""
        self.seen: list[Seen] = []
        self.arrived = asyncio.Event()
        self.disconnected = asyncio.Event()
        self._steps = asyncio.Semaphore(0)

    def step(self, count: int = 1) -> None:
        """Let streamed responses go on by this many events."""
        for _ in range(count):
            self._steps.release()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["EchoUpstream"]:
        """Serve on a free loopback port for the length of the block; `address` is then "ip:port"."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        self.address = f"{host}:{port}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append(Seen(request.method, request.path_qs, headers, body))
        self.arrived.set()
        if request.path == "/echo":
            return web.Response(body=body, headers={"x-served-by": self.name})
        if request.path == "/hang":
            return await self._hang()
        if request.path.startswith("/v1/") and body:
            asked = json.loads(body)
            return await self._stream(request) if asked.get("stream") else self._complete()
        return web.Response(headers={"x-served-by": self.name})

    async def _hang(self) -> web.Response:
        try:
            await asyncio.Event().wait()
        finally:
            self.disconnected.set()
        raise AssertionError

    def _complete(self) -> web.Response:
        answer = {
            "choices": [{"index": 0, "text": "there", "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5},
        }
        return web.json_response(answer, headers={"x-served-by": self.name})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        headers = {"content-type": "text/event-stream", "x-served-by": self.name}
        response = web.StreamResponse(headers=headers)
        try:
            await response.prepare(request)
            for number in range(3):
                await self._steps.acquire()
                event = {"choices": [{"index": 0, "text": f"token {number}", "finish_reason": None}]}
                await response.write(f"data: {json.dumps(event)}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.disconnected.set()
            raise
        return response
