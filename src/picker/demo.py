"""The demo: simulated pods, picker and a data plane on loopback, one load sent twice, and what the two runs say.

Owns the load and the comparison; `demo_stack` owns what is started. The pods run faster than real time, so that
minutes of traffic fit into seconds; all times that are shown are seconds of the pods. Prints nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol

import aiohttp
import numpy as np

from picker.demo_stack import DataPlane, Pods, Stack, running
from picker.errors import ConfigError
from picker.load import report, trace
from picker.load.client import Client, Target
from picker.load.live import OnProgress
from picker.load.schedule import Pace, Run, drive
from picker.load.workload import Arrivals, Plan, SharedPrefix
from picker.sim.latency import profile

DURATION = 25.0
_TAKES = "the demo takes Mooncake's JSON lines and Azure's CSV (`picker load --trace` takes access logs, too)"


@dataclass(frozen=True, slots=True)
class Scene:
    """Pods and how busy they are kept.

    profile: a name in `sim/profiles.toml`. kv_tokens: size of a pod's cache instead of the profile's. time_scale: how
    many times faster than real time the pods run; pods, picker, Envoy and the load share the cores of one machine, and
    two of them keep up with these. load: share of the time for which the pods would compute prompts if nothing were
    ever cached.
    """

    model: str
    profile: str
    kv_tokens: int | None
    time_scale: float
    load: float

    @property
    def pace(self) -> Pace:
        return Pace(time_scale=self.time_scale)


# A pod's cache holds eight of the system prompts, and there are four of them for each pod. Sent in turn, each pod meets
# all and forgets most before they come again; sent by prefix, each pod keeps its share. The prompts are long and few
# rather than short and many: a delay of this machine counts `time_scale` times, and must stay small beside a prefill.
GROUPS_PER_POD = 4
WORKLOAD = SharedPrefix(system_tokens=12_000, question_tokens=400, max_tokens=40)
SHARED_PREFIX = Scene("Qwen/Qwen3-32B", "qwen3-32b-2xh100", kv_tokens=100_000, time_scale=4.0, load=0.8)
# Prompts of a production chat are twice as long and come back after minutes: fast pods with much memory.
REPLAY = Scene("meta-llama/Llama-3.1-8B", "llama-3.1-8b-h200", kv_tokens=None, time_scale=5.0, load=0.7)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a demo is asked for. duration: wall seconds of load in each of the two runs."""

    endpoints: int = 4
    duration: float = DURATION
    data_plane: DataPlane = DataPlane.ENVOY
    trace: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.endpoints < 2:
            raise ConfigError("--endpoints: with a single pod there is nothing to choose; give 2 or more")
        if not 0 < self.duration < math.inf:
            raise ConfigError(f"--duration must be positive, not {self.duration:g}")

    @property
    def scene(self) -> Scene:
        return SHARED_PREFIX if self.trace is None else REPLAY


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same plan twice: routed in turn, and by picker."""

    data_plane: str
    cache_unaware: Run
    picker: Run

    @property
    def failed(self) -> int:
        return self.cache_unaware.failed + self.picker.failed

    @property
    def better(self) -> bool:
        """Whether every request was answered, and picker's answers began sooner on average."""
        before, after = report.mean_ttft(self.cache_unaware), report.mean_ttft(self.picker)
        return not self.failed and before is not None and after is not None and after < before

    def to_json(self) -> dict[str, object]:
        return {
            "requests": len(self.cache_unaware.records) + len(self.picker.records),
            "failed": self.failed,
            "data_plane": self.data_plane,
            "routing": {"cache-unaware": report.row(self.cache_unaware), "picker": report.row(self.picker)},
        }


# --- the load ------------------------------------------------------------------------------------------------


def make_plan(setup: Setup) -> Plan:
    """What both runs send, in the time of the pods: about `setup.duration` wall seconds of it."""
    rng = np.random.default_rng(setup.seed)
    if setup.trace is not None:
        return _trace_plan(setup, setup.trace, rng)
    arrivals = Arrivals(_rate(setup, [WORKLOAD.system_tokens + WORKLOAD.question_tokens]))
    count = arrivals.count_within(setup.duration * setup.scene.time_scale)
    groups = GROUPS_PER_POD * setup.endpoints
    # Questions enough that none is asked twice.
    workload = dataclasses.replace(WORKLOAD, groups=groups, prompts=-(-count // groups))
    return workload.plan(arrivals.times(count, rng), rng, seed=setup.seed)


def _trace_plan(setup: Setup, path: Path, rng: np.random.Generator) -> Plan:
    requests = _recorded(path)
    if len(requests) < 2:
        raise ConfigError(f"{path}: a trace of one request compares nothing")
    rate = _rate(setup, [request.prompt_tokens for request in requests])
    limit = max(2, round(rate * setup.duration * setup.scene.time_scale))
    times = sorted(request.at for request in requests)[:limit]
    return trace.plan(
        requests,
        rng,
        name=path.name,
        seed=setup.seed,
        limit=limit,
        rate_scale=max(times[-1] - times[0], 1e-3) * rate / len(times),
        # Every token is a chunk that four processes handle: long answers would measure this machine.
        max_tokens=WORKLOAD.max_tokens,
    )


def _recorded(path: Path) -> list[trace.Traced]:
    """The requests of a trace of a published format. Raises ConfigError."""
    if trace.sniff(path) is trace.TraceFormat.ACCESS_LOG:
        raise ConfigError(f"{path}: it has no hash_ids: {_TAKES}")
    try:
        return trace.load(path)
    except ConfigError as error:
        raise ConfigError(f"{error}: {_TAKES}") from None


def _rate(setup: Setup, prompts: Iterable[int]) -> float:
    """Requests a second, for prompts of these lengths, that make the load of the scene."""
    pod = profile(setup.scene.profile)
    seconds = fmean(
        pod.step_time(prefill_tokens=tokens, prefill_work=tokens * tokens / 2, decodes=0, context=0)
        for tokens in prompts
    )
    return setup.scene.load * setup.endpoints / seconds


# --- the two runs --------------------------------------------------------------------------------------------

Live = Callable[[str], AbstractContextManager[OnProgress | None]]


async def compare(stack: Stack, plan: Plan, scene: Scene, live: Live) -> Comparison:
    """Send `plan` through the cache-unaware way and, with empty caches again, through picker."""
    runs = []
    for label, url in (("cache-unaware", stack.cache_unaware), ("picker", stack.picker)):
        await _empty_caches(stack.pods)
        async with Client(Target(url, model=scene.model)) as client:
            with live(label) as on_progress:
                runs.append(await drive(plan, client, scene.pace, on_progress=on_progress))
    return Comparison(stack.data_plane, *runs)


async def _empty_caches(pods: Iterable[str]) -> None:
    async with aiohttp.ClientSession() as session:
        for pod in pods:
            async with session.post(f"{pod}/reset_prefix_cache") as response:
                response.raise_for_status()


# --- all of it -----------------------------------------------------------------------------------------------


class Audience(Protocol):
    """Who watches a demo."""

    def up(self, stack: Stack, plan: Plan) -> None:
        """Everything runs; `plan` is about to be sent, twice."""

    def live(self, label: str) -> AbstractContextManager[OnProgress | None]:
        """Around each of the two runs."""

    def result(self, stack: Stack, comparison: Comparison) -> None:
        """Both runs are over; everything still runs."""


async def demonstrate(setup: Setup, audience: Audience, *, keep: bool) -> None:
    """Start everything, compare, tell the audience, and stop everything; with `keep` only when cancelled.

    Raises ChildFailedError when something that was started ends, ConfigError when it cannot be started.
    """
    plan = make_plan(setup)
    scene = setup.scene
    pods = Pods(
        count=setup.endpoints,
        model=scene.model,
        profile=scene.profile,
        kv_tokens=scene.kv_tokens,
        time_scale=scene.time_scale,
        seed=setup.seed,
    )
    async with running(setup.data_plane, pods) as stack:
        audience.up(stack, plan)
        audience.result(stack, await compare(stack, plan, scene, audience.live))
        if keep:
            await asyncio.Event().wait()
