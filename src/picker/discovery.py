"""Where endpoints come from, from a configuration: given by hand, or asked of Kubernetes; and who leads there."""

from __future__ import annotations

import logging
import os
import random
import socket
from functools import partial

from picker.config import Config, EndpointSpec
from picker.errors import ConfigError
from picker.gate import Clock
from picker.sources.kubernetes.client import Client
from picker.sources.kubernetes.credentials import Access, find_access
from picker.sources.kubernetes.election import Election, Timing
from picker.sources.kubernetes.scope import Scope
from picker.sources.kubernetes.source import KubernetesSource
from picker.sources.roster import check_weight
from picker.sources.static import parse_endpoint
from picker.types import Endpoint, Role

log = logging.getLogger("picker.discovery")


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


def _namespace(config: Config, access: Access) -> str:
    return config.kubernetes.namespace or os.environ.get("NAMESPACE") or access.namespace or "default"
