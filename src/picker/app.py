"""The composition root: a configuration becomes objects, and the objects run until told to stop.

The only module that constructs everything, and the only one that nothing but the commands may import.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry

from picker.config import Config, EndpointSpec
from picker.core.pick import PICKERS, Picker, max_score
from picker.core.profile import Cost, Profile, Weighted
from picker.core.scheduler import Scheduler, Settings
from picker.errors import ConfigError
from picker.exchange import Limits
from picker.prefix.approximate import ApproximateIndex
from picker.prefix.blocks import BlockHasher
from picker.runtime import Clock, Runtime
from picker.scorers import build_scorer
from picker.scorers.inflight import Inflight
from picker.scorers.recency import Recency
from picker.sources.file import FileSource, load_endpoints
from picker.sources.scrape import AiohttpFetch, ScrapeSource
from picker.sources.static import StaticSource, parse_endpoint
from picker.telemetry import Telemetry
from picker.types import Endpoint, Fact, Role

log = logging.getLogger("picker.app")


class Source(Protocol):
    """How facts arrive."""

    async def run(self, emit: Callable[[Fact], None]) -> None: ...


Serve = Callable[[asyncio.Event], Coroutine[None, None, None]]
"""How requests arrive: a front end's `serve`, bound to its socket; it ends some time after the event is set."""


class App:
    """One running picker: runtime, sources and front ends. clock: monotonic seconds, the same for all of them."""

    def __init__(self, config: Config, *, clock: Clock = time.monotonic, secret: bytes | None = None) -> None:
        self.config = config
        self.telemetry = Telemetry(CollectorRegistry())
        self.runtime = Runtime(
            build_scheduler(config),
            BlockHasher(secret or os.urandom(32), config.index.block_bytes),
            self.telemetry,
            clock=clock,
            limits=Limits(
                max_body_bytes=config.limits.max_body_bytes,
                max_attempts=config.limits.max_attempts,
                name_endpoint=config.limits.name_endpoint,
            ),
            queue_timeout=config.queue.timeout_s,
        )
        self.sources = self._sources()
        self._export()

    def _sources(self) -> list[Source]:
        config = self.config
        if not config.endpoints and config.endpoints_file is None:
            raise ConfigError("no endpoints: give --endpoint URL (as often as needed) or --endpoints-file FILE")
        sources: list[Source] = []
        if config.endpoints:
            sources.append(StaticSource([build_endpoint(spec) for spec in config.endpoints]))
        if config.endpoints_file is not None:
            path = Path(config.endpoints_file)
            load_endpoints(path)  # a first load that fails is an error of usage, told at once
            sources.append(FileSource(path))
        return sources

    def _export(self) -> None:
        scheduler, gauge = self.runtime.scheduler, self.telemetry.gauge
        gauge("picker_inflight_requests", "Requests routed and not ended.", lambda: len(scheduler.charges))
        gauge("picker_queued_requests", "Requests waiting in picker's queue.", lambda: len(scheduler.queue))
        gauge("picker_endpoints", "Endpoints known.", lambda: len(scheduler.pool))
        gauge("picker_index_bytes", "Memory of the prefix index.", lambda: scheduler.index.nbytes)

    async def run(self, frontends: Sequence[Serve], stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then take nothing new, let running requests end and return.

        Raises the first error of a source or front end: a picker without its ears must not look alive.
        """
        config = self.config.scrape
        async with AiohttpFetch(timeout=config.timeout_s) as fetch, asyncio.TaskGroup() as group:
            rng = random.Random(self.config.seed)
            scraper = ScrapeSource(fetch, clock=self.runtime.clock, rng=rng, interval=config.interval_s)
            self.runtime.listen(scraper.observe)
            background = [group.create_task(source.run(self.runtime.emit)) for source in (scraper, *self.sources)]
            background.append(group.create_task(self._drain_on(stop)))
            await self._serve(frontends, stop)
            for task in background:
                task.cancel()

    async def _serve(self, frontends: Sequence[Serve], stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            for frontend in frontends:
                group.create_task(frontend(stop))

    async def _drain_on(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.runtime.drain()


def build_scheduler(config: Config) -> Scheduler:
    """The scheduler that a configuration describes; raises ConfigError for an unknown scorer or picker."""
    profile, picker = build_policy(config)
    settings = Settings(
        block_bytes=config.index.block_bytes,
        max_inflight=config.queue.max_inflight,
        queue_size=config.queue.size,
        eject_after=config.health.eject_after,
        eject_s=config.health.eject_s,
        eject_max_s=config.health.eject_max_s,
        seed=int.from_bytes(os.urandom(4)) if config.seed is None else config.seed,
    )
    return Scheduler(settings, ApproximateIndex(config.index.budget_bytes), profile, picker)


def build_policy(config: Config) -> tuple[Profile, Picker]:
    """What ranks the candidates and what chooses from the ranking."""
    picker = PICKERS.get(config.picker)
    if picker is None:
        raise ConfigError(f"picker: {config.picker!r} is not one of {', '.join(PICKERS)}")
    match config.policy:
        case "picker":
            return Cost(), picker
        case "weighted":
            return Weighted([(build_scorer(s.name, s.parameters), s.weight) for s in config.scorers]), picker
        case "least-request":
            return Weighted([(Inflight(), 1.0)]), max_score
        case "round-robin":
            return Weighted([(Recency(), 1.0)]), max_score
        case "random":
            return Weighted([]), max_score
        case _:
            raise ConfigError(f"policy: {config.policy!r} is unknown")


def build_endpoint(spec: str | EndpointSpec) -> Endpoint:
    """An endpoint from a URL or from its description in the file."""
    if isinstance(spec, str):
        return parse_endpoint(spec)
    endpoint = parse_endpoint(spec.address)
    roles = {role.value: role for role in Role}
    if spec.role not in roles:
        raise ConfigError(f"endpoints: role {spec.role!r} of {spec.address} is not one of {', '.join(roles)}")
    return Endpoint(
        name=spec.name or (endpoint.name if spec.rank is None else f"{endpoint.name}#{spec.rank}"),
        address=endpoint.address,
        models=frozenset(spec.models),
        role=roles[spec.role],
        scheme=endpoint.scheme,
        rank=spec.rank,
        labels=dict(spec.labels),
    )


@contextmanager
def stopping_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` on SIGTERM and Ctrl-C; a second one ends the process at once."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        log.info("stopping: running requests may end; a second signal ends at once")
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
