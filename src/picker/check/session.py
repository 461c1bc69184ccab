"""A whole run: starts and finds what the checks need, tier by tier, and stops it again.

Either a picker that somebody else runs, at an address, or picker's own, started here with endpoints of the checker's.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from picker import envoy
from picker.check import certificate, cluster, cluster_run, knowledge, pods, registry, runner
from picker.check.gateway import Gateway, Target
from picker.check.papers import Papers, read
from picker.check.pods import Pods
from picker.check.prompts import Prompts
from picker.check.rig import Rig, Setup, standing
from picker.check.subject import Subject
from picker.check.verdict import Check, Tier, Trace, Verdict, skipped
from picker.children import Child, Children, supervised
from picker.envoy import Topology
from picker.errors import ConfigError

Tell = Callable[[Verdict], None]

_EXT_PROC = re.compile(r"ext-proc on \S*?:(\d+)")
_START = 30.0
# Seconds for a picker to say its first word.
_MEET = 3.0

# picker's own, when it is started to be checked: small enough to be overloaded, quick to notice what happens. The queue
# takes what a check sends to a single endpoint at once: on a busy machine picker hears late that a request has ended.
SELF_OVERLOAD = 64
SELF_MAX_BODY = 1_000_000
_SELF_CONFIG = f"""
queue: {{max_inflight: 8, size: 16, timeout_s: 1.0}}
limits: {{max_body_bytes: {SELF_MAX_BODY}}}
scrape: {{interval_s: 0.2, timeout_s: 0.5}}
"""
_SELF_PODS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What to check. picker: where it serves, None for picker's own. health: its health port, when that is another.

    sources: for tier T3. cluster: for tier T4; evidence: a folder for what it measured. only: ids or families of ids.
    binary: an Envoy of one's own; no_envoy: why there is none, where T2 may go without. settle, bound, patience:
    seconds (see `Subject`).
    """

    tiers: frozenset[Tier]
    picker: Target | None = None
    health: str | None = None
    endpoints: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    only: tuple[str, ...] = ()
    topologies: tuple[Topology, ...] = (Topology.OVERRIDE_HOST,)
    binary: Path | None = None
    no_envoy: str = ""
    model: str = "check"
    seed: int = 1
    patience: float = 5.0
    bound: float = 1.0
    settle: float = 15.0
    overload: int | None = None
    max_body: int | None = None
    logs: tuple[Path, ...] = ()
    sources: knowledge.Asked = field(default_factory=knowledge.Asked)
    cluster: cluster.Asked | None = None
    evidence: Path | None = None


@dataclass(slots=True)
class Run:
    """What came of it. envoy: the versions that ran."""

    verdicts: list[Verdict] = field(default_factory=list)
    envoy: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Stand:
    """Pickers that run. plain: for tier T1. listing: names several endpoints; single: one only, for ORIGINAL_DST."""

    plain: Target
    listing: Target
    single: Target
    secure: Target | None
    pods: Pods | None
    logs: tuple[Path, ...]


async def run(plan: Plan, tell: Tell) -> Run:
    """Every check of the plan. Raises ConfigError for what cannot be run, ChildFailedError if picker does not start."""
    done = Run()
    if Tier.T0 in plan.tiers:
        await _run_t0(plan, done, tell)
    wanted = (Tier.T1, *runner.chosen(registry.T1, plan.only)), (Tier.T2, *runner.chosen(registry.T2, plan.only))
    tiers = {tier for tier, *checks in wanted if tier in plan.tiers and checks}
    unable = plan.no_envoy if Tier.T2 in tiers else ""
    if unable:
        tiers.remove(Tier.T2)
    if tiers:
        async with _standing(plan) as stand:
            if Tier.T1 in tiers:
                await _run_t1(plan, stand, done, tell)
            if Tier.T2 in tiers:
                await _run_t2(plan, stand, done, tell)
    if unable:
        _skip_t2(plan, unable, done, tell)
    if Tier.T3 in plan.tiers:
        done.verdicts += await knowledge.run(plan.sources, plan.only, plan.seed, plan.patience, tell)
    if Tier.T4 in plan.tiers and plan.cluster is not None:
        done.verdicts += await cluster_run.run(plan.cluster, plan.only, plan.patience, tell, plan.evidence)
    return done


# --- tiers -------------------------------------------------------------------------------------------------


async def _run_t0(plan: Plan, done: Run, tell: Tell) -> None:
    with tempfile.TemporaryDirectory(prefix="picker-check-") as folder:
        papers = Papers(read(plan.files or _own_files(Path(folder))), binary=plan.binary)
        done.verdicts += await runner.run(runner.chosen(registry.T0, plan.only), papers, papers.trace, tell=tell)


def _own_files(folder: Path) -> tuple[Path, ...]:
    """The Envoy configuration that picker ships, for both topologies, and the configuration it is started with here."""
    for topology in Topology:
        config = envoy.bootstrap(["127.0.0.1:8001", "127.0.0.1:8002"], "127.0.0.1:9002", topology=topology)
        (folder / f"envoy-{topology.value}.yaml").write_text(envoy.to_yaml(config), encoding="utf-8")
    (folder / "picker.yaml").write_text(_SELF_CONFIG, encoding="utf-8")
    return (folder,)


async def _run_t1(plan: Plan, stand: _Stand, done: Run, tell: Tell) -> None:
    trace = Trace()
    gateway = Gateway(stand.plain, patience=plan.patience, trace=trace)
    health = gateway
    if plan.health is not None:
        health = Gateway(Target(plan.health), patience=plan.patience, trace=trace)
    subject = Subject(
        gateway,
        health=health,
        prompts=Prompts(plan.model, plan.seed),
        trace=trace,
        pool=plan.endpoints or (stand.pods.addresses if stand.pods else ()),
        declared=bool(plan.endpoints or stand.pods),
        pods=stand.pods,
        bound=plan.bound,
        settle=plan.settle,
        overload=_own(plan, plan.overload, SELF_OVERLOAD),
        max_body=_own(plan, plan.max_body, SELF_MAX_BODY),
        secure=stand.secure,
        sinks=(*plan.logs, *stand.logs),
    )
    try:
        await _meet(subject)
        done.verdicts += await runner.run(runner.chosen(registry.T1, plan.only), subject, trace, tell=tell)
    finally:
        await gateway.close()
        if health is not gateway:
            await health.close()


def _own(plan: Plan, told: int | None, ours: int) -> int | None:
    return ours if told is None and plan.picker is None else told


async def _meet(subject: Subject) -> None:
    """Wait for a first verdict; a picker that gives none at all is not worth the checks."""
    heard = await subject.until(lambda heard: bool(heard.replies), seconds=_MEET)
    if not heard.replies:
        why = "silence" if heard.silent else f"{heard.end} {heard.details}"
        raise ConfigError(f"no picker answers at {subject.gateway.target.address}: {why}")
    await subject.ready()
    if not subject.declared:
        await subject.discover()


async def _run_t2(plan: Plan, stand: _Stand, done: Run, tell: Tell) -> None:
    if stand.pods is None:
        raise ConfigError(
            "tier T2 needs endpoints that the checker serves itself: name free addresses of this machine with "
            "--endpoint, and give the picker the same ones"
        )
    with tempfile.TemporaryDirectory(prefix="picker-check-") as folder:
        for topology in plan.topologies:
            setup = _setup(plan, stand, stand.pods, topology, Path(folder))
            async with standing(setup, Path(folder)) as rig:
                done.envoy.add(rig.envoy.version)
                done.verdicts += await runner.run(
                    _for(topology, plan), rig, rig.trace, variant=topology.value, tell=tell
                )


def _skip_t2(plan: Plan, why: str, done: Run, tell: Tell) -> None:
    for topology in plan.topologies:
        for check in _for(topology, plan):
            done.verdicts.append(runner.verdict_of(check, skipped(why), Trace(), topology.value, 0.0))
            tell(done.verdicts[-1])


def _for(topology: Topology, plan: Plan) -> list[Check[Rig]]:
    return [check for check in runner.chosen(registry.T2, plan.only) if topology.value in check.variants]


def _setup(plan: Plan, stand: _Stand, endpoints: Pods, topology: Topology, folder: Path) -> Setup:
    stranger = certificate.write(folder / "stranger") if stand.secure is not None and certificate.available() else None
    return Setup(
        topology,
        picker=stand.listing if topology is Topology.OVERRIDE_HOST else stand.single,
        pods=endpoints,
        prompts=Prompts(plan.model, plan.seed + 1),
        trace=Trace(),
        overload=_own(plan, plan.overload, SELF_OVERLOAD),
        settle=plan.settle,
        secure=stand.secure if stand.secure is not None and stand.secure.ca is not None else None,
        stranger=stranger,
        binary=plan.binary,
    )


# --- pickers -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def _standing(plan: Plan) -> AsyncIterator[_Stand]:
    async with AsyncExitStack() as stack:
        if plan.picker is None:
            yield await _own_pickers(stack, plan)
        else:
            secure = plan.picker if plan.picker.tls else None
            endpoints = await _take(stack, plan.endpoints, plan.model)
            yield _Stand(plan.picker, plan.picker, plan.picker, secure, endpoints, ())


async def _take(stack: AsyncExitStack, addresses: Sequence[str], model: str) -> Pods | None:
    """Serve the pool's endpoints, unless somebody does already."""
    if not addresses:
        return None
    try:
        return await stack.enter_async_context(pods.running(addresses, model))
    except ConfigError:
        return None


async def _own_pickers(stack: AsyncExitStack, plan: Plan) -> _Stand:
    """`picker epp` over the same endpoints, once for each purpose: none suffers from what another goes through."""
    # Before any gRPC of ours: a fork beside its threads may hang.
    children = await stack.enter_async_context(supervised())
    endpoints = await stack.enter_async_context(pods.running(["127.0.0.1:0"] * _SELF_PODS, plan.model))
    config = children.folder / "picker.yaml"
    config.write_text(_SELF_CONFIG, encoding="utf-8")
    flags = ["--config", str(config), *(flag for one in endpoints.addresses for flag in ("--endpoint", one))]
    clear = ("--secure-serving", "false")
    started = {name: await _epp(children, name, *flags, *clear) for name in ("plain", "listing")}
    started["single"] = await _epp(children, "single", *flags, *clear, "--fallbacks", "false")
    ca = None
    if certificate.available():
        ca = certificate.write(children.folder / "tls")
        started["tls"] = await _epp(children, "tls", *flags, "--secure-serving", "true", "--cert-path", str(ca.parent))
    ports = {name: (await children.announced(child, _EXT_PROC, timeout=_START))[0] for name, child in started.items()}
    plain, listing, single = (Target(f"127.0.0.1:{ports[name]}") for name in ("plain", "listing", "single"))
    secure = Target(f"127.0.0.1:{ports['tls']}", tls=True, ca=ca) if ca is not None else None
    return _Stand(plain, listing, single, secure, endpoints, tuple(child.log for child in started.values()))


async def _epp(children: Children, name: str, *flags: str) -> Child:
    anywhere = ("--host", "127.0.0.1", "--grpc-port", "0", "--grpc-health-port", "0", "--metrics-port", "0")
    return await children.start_picker(name, "epp", *anywhere, *flags)


def need_envoy(plan: Plan, *, asked: bool) -> Plan:
    """Complain before anything is started, where an Envoy is asked for; else note in the plan that there is none.

    Raises ConfigError. Where no check that is chosen goes by Envoy, none is looked for.
    """
    if Tier.T2 not in plan.tiers or not runner.chosen(registry.T2, plan.only):
        return plan
    if plan.binary is not None and not plan.binary.is_file():
        raise ConfigError(f"--envoy-binary: there is no file {plan.binary}")
    try:
        if plan.binary is None:
            envoy.find_envoy()
    except ConfigError as error:
        if asked:
            raise
        return replace(plan, no_envoy=str(error))
    return plan
