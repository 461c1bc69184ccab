"""K8S: is a pool in a cluster set up so that requests reach the right pods, and may picker do what it needs only?"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import zmq.asyncio

from picker.check import cluster_routing, sources
from picker.check.cluster import ALLOWED, WANTED, Cluster, at, listed, named, ports, unmet
from picker.check.engine import Engine
from picker.check.verdict import Check, Finding, Level, Outcome, Tier, failed, held, passed, skipped

Try = Callable[[Cluster], Awaitable[Finding]]

RBAC = "Kubernetes, RBAC good practices"
POOL = "GIE, InferencePool v1"
ROUTE = "Gateway API v1"
PROTOCOL = "GIE, endpoint picker protocol"
PROGRAMME = "Kubernetes AI Conformance, advanced_inference_ingress"

_SHOWN = 5  # names in a sentence


# --- rights ------------------------------------------------------------------------------------------------


async def sufficient(cluster: Cluster) -> Finding:
    missing = [str(right) for right in WANTED if not await cluster.may(right)]
    return held(f"{_who(cluster)} may not {_some(missing)}" if missing else None)


async def no_more(cluster: Cluster) -> Finding:
    rights, whole = await cluster.rights()
    beyond = sorted(str(right) for right in rights - ALLOWED)
    if beyond:
        return failed(f"{_who(cluster)} may also {_some(beyond)}")
    return passed() if whole else skipped("the API server does not know all of its rights (incomplete)")


def _who(cluster: Cluster) -> str:
    return "whoever runs this check" if cluster.asked.account is None else f"service account {cluster.asked.account}"


# --- the pool ----------------------------------------------------------------------------------------------


async def selects(cluster: Cluster) -> Finding:
    pool = await cluster.pool()
    servers = await cluster.servers(pool)
    cluster.evidence["pool"] = {"name": named(pool), "pods": [each.name for each in servers], "ports": ports(pool)}
    return passed(f"{len(servers)} pods") if servers else failed("its selector selects no pod")


async def are_ready(cluster: Cluster) -> Finding:
    servers = await cluster.servers(await cluster.pool())
    not_ready = [f"{each.name} ({each.why})" for each in servers if not each.ready]
    if not servers or len(not_ready) == len(servers):
        return failed(f"no pod is ready: {_some(not_ready)}" if not_ready else "there is no pod")
    return passed(
        f"{len(servers) - len(not_ready)} of {len(servers)}" + (f"; not {_some(not_ready)}" if not_ready else "")
    )


async def alone(cluster: Cluster) -> Finding:
    own = {each.name for each in await cluster.servers(await cluster.pool())}
    for other in await cluster.pools():
        if named(other) != cluster.asked.pool:
            shared = own & {each.name for each in await cluster.servers(other)}
            if shared:
                return failed(
                    f"the pool {named(other)} selects {_some(sorted(shared))}, too: neither knows all of its load"
                )
    return passed()


async def accepted(cluster: Cluster) -> Finding:
    parents = listed(await cluster.pool(), "status", "parents")
    if not parents:
        return failed("no gateway has taken it: its status names no parent")
    wrong = [each for parent in parents for each in unmet(listed(parent, "conditions"), "Accepted", "ResolvedRefs")]
    return held(_some(wrong) if wrong else None)


async def picker_service(cluster: Cluster) -> Finding:
    reference = at(await cluster.pool(), "spec", "endpointPickerRef")
    name, port = str(reference.get("name", "")), at(reference, "port").get("number")
    service = await cluster.get(cluster.within("/api/v1", "services", name))
    if service is None:
        return failed(f"its endpointPickerRef names the Service {name}, which is not there")
    offered = next((each for each in listed(service, "spec", "ports") if each.get("port") == port), None)
    if offered is None:
        return failed(f"the Service {name} has no port {port}")
    slices = await cluster.items(
        cluster.within("/apis/discovery.k8s.io/v1", "endpointslices"),
        labelSelector=f"kubernetes.io/service-name={name}",
    )
    serving = [each for found in slices for each in listed(found, "endpoints") if _serves(each)]
    if not serving:
        return failed(f"nobody is ready behind the Service {name}")
    mode = reference.get("failureMode", "FailClose")
    return passed(f"{len(serving)} ready, failureMode {mode}, appProtocol {offered.get('appProtocol')}")


def _serves(endpoint: dict[str, object]) -> bool:
    return at(endpoint, "conditions").get("ready") is not False


# --- ports -------------------------------------------------------------------------------------------------


async def pods_answer(cluster: Cluster) -> Finding:
    pool = await cluster.pool()
    tried = [(each.name, each.ip, port) for each in await cluster.servers(pool) if each.ready for port in ports(pool)]
    silent = [
        f"{name}:{port} ({why})" for name, ip, port in tried if (why := await cluster.answers(ip, port)) is not None
    ]
    if tried and len(silent) == len(tried):
        return skipped(f"no pod can be reached from here ({silent[0]}): run it inside the cluster")
    return _counted(len(tried), silent, "ports of pods do not answer")


async def metrics(cluster: Cluster) -> Finding:
    return await _of_engines(cluster, sources.load)


async def caching(cluster: Cluster) -> Finding:
    return await _of_engines(cluster, sources.caching)


async def _of_engines(cluster: Cluster, ask: Callable[[Engine], Awaitable[Finding]]) -> Finding:
    """One check of engines for all that can be reached."""
    pool, context = await cluster.pool(), zmq.asyncio.Context()
    wrong: list[str] = []
    told = unreached = 0
    unsaid = ""
    try:
        for server in [each for each in await cluster.servers(pool) if each.ready]:
            for port in ports(pool):
                if await cluster.answers(server.ip, port) is not None:
                    unreached += 1
                    continue
                engine = Engine(
                    f"http://{server.ip}:{port}", cluster.session, context, cluster.trace, patience=cluster.patience
                )
                finding = await ask(engine)
                told += finding.outcome is Outcome.PASS
                if finding.outcome is Outcome.FAIL:
                    wrong.append(f"{server.name}: {finding.why}")
                elif finding.outcome is Outcome.SKIP:
                    unsaid = finding.why
    finally:
        context.destroy(linger=0)
    if wrong:
        return failed(_some(wrong))
    if not told:
        return skipped(unsaid or "no pod can be reached from here: run it inside the cluster")
    return passed(f"{told} engines" + (f"; {unreached} cannot be reached" if unreached else ""))


async def secure(cluster: Cluster) -> Finding:
    reference = at(await cluster.pool(), "spec", "endpointPickerRef")
    name, port = str(reference.get("name", "")), at(reference, "port").get("number")
    service = await cluster.get(cluster.within("/api/v1", "services", name))
    address = at(service or {}, "spec").get("clusterIP")
    if not isinstance(port, int) or address in (None, "", "None"):
        return skipped(f"the Service {name} has no address of its own")
    try:
        version = await cluster.speaks_tls(str(address), port)
    except OSError as error:
        return skipped(f"it cannot be reached from here ({error}): run it inside the cluster")
    return (
        passed(version)
        if version
        else failed(f"{name}:{port} does not speak TLS: who is in between can pick endpoints")
    )


# --- the gateway -------------------------------------------------------------------------------------------


async def routed(cluster: Cluster) -> Finding:
    routes = await cluster.routes()
    if not routes:
        return failed(f"no HTTPRoute of the namespace {cluster.namespace} leads to the pool")
    wrong = []
    for route in routes:
        parents = listed(route, "status", "parents")
        of_route = [each for one in parents for each in unmet(listed(one, "conditions"), "Accepted", "ResolvedRefs")]
        wrong += [f"{named(route)}: {each}" for each in of_route or ([] if parents else ["no gateway has taken it"])]
    cluster.evidence["routes"] = [named(route) for route in routes]
    return held(_some(wrong) if wrong else None)


async def programmed(cluster: Cluster) -> Finding:
    wrong, seen = [], {}
    for route in await cluster.routes():
        for name, gateway in await cluster.gateways(route):
            if gateway is None:
                wrong.append(f"{name} is not there")
                continue
            seen[name] = at(gateway, "spec").get("gatewayClassName")
            wrong += [
                f"{name}: {each}" for each in unmet(listed(gateway, "status", "conditions"), "Accepted", "Programmed")
            ]
    cluster.evidence["gateways"] = seen
    if not seen and not wrong:
        return failed("no Gateway leads to the pool")
    return held(_some(wrong) if wrong else None)


# --- words -------------------------------------------------------------------------------------------------


def _counted(tried: int, wrong: Sequence[str], what: str) -> Finding:
    if not tried:
        return skipped("no pod is ready")
    return failed(f"{len(wrong)} of {tried} {what}: {_some(wrong)}") if wrong else passed(f"{tried}")


def _some(names: Sequence[str]) -> str:
    shown = "; ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}; and {len(names) - _SHOWN} more"


def _check(name: str, requirement: str, run: Try, source: str, level: Level = Level.MUST) -> Check[Cluster]:
    return Check(f"K8S-{name}", Tier.T4, requirement, source, run, level)


CHECKS: Sequence[Check[Cluster]] = (
    _check("1.sufficient", "Picker may list and watch what it follows.", sufficient, RBAC),
    _check("1.no-more", "It may do nothing else.", no_more, RBAC, Level.SHOULD),
    _check("2.selects", "The pool selects pods.", selects, POOL),
    _check("2.ready", "Some of them are ready.", are_ready, POOL),
    _check("2.alone", "No other pool selects the same pods.", alone, POOL),
    _check("2.accepted", "A gateway has accepted the pool, and finds what it refers to.", accepted, POOL),
    _check(
        "2.picker",
        "The Service of its endpoint picker is there, with the port, and somebody behind it.",
        picker_service,
        POOL,
    ),
    _check("3.ports", "Ready pods answer at the pool's ports.", pods_answer, POOL),
    _check("3.metrics", "Their metrics are there, by names that picker knows.", metrics, sources.PAGE),
    _check("3.caching", "Their prefix caches are on.", caching, sources.CACHE),
    _check("3.tls", "The endpoint picker serves TLS.", secure, PROTOCOL, Level.SHOULD),
    _check("4.routed", "HTTPRoutes lead to the pool, and gateways have accepted them.", routed, ROUTE),
    _check("4.programmed", "Their Gateways are programmed.", programmed, ROUTE),
    _check("5.answers", "A request through the gateway is answered.", cluster_routing.answers, ROUTE),
    _check(
        "5.affinity",
        "Prompts that come again find their cache: routing knows of it.",
        cluster_routing.affinity,
        PROGRAMME,
    ),
    _check("5.spread", "Different prompts go to different pods.", cluster_routing.spread, PROGRAMME),
)
