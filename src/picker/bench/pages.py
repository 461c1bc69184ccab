"""Many idle engines in one process, as a scraper sees them: a port each, a page of metrics and a model list.

`python -m picker.bench.pages COUNT FILE` serves until it is ended; it says so once it listens and `FILE` names the
endpoints. The page is the simulated pod's, of a pod that has served some requests; it is made once, so that the servers
cost little beside the scraper they are there for.
"""

from __future__ import annotations

import asyncio
import math
import resource
import sys
from pathlib import Path
from typing import cast

from picker.sim.engine import Engine, EngineRequest
from picker.sim.latency import profile
from picker.sim.pod_metrics import CONTENT_TYPE, PodMetrics

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
# Answers with how many pages of metrics all of them together have served.
SERVED = b"/served"
_MODELS = b'{"object":"list","data":[{"id":"%b","object":"model","max_model_len":131072}]}' % MODEL.encode()
_REQUESTS = 8


def page(requests: int = _REQUESTS) -> bytes:
    """What a vLLM shows at /metrics after so many requests, now idle."""
    engine = Engine(profile("llama-3.1-8b-h100"))
    metrics, now = PodMetrics(engine, MODEL, started_at=1.5e9), 0.0
    for number in range(requests):
        engine.add(EngineRequest(number, 1000, 50, list(range(62)), arrived_at=now), now)
        while (result := engine.step(now, math.inf)) is not None:
            now += result.duration
            metrics.step(result)
            for record in result.finished:
                metrics.finished(record, max_tokens=50, choices=1)
    return metrics.render(now=1.6e9)


class Pages:
    """What is answered by path, and how often."""

    def __init__(self) -> None:
        self.served = 0
        self._metrics = answer(page(), CONTENT_TYPE)
        self._models = answer(_MODELS, "application/json")

    def take(self, path: bytes) -> bytes:
        if path == b"/metrics":
            self.served += 1
            return self._metrics
        if path == SERVED:
            return answer(str(self.served).encode(), "text/plain")
        return self._models


def answer(body: bytes, kind: str) -> bytes:
    """Head and body of a response as uvicorn sends it."""
    head = (
        f"HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 10:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: {len(body)}\r\n"
    )
    return f"{head}content-type: {kind}\r\n\r\n".encode() + body


class _Connection(asyncio.Protocol):
    """A kept-alive connection; requests have no bodies and come one at a time."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._begun = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._begun += data
        if self._begun.endswith(b"\r\n\r\n"):
            path = self._begun.split(b" ", 2)[1]
            self._begun = b""
            self._transport.write(self._pages.take(path))


async def _serve(count: int, file: Path) -> None:
    loop, pages = asyncio.get_running_loop(), Pages()
    servers = [await loop.create_server(lambda: _Connection(pages), "127.0.0.1", 0) for _ in range(count)]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    lines = [f"- {{address: 127.0.0.1, port: {port}}}" for port in ports]
    await asyncio.to_thread(file.write_text, "\n".join(["endpoints:", *lines, ""]), encoding="utf-8")
    sys.stdout.write(f"pages on http://127.0.0.1:{ports[0]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def main(count: int, file: Path) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_serve(count, file))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
