"""The standalone proxy beside every peer that is installed: the same requests, through each in turn.

What is measured has a core to itself, client and upstream have the others. The row `direct` is no proxy at all: what
the load generator can do by itself, and the baseline of the added latencies. Where an Envoy is installed, picker is
measured behind one of its own, too (`picker proxy --data-plane envoy`, one worker, on the core that it has in
`picker bench extproc`), and what each of the two uses is told apart: that row's requests per second are of two cores.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from picker.bench import peers
from picker.bench.cases import CHUNKS, ENDPOINTS, PROMPT_BYTES, Case, cases, modest_rate
from picker.bench.client import Latency, Throughput, Traffic, answers, closed_loop, open_loop
from picker.bench.cputime import family, rss_bytes, table
from picker.bench.figures import added, row_figures
from picker.bench.placement import Cores, move, pinned, placement
from picker.bench.upstream import Upstream
from picker.children import Child, ChildFailedError, Children, free_ports, supervised
from picker.envoy import find_envoy
from picker.errors import ConfigError

DIRECT = "direct"
PICKER = "picker"
BEHIND_ENVOY = "picker+envoy"
COLUMNS = (
    *("name", "prompt_bytes", "chunks", "requests_per_s", "cpu_us_per_request", "added_p50_ms", "added_p99_ms"),
    *("latency_requests", "added_chunk_p50_ms", "half_added_p99_ms", "rss_mb", "cores"),
    "envoy_cpu_us_per_request",  # in no other figure of a gateway behind its own Envoy but `cores`
)
_PROXY = re.compile(r"proxy on http://\S+?:(\d+)/v1")
_READY_TIMEOUT = 60.0
_PEER_TIMEOUT = 30.0

Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to the upstream. pid: of what is measured, None for none. envoy: of its Envoy, a child of that."""

    ports: tuple[int, ...]
    pid: int | None
    envoy: int | None = None

    @property
    def processes(self) -> dict[str, int]:
        """Whose CPU time counts. The first one's has that of the second in it."""
        both = {"gateway": self.pid, "envoy": self.envoy}
        return {name: pid for name, pid in both.items() if pid is not None}


async def rows(
    *,
    prompt_bytes: Sequence[int] = PROMPT_BYTES,
    chunks: Sequence[int] = CHUNKS,
    seconds: float = 0.7,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda line: None,
    warn: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row for each proxy, prompt size and number of chunks (0: one JSON answer instead of a stream).

    seconds: of each measured window; a repeat has two for each proxy. warn: told of peers that do not work here.
    Raises ChildFailedError or AnswerError when something breaks.
    """
    found = []
    async with _running(next(cases(prompt_bytes, chunks)), warn) as (upstream, ways):
        for case in cases(prompt_bytes, chunks):
            figures: dict[str, list[Figures]] = {name: [] for name in ways}
            for number in range(repeats):
                progress(f"{', '.join(ways)} · {case} · {number + 1} of {repeats}")
                for name, repeat in (await _repeat(upstream, ways, case, seconds)).items():
                    figures[name].append(repeat)
            for name, repeated in figures.items():
                key = {"name": name, "prompt_bytes": case.prompt_bytes, "chunks": case.chunks}
                found.append({**key, **row_figures(repeated), "repeats": repeats})
    return found


async def _repeat(upstream: Upstream, ways: Mapping[str, Way], case: Case, seconds: float) -> dict[str, Figures]:
    """Every way's throughput, then every way's latency at one rate that suits the slowest, and at half its own load."""
    traffic = {name: case.traffic(upstream, way.ports) for name, way in ways.items()}
    capacity = {}
    for name, way in ways.items():
        capacity[name] = await closed_loop(traffic[name], seconds=seconds, processes=way.processes)
    rate = modest_rate(min(each.requests_per_s for each in capacity.values()))
    latency = {name: await open_loop(traffic[name], seconds=seconds, rate=rate) for name in ways}
    found = {
        name: _figures(way, capacity[name], latency[name], latency[DIRECT]) | {"latency_requests_per_s": rate}
        for name, way in ways.items()
    }
    for name in ways:
        found[name] |= await _at_half_load(traffic[name], traffic[DIRECT], capacity[name], seconds)
    return found


async def _at_half_load(behind: Traffic, direct: Traffic, capacity: Throughput, seconds: float) -> Figures:
    """What is added at half the rate that saturates it; nothing for no proxy at all, and for paced streams."""
    rate = capacity.requests_per_s / 2.0
    if behind is direct or behind.response.chunks > 1:
        return dict.fromkeys(("half_load_per_s", "half_added_p50_ms", "half_added_p99_ms"))
    baseline = await open_loop(direct, seconds=seconds, rate=rate)
    figures = added(await open_loop(behind, seconds=seconds, rate=rate), baseline)
    percents = {f"half_added_p{percent}_ms": figures[f"added_p{percent}_ms"] for percent in (50, 99)}
    return {"half_load_per_s": rate, **percents}


def _figures(way: Way, capacity: Throughput, latency: Latency, baseline: Latency) -> Figures:
    compared = added(latency, baseline)
    memory = {name: rss_bytes(pid) / 1e6 for name, pid in way.processes.items()}
    return {
        "requests_per_s": capacity.requests_per_s,
        "cpu_us_per_request": _own(capacity.cpu_us),
        "envoy_cpu_us_per_request": capacity.cpu_us.get("envoy"),
        **(compared if way.pid else dict.fromkeys(compared)),
        "latency_requests": len(latency.first_byte),
        "rss_mb": _own(memory),
        "envoy_rss_mb": memory.get("envoy"),
        "cores": capacity.cores.get("gateway"),
    }


def _own(figures: Mapping[str, float]) -> float | None:
    """What is used without Envoy; None where there is no gateway."""
    return figures["gateway"] - figures.get("envoy", 0.0) if "gateway" in figures else None


# --- what is measured --------------------------------------------------------------------------------------


@asynccontextmanager
async def _running(first: Case, warn: Callable[[str], None]) -> AsyncIterator[tuple[Upstream, dict[str, Way]]]:
    """Upstream, picker and the peers that work, once each has answered `first`."""
    places = placement()
    async with AsyncExitStack() as stack:
        stack.enter_context(pinned(places.load))
        upstream = await stack.enter_async_context(Upstream().running(ENDPOINTS))
        working = [name for name in peers.installed() if await _works(name, upstream, first, warn)]
        children = await stack.enter_async_context(supervised())
        ways = {DIRECT: Way(upstream.ports, None)}
        for name in (PICKER, *([BEHIND_ENVOY] if has_envoy() else []), *working):
            ways[name] = await start(name, children, upstream, first, places.subject, beside=places.gateway)
        yield upstream, ways


async def start(
    name: str,
    children: Children,
    upstream: Upstream,
    first: Case,
    cores: Cores | None,
    *,
    beside: Cores | None = None,
) -> Way:
    """picker or an installed peer in front of the upstream, once it has answered `first`.

    cores: those it runs on; beside: those of its Envoy, if it has one, and if they are others.
    """
    if name == PICKER:
        return await _start_picker(children, upstream, first, cores)
    if name == BEHIND_ENVOY:
        way = await _start_picker(children, upstream, first, cores, "--data-plane", "envoy", "--envoy-threads", "1")
        envoy = _child(way)
        if beside is not None:
            move(envoy, beside)
        return replace(way, envoy=envoy)
    return await _start_peer(children, name, upstream, first, cores)


def has_envoy() -> bool:
    """Whether an Envoy is installed."""
    try:
        find_envoy()
    except ConfigError:
        return False
    return True


async def _start_picker(children: Children, upstream: Upstream, first: Case, cores: Cores | None, *flags: str) -> Way:
    name = PICKER if not flags else BEHIND_ENVOY
    with pinned(cores):
        child = await children.start_picker(
            name, *("proxy", "--port", "0", "--admin-port", "0"), *flags, *upstream.endpoint_flags()
        )
    (port,) = await children.announced(child, _PROXY, timeout=_READY_TIMEOUT)
    return await _ready(children, child, int(port), first.traffic(upstream, (int(port),)))


def _child(way: Way) -> int:
    """The one process that picker has started."""
    assert way.pid is not None
    _, envoy = family(table(), way.pid)
    return envoy.pid


async def _start_peer(children: Children, name: str, upstream: Upstream, first: Case, cores: Cores | None) -> Way:
    port, metrics_port = free_ports(2)
    command = peers.installed()[name] + peers.flags(upstream.urls, port=port, metrics_port=metrics_port)
    with pinned(cores):
        child = await children.start(name, *command)
    return await _ready(children, child, port, first.traffic(upstream, (port,)))


async def _ready(children: Children, child: Child, port: int, traffic: Traffic) -> Way:
    await children.ready(child, partial(answers, traffic), timeout=_PEER_TIMEOUT)
    return Way((port,), child.process.pid)


async def _works(name: str, upstream: Upstream, first: Case, warn: Callable[[str], None]) -> bool:
    """Start it once by itself: what is installed under a peer's name may be broken, or something else."""
    try:
        async with supervised(grace=1.0) as children:
            await _start_peer(children, name, upstream, first, None)
    except ChildFailedError as error:
        warn(f"{name} is left out: {error}")
        return False
    return True
