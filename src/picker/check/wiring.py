"""ENVOY at tier T0: a static Envoy configuration around an endpoint picker, clause by clause.

Reads what stands in the file; what a control plane adds is not seen.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from picker import envoy
from picker.check.frames import LB_NAMESPACE, ORDER_HEADERS, SUBSET_NAMESPACE
from picker.check.papers import Kind, Papers, within
from picker.check.verdict import Check, Finding, Level, Tier, failed, passed, skipped
from picker.errors import ConfigError

Json = dict[str, Any]
Try = Callable[[Papers], Awaitable[Finding]]

_DUPLEX = "FULL_DUPLEX_STREAMED"
_UPSTREAM = "upstream.address"
_LONGEST_IDLE = 3_600.0
_LONGEST_CONNECT = 5.0


def _each(test: Callable[[Json], str | None]) -> Try:
    """A check of every Envoy configuration; the test says what is wrong with one."""

    async def run(papers: Papers) -> Finding:
        found = papers.of(Kind.ENVOY)
        for paper in found:
            if wrong := test(paper.value):
                return failed(f"{paper.name}: {wrong}")
        return passed() if found else skipped("no Envoy configuration among the files")

    return run


def _filters(config: Json) -> list[Json]:
    """The settings of every ext-proc filter."""
    typed = [one for one in within(config, "typed_config") if isinstance(one, dict)]
    return [one for one in typed if str(one.get("@type", "")).endswith("ext_proc.v3.ExternalProcessor")]


def _managers(config: Json) -> list[Json]:
    typed = [one for one in within(config, "typed_config") if isinstance(one, dict)]
    managers = [one for one in typed if str(one.get("@type", "")).endswith("HttpConnectionManager")]
    return [one for one in managers if _filters({"http": one})]


def _clusters(config: Json) -> list[Json]:
    return list(config.get("static_resources", {}).get("clusters", ()))


def _picker_clusters(config: Json) -> list[Json]:
    names = {name for one in _filters(config) for name in within(one.get("grpc_service"), "cluster_name")}
    return [one for one in _clusters(config) if one.get("name") in names]


def _pools(config: Json) -> list[Json]:
    """Clusters that take the picker's verdict."""
    return [one for one in _clusters(config) if _overrides(one) or one.get("type") == "ORIGINAL_DST"]


def _overrides(cluster: Json) -> bool:
    return any(True for _ in within(cluster, "override_host_sources"))


def seconds(text: object) -> float | None:
    """Of a duration as protobuf's JSON writes it, "0.25s"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)s", str(text))
    return float(found[1]) if found else None


# --- checks ------------------------------------------------------------------------------------------------


async def valid(papers: Papers) -> Finding:
    found = papers.of(Kind.ENVOY)
    if not found:
        return skipped("no Envoy configuration among the files")
    try:
        binary = papers.binary or envoy.find_envoy()
    except ConfigError as error:
        return skipped(str(error))
    for paper in found:
        papers.trace.send(f"envoy --mode validate {paper.name}")
        try:
            await asyncio.to_thread(envoy.validate, paper.value, binary=binary)
        except ConfigError as error:
            return failed(f"{paper.name}: {error}")
    return passed()


def has_picker(config: Json) -> str | None:
    if not _filters(config):
        return "there is no ext-proc filter"
    return None if _picker_clusters(config) else "the ext-proc filter's cluster is not there"


def modes(config: Json) -> str | None:
    for one in _filters(config):
        mode = one.get("processing_mode", {})
        for side in ("request", "response"):
            told = tuple(mode.get(f"{side}_{part}_mode") for part in ("header", "body", "trailer"))
            unseen = side == "response" and told == ("SKIP", "NONE", "SKIP")
            if told != ("SEND", _DUPLEX, "SEND") and not unseen:
                return f"{side} headers, body and trailers are {', '.join(map(str, told))}"
    return None


def metadata(config: Json) -> str | None:
    for one in _filters(config):
        options = one.get("metadata_options", {})
        receiving = options.get("receiving_namespaces", {}).get("untyped", ())
        forwarding = options.get("forwarding_namespaces", {}).get("untyped", ())
        if LB_NAMESPACE not in receiving:
            return f"{LB_NAMESPACE} is not received: the picker's metadata is dropped without a word"
        if missing := {LB_NAMESPACE, SUBSET_NAMESPACE} - set(forwarding):
            return f"{', '.join(sorted(missing))} is not forwarded to the picker"
    return None


def told_who_served(config: Json) -> str | None:
    """Where responses go through the picker; elsewhere an access log tells."""
    by_policy = any(True for _ in within(_clusters(config), "selected_host_key"))
    for one in _filters(config):
        follows = one.get("processing_mode", {}).get("response_header_mode") != "SKIP"
        if follows and not by_policy and _UPSTREAM not in one.get("response_attributes", ()):
            return f"neither response_attributes {_UPSTREAM} nor a policy's selected_host_key tells it who answered"
    return None


def stripped(config: Json) -> str | None:
    for manager in _managers(config):
        early = manager.get("early_header_mutation_extensions", ())
        prefixes = [prefix for prefix in within(early, "prefix") if isinstance(prefix, str)]
        names = {str(name).lower() for name in within(early, "remove")}
        left = [name for name in ORDER_HEADERS if name not in names and not name.startswith(tuple(prefixes))]
        if left:
            return f"a client's {', '.join(left)} is not removed before routing"
    return None


def idle(config: Json) -> str | None:
    for manager in _managers(config):
        timers = [manager.get("stream_idle_timeout", "300s")]
        timers += list(within(manager.get("route_config", {}), "idle_timeout"))
        for timer in timers:
            if not 0 < (seconds(timer) or 0.0) <= _LONGEST_IDLE:
                return f"an idle timeout of {timer}: nothing else ends a request whose picker hangs"
    return None


def by_header(config: Json) -> str | None:
    named = [one["name"] for one in _pools(config) if any(within(one, "use_http_header"))]
    return f"cluster {named[0]} goes where a header says, unchecked" if named else None


def open_where_nobody_serves(config: Json) -> str | None:
    allowed = any(one.get("failure_mode_allow") for one in _filters(config))
    pools = [one["name"] for one in _pools(config) if one.get("type") == "ORIGINAL_DST"]
    return f"failure_mode_allow with {pools[0]}, which has no host without a verdict" if allowed and pools else None


def picker_cluster(config: Json) -> str | None:
    for one in _picker_clusters(config):
        if not any(True for _ in within(one, "http2_protocol_options")):
            return f"cluster {one['name']} does not speak HTTP/2"
        if (connect := seconds(one.get("connect_timeout", "5s"))) is None or connect > _LONGEST_CONNECT:
            return f"cluster {one['name']} waits {one.get('connect_timeout')} for a connection"
        if "health_checks" not in one and not any(True for _ in within(one, "connection_keepalive")):
            return f"cluster {one['name']} has neither health check nor keepalive: a picker that hangs goes unnoticed"
    return None


def retries(config: Json) -> str | None:
    pools = {one["name"] for one in _pools(config) if _overrides(one)}
    for action in _actions(config):
        if action.get("cluster") in pools and "retry_policy" not in action:
            return f"the route to {action['cluster']} has no retry_policy: fallbacks are never tried"
    return None


def _actions(config: Json) -> Iterator[Json]:
    return (one for one in within(config, "route") if isinstance(one, dict))


def secured(config: Json) -> str | None:
    for one in _picker_clusters(config):
        remote = [host for host in within(one, "address") if isinstance(host, str) and not _is_local(host)]
        if remote and not any(True for _ in within(one, "trusted_ca")):
            return f"cluster {one['name']} ({remote[0]}) sends prompts to whoever is there: no TLS with trusted_ca"
    return None


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.startswith("/")


def _check(
    name: str, requirement: str, run: Try, source: str = "Envoy API", level: Level = Level.MUST
) -> Check[Papers]:
    return Check(f"ENVOY-{name}", Tier.T0, requirement, source, run, level)


CHECKS: Sequence[Check[Papers]] = (
    _check("1.valid", "Envoy itself takes the configuration.", valid),
    _check("1.picker", "It has an ext-proc filter, whose cluster is there.", _each(has_picker)),
    _check("2.modes", "Requests, and responses unless skipped, are full-duplex streamed with trailers.", _each(modes)),
    _check("3.metadata", "The picker's metadata is taken, the gateway's is handed over.", _each(metadata)),
    _check(
        "3.served",
        "The picker is told who answered.",
        _each(told_who_served),
        "clause D3",
        Level.SHOULD,
    ),
    _check("4.stripped", "Control headers of clients are removed before routing.", _each(stripped), "header spoofing"),
    _check("5.idle", "An idle timer ends what a picker that hangs holds up.", _each(idle)),
    _check("6.header", "No cluster goes where a header says.", _each(by_header), "SSRF"),
    _check("7.cluster", "The picker is reached by HTTP/2, given up soon and watched.", _each(picker_cluster)),
    _check("8.open", "Failing open is for pools that can serve by themselves.", _each(open_where_nobody_serves)),
    _check("9.retries", "Routes to a pool with fallbacks retry.", _each(retries), "clause D1", Level.SHOULD),
    _check("10.tls", "A picker elsewhere is reached by TLS and verified.", _each(secured), "transport security"),
)
