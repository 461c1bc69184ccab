"""What clients of `picker proxy` notice of each fault, under load: the fault table.

python -m bench.faults [--fault NAME ...] [--workers N] [--seconds S] [--json]

Three pods in processes of their own, one picker in its own, and clients that ask all the time, half of them for
streams. Each fault hits the first pod (or all of them, or picker) for a few seconds and is then mended. A request has
failed if its client did not get the whole answer. Of those, `savable` got nothing at all although another endpoint was
there: a retry before the first byte could have saved them. `cut` had received a part; `passed on` got the endpoint's
own 500, which is an answer. Passed means: nothing savable, and nobody waits for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import aiohttp
import click
import yaml
from bench.fault_pod import TOKENS
from rich.console import Console
from rich.table import Table

from picker.bench import machine
from picker.children import free_ports

PODS = 3
_PATIENCE_S = 30.0  # until an answer counts as hanging
_HEALTH = {"hang_floor_s": 1.5, "stall_s": 1.5, "slow_start_s": 2.0, "eject_s": 0.5, "eject_max_s": 4.0}
Row = dict[str, object]


class Process:
    """A child process that can be started again with the same arguments."""

    def __init__(self, port: int, *arguments: str, health: str) -> None:
        self.port = port
        self.health = health  # URL that tells when it is ready
        self.arguments = arguments
        self.child: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self.child = await asyncio.create_subprocess_exec(
            sys.executable, *self.arguments, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(30), aiohttp.ClientSession() as client:
            while self.child.returncode is None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with client.get(self.health) as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(0.05)
        said = b"" if self.child.stderr is None else await self.child.stderr.read()
        raise click.ClickException(f"{' '.join(self.arguments)} ended at its start: {said.decode()[-500:]}")

    def send(self, number: signal.Signals) -> None:
        assert self.child is not None
        self.child.send_signal(number)

    async def ended(self) -> None:
        assert self.child is not None
        await self.child.wait()

    async def stop(self) -> None:
        if self.child is not None and self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(signal.SIGCONT)
                self.child.kill()
            await self.child.wait()


@dataclass(slots=True)
class World:
    """The pods, picker, and the file that lists the endpoints."""

    pods: list[Process]
    picker: Process
    listed: Path
    config: Path
    client: aiohttp.ClientSession
    leaving: bool = False

    def list_pods(self, addresses: dict[str, str]) -> None:
        entries = [{"name": name, "address": address} for name, address in addresses.items()]
        made = self.listed.with_suffix(".new")
        made.write_text(yaml.safe_dump({"endpoints": entries}), encoding="utf-8")
        made.replace(self.listed)

    def addresses(self) -> dict[str, str]:
        return {f"pod-{number}": f"127.0.0.1:{pod.port}" for number, pod in enumerate(self.pods)}

    async def retries(self) -> int | None:
        """How often picker has asked another pod; None where it has gone."""
        with contextlib.suppress(aiohttp.ClientError):
            async with self.client.get(self.picker.health.replace("/readyz", "/metrics")) as response:
                found = re.search(r"^picker_retries (\d+)", await response.text(), re.MULTILINE)
                return None if found is None else int(found[1])
        return None

    async def mode(self, mode: str, pod: int = 0) -> None:
        async with self.client.post(f"{self.pods[pod].url}/_mode", data=mode.encode()) as response:
            await response.read()


@dataclass(slots=True)
class Tally:
    """What the clients have seen. kinds: of failures, in a few words."""

    requests: int = 0
    whole: int = 0
    cut: int = 0
    passed_on: int = 0
    savable: int = 0
    hung: int = 0
    refused: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    @property
    def failed(self) -> int:
        return self.cut + self.passed_on + self.savable + self.hung


async def ask(world: World, number: int, tally: Tally) -> None:
    """One request, and what became of it."""
    stream, got, began = number % 2 == 0, b"", monotonic()
    body = {"model": "m", "messages": [{"role": "user", "content": f"request {number} " + "word " * 200}]}
    tally.requests += 1
    try:
        async with (
            asyncio.timeout(_PATIENCE_S),
            world.client.post(
                f"{world.picker.url}/v1/chat/completions", json=body | {"stream": stream, "max_tokens": TOKENS}
            ) as response,
        ):
            async for piece in response.content.iter_any():
                got += piece
            judge(tally, response.status, got, stream=stream)
    except TimeoutError:
        tally.hung += 1
        tally.kinds["hung"] += 1
    except aiohttp.ClientConnectorError:
        # Only where picker itself has left: then its clients go elsewhere, and nothing was accepted.
        if world.leaving:
            tally.refused += 1
        else:
            tally.savable += 1
            tally.kinds["picker refused"] += 1
    except (aiohttp.ClientError, OSError) as error:
        if got:
            tally.cut += 1
        else:
            tally.savable += 1
        tally.kinds[f"{type(error).__name__} after {'a part' if got else 'nothing'}"] += 1
    tally.slowest_s = max(tally.slowest_s, monotonic() - began)


def judge(tally: Tally, status: int, got: bytes, *, stream: bool) -> None:
    if status == 200 and got.count(b"x") >= TOKENS and (not stream or got.endswith(b"data: [DONE]\n\n")):
        tally.whole += 1
    elif status == 500:
        tally.passed_on += 1
        tally.kinds["500"] += 1
    elif status == 200 and b'"x"' in got:
        tally.cut += 1
        tally.kinds["incomplete"] += 1
    else:
        tally.savable += 1
        tally.kinds[f"{status} {got[:80].decode(errors='replace')}"] += 1


async def load(world: World, workers: int, tally: Tally, over: asyncio.Event) -> None:
    async def work(first: int) -> None:
        number = first
        while not over.is_set():
            await ask(world, number, tally)
            if tally.refused > 50:
                await asyncio.sleep(0.05)
            number += workers

    async with asyncio.TaskGroup() as group:
        for first in range(workers):
            group.create_task(work(first))


# --- the faults --------------------------------------------------------------------------------------------


async def killed(world: World, seconds: float) -> None:
    world.pods[0].send(signal.SIGKILL)
    await asyncio.sleep(seconds)
    await world.pods[0].ended()
    await world.pods[0].start()


async def hung(world: World, seconds: float) -> None:
    world.pods[0].send(signal.SIGSTOP)
    await asyncio.sleep(seconds + 2.0)
    world.pods[0].send(signal.SIGCONT)


async def shut_down(world: World, seconds: float) -> None:
    """As vLLM does it by default."""
    world.pods[0].send(signal.SIGTERM)
    await asyncio.sleep(seconds + 2.0)
    await world.pods[0].stop()
    await world.pods[0].start()


async def restarted(world: World, seconds: float) -> None:
    """Comes back at once, with an empty cache."""
    world.pods[0].send(signal.SIGKILL)
    await world.pods[0].ended()
    await world.pods[0].start()
    await asyncio.sleep(seconds)


def in_mode(mode: str) -> Callable[[World, float], Awaitable[None]]:
    async def fault(world: World, seconds: float) -> None:
        await world.mode(mode)
        await asyncio.sleep(seconds)
        await world.mode("ok")

    return fault


async def nameless(world: World, seconds: float) -> None:
    """Its name means nothing any more."""
    world.list_pods(world.addresses() | {"pod-0": f"pod-0.invalid:{world.pods[0].port}"})
    await asyncio.sleep(seconds)
    world.list_pods(world.addresses())


async def rolling(world: World, seconds: float) -> None:
    """All pods, one after the other: each drains as vLLM with --shutdown-timeout, ends and comes back."""
    for pod in world.pods:
        pod.send(signal.SIGTERM)
        await pod.ended()
        await pod.start()
        await asyncio.sleep(max(1.5, seconds / PODS))


async def rolling_abrupt(world: World, seconds: float) -> None:
    """The same, but each is killed."""
    for pod in world.pods:
        pod.send(signal.SIGKILL)
        await pod.ended()
        await pod.start()
        await asyncio.sleep(max(2.5, seconds / PODS))


async def reloaded(world: World, seconds: float) -> None:
    """The list of endpoints loses one, gets it back, and changes in the middle of requests."""
    everybody = world.addresses()
    for _ in range(2):
        world.list_pods({name: address for name, address in everybody.items() if name != "pod-0"})
        await asyncio.sleep(max(1.5, seconds / 4))
        world.list_pods(everybody)
        await asyncio.sleep(max(1.5, seconds / 4))


async def reconfigured(world: World, seconds: float) -> None:
    """The configuration changes, and picker is told so (SIGHUP), several times."""
    before = yaml.safe_load(world.config.read_text(encoding="utf-8"))
    for number in range(4):
        changed = before | {"queue": {"timeout_s": 50.0 + number}, "limits": {"max_body_bytes": 1_000_000 + number}}
        made = world.config.with_suffix(".new")
        made.write_text(yaml.safe_dump(changed), encoding="utf-8")
        made.replace(world.config)
        world.picker.send(signal.SIGHUP)
        await asyncio.sleep(max(0.5, seconds / 4))


async def left(world: World, seconds: float) -> None:
    """picker itself is told to stop; whoever finds its port closed goes elsewhere."""
    world.leaving = True
    world.picker.send(signal.SIGTERM)
    await world.picker.ended()


FAULTS: dict[str, Callable[[World, float], Awaitable[None]]] = {
    "none": in_mode("ok"),
    "killed": killed,
    "hung": hung,
    "shut-down-vllm": shut_down,
    "drains-with-abort": in_mode("abort"),
    "reset-before-head": in_mode("reset"),
    "reset-mid-stream": in_mode("reset-mid"),
    "slow-loris": in_mode("loris"),
    "returns-500": in_mode("error"),
    "returns-503": in_mode("busy"),
    "returns-garbage": in_mode("garbage"),
    "restarts-empty": restarted,
    "dns-gone": nameless,
    "metrics-gone": in_mode("metrics-gone"),
    "metrics-reset": in_mode("metrics-reset"),
    "rolling-restart": rolling,
    "rolling-kill": rolling_abrupt,
    "endpoints-reload": reloaded,
    "config-reload": reconfigured,
    "picker-sigterm": left,
}
_DRAINING = ("rolling-restart",)  # whose pods are told to drain


@contextlib.asynccontextmanager
async def world_for(fault: str, folder: Path) -> AsyncIterator[World]:
    """Everything started and known to picker."""
    term = "drain" if fault in _DRAINING else "vllm"
    *ports, port, admin = free_ports(PODS + 2)
    pods = [
        Process(
            each,
            *("-m", "bench.fault_pod", "--port", str(each), "--on-term", term),
            health=f"http://127.0.0.1:{each}/health",
        )
        for each in ports
    ]
    listed, config = folder / f"{fault}.endpoints.yaml", folder / f"{fault}.yaml"
    settings = {
        "endpoints_file": str(listed),
        "scrape": {"interval_s": 0.3, "timeout_s": 0.5},
        "health": _HEALTH,
        "proxy": {"port": port, "drain_delay_s": 0.5, "survey": False},
        "admin": {"port": admin},
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    arguments = ("-m", "picker", "proxy", "--config", str(config), "--log-level", "error")
    picker = Process(port, *arguments, health=f"http://127.0.0.1:{admin}/readyz")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        world = World(pods, picker, listed, config, client)
        world.list_pods(world.addresses())
        try:
            await asyncio.gather(*(pod.start() for pod in pods))
            await picker.start()
            yield world
        finally:
            for process in (picker, *pods):
                await process.stop()


async def run_one(fault: str, workers: int, seconds: float, folder: Path) -> Row:
    tally, over, began = Tally(), asyncio.Event(), monotonic()
    async with world_for(fault, folder) as world, asyncio.TaskGroup() as group:
        loading = group.create_task(load(world, workers, tally, over))
        await asyncio.sleep(1.5)
        await FAULTS[fault](world, seconds)
        await asyncio.sleep(1.5)
        retries = await world.retries()
        over.set()
        await loading
    row: Row = {"fault": fault, "requests": tally.requests, "whole": tally.whole, "failed": tally.failed}
    row |= {"savable": tally.savable, "cut": tally.cut, "passed_on": tally.passed_on, "hung": tally.hung}
    row |= {
        "retries": retries,
        "slowest_s": round(tally.slowest_s, 3),
        "kinds": dict(tally.kinds),
        "not_accepted": tally.refused,
    }
    return row | {"passed": not tally.savable and not tally.hung, "took_s": round(monotonic() - began, 1)}


def show(rows: Sequence[Row]) -> None:
    table = Table(title=f"{PODS} pods, commit {machine.describe()['commit']}")
    columns = ("fault", "requests", "failed", "savable", "cut", "passed_on", "hung", "retries", "slowest_s", "kinds")
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(str(row[column]) if row[column] != {} else "" for column in columns))
    Console(width=None if Console().is_terminal else 180).print(table)


@click.command(help=__doc__)
@click.option("--fault", "faults", multiple=True, type=click.Choice(list(FAULTS)), help="Only these.  [default: all]")
@click.option("--workers", type=click.IntRange(1), default=16, show_default=True, help="Clients.")
@click.option("--seconds", type=click.FloatRange(0.1), default=4.0, show_default=True, help="How long a fault lasts.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(faults: Sequence[str], workers: int, seconds: float, as_json: bool) -> None:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for fault in faults or FAULTS:
            rows.append(asyncio.run(run_one(fault, workers, seconds, Path(folder))))
            click.echo(
                f"{fault}: {'passed' if rows[-1]['passed'] else 'FAILED'}, {rows[-1]['failed']} failed", err=True
            )
    if as_json:
        about = {
            "machine": machine.describe(),
            "command": shlex.join(["python", "-m", "bench.faults", *sys.argv[1:]]),
            "health": _HEALTH,
        }
        click.echo(json.dumps({"bench": "faults", "rows": rows, "workers": workers, "seconds": seconds, **about}))
    else:
        show(rows)
    sys.exit(0 if all(row["passed"] for row in rows) else 1)


if __name__ == "__main__":
    command()
