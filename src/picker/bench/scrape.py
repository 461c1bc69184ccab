"""picker with nothing to route: what watching its endpoints costs, and how old what it knows of them is.

`picker epp` follows that many idle engines over real sockets (`bench.pages`, a process of its own). CPU time is the
whole process's, whatever it does beside scraping.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from picker.bench.cputime import cpu_seconds
from picker.bench.pages import SERVED
from picker.bench.placement import pinned, placement
from picker.children import supervised
from picker.config import Config

ENDPOINTS = (100, 1000)
COLUMNS = ("endpoints", "interval_s", "cores", "us_per_scrape", "scrapes_per_s", "age_p50_s", "age_p99_s", "age_max_s")
_PAGES = re.compile(r"pages on (http://\S+)")
_ADMIN = re.compile(r"debug on (http://\S+)")
_READY_TIMEOUT = 60.0
_LOOKS = 12  # at the ages of all endpoints


@dataclass(frozen=True, slots=True)
class _Watcher:
    """pid: of the picker that watches. admin, pages: where it and one of the engines answer."""

    pid: int
    admin: str
    pages: str

    def served(self) -> int:
        """Pages of metrics that all engines together have served."""
        return int(_get(self.pages + SERVED.decode()))

    def ages(self) -> list[float | None]:
        """Seconds since the last good scrape of each endpoint, None where there was none."""
        endpoints = json.loads(_get(self.admin + "/debug/endpoints"))["endpoints"]
        return [endpoint["scrape_age_s"] for endpoint in endpoints]


async def rows(
    *,
    endpoints: Sequence[int] = ENDPOINTS,
    interval: float | None = None,
    seconds: float = 10.0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row for each number of endpoints. interval: seconds between two scrapes, None: picker's default.

    seconds: of each measurement, after everybody has been seen twice. Raises ChildFailedError when something breaks.
    """
    every = Config().scrape.interval_s if interval is None else interval
    found = []
    for count in endpoints:
        progress(f"{count} endpoints")
        async with _watching(count, every) as watcher:
            await asyncio.sleep(3 * every)
            found.append({"endpoints": count, "interval_s": every, **await _figures(watcher, every, seconds)})
    return found


async def _figures(watcher: _Watcher, interval: float, seconds: float) -> dict[str, Any]:
    served, cpu, started = watcher.served(), cpu_seconds(watcher.pid), perf_counter()
    await asyncio.sleep(seconds)
    used, elapsed = cpu_seconds(watcher.pid) - cpu, perf_counter() - started
    scrapes = watcher.served() - served
    # Afterwards: to be asked costs more than to scrape.
    ages: list[float] = []
    for _ in range(_LOOKS):
        await asyncio.sleep(interval * 0.37)
        ages += [np.inf if age is None else age for age in watcher.ages()]
    p50, p99 = np.percentile(ages, [50, 99])
    return {
        "cores": round(used / elapsed, 4),
        "us_per_scrape": round(used / max(scrapes, 1) * 1e6, 1),
        "scrapes_per_s": round(scrapes / elapsed, 1),
        "age_p50_s": round(float(p50), 3),
        "age_p99_s": round(float(p99), 3),
        "age_max_s": round(max(ages), 3),
        "seconds": round(elapsed, 2),
    }


@asynccontextmanager
async def _watching(count: int, interval: float) -> AsyncIterator[_Watcher]:
    """Engines and a picker that has seen each of them."""
    places = placement()
    async with AsyncExitStack() as stack:
        children = await stack.enter_async_context(supervised())
        file = children.folder / "endpoints.yaml"
        with pinned(places.load):
            engines = await children.start("engines", sys.executable, "-m", "picker.bench.pages", str(count), str(file))
        (pages,) = await children.announced(engines, _PAGES, timeout=_READY_TIMEOUT)
        with pinned(places.subject):
            picker = await children.start_picker("picker", *_arguments(file, interval))
        (admin,) = await children.announced(picker, _ADMIN, timeout=_READY_TIMEOUT)
        watcher = _Watcher(picker.process.pid, admin, pages)

        async def seen() -> bool:
            ages = watcher.ages()
            return len(ages) == count and None not in ages

        await children.ready(picker, seen, timeout=_READY_TIMEOUT)
        yield watcher


def _arguments(file: Path, interval: float) -> tuple[str, ...]:
    ports = ("--grpc-port", "0", "--grpc-health-port", "0", "--metrics-port", "0")
    files = ("--endpoints-file", str(file), "--scrape-interval", str(interval))
    return ("epp", "--host", "127.0.0.1", "--secure-serving", "false", *ports, *files)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10.0) as response:
        text: str = response.read().decode()
    return text
