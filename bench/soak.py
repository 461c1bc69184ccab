"""Hours of trouble for the ext-proc service behind a real Envoy, and what is left of it at the end.

python -m bench.soak [--minutes M] [--mode full|lean] [--rate R] [--pods N] [--seed N] [--json]

Simulated pods are killed and come back, the list of endpoints changes all the time, a part of the clients leaves at any
moment, and picker itself is restarted now and then. Passed means: every request that was not disturbed got a whole
answer, none hung, nothing is in flight when all is quiet, and picker's memory has stopped growing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic

import aiohttp
import click

from picker import envoy
from picker.bench import machine

MODEL = "soak"
_TIMEOUT = 60.0  # seconds until an answer counts as hanging
_SETTLED = 30.0  # seconds that the last request may take to be told of
_NEAR = 1.5  # seconds after a disturbance within which a request may still suffer from it
_ABORTED = 0.15  # share of clients that leave
_GAUGES = ("picker_inflight_requests", "picker_queued_requests", "picker_extproc_streams", "picker_unheard_requests")


@dataclass(slots=True)
class Figures:
    """What came of it. lost: undisturbed requests without a whole answer, and hung ones; left: what gauges still say.

    rss_mb: of picker, after a quarter of its longest life and at the end of that.
    """

    requests: int = 0
    whole: int = 0
    aborted: int = 0
    disturbed: int = 0
    lost: list[str] = field(default_factory=list)
    kills: int = 0
    restarts: int = 0
    changes: int = 0
    left: dict[str, float] = field(default_factory=dict)
    rss_mb: tuple[float, float] = (0.0, 0.0)

    @property
    def passed(self) -> bool:
        early, late = self.rss_mb
        return not self.lost and not any(self.left.values()) and late < 1.15 * early + 8.0 and self.whole > 0


class Process:
    """A child that may be killed and started again. log: what it says, of its latest life."""

    def __init__(self, log: Path, *command: str) -> None:
        self.command = command
        self.log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self, announced: str) -> str:
        """Start; the first group of what it announces. Raises RuntimeError with its words when it ends instead."""
        with self.log.open("wb") as out:
            self._process = await asyncio.create_subprocess_exec(*self.command, stdout=out, stderr=out)
        while not (found := re.search(announced, self.log.read_text(errors="replace"))):
            if self._process.returncode is not None:
                raise RuntimeError(self.log.read_text(errors="replace")[-2000:])
            await asyncio.sleep(0.05)
        return found[1]

    async def stop(self, *, kill: bool) -> None:
        if self._process is not None and self._process.returncode is None:
            (self._process.kill if kill else self._process.terminate)()
            await self._process.wait()

    @property
    def rss_mb(self) -> float:
        """Raises OSError or ValueError when it has ended."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * 4096 / 2**20


class Soak:
    """One run. rng: of everything that happens; how long things take is up to the machine."""

    def __init__(self, folder: Path, *, mode: str, pods: int, rate: float, rng: random.Random) -> None:
        self.figures = Figures()
        self._folder = folder
        self._mode = mode
        self._rate = rate
        self._rng = rng
        self._pods = [self._pod(number) for number in range(pods)]
        self._addresses: list[str] = []
        self._picker = Process(folder / "picker.log")
        self._over = asyncio.Event()
        self._admin = ""
        self._url = ""
        self._trouble: list[tuple[float, float]] = []  # from when until when

    def _pod(self, number: int) -> Process:
        options = ("--port", "0", "--model", MODEL, "--time-scale", "20", "--seed", str(number))
        return Process(self._folder / f"pod-{number}.log", sys.executable, "-m", "picker", "sim", *options)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Pods, picker and Envoy, answering."""
        try:
            self._addresses = list(await asyncio.gather(*(pod.start(r"pod on http://(\S+)") for pod in self._pods)))
            for pod, address in zip(self._pods, self._addresses, strict=True):  # the next life is at the same place
                port = address.rpartition(":")[2]
                pod.command = tuple(port if part == "0" and pod.command[i - 1] == "--port" else part
                                    for i, part in enumerate(pod.command))  # fmt: skip
            self._list(self._addresses)
            port = await self._start_picker("0")
            config = envoy.bootstrap(self._addresses, f"127.0.0.1:{port}", lean=self._mode == "lean")
            async with envoy.running_envoy(config) as running:
                self._url = f"http://127.0.0.1:{running.ports[envoy.GATEWAY]}/v1/completions"
                await self._start_picker_again(port)  # from here on at a port that Envoy knows
                yield
        finally:
            await asyncio.gather(*(each.stop(kill=True) for each in (*self._pods, self._picker)))

    async def _start_picker(self, port: str) -> str:
        self._picker.command = (
            *(sys.executable, "-m", "picker", "epp", "--host", "127.0.0.1", "--secure-serving", "false"),
            *("--grpc-port", port, "--grpc-health-port", "0", "--metrics-port", "0", "--mode", self._mode),
            *("--endpoints-file", str(self._folder / "endpoints.yaml"), "--drain-delay", "0"),
            *("--log-level", "error"),
        )
        bound = await self._picker.start(r"ext-proc on \S*?:(\d+)")
        found = re.search(r"debug on (http://\S+)", self._picker.log.read_text())
        assert found is not None
        self._admin = found[1]
        return bound

    async def _start_picker_again(self, port: str) -> None:
        with self._disturbing():
            await self._picker.stop(kill=False)
            await self._start_picker(port)
            await self._ready()

    async def _ready(self) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.get(f"{self._admin}/readyz") as response:
                    if response.status == 200:
                        return
                await asyncio.sleep(0.05)

    def _list(self, addresses: Sequence[str]) -> None:
        text = json.dumps({"endpoints": [_entry(address) for address in addresses]})
        (self._folder / "new.yaml").write_text(text)
        (self._folder / "new.yaml").replace(self._folder / "endpoints.yaml")

    @contextlib.contextmanager
    def _disturbing(self) -> Iterator[None]:
        begun, at = monotonic(), len(self._trouble)
        self._trouble.append((begun, math.inf))
        yield
        self._trouble[at] = (begun, monotonic())

    # what happens

    async def go(self, seconds: float, *, restarts: bool) -> None:
        """Load and trouble for so long, then quiet."""
        until = monotonic() + seconds
        async with asyncio.TaskGroup() as group, aiohttp.ClientSession() as session:
            happenings = [group.create_task(self._churn()), group.create_task(self._kill())]
            watch = group.create_task(self._watch(until))
            if restarts:
                happenings.append(group.create_task(self._restart()))
            asking = []
            while monotonic() < until:
                asking.append(group.create_task(self._ask(session)))
                await asyncio.sleep(self._rng.expovariate(self._rate))
            self._over.set()
            await asyncio.wait([*happenings, *asking])
            await watch
        await self._settle()

    async def _goes_on(self, least: float, most: float) -> bool:
        """After a while of that length: whether there is to be more trouble."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._rng.uniform(least, most)):
                await self._over.wait()
        return not self._over.is_set()

    async def _churn(self) -> None:
        """At least one endpoint stays; one of those that are listed may be dead, and one that lives unlisted."""
        while await self._goes_on(0.3, 1.5):
            self._list(self._rng.sample(self._addresses, self._rng.randint(1, len(self._addresses))))
            self.figures.changes += 1

    async def _kill(self) -> None:
        while await self._goes_on(2.0, 6.0):
            pod = self._rng.choice(self._pods[1:])  # the first one lives: requests may always go somewhere
            with self._disturbing(), contextlib.suppress(RuntimeError):  # its port may be taken meanwhile
                await pod.stop(kill=True)
                self.figures.kills += 1
                await pod.start(r"pod on http://(\S+)")

    async def _restart(self) -> None:
        while await self._goes_on(20.0, 40.0):
            port = self._picker.command[self._picker.command.index("--grpc-port") + 1]
            await self._start_picker_again(port)
            self.figures.restarts += 1

    async def _watch(self, until: float) -> None:
        lives: dict[int, list[float]] = {}
        while monotonic() < until:
            await asyncio.sleep(min(1.0, max(until - monotonic(), 0.0)))
            with contextlib.suppress(OSError, ValueError):  # between two lives
                lives.setdefault(self._picker.pid, []).append(self._picker.rss_mb)
        longest = max(lives.values(), key=len)
        self.figures.rss_mb = (longest[len(longest) // 4], longest[-1])

    # requests

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        rng, figures, begun = self._rng, self.figures, monotonic()
        figures.requests += 1
        group, stream = rng.randrange(20), rng.random() < 0.7
        prompt = f"group {group} " * rng.choice([10, 100, 2000]) + str(rng.random())
        body = {"model": MODEL, "prompt": prompt, "max_tokens": rng.randint(1, 200), "stream": stream}
        leaves = rng.expovariate(5.0) if rng.random() < _ABORTED else None
        found: str | None
        try:
            async with asyncio.timeout(leaves if leaves is not None else _TIMEOUT):
                async with session.post(self._url, json=body) as response:
                    answer = await response.read()
                    found = _whole(response.status, answer, stream=stream)
        except TimeoutError:
            found = None if leaves is not None else "no answer in time"
        except aiohttp.ClientError as error:
            found = type(error).__name__
        if found == "":
            figures.whole += 1
        elif found is None:
            figures.aborted += 1
        elif self._disturbed(begun) and found != "no answer in time":
            figures.disturbed += 1
        else:
            figures.lost.append(found)

    def _disturbed(self, begun: float) -> bool:
        ended = monotonic()
        return any(begin <= ended and begun <= end + _NEAR for begin, end in self._trouble)

    async def _settle(self) -> None:
        """Wait until nothing is in flight; what still is when the time is over is what is left."""
        until = monotonic() + _SETTLED
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.get(f"{self._admin}/metrics") as response:
                    text = await response.text()
                found = {name: re.search(rf"^{name} (\S+)$", text, re.MULTILINE) for name in _GAUGES}
                self.figures.left = {name: float(match[1]) for name, match in found.items() if match}
                if not any(self.figures.left.values()) or monotonic() > until:
                    return
                await asyncio.sleep(0.2)


def _entry(address: str) -> dict[str, str | int]:
    host, _, port = address.rpartition(":")
    return {"address": host, "port": int(port)}


def _whole(status: int, answer: bytes, *, stream: bool) -> str:
    """What is wrong with an answer; nothing with one that is whole."""
    if status != 200:
        return f"status {status}: {answer[:200].decode(errors='replace')}"
    if stream:
        return "" if answer.endswith(b"data: [DONE]\n\n") else "a stream without its end"
    return "" if b'"usage"' in answer else "an answer without its end"


async def soak(*, seconds: float, mode: str, pods: int, rate: float, seed: int, restarts: bool = True) -> Figures:
    """Run it; raises ConfigError without Envoy."""
    envoy.find_envoy()
    with tempfile.TemporaryDirectory(prefix="picker-soak-") as folder:
        this = Soak(Path(folder), mode=mode, pods=pods, rate=rate, rng=random.Random(seed))
        async with this.running():
            await this.go(seconds, restarts=restarts)
        return this.figures


@click.command()
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--mode", type=click.Choice(["full", "lean"]), default="full", show_default=True)
@click.option("--rate", default=30.0, show_default=True, help="Requests a second.")
@click.option("--pods", type=click.IntRange(min=2), default=4, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(minutes: float, mode: str, rate: float, pods: int, seed: int, as_json: bool) -> None:
    """Soak the ext-proc service; exit status 1 when something was lost, is left over, or has grown."""
    figures = asyncio.run(soak(seconds=minutes * 60, mode=mode, pods=pods, rate=rate, seed=seed))
    found = {"mode": mode, "minutes": minutes, "rate": rate, "seed": seed, **asdict(figures)}
    if as_json:
        click.echo(json.dumps({**found, "passed": figures.passed, "machine": machine.describe()}))
    else:
        for key, value in found.items():
            click.echo(f"{key:>10}  {value}")
        click.echo("passed" if figures.passed else "FAILED")
    sys.exit(not figures.passed)


if __name__ == "__main__":
    main()
