"""One of two replicas behind one Envoy is killed under load, and started anew: what is lost, and when it knows again.

python -m bench.replica_death [--mode full|lean] [--redis URL] [--rounds N] [--json]

Clients ask again once what was refused before anything was answered, as a gateway in front would. `knows_s`: from the
start of the new process until it believes 95 % of the blocks cached that the survivor does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import click

from picker import envoy
from picker.bench import machine
from picker.children import free_ports, supervised

Row = dict[str, Any]

_CLIENTS, _SESSIONS = 16, 200
_PAUSE = 0.2  # seconds between two questions: what is measured is not how busy the machine is
_SYSTEM = "You are a helpful assistant that answers in a few words. " * 20
_SECRET = "what all replicas of this bench know"
_ENOUGH = 0.95
_POD = re.compile(r"pod on (http://\S+)")
_EXT_PROC = re.compile(r"ext-proc on \S*?:(\d+), health on :(\d+)")
_ADMIN = re.compile(r"debug on (http://\S+)")


# One failure to connect and Envoy leaves a replica alone for a second; health checks take as long to notice.
_OUTLIERS: envoy.Json = {
    "split_external_local_origin_errors": True,
    "consecutive_local_origin_failure": 1,
    "base_ejection_time": "1s",
    "interval": "0.2s",
    "max_ejection_percent": 50,
}


class Replica:
    """A `picker epp` that can be killed and started anew on the same ports."""

    def __init__(self, folder: Path, name: str, flags: list[str]) -> None:
        self.grpc, self.health, self.peer = free_ports(3)
        self.admin = ""
        self._name, self._flags = name, flags
        self._log = folder / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, peers: list[int]) -> None:
        bus = [flag for port in peers for flag in ("--peer", f"127.0.0.1:{port}")]
        own = ["--host", "127.0.0.1", "--grpc-port", str(self.grpc), "--grpc-health-port", str(self.health)]
        more = ["--metrics-port", "0", "--peer-port", str(self.peer), "--secure-serving", "false", *bus, *self._flags]
        environment = os.environ | {"PICKER_REPLICAS_SECRET": _SECRET, "POD_NAME": self._name}
        with self._log.open("wb") as out:
            command = (sys.executable, "-m", "picker", "epp", *own, *more, "--log-level", "warning")
            self._process = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out, env=environment)
        self.admin = (await self._said(_ADMIN))[1]
        await self._said(_EXT_PROC)

    async def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    async def _said(self, pattern: re.Pattern[str]) -> re.Match[str]:
        assert self._process is not None
        while not (found := pattern.search(self._log.read_text(errors="replace"))):
            if self._process.returncode is not None:
                raise RuntimeError(self._log.read_text(errors="replace")[-2000:])
            await asyncio.sleep(0.005)
        return found

    async def blocks(self, session: aiohttp.ClientSession) -> dict[str, int]:
        """Blocks that it believes to be cached, by endpoint."""
        async with session.get(f"{self.admin}/debug/endpoints") as response:
            return {each["name"]: each["index_blocks"] for each in (await response.json())["endpoints"]}

    async def others(self, session: aiohttp.ClientSession) -> int:
        async with session.get(f"{self.admin}/readyz") as response:
            return int((await response.json())["replicas"]["connected"])


class Load:
    """Clients that ask one question after the other, each of one of many sessions that grow."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._rng = random.Random(1)
        self._sessions = [f"{_SYSTEM} Session {number}. " for number in range(_SESSIONS)]
        self.asked = self.refused = self.saved = self.lost = self.broken = 0
        self.slowest = 0.0

    async def client(self, session: aiohttp.ClientSession) -> None:
        while True:
            number = self._rng.randrange(_SESSIONS)
            self._sessions[number] += "Tell me something more about that, please, and why it is so. " * 3
            if len(self._sessions[number]) > 20_000:
                self._sessions[number] = f"{_SYSTEM} Session {number}, again. "
            await self._ask(session, self._sessions[number])
            await asyncio.sleep(_PAUSE)

    async def _ask(self, session: aiohttp.ClientSession, prompt: str) -> None:
        self.asked += 1
        began = time.perf_counter()
        if not await self._once(session, prompt):
            self.refused += 1
            again = await self._once(session, prompt)
            self.saved += again
            self.lost += not again
        self.slowest = max(self.slowest, time.perf_counter() - began)

    async def _once(self, session: aiohttp.ClientSession, prompt: str) -> bool:
        """False where it was refused before anything was answered."""
        begun = False
        body = {"model": "m", "prompt": prompt, "max_tokens": 16, "stream": True}
        try:
            async with session.post(self._url, json=body) as response:
                if response.status != 200:
                    return False
                async for line in response.content:
                    begun = begun or bool(line.strip())
                    if b"[DONE]" in line:
                        return True
        except aiohttp.ClientError:
            pass
        self.broken += begun
        return begun


@contextlib.asynccontextmanager
async def clients(load: Load) -> AsyncIterator[None]:
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        tasks = [group.create_task(load.client(session)) for _ in range(_CLIENTS)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def measure(mode: str, redis: str | None) -> Row:
    with tempfile.TemporaryDirectory(prefix="picker-bench-") as folder:
        async with supervised() as children, aiohttp.ClientSession() as session:
            sim = ("sim", "--count", "4", "--port", "0", "--model", "m", "--profile", "llama-3.1-8b-h100")
            pods = await children.announced(await children.start_picker("pods", *sim), _POD, timeout=60, count=4)
            flags = ["--mode", mode, *(("--peer-redis", redis) if redis else ())]
            flags += [flag for pod in pods for flag in ("--endpoint", pod)]
            both = [Replica(Path(folder), name, flags) for name in ("one", "two")]
            peers = [] if redis else [each.peer for each in both]
            try:
                for each in both:
                    await each.start(peers)
                async with envoy.running_envoy(gateway(pods, both, mode)) as running:
                    load = Load(f"http://127.0.0.1:{running.ports[envoy.GATEWAY]}/v1/completions")
                    return await _story(load, both, peers, session)
            finally:
                for each in both:
                    await each.kill()


async def _story(load: Load, both: list[Replica], peers: list[int], session: aiohttp.ClientSession) -> Row:
    dies, survives = both
    while await survives.others(session) < 1:  # noqa: ASYNC110 - another process's doing
        await asyncio.sleep(0.05)
    await asyncio.sleep(1.5)  # Envoy's health check
    async with clients(load):
        await asyncio.sleep(8)
        before, load.refused, load.lost, load.broken, load.saved, load.slowest = load.asked, 0, 0, 0, 0, 0.0
        agreed = share(await dies.blocks(session), await survives.blocks(session))
        await dies.kill()
        await asyncio.sleep(3)
        started = time.perf_counter()
        await dies.start(peers)
        serves = time.perf_counter() - started
        known = 0.0
        while known < _ENOUGH:
            await asyncio.sleep(0.02)
            known = share(await dies.blocks(session), await survives.blocks(session))
        knows = time.perf_counter() - started
        await asyncio.sleep(3)
        blocks = sum((await survives.blocks(session)).values())
    return {
        "requests": load.asked - before,
        "refused": load.refused,
        "saved_by_asking_again": load.saved,
        "lost": load.lost,
        "broken_off": load.broken,
        "slowest_s": load.slowest,
        "agreement_before": agreed,
        "serves_s": serves,
        "knows_s": knows,
        "agreement": known,
        "blocks": blocks,
    }


def gateway(pods: list[str], both: list[Replica], mode: str) -> envoy.Json:
    """An Envoy that takes turns, and asks the other where one cannot be reached."""
    config = envoy.bootstrap(
        [pod.removeprefix("http://") for pod in pods], f"127.0.0.1:{both[0].grpc}", lean=mode == "lean"
    )
    for cluster in config["static_resources"]["clusters"]:
        if cluster["name"] == envoy.EXT_PROC:
            cluster |= {"lb_policy": "ROUND_ROBIN", "outlier_detection": _OUTLIERS}
            members = [{"endpoint": {"address": envoy.socket_address(f"127.0.0.1:{each.grpc}")}} for each in both]
            for member, each in zip(members, both, strict=True):
                member["endpoint"]["health_check_config"] = {"port_value": each.health}
            cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": members}]
    return config


def share(known: dict[str, int], wanted: dict[str, int]) -> float:
    """How much of what one believes to be cached another does, endpoint by endpoint."""
    every = sum(wanted.values())
    return sum(min(known.get(name, 0), blocks) for name, blocks in wanted.items()) / every if every else 1.0


@click.command(help=__doc__)
@click.option("--mode", "modes", type=click.Choice(("full", "lean")), multiple=True, default=("full", "lean"))
@click.option("--redis", metavar="URL", help="Let them speak through this Redis.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(modes: tuple[str, ...], redis: str | None, rounds: int, as_json: bool) -> None:
    rows: list[Row] = []
    for mode in modes:
        for _ in range(rounds):
            row = {"mode": mode, "bus": "redis" if redis else "direct"} | asyncio.run(measure(mode, redis))
            rows.append(row)
            click.echo(_line(row), err=True)
    knows = statistics.median([float(row["knows_s"]) for row in rows])
    about = {"machine": machine.describe(), "command": shlex.join(sys.argv)}
    click.echo(json.dumps({"bench": "replica-death", "rows": rows, **about}) if as_json else f"knows_s {knows:.3g}")


def _line(row: Row) -> str:
    return "  ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


if __name__ == "__main__":
    main()
