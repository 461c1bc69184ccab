"""Two `picker epp` that share what they know, as processes of their own behind one real Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from picker.bench.cputime import family, table
from picker.children import free_ports
from picker.envoy import EXT_PROC, GATEWAY, Envoy, Json, bootstrap, find_envoy, running_envoy, socket_address
from picker.errors import ConfigError

SECRET = {"PICKER_REPLICAS_SECRET": "what both replicas of this test know"}
SERVER = shutil.which("redis-server") or shutil.which("valkey-server")
Figures = dict[str, float]


def envoy_missing() -> str:
    """Why tests with Envoy cannot run; empty when they can."""
    try:
        find_envoy()
    except ConfigError as error:
        return str(error)
    return ""


@dataclass
class Picker:
    process: asyncio.subprocess.Process
    log: Path
    port: int
    health: int
    admin: str

    async def figures(self) -> Figures:
        async with aiohttp.ClientSession() as session, session.get(f"{self.admin}/metrics") as response:
            lines = (await response.text()).splitlines()
        return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    async def until(self, condition: Callable[[Figures], bool]) -> Figures:
        """Wait for figures; those of a decider that is just being started again are none."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    if condition(found := await self.figures()):
                        return found
                await asyncio.sleep(0.02)

    async def json(self, path: str) -> Any:
        async with aiohttp.ClientSession() as session, session.get(f"{self.admin}{path}") as response:
            return await response.json()

    async def blocks(self) -> int:
        """How many it believes to be cached, at all endpoints."""
        return sum(each["index_blocks"] for each in (await self.json("/debug/endpoints"))["endpoints"])

    def pid(self, name: str) -> int:
        """Of one of its processes, where there are several."""
        for process in family(table(), self.process.pid)[1:]:
            with contextlib.suppress(OSError):
                *_, said, _ = ["", *Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")]
                if said == name:
                    return process.pid
        raise LookupError(name)


@contextlib.asynccontextmanager
async def picker(folder: Path, name: str, *flags: str) -> AsyncIterator[Picker]:
    log = folder / f"{name}.log"
    own = ("--host", "127.0.0.1", "--grpc-port", "0", "--grpc-health-port", "0", "--metrics-port", "0")
    command = (sys.executable, "-m", "picker", "epp", *own, "--secure-serving", "false", *flags)
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out, env=os.environ | SECRET)
    try:
        async with asyncio.timeout(60):
            while not (found := re.search(r"ext-proc on \S*?:(\d+), health on :(\d+)", log.read_text())):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)
        admin = re.search(r"debug on (http://\S+)", log.read_text())
        assert admin is not None
        yield Picker(process, log, int(found[1]), int(found[2]), admin[1])
    finally:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def redis(folder: Path) -> AsyncIterator[str]:
    assert SERVER is not None
    path = f"{folder}/redis.sock"
    own = ("--port", "0", "--unixsocket", path, "--save", "", "--dir", str(folder))
    process = await asyncio.create_subprocess_exec(SERVER, *own, stdout=asyncio.subprocess.DEVNULL)
    try:
        yield f"unix://{path}"
    finally:
        process.kill()
        await process.wait()


def in_turn(upstream: str, both: Sequence[Picker], *, lean: bool) -> Json:
    """An Envoy that asks them in turn, and in lean mode opens its one log to either."""
    config = bootstrap([upstream], f"127.0.0.1:{both[0].port}", lean=lean)
    (cluster,) = [each for each in config["static_resources"]["clusters"] if each["name"] == EXT_PROC]
    members = [{"endpoint": {"address": socket_address(f"127.0.0.1:{each.port}")}} for each in both]
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": members}]
    cluster["lb_policy"] = "ROUND_ROBIN"
    return config


@dataclass
class World:
    one: Picker
    two: Picker
    envoy: Envoy

    async def ask(self, count: int, prompt: Callable[[int], str] = lambda number: "Once upon a time") -> None:
        url = f"http://127.0.0.1:{self.envoy.ports[GATEWAY]}/v1/completions"
        async with aiohttp.ClientSession() as session:
            for number in range(count):
                async with session.post(url, json={"model": "m", "prompt": prompt(number)}) as response:
                    assert response.status == 200
                    await response.read()


@contextlib.asynccontextmanager
async def two(
    folder: Path, upstream: str, *, bus: str = "direct", mode: str = "full", second: Sequence[str] = ()
) -> AsyncIterator[World]:
    """Both know each other. second: further flags of the second."""
    async with contextlib.AsyncExitStack() as stack:
        ports = free_ports(2)
        flags = [["--peer-port", str(port), "--peer", f"127.0.0.1:{sum(ports) - port}"] for port in ports]
        if bus == "redis":
            flags = [["--peer-redis", await stack.enter_async_context(redis(folder))]] * 2
        common = ("--endpoint", f"http://{upstream}", "--mode", mode)
        async with asyncio.TaskGroup() as group:
            started = [
                group.create_task(stack.enter_async_context(picker(folder, name, *common, *each, *more)))
                for name, each, more in zip(("one", "two"), flags, ((), second), strict=True)
            ]
        one, other = (task.result() for task in started)
        for each in (one, other):
            await each.until(lambda figures: figures["picker_replicas"] == 1)
        config = in_turn(upstream, (one, other), lean=mode == "lean")
        yield World(one, other, await stack.enter_async_context(running_envoy(config)))
