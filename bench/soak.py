"""Hours of trouble for the ext-proc service behind a real Envoy, and what is left of it at the end.

python -m bench.soak [--hours H] [--rate R] [--speed S] [--mode full|lean] [--pods N] [--seed N] [--json]

Hours' worth of requests, R a second, sent S times as fast: one hour at 12 a second and six times the speed takes ten
minutes. Simulated pods are killed and come back, the list of endpoints changes all the time, a part of the clients
leaves at any moment, and in the first half picker itself is restarted now and then; in the second it lives on, for its
memory to be seen. Passed means: every request got a whole answer, except those whose own pod was killed while it
answered and those that met a picker that was away; none hung, nothing is in flight when all is quiet, and picker's
memory has stopped growing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import re
import socket
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
_SOON = 0.2  # seconds that the end of a killed pod's connections may take to reach a client
_POD_HEADER = "x-soak-pod"  # which pod a response is of, as Envoy says
_WHY_HEADER = "x-soak-why"  # where a status comes from, as Envoy says
_ABORTED = 0.15  # share of clients that leave
_QUIET = (20_000, 32_000)  # ports; below what Linux takes for outgoing connections
_TAKEN: set[int] = set()
_GAUGES = ("picker_inflight_requests", "picker_queued_requests", "picker_extproc_streams", "picker_unheard_requests")


@dataclass(slots=True)
class Figures:
    """What came of it. cut: answers broken off with the pod that gave them; away: requests that met no picker.

    lost: all others without a whole answer, and hung ones. left: what gauges still say. rss_mb: of picker, after a
    quarter of its longest life and at the end of that; life_s: how long that was.
    """

    requests: int = 0
    whole: int = 0
    aborted: int = 0
    cut: int = 0
    away: int = 0
    lost: list[str] = field(default_factory=list)
    kills: int = 0
    restarts: int = 0
    changes: int = 0
    left: dict[str, float] = field(default_factory=dict)
    rss_mb: tuple[float, float] = (0.0, 0.0)
    life_s: float = 0.0

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
        self._away: list[tuple[float, float]] = []  # when picker was: from when until when
        self._dead: dict[str, list[tuple[float, float]]] = {}  # when pods were, by address

    def _pod(self, number: int) -> Process:
        options = ("--port", str(_quiet_port()), "--model", MODEL, "--time-scale", "20", "--seed", str(number))
        return Process(self._folder / f"pod-{number}.log", sys.executable, "-m", "picker", "sim", *options)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Pods, picker and Envoy, answering."""
        try:
            self._addresses = list(await asyncio.gather(*(pod.start(r"pod on http://(\S+)") for pod in self._pods)))
            self._list(self._addresses)
            port = await self._start_picker("0")
            config = envoy.bootstrap(self._addresses, f"127.0.0.1:{port}", lean=self._mode == "lean")
            _name_pods(config)
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
        with _during(self._away):
            await self._picker.stop(kill=False)
            await self._start_picker(port)
            await self._answering(f"{self._admin}/readyz")
            # Envoy asks only now and then whether picker is there again.
            await self._answering(self._url.replace("/completions", "/models"))

    async def _answering(self, url: str) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
                await asyncio.sleep(0.05)

    def _list(self, addresses: Sequence[str]) -> None:
        text = json.dumps({"endpoints": [_entry(address) for address in addresses]})
        (self._folder / "new.yaml").write_text(text)
        (self._folder / "new.yaml").replace(self._folder / "endpoints.yaml")

    # what happens

    async def go(self, seconds: float, *, restarts: bool) -> None:
        """Load and trouble for so long, then quiet."""
        until = monotonic() + seconds
        async with asyncio.TaskGroup() as group, aiohttp.ClientSession() as session:
            happenings = [group.create_task(self._churn()), group.create_task(self._kill())]
            watch = group.create_task(self._watch(until))
            if restarts:
                happenings.append(group.create_task(self._restart(monotonic() + seconds / 2)))
            asking, at = [], monotonic()
            while at < until:
                asking.append(group.create_task(self._ask(session)))
                at += self._rng.expovariate(self._rate)
                await asyncio.sleep(max(at - monotonic(), 0.0))
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
        """Of those that are listed one may be dead, no more: only one is at a time."""
        while await self._goes_on(0.3, 1.5):
            self._list(self._rng.sample(self._addresses, self._rng.randint(2, len(self._addresses))))
            self.figures.changes += 1

    async def _kill(self) -> None:
        while await self._goes_on(2.0, 6.0):
            number = self._rng.randrange(len(self._pods))
            with _during(self._dead.setdefault(self._addresses[number], [])):
                await self._pods[number].stop(kill=True)
                self.figures.kills += 1
                await self._return(self._pods[number])

    async def _return(self, pod: Process) -> None:
        """Its port may serve somebody's outgoing connection meanwhile, for a moment."""
        while True:
            try:
                await pod.start(r"pod on http://(\S+)")
            except RuntimeError:
                await asyncio.sleep(0.1)
            else:
                return

    async def _restart(self, until: float) -> None:
        while await self._goes_on(15.0, 30.0) and monotonic() < until:
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
        self.figures.rss_mb, self.figures.life_s = (longest[len(longest) // 4], longest[-1]), float(len(longest))

    # requests

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        rng, figures, begun = self._rng, self.figures, monotonic()
        figures.requests += 1
        group, stream = rng.randrange(20), rng.random() < 0.7
        prompt = f"group {group} " * rng.choice([10, 100, 2000]) + str(rng.random())
        body = {"model": MODEL, "prompt": prompt, "max_tokens": rng.randint(1, 200), "stream": stream}
        leaves = rng.expovariate(5.0) if rng.random() < _ABORTED else None
        found: str | None
        pod = None
        try:
            async with asyncio.timeout(leaves if leaves is not None else _TIMEOUT):
                async with session.post(self._url, json=body) as response:
                    pod = response.headers.get(_POD_HEADER) if response.status == 200 else None
                    answer = await response.read()
                    found = _whole(response.status, answer, stream=stream)
                    if found:
                        found += f" ({response.headers.get(_WHY_HEADER)})"
        except TimeoutError:
            found = None if leaves is not None else "no answer in time"
        except aiohttp.ClientError as error:
            found = type(error).__name__
        if found == "":
            figures.whole += 1
        elif found is None:
            figures.aborted += 1
        elif found == "no answer in time":
            figures.lost.append(found)
        elif pod is not None and _met(self._dead.get(pod, ()), begun, _SOON):
            figures.cut += 1
        elif _met(self._away, begun, 0.0):
            figures.away += 1
        else:
            figures.lost.append(found)

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


def _quiet_port() -> int:
    """A free port that the system gives nobody for outgoing connections.

    Whoever connects to a port of those while nobody listens there may get it himself, and talk to himself.
    """
    for port in range(*_QUIET):
        with contextlib.suppress(OSError), socket.socket() as probe:
            if port not in _TAKEN:
                probe.bind(("127.0.0.1", port))
                _TAKEN.add(port)
                return port
    raise RuntimeError(f"no free port from {_QUIET[0]} to {_QUIET[1]}")


def _met(times: Sequence[tuple[float, float]], begun: float, after: float) -> bool:
    """Whether any of these was during a request that began then and is just over."""
    ended = monotonic()
    return any(begin <= ended and begun <= end + after for begin, end in times)


@contextlib.contextmanager
def _during(times: list[tuple[float, float]]) -> Iterator[None]:
    begun, at = monotonic(), len(times)
    times.append((begun, math.inf))
    yield
    times[at] = (begun, monotonic())


def _name_pods(config: envoy.Json) -> None:
    """Have Envoy say which pod each response is of, and who made it."""
    said = {_POD_HEADER: "%UPSTREAM_REMOTE_ADDRESS%", _WHY_HEADER: "%RESPONSE_CODE_DETAILS%"}
    headers = [{"header": {"key": key, "value": value}} for key, value in said.items()]
    for listener in config["static_resources"]["listeners"]:
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        for host in manager["route_config"]["virtual_hosts"]:
            host["response_headers_to_add"] = headers


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
@click.option("--hours", default=1.0, show_default=True, help="So many hours' worth of requests.")
@click.option("--mode", type=click.Choice(["full", "lean"]), default="full", show_default=True)
@click.option("--rate", default=12.0, show_default=True, help="Requests a second in these hours.")
@click.option("--speed", default=6.0, show_default=True, help="How much faster they are sent.")
@click.option("--pods", type=click.IntRange(min=2), default=4, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(hours: float, rate: float, speed: float, mode: str, pods: int, seed: int, as_json: bool) -> None:
    """Soak the ext-proc service; exit status 1 when something was lost, is left over, or has grown."""
    seconds = hours * 3600.0 / speed
    figures = asyncio.run(soak(seconds=seconds, mode=mode, pods=pods, rate=rate * speed, seed=seed))
    settings = {"hours": hours, "rate": rate, "speed": speed, "seconds": seconds, "pods": pods, "seed": seed}
    found = {"mode": mode, **settings, **asdict(figures)}
    if as_json:
        click.echo(json.dumps({**found, "passed": figures.passed, "machine": machine.describe()}))
    else:
        for key, value in found.items():
            click.echo(f"{key:>10}  {value}")
        click.echo("passed" if figures.passed else "FAILED")
    sys.exit(not figures.passed)


if __name__ == "__main__":
    main()
