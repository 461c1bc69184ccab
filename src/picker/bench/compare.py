"""Gateways side by side: one scenario's requests through each in turn, over real HTTP, to the same simulated pods.

Owns which processes are started and with which flags, and what is asked of them. Every gateway finds new pods with
empty caches, and gets the same arrivals, prompts and answer lengths; the later turns of a session follow its answers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import aiohttp

from picker.bench import peers
from picker.bench.cputime import cpu_seconds, rss_bytes
from picker.children import Child, Children, free_ports, supervised
from picker.errors import ConfigError
from picker.load import report
from picker.load.client import Client, Target
from picker.load.scenario import Level, level, planned
from picker.load.schedule import Run, drive, without_warmup
from picker.sim.scenario import Scenario
from picker.sim.sessions import Sessions
from picker.sim.workload import Adapters

PICKER, ROUND_ROBIN, DIRECT_POLICIES = "picker", "round-robin", ("round-robin", "random", "least-request")
COLUMNS = (
    *("gateway", "seed", "requests", "failed", "ttft_mean_s", "ttft_p95_s", "e2e_mean_s", "hit_ratio"),
    *("cpu_us_per_request", "rss_mb", "schedule_delay_p99_s", "pods_late_p99_s"),
)
MODEL = "simulated"
_POD = re.compile(r"pod on (http://\S+)")
_PROXY = re.compile(r"proxy on (http://\S+?)/v1")
_READY_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What is compared. load: of what the pods could stand; None: as the scenario has it.

    seconds: of arrivals, in time of the pods, instead of the scenario's. time_scale: how many times faster than real
    time the pods run. stream_interval: tokens in an event of a stream; larger ones leave more of the machine for what
    is measured, and change neither first tokens nor caches.
    """

    scenario: Scenario
    gateways: tuple[str, ...]
    load: float | None = None
    seeds: tuple[int, ...] = (0,)
    seconds: float | None = None
    limit: int | None = None
    time_scale: float = 4.0
    stream_interval: int = 16

    def __post_init__(self) -> None:
        known = (PICKER, *DIRECT_POLICIES, *(peer.name for peer in peers.PEERS))
        for name in self.gateways:
            if name not in known:
                raise ConfigError(f"{name!r} is no gateway known here: {', '.join(known)}")
            if name not in (PICKER, *DIRECT_POLICIES) and name not in peers.installed():
                raise ConfigError(f"{name} is not installed: `make bench-peers` gets it, or leave it out of --gateways")
        if isinstance(self.scenario.workload, Adapters):
            raise ConfigError(f"{self.scenario.number}: the gateways compared here do not all know LoRA adapters")

    def chosen(self) -> Level:
        scenario, workload = self.scenario, self.scenario.workload
        if self.seconds is not None and isinstance(workload, Sessions):
            scenario = replace(scenario, workload=replace(workload, seconds=self.seconds))
        elif self.seconds is not None:
            raise ConfigError(f"{scenario.number} has no seconds: shorten it with --limit")
        return level(scenario, load=self.load, limit=self.limit)


def present() -> tuple[str, ...]:
    """The gateways that can be compared here: picker, cache-unaware routing, and every peer that is installed."""
    return (PICKER, ROUND_ROBIN, *peers.installed())


async def rows(setup: Setup, *, progress: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """One row for each gateway and seed. Raises ChildFailedError when something that was started breaks."""
    found = []
    chosen = setup.chosen()
    for seed in setup.seeds:
        for name in setup.gateways:
            progress(f"{setup.scenario.number} at {_share(chosen)}, seed {seed}: {name}")
            found.append(await _measured(setup, chosen, name, seed))
    return found


def _share(chosen: Level) -> str:
    return f"rate {chosen.rate:g}" if chosen.load is None else f"load {chosen.load:g}"


async def _measured(setup: Setup, chosen: Level, name: str, seed: int) -> dict[str, Any]:
    plan, pace = planned(chosen, seed=seed, limit=setup.limit)
    pace = replace(pace, time_scale=setup.time_scale)
    async with supervised() as children:
        pods = await _start_pods(children, setup, seed)
        gateway, url, command = await _start_gateway(children, name, pods)
        async with aiohttp.ClientSession() as session, Client(Target(url, model=MODEL)) as client:
            await children.ready(gateway, lambda: _answers(client), timeout=_READY_TIMEOUT)
            await _forget(session, pods)
            before = cpu_seconds(gateway.process.pid)
            run = await drive(plan, client, pace)
            used = cpu_seconds(gateway.process.pid) - before
            clock = await _clock(session, pods)
        rss = rss_bytes(gateway.process.pid)
    sent = len(run.records)
    return _row(without_warmup(run), clock) | {
        "gateway": name,
        "scenario": setup.scenario.number,
        "load": chosen.load,
        "seed": seed,
        "time_scale": setup.time_scale,
        "cpu_us_per_request": used / max(sent, 1) * 1e6,
        "rss_mb": rss / 1e6,
        "command": command,
    }


def _row(run: Run, clock: Mapping[str, Any]) -> dict[str, Any]:
    """The load's own figures, and whether they are worth anything."""
    figures = report.row(run)
    return figures | {
        "errors": report.errors(run),
        "on_schedule": run.on_schedule,
        "pods_late_p99_s": clock["p99_s"],
        "pods_late_max_s": clock["max_s"],
        "distorted": clock["distorted"],
    }


# --- pods --------------------------------------------------------------------------------------------------


async def _start_pods(children: Children, setup: Setup, seed: int) -> list[str]:
    """All in one process, each at its speed."""
    pods = setup.scenario.pods
    profile = pods.published
    child = await children.start_picker(
        "pods",
        *("sim", "--count", str(pods.count), "--port", "0", "--model", MODEL, "--profile", pods.profile),
        *("--kv-tokens", str(profile.kv_tokens), "--block-size", str(profile.block_size)),
        *("--max-num-seqs", str(profile.max_num_seqs), "--seed", str(seed)),
        *("--time-scale", str(setup.time_scale), "--stream-interval", str(setup.stream_interval)),
    )
    urls = await children.announced(child, _POD, timeout=_READY_TIMEOUT, count=pods.count)
    async with aiohttp.ClientSession() as session:
        for number, url in enumerate(urls):
            if (speed := pods.speed(number)) != 1.0:
                async with session.post(f"{url}/_sim/fault", json={"slowdown": 1.0 / speed}) as answer:
                    answer.raise_for_status()
    return urls


async def _forget(session: aiohttp.ClientSession, pods: Sequence[str]) -> None:
    """Whatever the first answers left behind."""
    for pod in pods:
        async with session.post(f"{pod}/reset_prefix_cache") as answer:
            answer.raise_for_status()
        async with session.delete(f"{pod}/_sim/clock") as answer:
            answer.raise_for_status()


async def _clock(session: aiohttp.ClientSession, pods: Sequence[str]) -> dict[str, Any]:
    async with session.get(f"{pods[0]}/_sim/clock") as answer:
        told: dict[str, Any] = await answer.json()
        return told


# --- gateways ----------------------------------------------------------------------------------------------


async def _start_gateway(children: Children, name: str, pods: Sequence[str]) -> tuple[Child, str, str]:
    """The gateway, its URL, and the command line that started it, as a reader would type it."""
    if name not in (PICKER, *DIRECT_POLICIES):
        return await _start_peer(children, name, pods)
    policy = () if name == PICKER else ("--policy", name)
    endpoints = [flag for pod in pods for flag in ("--endpoint", pod)]
    flags = ["proxy", "--port", "0", "--admin-port", "0", *policy, *endpoints]
    child = await children.start_picker(name, *flags)
    (url,) = await children.announced(child, _PROXY, timeout=_READY_TIMEOUT)
    return child, url, " ".join(["picker", *flags])


async def _start_peer(children: Children, name: str, pods: Sequence[str]) -> tuple[Child, str, str]:
    port, metrics_port = free_ports(2)
    command = peers.installed()[name] + peers.flags(list(pods), port=port, metrics_port=metrics_port)
    child = await children.start(name, *command)
    return child, f"http://127.0.0.1:{port}", " ".join([PurePath(command[0]).name, *command[1:]])


async def _answers(client: Client) -> bool:
    record, _ = await client.ask(client.body([("user", "hello")], 2), intended_at=asyncio.get_running_loop().time())
    return record.error is None
