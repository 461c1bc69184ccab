"""How often picker knows what an engine has cached: a workload through `picker proxy` in front of real servers.

Owns the proxy's process and the sending; `prediction` judges. `python -m real_vllm.accuracy [FLAGS OF picker proxy]`
prints the table for this machine; MODEL among the flags stands for the model directory.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from picker.children import Children, supervised
from real_vllm.install import home
from real_vllm.pod import Pod, new_pod
from real_vllm.prediction import Comparison, Row
from real_vllm.script import Answer, Step, Steps
from real_vllm.tiny_model import write_model
from real_vllm.workload import workload

Disturbances = Mapping[int, Callable[[], Awaitable[None]]]
States = list[dict[str, Any]]

REQUESTS = 300
_PATIENCE = 30.0  # seconds
_PROXY = re.compile(r"picker proxy on (http://\S+)/v1")
_ADMIN = re.compile(r"metrics, health and debug on (http://\S+)")


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running `picker proxy`: where clients go, and its admin API."""

    client: httpx.AsyncClient
    admin: httpx.AsyncClient

    async def send(self, number: int, step: Step) -> tuple[Row | str, Answer]:
        """One request; why there is no row where the engine refused it, or another than the chosen one answered."""
        content = json.dumps(step.body, ensure_ascii=False).encode()
        response = await self.client.post(step.path, content=content, headers={"content-type": "application/json"})
        answer = Answer(response.status_code, response.json())
        if answer.status != httpx.codes.OK or answer.cached is None or answer.usage is None:
            return f"status {answer.status}", answer
        decision = await self._decision(response.headers["x-picker-request-id"])
        served = response.headers["x-picker-endpoint"]
        if decision["endpoint"] != served:
            return "served by another endpoint than the chosen one", answer
        prompt = answer.usage["prompt_tokens"]
        return Row(number, step.name, served, prompt, float(decision["matched_tokens"]), answer.cached), answer

    async def until(self, ready: Callable[[States], bool]) -> None:
        """Wait until the endpoints, as picker sees them, are what `ready` wants. Raises TimeoutError."""

        async def seen() -> bool:
            return ready((await self.admin.get("/debug/endpoints")).json()["endpoints"])

        await _polled(seen)

    async def _decision(self, request_id: str) -> dict[str, Any]:
        """What was decided of a request, once picker has seen the end of it."""
        record: dict[str, Any] = {}

        async def ended() -> bool:
            record.update((await self.admin.get(f"/debug/decisions/{request_id}")).json())
            return record["end"] is not None

        await _polled(ended)
        decision: dict[str, Any] = record["decision"]
        return decision


async def _polled(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(_PATIENCE):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def picker_before(pods: Sequence[Pod], *flags: str) -> AsyncIterator[Gateway]:
    """`picker proxy` in front of these servers, which it has found healthy."""
    endpoints = [flag for pod in pods for flag in ("--endpoint", pod.url)]
    options = ["--port", "0", "--admin-port", "0", "--scrape-interval", "0.2", "--seed", "1", *endpoints, *flags]
    async with supervised() as children:
        proxy, admin = await _started(children, options)
        async with (
            httpx.AsyncClient(base_url=proxy, timeout=120.0) as client,
            httpx.AsyncClient(base_url=admin, timeout=10.0) as debug,
        ):
            gateway = Gateway(client, debug)
            await gateway.until(lambda states: len(states) == len(pods) and all(_known(state) for state in states))
            yield gateway


async def _started(children: Children, options: Sequence[str]) -> tuple[str, str]:
    child = await children.start_picker("picker", "proxy", *options)
    (proxy,) = await children.announced(child, _PROXY, timeout=_PATIENCE)
    (admin,) = await children.announced(child, _ADMIN, timeout=_PATIENCE)
    return proxy, admin


def _known(state: Mapping[str, Any]) -> bool:
    return bool(state["healthy"] and state["models"])


async def measure(gateway: Gateway, steps: Steps, disturbances: Disturbances | None = None) -> Comparison:
    """Send a workload through picker, one request at a time. disturbances: what happens before which request."""
    comparison = Comparison()
    number, step = 0, next(steps, None)
    while step is not None:
        if disturbances and number in disturbances:
            await disturbances[number]()
        row, answer = await gateway.send(number, step)
        comparison.add(row)
        number += 1
        try:
            step = steps.send(answer)
        except StopIteration:
            break
    return comparison


async def _compare(pods: Sequence[Pod], flags: Sequence[str]) -> Comparison:
    async with picker_before(pods, *flags) as gateway:
        return await measure(gateway, workload(seed=1, count=REQUESTS))


def main(flags: Sequence[str]) -> None:
    """In front of two servers, with blocks of 32 and of 64 tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model")
        pods = [new_pod(home(), model, folder, f"pod-{size}", block_size=size) for size in (32, 64)]
        words = [flag.replace("MODEL", str(model)) for flag in flags]
        try:
            for pod in pods:
                pod.start()
            for pod in pods:
                pod.wait()
            print(asyncio.run(_compare(pods, words)))
        finally:
            for pod in pods:
                pod.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
