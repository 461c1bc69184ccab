"""The composition root: a configuration becomes objects, and the objects run until told to stop.

The only module that constructs everything, and the only one that nothing but the commands may import.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections import ChainMap
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry

from picker.config import Config, EndpointSpec
from picker.deciders import build_policy, build_scheduler
from picker.discovery import build_discovery, build_election, build_endpoint
from picker.errors import ConfigError
from picker.exchange import Limits
from picker.frontends.serving import listen
from picker.gate import Clock
from picker.live_policy import LivePolicy
from picker.prediction_metrics import EventMetrics, PredictionMetrics
from picker.prefix.blocks import BlockHasher
from picker.record import Recorder
from picker.request_limits import KUBERNETES, build_limits, build_rewriting, tell_rewriting
from picker.rewrite_metrics import RewriteMetrics
from picker.runtime import Runtime
from picker.sources.file import FileSource, Terms, load_endpoints
from picker.sources.roster import Roster
from picker.sources.scrape import AiohttpFetch, Fetch, Manners, ScrapeSource, plainly
from picker.telemetry import Telemetry
from picker.types import Fact

if TYPE_CHECKING:  # what few need is brought when it is asked for
    from picker.exact_mode import ExactMode
    from picker.replicas.service import Replicas
    from picker.sources.ingest import Ingest
    from picker.sources.kv_events import KvEventSource
    from picker.sources.kv_snapshot import Snapshots

log = logging.getLogger("picker.app")

CONFIGURATION, ENDPOINTS_FILE = "configuration", "endpoints file"  # who list endpoints


class Source(Protocol):
    """How facts arrive."""

    async def run(self, emit: Callable[[Fact], None]) -> None: ...


Serve = Callable[[asyncio.Event], Coroutine[None, None, None]]
"""How requests arrive: a front end's `serve`, bound to its socket; it ends some time after the event is set."""


@dataclass(frozen=True, slots=True)
class Hearing:
    """What listens to KV events while the application runs, for its figures."""

    events: KvEventSource
    ingest: Ingest


class App:
    """One running picker: runtime, sources and front ends. clock: monotonic seconds, the same for all of them."""

    def __init__(self, config: Config, *, clock: Clock = time.monotonic, secret: bytes | None = None) -> None:
        self.config = config
        self.telemetry = Telemetry(CollectorRegistry())
        self.replicas = _replicas(config)
        # Hashes that replicas tell each other must be those of one secret, whoever is started by whom.
        secret = self.replicas.hashing if self.replicas is not None else secret or os.urandom(32)
        self.secret = secret
        self.exact = _exact(config, secret)
        self.discovery = build_discovery(config, clock)
        self.rewriting = build_rewriting(config)
        if self.discovery is not None:
            self.discovery.catalogue.rewrites.on_change = partial(self.rewriting.put, KUBERNETES)
        self.election = build_election(config, clock)
        self.manners: Manners = plainly  # in which endpoints are asked for their metrics
        self.fetch: AiohttpFetch | None = None
        self.scraper: ScrapeSource | None = None
        self.roster = Roster(CONFIGURATION, ENDPOINTS_FILE)
        self.endpoints_file = FileSource(_path(config.endpoints_file), terms=self._note_terms)
        # Told by whom each of the endpoints that an owner lists is shown which key; None: it says nothing of one.
        self.tell_keys: Callable[[str, Mapping[str, str | None]], None] = lambda owner, keys: None
        self._listed_weights: dict[str, dict[str, float]] = {}
        self.policy = LivePolicy(*build_policy(config), ChainMap(self.roster.weights, self.roster.listed_weights))
        knowledge = None if self.exact is None else self.exact.knowledge(self._models_of)
        scheduler = build_scheduler(config, knowledge, self.policy)
        self.runtime = Runtime(
            scheduler,
            BlockHasher(secret, config.index.block_bytes),
            self.telemetry,
            clock=clock,
            limits=self.limits_of(config),
            reader=None if self.exact is None else self.exact.reader(scheduler.is_adapter),
            headers=scheduler.headers,
            queue_timeout=config.queue.timeout_s,
            patience=config.health.hang_floor_s or math.inf,
        )
        self.sources = self._sources()
        if self.replicas is not None:
            self.replicas.join(self.runtime, config.index.block_bytes, self._knows_endpoints)
        self.hearing: Hearing | None = None
        self.snapshots: Snapshots | None = None
        self.recorder = self._recorder()
        self._export()

    def _sources(self) -> list[Source]:
        config = self.config
        self.runtime.listen(self.roster.observe)
        if self.discovery is not None:
            return [self.discovery, self.roster]
        if not config.endpoints and config.endpoints_file is None:
            raise ConfigError(
                "no endpoints: give --endpoint URL (as often as needed) or --endpoints-file FILE, "
                "or name a pool of Kubernetes (picker epp --pool-name, or kubernetes.pools in the configuration)"
            )
        self.list_endpoints(config)
        if config.endpoints_file is not None:
            load_endpoints(Path(config.endpoints_file))  # a first load that fails is an error of usage, told at once
        self.roster.follow(ENDPOINTS_FILE, self.endpoints_file)
        return [self.roster]

    def list_endpoints(self, config: Config) -> None:
        """Have the endpoints of a configuration instead of those listed before; raises ConfigError."""
        endpoints = [(build_endpoint(spec), spec) for spec in config.endpoints]
        self.roster.assign(CONFIGURATION, [endpoint for endpoint, _ in endpoints])
        weights = {each.name: spec.weight if isinstance(spec, EndpointSpec) else 1.0 for each, spec in endpoints}
        self._list_weights(CONFIGURATION, weights)

    def _note_terms(self, terms: Mapping[str, Terms]) -> None:
        """How the file of endpoints wants them treated."""
        self._list_weights(ENDPOINTS_FILE, {name: each.weight for name, each in terms.items()})
        self.tell_keys(ENDPOINTS_FILE, {name: each.key for name, each in terms.items()})

    def _list_weights(self, owner: str, weights: dict[str, float]) -> None:
        """Of an endpoint that two list, the configuration's description counts, and with it its weight."""
        self._listed_weights[owner] = weights
        merged = self._listed_weights.get(ENDPOINTS_FILE, {}) | self._listed_weights.get(CONFIGURATION, {})
        self.roster.listed_weights.clear()
        self.roster.listed_weights.update({name: weight for name, weight in merged.items() if weight != 1.0})

    def limits_of(self, config: Config) -> Limits:
        """What a request may be, by a configuration whose rewrites are in force from here on."""
        tell_rewriting(self.rewriting, config)
        if self.discovery is None:
            return build_limits(config, rewriting=self.rewriting)
        return build_limits(config, self.discovery.objectives, self.rewriting)

    def _recorder(self) -> Recorder | None:
        if self.config.record is None:
            return None
        path, block_bytes = Path(self.config.record), self.config.index.block_bytes
        recorder = Recorder(path, block_bytes=block_bytes, clock=self.runtime.clock)
        self.telemetry.watch(recorder)
        return recorder

    def _export(self) -> None:
        scheduler, gauge = self.runtime.scheduler, self.telemetry.gauge
        gauge("picker_inflight_requests", "Requests routed here and not ended.", lambda: scheduler.charges.own)
        gauge("picker_queued_requests", "Requests waiting in picker's queue.", lambda: len(scheduler.queue))
        gauge("picker_endpoints", "Endpoints known.", lambda: len(scheduler.pool))
        gauge("picker_retries", "Requests sent to another endpoint.", lambda: scheduler.retries.allowed)
        gauge("picker_retries_refused", "Retries beyond the budget.", lambda: scheduler.retries.refused)
        gauge("picker_index_bytes", "Memory of the prefix index.", lambda: scheduler.index.nbytes)
        if (discovery := self.discovery) is not None:
            age = "Seconds since the API server was lost sight of; nan before all is known."
            gauge("picker_kubernetes_age_seconds", age, lambda: _or_nan(discovery.age(self.runtime.clock())))
            self.runtime.reports["kubernetes"] = discovery.report
        if (election := self.election) is not None:
            gauge("picker_leader", "1 while this replica leads.", lambda: float(election.leading))
            self.runtime.reports["leader_election"] = election.report
        exact = scheduler.exact
        if exact is not None:
            gauge("picker_exact_index_bytes", "Memory of the index of KV events.", lambda: exact.index.nbytes)
            states = PredictionMetrics(lambda: scheduler.snapshot(self.runtime.clock()))
            self.telemetry.registry.register(states)
        if self.exact is not None:
            self.telemetry.registry.register(EventMetrics(self._event_counts, self.exact.readings))
        self.telemetry.registry.register(RewriteMetrics(self.rewriting, compat=self.config.epp.metrics_compat))

    def _knows_endpoints(self) -> bool:
        return self.discovery is None or self.discovery.synced.is_set()

    @property
    def informed(self) -> bool:
        """Whether it knows what there is to know at the start: the endpoints, and what other replicas have told."""
        return self._knows_endpoints() and (self.replicas is None or self.replicas.settled.is_set())

    @property
    def leads(self) -> bool:
        """Whether it is this replica that serves, which all are where nobody leads."""
        return self.election is None or self.election.leading

    async def get_informed(self) -> None:
        """Wait for that; for other replicas no longer than a few seconds."""
        if self.discovery is not None:
            await self.discovery.synced.wait()
        if self.replicas is not None:
            await self.replicas.settled.wait()

    def _has_requests(self, name: str) -> bool:
        """Whether anything that was sent there is not over."""
        pool = self.runtime.scheduler.pool
        row = pool.row(name)
        return row is not None and pool.inflight.item(row) > 0

    def _event_counts(self) -> Mapping[str, Mapping[str, float]]:
        """Of each endpoint's KV events; what is not known is left out."""
        exact, pool = self.runtime.scheduler.exact, self.runtime.scheduler.pool
        if self.hearing is None or exact is None:
            return {}
        counts = {name: asdict(stats) for name, stats in self.hearing.events.stats.items()}
        for name, known in counts.items():
            if (row := pool.row(name)) is not None:
                known |= {"unread": exact.stream(row).unread, "nameless": exact.stream(row).nameless}
        return {name: {key: each for key, each in known.items() if each is not None} for name, known in counts.items()}

    def _models_of(self, name: str) -> frozenset[str]:
        pool = self.runtime.scheduler.pool
        row = pool.row(name)
        return frozenset() if row is None else pool.endpoint(row).models

    async def run(self, frontends: Sequence[Serve], stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then take nothing new, let running requests end and return.

        Raises the first error of a source or front end: a picker without its ears must not look alive.
        """
        config = self.config.scrape
        self.fetch = AiohttpFetch(timeout=config.timeout_s, manners=self.manners)
        async with self.fetch as fetch, asyncio.TaskGroup() as group:
            rng = random.Random(self.config.seed)
            scraper = ScrapeSource(
                fetch, clock=self.runtime.clock, rng=rng, interval=config.interval_s, busy=self._has_requests
            )
            scraper.health_path = self.config.health.path
            self.scraper = scraper
            self.runtime.listen(scraper.observe)
            background = [group.create_task(self._drain_on(stop))]
            if self.exact is not None:
                background.append(group.create_task(self._hear(self.exact, fetch, rng)))
            if self.replicas is not None:
                background.append(group.create_task(self.replicas.run(rng)))
            if self.recorder is not None:
                background.append(group.create_task(self.recorder.run()))
            if self.election is not None:
                background.append(group.create_task(self.election.run(self.get_informed)))
            background += [group.create_task(source.run(self.runtime.emit)) for source in (scraper, *self.sources)]
            await self._serve([*frontends, *self._api()], stop)
            if self.snapshots is not None:
                await self.snapshots.finish()
            if self.election is not None:
                await self.election.gone.wait()
            for task in background:
                task.cancel()

    def _api(self) -> list[Serve]:
        if self.config.api.port is None:
            return []
        from picker.api_service import serve_api  # gRPC and Envoy's messages: 9 MB

        return [partial(serve_api, self.config, self.runtime)]

    async def _hear(self, exact: ExactMode, fetch: Fetch, rng: random.Random) -> None:
        """KV events: from the engines through what works on them to the scheduler."""
        from picker.sources.kv_events import KvEventSource

        config = self.config.exact
        events = KvEventSource(
            fetch,
            clock=self.runtime.clock,
            rng=rng,
            secret=exact.secret,
            events=config.events,
            replay=config.replay,
        )
        ingest = exact.ingest(self._models_of)
        self.hearing = Hearing(events, ingest)
        exact.post.manners = self.manners
        for listener in (exact.post.observe, ingest.observe, events.observe):
            self.runtime.listen(listener)
        async with exact.post, asyncio.TaskGroup() as group:
            group.create_task(ingest.run(self.runtime.emit))
            snapshots = exact.snapshots(self.runtime.scheduler, events, lambda: ingest.idle)
            if snapshots is not None:
                self.runtime.listen(snapshots.observe)
                await snapshots.restore()
                self.snapshots = snapshots
                group.create_task(snapshots.run())
            group.create_task(events.run(ingest.take))

    async def _serve(self, frontends: Sequence[Serve], stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            for frontend in frontends:
                group.create_task(frontend(stop))

    async def _drain_on(self, stop: asyncio.Event) -> None:
        await stop.wait()
        if self.election is not None:
            self.election.resign()
        self.runtime.drain()


def _replicas(config: Config) -> Replicas | None:
    if not config.replicas.wanted:
        return None
    from picker.replicas.service import Replicas  # and what seals their words: 6 MB

    return Replicas(config.replicas, listen=listen)


def _exact(config: Config, secret: bytes) -> ExactMode | None:
    if config.exact.mode == "off":
        return None
    from picker.exact_mode import ExactMode  # and ZeroMQ: 3 MB

    return ExactMode(config.exact, secret)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
