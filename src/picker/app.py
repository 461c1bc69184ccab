"""The composition root: a configuration becomes objects, and the objects run until told to stop.

The only module that constructs everything, and the only one that nothing but the commands may import.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import signal
import socket
import time
from collections import ChainMap
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry

from picker.api_service import serve_api
from picker.config import Config, EndpointSpec, ProfileSpec
from picker.core.pick import PICKERS, Picker, max_score
from picker.core.plan import Plan, Route
from picker.core.plugin_filters import build_detector, build_filter
from picker.core.profile import Cost, Profile, Weighted
from picker.core.saturation import Detector
from picker.core.scheduler import Scheduler, Settings
from picker.errors import ConfigError
from picker.exact_mode import ExactMode
from picker.exchange import Limits
from picker.frontends.serving import listen
from picker.gate import Clock
from picker.live_policy import LivePolicy
from picker.prediction_metrics import EventMetrics, PredictionMetrics
from picker.prefix.approximate import ApproximateIndex
from picker.prefix.blocks import BlockHasher
from picker.prefix.exact import Exact
from picker.record import Recorder
from picker.replicas.service import Replicas
from picker.rewrite_metrics import RewriteMetrics
from picker.rewrites import Rewriting
from picker.runtime import Runtime
from picker.scorers import build_scorer
from picker.scorers.inflight import Inflight
from picker.scorers.recency import Recency
from picker.sources.file import FileSource, Terms, load_endpoints
from picker.sources.ingest import Ingest
from picker.sources.kubernetes.client import Client
from picker.sources.kubernetes.credentials import Access, find_access
from picker.sources.kubernetes.election import Election, Timing
from picker.sources.kubernetes.scope import Scope
from picker.sources.kubernetes.source import KubernetesSource
from picker.sources.kv_events import KvEventSource
from picker.sources.kv_snapshot import Snapshots
from picker.sources.roster import Roster, check_weight
from picker.sources.scrape import AiohttpFetch, Fetch, Manners, ScrapeSource, plainly
from picker.sources.static import parse_endpoint
from picker.telemetry import Telemetry
from picker.types import Endpoint, Fact, Role

log = logging.getLogger("picker.app")

CONFIGURATION, ENDPOINTS_FILE = "configuration", "endpoints file"  # who list endpoints
KUBERNETES = "kubernetes"  # who, beside a configuration, says what models requests get
_FALLBACKS = 2  # endpoints that a decision names behind the first, unless a profile names more


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
        self.replicas = Replicas(config.replicas, listen=listen) if config.replicas.wanted else None
        # Hashes that replicas tell each other must be those of one secret, whoever is started by whom.
        secret = self.replicas.hashing if self.replicas is not None else secret or os.urandom(32)
        self.secret = secret
        self.exact = None if config.exact.mode == "off" else ExactMode(config.exact, secret)
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
            await self._serve([*frontends, partial(serve_api, self.config, self.runtime)], stop)
            if self.snapshots is not None:
                await self.snapshots.finish()
            if self.election is not None:
                await self.election.gone.wait()
            for task in background:
                task.cancel()

    async def _hear(self, exact: ExactMode, fetch: Fetch, rng: random.Random) -> None:
        """KV events: from the engines through what works on them to the scheduler."""
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


def build_scheduler(config: Config, exact: Exact | None = None, policy: LivePolicy | None = None) -> Scheduler:
    """The scheduler that a configuration describes; raises ConfigError for an unknown scorer or picker.

    policy: to decide by instead of the configuration's.
    """
    profile, picker = build_policy(config) if policy is None else (policy, policy.pick)
    index = ApproximateIndex(config.index.budget_bytes)
    return Scheduler(build_settings(config), index, profile, picker, exact, build_saturation(config))


def build_settings(config: Config) -> Settings:
    """The numbers that decisions go by; without a seed in the configuration it is a new one each time."""
    return Settings(
        block_bytes=config.index.block_bytes,
        max_inflight=config.queue.max_inflight,
        queue_size=config.queue.size,
        hold_s=config.queue.hold_s,
        eject_after=config.health.eject_after,
        eject_s=config.health.eject_s,
        eject_max_s=config.health.eject_max_s,
        retry_ratio=config.retry.ratio,
        retry_floor=config.retry.floor,
        hang_factor=config.health.hang_factor,
        hang_floor_s=config.health.hang_floor_s,
        slow_start_s=config.health.slow_start_s,
        seed=int.from_bytes(os.urandom(4)) if config.seed is None else config.seed,
        fallbacks=max([_FALLBACKS, *((profile.max_endpoints or 1) - 1 for profile in config.profiles)]),
    )


def build_policy(config: Config) -> tuple[Profile, Picker]:
    """What ranks the candidates and what chooses from the ranking."""
    picker = PICKERS.get(config.picker)
    if picker is None:
        raise ConfigError(f"picker: {config.picker!r} is not one of {', '.join(PICKERS)}")
    match config.policy:
        case "picker":
            return Cost(), picker
        case "weighted":
            plan = build_plan(config)
            return plan, plan.pick
        case "least-request":
            return Weighted([(Inflight(), 1.0)]), max_score
        case "round-robin":
            return Weighted([(Recency(), 1.0)]), max_score
        case "random":
            return Weighted([]), max_score
        case _:
            raise ConfigError(f"policy: {config.policy!r} is unknown")


def build_plan(config: Config) -> Plan:
    """The profiles of the `weighted` policy; the filters and scorers at the top are one of their own."""
    own = ProfileSpec(name="default", filters=config.filters, scorers=config.scorers, picker=config.picker)
    specs = config.profiles or [own]
    routes = {spec.name: build_route(spec) for spec in specs}
    return Plan(routes, config.profile or specs[0].name, config.profile_header, config.prefill_profile)


def build_route(spec: ProfileSpec) -> Route:
    """A profile with what it names; raises ConfigError for what there is not."""
    picker = PICKERS.get(spec.picker)
    if picker is None:
        raise ConfigError(f"profile {spec.name!r}: picker {spec.picker!r} is not one of {', '.join(PICKERS)}")
    return Route(
        scorers=[(build_scorer(each.name, each.parameters), each.weight) for each in spec.scorers],
        filters=[build_filter(each.name, each.parameters) for each in spec.filters],
        picker=picker,
        most=spec.max_endpoints,
    )


def build_saturation(config: Config) -> Detector | None:
    """What tells how full the pool is, where the configuration names it."""
    if config.saturation.detector == "off":
        return None
    return build_detector(config.saturation.detector, config.saturation.parameters)


def asks_kubernetes(config: Config) -> bool:
    """Whether endpoints come from there: none are given by hand."""
    return config.kubernetes.wanted and not config.endpoints and config.endpoints_file is None


def build_discovery(config: Config, clock: Clock) -> KubernetesSource | None:
    """Where endpoints come from when none are given by hand; None where Kubernetes is not asked."""
    wanted = config.kubernetes
    if not wanted.wanted:
        return None
    if config.endpoints or config.endpoints_file is not None:
        log.info("endpoints are given: Kubernetes is not asked for any")
        return None
    access = find_access(wanted.kubeconfig, wanted.context)
    scope = Scope(
        namespace=_namespace(config, access),
        pools=tuple(wanted.pools),
        group=wanted.group,
        selector=wanted.selector or "",
        ports=tuple(wanted.target_ports),
        services=tuple(wanted.services),
    )
    return KubernetesSource(
        access,
        scope,
        clock=clock,
        rng=random.Random(config.seed),
        objectives=config.objectives,
        resync=wanted.resync_s,
        silence=wanted.silence_s,
    )


def build_election(config: Config, clock: Clock) -> Election | None:
    """A part in choosing the replica that serves; None where all do. Raises ConfigError."""
    wanted = config.kubernetes.leader_election
    if not wanted.enabled:
        return None
    access = find_access(config.kubernetes.kubeconfig, config.kubernetes.context)
    namespace, pool = _namespace(config, access), next(iter(config.kubernetes.pools), config.epp.pool_name)
    name = wanted.lease or (f"epp-{namespace}-{pool}.llm-d.ai" if pool else None)
    if name is None:
        raise ConfigError("kubernetes.leader_election.lease: without a pool the lease needs a name")
    rng = random.Random(config.seed)
    identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}_{os.urandom(8).hex()}"
    timing = Timing(wanted.duration_s, wanted.renew_s, wanted.retry_s)
    # As client-go: of two requests in the time until a leader gives up, one may hang.
    connect = partial(Client, access, timeout=timing.renew / 2)
    return Election(connect, namespace, name, identity, clock=clock, rng=rng, timing=timing)


def _namespace(config: Config, access: Access) -> str:
    return config.kubernetes.namespace or os.environ.get("NAMESPACE") or access.namespace or "default"


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def build_limits(
    config: Config, objectives: Mapping[str, int] | None = None, rewriting: Rewriting | None = None
) -> Limits:
    """What a request may be. objectives: priorities by name where others than the configuration's are known, live.

    rewriting: which models requests get, likewise; left out where nobody will ever say.
    """
    silent = not (config.models.rewrites or config.models.rewrite_header or asks_kubernetes(config))
    return Limits(
        max_body_bytes=config.limits.max_body_bytes,
        max_attempts=config.limits.max_attempts,
        name_endpoint=config.limits.name_endpoint,
        objectives=config.objectives if objectives is None else objectives,
        retry_statuses=frozenset(config.retry.statuses),
        rewriting=None if silent else build_rewriting(config) if rewriting is None else rewriting,
    )


def build_rewriting(config: Config) -> Rewriting:
    """Which models requests get, as far as the configuration says."""
    rewriting = Rewriting(random.Random(config.seed).random, (KUBERNETES, CONFIGURATION))
    tell_rewriting(rewriting, config)
    return rewriting


def tell_rewriting(rewriting: Rewriting, config: Config) -> None:
    """Have the rules of a configuration in force."""
    models = config.models
    rewriting.put(CONFIGURATION, [spec.rule for spec in models.rewrites])
    rewriting.heeds_header = asks_kubernetes(config) if models.rewrite_header is None else models.rewrite_header


def build_endpoint(spec: str | EndpointSpec) -> Endpoint:
    """An endpoint from a URL or from its description in the file."""
    if isinstance(spec, str):
        return parse_endpoint(spec)
    endpoint = parse_endpoint(spec.address)
    roles = {role.value: role for role in Role}
    check_weight(spec.weight)
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
