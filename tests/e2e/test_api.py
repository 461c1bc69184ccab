"""The gRPC API of a picker process, used as docs/api.md says: its examples route real traffic to simulated pods."""

import asyncio
import contextlib
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from dead_port import dead_port
from picker.children import free_ports
from picker.client import Client, RefusedError
from picker.sim.pod import running_pods

pytestmark = pytest.mark.e2e

DOCS = Path(__file__).parent.parent.parent / "docs" / "api.md"
NGINX = os.environ.get("PICKER_NGINX") or shutil.which("nginx")
FREE = (
    "--host",
    "127.0.0.1",
    "--grpc-port",
    "0",
    "--grpc-health-port",
    "0",
    "--metrics-port",
    "0",
    "--drain-delay",
    "0",
)
COMMANDS = {
    "proxy": ("proxy", "--port", "0", "--admin-port", "0"),
    "epp": ("epp", *FREE),
    "workers": ("epp", *FREE, "--workers", "1"),
}


def example(name: str) -> str:
    """A file that the documentation shows, by the name in its first line."""
    blocks = re.findall(r"```\w+\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return next(str(block) for block in blocks if block.startswith(f"# {name}"))


class Process:
    """A program and what it says."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log

    async def says(self, pattern: str) -> str:
        async with asyncio.timeout(60):
            while not (found := re.search(pattern, self.log.read_text())):
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.02)
        return found[1]


@contextlib.asynccontextmanager
async def running(log: Path, *command: str, cwd: Path | None = None) -> AsyncIterator[Process]:
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output, cwd=cwd)
    try:
        yield Process(process, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def picker(folder: Path, command: str, pods: list[str], *flags: str) -> AsyncIterator[tuple[Process, str, str]]:
    """A picker that knows its pods: the process, the API's address, the admin API's URL."""
    endpoints = [part for pod in pods for part in ("--endpoint", pod)]
    argv = (sys.executable, "-m", "picker", *COMMANDS[command], "--api-port", "0", *endpoints, *flags)
    async with running(folder / "picker.log", *argv) as process:
        admin = await process.says(r"debug on (http://\S+)")
        target = await process.says(r"gRPC API is on (\S+),")
        async with Client(target) as client, asyncio.timeout(60):
            async for states in client.watch(interval=0.1):
                if sum(bool(state.models) for state in states.values()) == len(pods):
                    break
        yield process, target, admin


async def metric(admin: str, name: str) -> float:
    async with aiohttp.ClientSession() as http, http.get(f"{admin}/metrics") as response:
        found = re.search(rf"^{name} (\S+)$", await response.text(), re.MULTILINE)
        assert found is not None
        return float(found[1])


async def settled(admin: str) -> None:
    """Wait until picker counts nothing in flight."""
    async with asyncio.timeout(60):
        while await metric(admin, "picker_inflight_requests") or await metric(admin, "picker_api_picks"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def route(folder: Path, target: str, *prompts: str) -> list[tuple[str, int]]:
    """Send prompts by the documented router; who answered each, and how many tokens of it were cached there."""
    (folder / "route.py").write_text(example("route.py"))
    async with running(
        folder / "route.log", sys.executable, "route.py", target, "demo", *prompts, cwd=folder
    ) as script:
        async with asyncio.timeout(60):
            assert await script.process.wait() == 0, script.log.read_text()
        lines = [line.split() for line in script.log.read_text().splitlines()]
        return [(name, int(cached)) for name, cached in lines]


@pytest.mark.parametrize("command", ["proxy", "workers"])
async def test_the_documented_router_sends_conversations_back_to_their_cache(tmp_path: Path, command: str) -> None:
    texts = [f"Story {number}: " + "once upon a time there was a king; " * 600 for number in range(4)]
    async with running_pods(3, model="demo", time_scale=10.0) as pods, picker(tmp_path, command, pods) as this:
        _, target, admin = this
        served = await route(tmp_path, target, *texts, *texts)
        first, second = served[:4], served[4:]
        assert [name for name, _ in first] == [name for name, _ in second]
        assert all(cached > 4000 for _, cached in second)
        await settled(admin)
        assert await metric(admin, "picker_cached_tokens_total") == sum(cached for _, cached in served)


HANG = """
import asyncio, sys
from picker.client import Client, Features
async def main():
    async with Client(sys.argv[1]) as picker:
        picks = [await picker.ask(Features(prompt_tokens=1000)) for _ in range(3)]
        picks[0].started(200)
        print("picked", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_clients_and_endpoints_that_are_gone_and_a_picker_that_goes(tmp_path: Path) -> None:
    body = b'{"model": "demo", "prompt": "Once"}'
    async with contextlib.AsyncExitStack() as stack:
        dead = f"http://{stack.enter_context(dead_port())}"
        pods = await stack.enter_async_context(running_pods(1, model="demo", time_scale=50.0))
        process, target, admin = await stack.enter_async_context(picker(tmp_path, "epp", pods, "--endpoint", dead))
        async with running(tmp_path / "hang.log", sys.executable, "-c", HANG, target) as client:
            await client.says("(picked)")
            assert await metric(admin, "picker_api_picks") == 3
        served = await route(tmp_path, target, *(f"Question {number}" for number in range(4)))
        assert {name for name, _ in served} == {pods[0].removeprefix("http://")}
        await settled(admin)  # also of the client that was killed
        async with Client(target) as client_, client_.pick(body, path="/v1/completions") as picked:
            process.process.terminate()
            assert (await _refusal(client_, body)).reason == "shutdown"
            assert process.process.returncode is None
            picked.finished()
            async with asyncio.timeout(60):
                assert await process.process.wait() == 0


async def _refusal(client: Client, body: bytes) -> RefusedError:
    """Ask until picker does not pick any more."""
    while True:
        try:
            (await client.ask(body, path="/v1/completions")).finished()
        except RefusedError as refusal:
            return refusal


@pytest.mark.skipif(
    NGINX is None, reason="there is no nginx: install it (apt-get install nginx), or say where it is in PICKER_NGINX"
)
async def test_plain_nginx_routes_by_auth_request(tmp_path: Path) -> None:
    ports = dict(zip(("8080", "8081", "8082"), free_ports(3), strict=True))
    config = re.sub(r"127\.0\.0\.1:(\d+)", lambda found: f"127.0.0.1:{ports[found[1]]}", example("nginx.conf"))
    (tmp_path / "nginx.conf").write_text(config)
    (tmp_path / "sidecar.py").write_text(example("sidecar.py"))
    url = f"http://127.0.0.1:{ports['8080']}/v1/completions"
    async with contextlib.AsyncExitStack() as stack:
        pods = await stack.enter_async_context(running_pods(2, model="demo", time_scale=20.0))
        _, target, admin = await stack.enter_async_context(picker(tmp_path, "epp", pods))
        sidecar = (sys.executable, "sidecar.py", target, str(ports["8081"]), str(ports["8082"]))
        await stack.enter_async_context(running(tmp_path / "sidecar.log", *sidecar, cwd=tmp_path))
        nginx = (str(NGINX), "-p", str(tmp_path), "-c", "nginx.conf")
        await stack.enter_async_context(running(tmp_path / "nginx.log", *nginx, cwd=tmp_path))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        await _answering(http, url)
        answers = await asyncio.gather(*(_complete(http, url) for _ in range(12)))
        assert [status for status, _ in answers] == [200] * 12
        await settled(admin)
        async with http.get(f"{admin}/metrics") as response:
            picks = re.findall(r'picker_picks_total\{endpoint="(\S+?)"\} (\S+)', await response.text())
        assert {name for name, _ in picks} == {pod.removeprefix("http://") for pod in pods}


async def _answering(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                if (await _complete(http, url))[0] == 200:
                    return
            await asyncio.sleep(0.05)


async def _complete(http: aiohttp.ClientSession, url: str) -> tuple[int, Any]:
    async with http.post(url, json={"model": "demo", "prompt": "Once upon a time", "max_tokens": 20}) as response:
        return response.status, await response.read()
