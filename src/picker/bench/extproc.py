"""picker behind a real Envoy: what ext-proc costs in CPU time and adds in latency, against the same Envoy without it.

One Envoy with one worker and two listeners, with and without picker, in front of the same upstream; every repeat
measures both in turn. Mode `full` is both directions over ext-proc, as the endpoint-picker protocol has it; `lean` is
the request alone, and Envoy's access log instead of the response. With several workers, Envoy has a thread for each,
since every thread keeps a connection of its own; all of picker's processes stay on one core. A request
costs a busy process less than an idle one, whose caches are cold and which wakes for each: `slow` is the cost at
the same few requests a second whatever the answer's length, which is what tells short from long answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from picker import envoy
from picker.bench.cases import CHUNKS, ENDPOINTS, PROMPT_BYTES, Case, cases, modest_rate
from picker.bench.client import answers, closed_loop, open_loop
from picker.bench.figures import added, row_figures
from picker.bench.placement import pinned, placement
from picker.bench.upstream import Upstream
from picker.children import supervised
from picker.config import EPP_MODES

COLUMNS = (
    *("mode", "prompt_bytes", "chunks", "requests_per_s", "picker_cpu_us_per_request"),
    *("slow_picker_cpu_us_per_request", "envoy_cpu_us_per_request"),
    *("added_p50_ms", "added_p99_ms", "latency_requests", "added_chunk_p50_ms", "picker_cores", "plain_requests_per_s"),
)
# Beside those, where several workers share one decider.
WORKER_COLUMNS = ("workers", "decider_cpu_us_per_request", "worker_cpu_us_per_request", "workers_per_decider")
_EPP = (
    *("epp", "--host", "127.0.0.1", "--secure-serving", "false"),
    *("--grpc-port", "0", "--grpc-health-port", "0", "--metrics-port", "0"),
)
_DECIDER = re.compile(r"decider is process (\d+)")
_EXT_PROC = re.compile(r"ext-proc on \S*?:(\d+)")
_READY_TIMEOUT = 60.0
_SLOW = 10.0  # requests a second that every case can bear


@dataclass(frozen=True, slots=True)
class _Gateway:
    """behind, plain: Envoy's ports with and without picker. pids: of both processes."""

    upstream: Upstream
    behind: tuple[int]
    plain: tuple[int]
    pids: Mapping[str, int]


async def rows(
    *,
    modes: Sequence[str] = EPP_MODES,
    prompt_bytes: Sequence[int] = PROMPT_BYTES,
    chunks: Sequence[int] = CHUNKS,
    workers: int = 1,
    seconds: float = 0.7,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row for each mode, prompt size and number of chunks (0: one JSON answer instead of a stream).

    workers: of picker; with several, the CPU time of the decider and of the workers, too. seconds: of each measured
    window; a repeat has four. Raises ConfigError without Envoy, ChildFailedError or
    AnswerError when something breaks.
    """
    envoy.find_envoy()
    found = []
    for mode in modes:
        async with _running(mode, workers, next(cases(prompt_bytes, chunks))) as gateway:
            for case in cases(prompt_bytes, chunks):
                figures = []
                for number in range(repeats):
                    progress(f"{mode} · {case} · {number + 1} of {repeats}")
                    figures.append(await _repeat(gateway, case, seconds))
                key = {"mode": mode, "prompt_bytes": case.prompt_bytes, "chunks": case.chunks, "workers": workers}
                found.append({**key, **row_figures(figures), "repeats": repeats})
    return found


async def _repeat(gateway: _Gateway, case: Case, seconds: float) -> dict[str, float | None]:
    behind, plain = (case.traffic(gateway.upstream, ports) for ports in (gateway.behind, gateway.plain))
    with_picker = await closed_loop(behind, seconds=seconds, processes=gateway.pids)
    without = await closed_loop(plain, seconds=seconds, processes=gateway.pids)
    rate = modest_rate(with_picker.requests_per_s)
    idle = without.cores["picker"]
    latency = await open_loop(behind, seconds=seconds, rate=rate)
    slow = await open_loop(behind, seconds=seconds, rate=_SLOW, processes=gateway.pids)
    return {
        "requests_per_s": with_picker.requests_per_s,
        "picker_cpu_us_per_request": with_picker.cpu_us["picker"],
        **_shares(with_picker.cpu_us),
        "slow_picker_cpu_us_per_request": slow.cpu_us["picker"],
        "envoy_cpu_us_per_request": with_picker.cpu_us["envoy"],
        **added(latency, await open_loop(plain, seconds=seconds, rate=rate)),
        "picker_cores": with_picker.cores["picker"],
        "picker_idle_cores": idle,
        "picker_net_cpu_us_per_request": with_picker.cpu_us["picker"] - idle * 1e6 / with_picker.requests_per_s,
        "envoy_cores": with_picker.cores["envoy"],
        "plain_requests_per_s": without.requests_per_s,
        "plain_envoy_cpu_us_per_request": without.cpu_us["envoy"],
        "latency_requests": len(latency.first_byte),
        "latency_requests_per_s": rate,
    }


def _shares(cpu_us: Mapping[str, float]) -> dict[str, float]:
    """What a request costs its worker and the decider, and so how many busy workers one decider can keep so."""
    if "decider" not in cpu_us:
        return {}
    decider = cpu_us["decider"]
    worker = cpu_us["picker"] - decider
    return {
        "decider_cpu_us_per_request": decider,
        "worker_cpu_us_per_request": worker,
        "workers_per_decider": worker / decider if decider else math.nan,
    }


@asynccontextmanager
async def _running(mode: str, workers: int, first: Case) -> AsyncIterator[_Gateway]:
    """Upstream, picker and Envoy, once `first` has been answered both ways."""
    places = placement()
    async with AsyncExitStack() as stack:
        stack.enter_context(pinned(places.load))
        upstream = await stack.enter_async_context(Upstream().running(ENDPOINTS))
        children = await stack.enter_async_context(supervised())
        with pinned(places.subject):
            flags = (*_EPP, "--mode", mode, "--workers", str(workers))
            picker = await children.start_picker("picker", *flags, *upstream.endpoint_flags())
        (port,) = await children.announced(picker, _EXT_PROC, timeout=_READY_TIMEOUT)
        pids = {"picker": picker.process.pid}
        if workers > 1:
            pids["decider"] = int((await children.announced(picker, _DECIDER, timeout=_READY_TIMEOUT))[0])
        config = envoy.bootstrap(upstream.addresses, f"127.0.0.1:{port}", plain="127.0.0.1:0", lean=mode == "lean")
        with pinned(places.gateway):
            running = await stack.enter_async_context(envoy.running_envoy(config, concurrency=workers))
        behind, plain = (running.ports[envoy.GATEWAY],), (running.ports[envoy.PLAIN],)
        for ports in (behind, plain):
            traffic = first.traffic(upstream, ports)
            await children.ready(picker, partial(answers, traffic), timeout=_READY_TIMEOUT)
        yield _Gateway(upstream, behind, plain, pids | {"envoy": running.pid})
