"""Endpoints that the checker owns: small HTTP servers that say what reached them, and fail on command.

Each answers as an OpenAI server would, streamed when asked, exposes vLLM's metrics, and remembers every request. What
arrived here is the checker's truth about where a request went and what became of its body.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import json
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from picker.check.gateway import ANSWER
from picker.errors import ConfigError

# What a pod answers with beside the body.
POD_HEADER = "x-check-pod"
DIGEST_HEADER = "x-check-sha256"
# What a client asks of a pod: the number of events, whether to wait for `step` before each one.
EVENTS_HEADER = "x-check-events"
GATE_HEADER = "x-check-gate"
# Which route or test a request belongs to, for the pod's memory.
MARK_HEADER = "x-check-mark"
# Seconds for a port to be had again.
_RETURN = 3.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it arrived. digest: SHA-256 of its body, in hex."""

    method: str
    path: str
    headers: dict[str, str]
    size: int
    digest: str


class Metrics(enum.Enum):
    """What /metrics does: tell of an idle or of a saturated engine, or never answer."""

    IDLE = "idle"
    SATURATED = "saturated"
    HANGING = "hanging"


class Pod:
    """One endpoint. address: "ip:port" once started; port 0 takes a free one and keeps it over restarts."""

    def __init__(self, address: str, model: str) -> None:
        self.address = address
        self.model = model
        self.metrics = Metrics.IDLE
        self.seen: list[Seen] = []
        self.up = False
        self._steps = asyncio.Semaphore(0)
        self._runner: web.AppRunner | None = None
        self._served = False

    async def start(self) -> None:
        """Serve; raises ConfigError where the address cannot be taken."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2, access_log=None)
        await runner.setup()
        host, _, port = self.address.rpartition(":")
        try:
            await self._bind(runner, host.strip("[]"), int(port))
        except (OSError, OverflowError) as error:
            await runner.cleanup()
            raise ConfigError(f"cannot serve the endpoint {self.address}: {error.strerror or error}") from None  # type: ignore[union-attr]
        self._runner, self.up, self._served = runner, True, True
        bound = runner.addresses[0][1]
        self.address = f"{host}:{bound}"

    async def _bind(self, runner: web.AppRunner, host: str, port: int) -> None:
        """A port that was its own may serve somebody's outgoing connection by now, for a moment."""
        deadline = time.monotonic() + (_RETURN if self._served else 0.0)
        while True:
            try:
                return await web.TCPSite(runner, host, port, reuse_address=True).start()
            except OSError:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Refuse connections from here on; those that are open are closed."""
        if self._runner is not None:
            runner, self._runner, self.up = self._runner, None, False
            await runner.cleanup()

    def step(self, count: int = 1) -> None:
        """Let gated streams go on by this many events."""
        for _ in range(count):
            self._steps.release()

    def rest(self) -> None:
        """Take back the steps that nobody has made use of."""
        self._steps = asyncio.Semaphore(0)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/metrics":
            return await self._metrics()
        if request.path == "/v1/models" and MARK_HEADER not in request.headers:
            return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})
        body = await request.read()
        digest = hashlib.sha256(body).hexdigest()
        headers = {name.lower(): value for name, value in request.headers.items()}
        if MARK_HEADER in headers:
            self.seen.append(Seen(request.method, request.path, headers, len(body), digest))
        named = {POD_HEADER: self.address, DIGEST_HEADER: digest}
        if _streams(body):
            return await self._stream(request, named)
        return web.Response(body=ANSWER, content_type="application/json", headers=named)

    async def _stream(self, request: web.Request, named: dict[str, str]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **named})
        await response.prepare(request)
        for number in range(int(request.headers.get(EVENTS_HEADER, "3"))):
            if GATE_HEADER in request.headers:
                await self._steps.acquire()
            await response.write(event(request.headers.get(MARK_HEADER, ""), number))
        await response.write(DONE)
        return response

    async def _metrics(self) -> web.Response:
        if self.metrics is Metrics.HANGING:
            await asyncio.Event().wait()
        waiting, usage = (500, 1.0) if self.metrics is Metrics.SATURATED else (0, 0.0)
        label = f'model_name="{self.model}"'
        lines = [
            f"vllm:num_requests_running{{{label}}} {float(waiting)}",
            f"vllm:num_requests_waiting{{{label}}} {float(waiting)}",
            f"vllm:kv_cache_usage_perc{{{label}}} {usage}",
            'vllm:cache_config_info{block_size="16",num_gpu_blocks="20000"} 1.0',
        ]
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")


def _streams(body: bytes) -> bool:
    try:
        return bool(json.loads(body).get("stream"))
    except (ValueError, AttributeError):
        return False


DONE = b"data: [DONE]\n\n"


def event(mark: str, number: int) -> bytes:
    """One event of a stream; `mark` tells streams apart, and its length varies so that frames do not line up."""
    text = f"{mark}-{number}-" + "x" * (number * 37 % 211)
    choice = {"index": 0, "text": text, "finish_reason": None}
    return f"data: {json.dumps({'object': 'text_completion', 'choices': [choice]})}\n\n".encode()


class Pods:
    """All endpoints of a pool."""

    def __init__(self, pods: Sequence[Pod]) -> None:
        self.all = tuple(pods)

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(pod.address for pod in self.all)

    @property
    def up(self) -> tuple[str, ...]:
        return tuple(pod.address for pod in self.all if pod.up)

    def __getitem__(self, address: str) -> Pod:
        return next(pod for pod in self.all if pod.address == address)

    def set_metrics(self, metrics: Metrics) -> None:
        for pod in self.all:
            pod.metrics = metrics

    async def start(self) -> None:
        for pod in self.all:
            if not pod.up:
                await pod.start()

    async def stop(self) -> None:
        for pod in self.all:
            await pod.stop()

    def seen(self, mark: str) -> list[tuple[str, Seen]]:
        """(address, request) of everything that arrived with this mark."""
        return [(pod.address, seen) for pod in self.all for seen in pod.seen if seen.headers[MARK_HEADER] == mark]


@asynccontextmanager
async def running(addresses: Sequence[str], model: str) -> AsyncIterator[Pods]:
    """Pods at these addresses for the length of the block; raises ConfigError where one cannot be taken."""
    pods = Pods([Pod(address, model) for address in addresses])
    try:
        await pods.start()
        yield pods
    finally:
        await pods.stop()


def free_address(host: str = "127.0.0.1") -> str:
    """An address nobody listens on at the moment."""
    with socket.socket() as taken:
        taken.bind((host, 0))
        return f"{host}:{taken.getsockname()[1]}"
