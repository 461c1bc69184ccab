"""`picker epp --workers 2` behind a real Envoy: one truth, whoever of its processes dies."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from echo_upstream import EchoUpstream
from picker.bench.cputime import family, table
from picker.envoy import GATEWAY, Envoy, bootstrap, find_envoy, running_envoy
from picker.errors import ConfigError

try:
    find_envoy()
    missing = ""
except ConfigError as error:
    missing = str(error)

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing), reason=missing)]

PROMPT = {"model": "m", "prompt": "Once upon a time"}
EPP = (
    *(sys.executable, "-m", "picker", "epp", "--host", "127.0.0.1", "--grpc-port", "0", "--grpc-health-port", "0"),
    *("--metrics-port", "0", "--secure-serving", "false", "--drain-delay", "0", "--workers", "2"),
)


@dataclass
class Picker:
    process: asyncio.subprocess.Process
    log: Path
    port: int
    admin: str

    def children(self) -> dict[int, str]:
        """Process ids and what they are."""
        found = {}
        for process in family(table(), self.process.pid)[1:]:
            with contextlib.suppress(OSError):
                *_, name, _ = ["", *Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")]
                found[process.pid] = name
        return found

    def pid(self, name: str) -> int:
        return next(pid for pid, each in self.children().items() if each == name)

    async def metrics(self) -> dict[str, float]:
        async with aiohttp.ClientSession() as session, session.get(f"{self.admin}/metrics") as response:
            lines = (await response.text()).splitlines()
        return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    async def until(self, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """Wait for figures; those of a decider that is just being started again are none."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    if condition(found := await self.metrics()):
                        return found
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def picker(folder: Path, *flags: str) -> AsyncIterator[Picker]:
    log = folder / "picker.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*EPP, *flags, stdout=output, stderr=output)
    try:
        async with asyncio.timeout(60):
            while not (port := re.search(r"ext-proc on \S*?:(\d+)", log.read_text())):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)
        admin = re.search(r"debug on (http://\S+)", log.read_text())
        assert admin is not None
        made = Picker(process, log, int(port[1]), admin[1])
        await made.until(lambda figures: figures["picker_endpoints"] > 0)
        yield made
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@dataclass
class Rig:
    picker: Picker
    envoy: Envoy
    upstream: EchoUpstream

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.envoy.ports[GATEWAY]}/v1/completions"

    async def ask(self, count: int = 1) -> list[int]:
        """Statuses of requests that come at once, each over a connection of its own."""
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(self._ask()) for _ in range(count)]
        return [each.result() for each in asked]

    async def _ask(self) -> int:
        async with aiohttp.ClientSession() as session, session.post(self.url, json=PROMPT) as response:
            await response.read()
            return response.status

    async def served(self) -> None:
        """Wait until requests are answered again, whichever way they take."""
        async with asyncio.timeout(60):
            while set(await self.ask(8)) != {200}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def rig(folder: Path, *, mode: str = "full") -> AsyncIterator[Rig]:
    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(EchoUpstream("a").running())
        flags = ("--endpoint", f"http://{upstream.address}", "--mode", mode)
        this = await stack.enter_async_context(picker(folder, *flags))
        lean, service = mode == "lean", f"127.0.0.1:{this.port}"
        config = bootstrap([upstream.address], service, lean=lean)
        envoy = await stack.enter_async_context(running_envoy(config, concurrency=2))
        yield Rig(this, envoy, upstream)


def by_worker(figures: dict[str, float]) -> Iterator[float]:
    return (value for key, value in figures.items() if key.startswith("picker_worker_requests_total{"))


def settled(figures: dict[str, float]) -> bool:
    return figures["picker_inflight_requests"] == figures.get("picker_unheard_requests", 0) == 0


@pytest.mark.parametrize("mode", ["full", "lean"])
async def test_both_workers_serve_and_all_figures_are_in_one_place(tmp_path: Path, mode: str) -> None:
    async with rig(tmp_path, mode=mode) as this:
        asked = 0
        # Which of Envoy's threads gets a connection is the system's choice: ask until both have had some.
        while asked == 0 or not all(by_worker(await this.picker.metrics())):
            assert set(await this.ask(20)) == {200}
            asked += 20
            assert asked < 2000
        figures = await this.picker.until(settled)
        assert sum(by_worker(figures)) == asked == figures['picker_decisions_total{outcome="picked"}']
        assert figures['picker_requests_ended_total{how="finished"}'] == asked
        assert figures["picker_workers"] == 2


async def test_a_worker_that_is_killed_leaks_nothing_and_comes_again(tmp_path: Path) -> None:
    async with rig(tmp_path) as this, aiohttp.ClientSession() as session, contextlib.AsyncExitStack() as open_streams:
        for _ in range(8):
            await open_streams.enter_async_context(session.post(this.url, json=PROMPT | {"stream": True}))
        before = await this.picker.until(lambda figures: figures["picker_inflight_requests"] == 8)
        assert before["picker_extproc_streams"] <= 8
        for name in ("worker 0", "worker 1"):
            os.kill(this.picker.pid(name), signal.SIGKILL)
        figures = await this.picker.until(lambda figures: figures["picker_inflight_requests"] == 0)
        assert figures['picker_requests_ended_total{how="shutdown"}'] == 8
        await this.picker.until(lambda figures: figures["picker_workers"] == 2)
        await this.served()
        await this.picker.until(settled)


async def test_a_worker_that_has_come_again_gets_its_share_again(tmp_path: Path) -> None:
    async with rig(tmp_path) as this:
        os.kill(this.picker.pid("worker 0"), signal.SIGKILL)
        await this.picker.until(lambda figures: figures["picker_worker_arrivals_total"] == 3)
        before = list(by_worker(await this.picker.metrics()))
        async with asyncio.timeout(60):
            while any(now == then for now, then in zip(by_worker(await this.picker.metrics()), before, strict=True)):
                assert set(await this.ask(10)) == {200}


@pytest.mark.parametrize("mode", ["full", "lean"])
async def test_a_decider_that_is_killed_costs_time_and_no_request(tmp_path: Path, mode: str) -> None:
    async with rig(tmp_path, mode=mode) as this:
        await this.served()
        arrivals = (await this.picker.metrics())["picker_worker_arrivals_total"]
        old = this.picker.pid("decider")
        async with asyncio.TaskGroup() as tasks:
            before = tasks.create_task(this.ask(8))
            os.kill(old, signal.SIGKILL)
            while old in table():  # noqa: ASYNC110
                await asyncio.sleep(0)
            after = tasks.create_task(this.ask(8))
        assert set(before.result() + after.result()) == {200}
        assert "decider ended (SIGKILL); it is started again" in this.picker.log.read_text()
        figures = await this.picker.until(lambda figures: figures.get("picker_workers") == 2 and settled(figures))
        assert arrivals == figures["picker_worker_arrivals_total"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_told_to_go_streams_end_and_no_process_is_left(tmp_path: Path, number: signal.Signals) -> None:
    async with rig(tmp_path) as this, aiohttp.ClientSession() as session:
        async with session.post(this.url, json=PROMPT | {"stream": True}) as response:
            children = this.picker.children()
            assert sorted(children.values()) == ["decider", "worker 0", "worker 1"]
            this.picker.process.send_signal(number)
            await asyncio.sleep(0.3)
            this.upstream.step(3)
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        async with asyncio.timeout(60):
            assert await this.picker.process.wait() == 0
        assert children.keys().isdisjoint(table())
        assert "Traceback" not in this.picker.log.read_text()


async def test_a_parent_that_is_killed_takes_all_along(tmp_path: Path) -> None:
    async with picker(tmp_path, "--endpoint", "http://127.0.0.1:1") as this:
        children = this.children()
        this.process.kill()
        await this.process.wait()
        async with asyncio.timeout(60):
            while not children.keys().isdisjoint(table()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--workers", "0", "--endpoint", "http://127.0.0.1:1"], "0 is not in the range"),
        (["--workers", "two", "--endpoint", "http://127.0.0.1:1"], "'two' is not a valid integer"),
        ([], "no endpoints: give --endpoint URL"),
        (["--endpoint", "http://127.0.0.1:1", "--grpc-port", "1", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
    ],
)
async def test_what_cannot_be_is_said_in_a_line_with_exit_status_2(flags: list[str], complaint: str) -> None:
    done = await asyncio.create_subprocess_exec(*EPP, *flags, stderr=asyncio.subprocess.PIPE)
    _, said = await done.communicate()
    assert done.returncode == 2
    assert complaint in said.decode()
    assert "Traceback" not in said.decode()
