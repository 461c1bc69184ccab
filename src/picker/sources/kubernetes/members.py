"""What a pod, or an address of an EndpointSlice, is to a scheduler: where it is, what it can do, whether to use it.

Pure. What somebody has written wrongly on one pod is a note about that pod; it is then read as if it were not there.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from picker.errors import ConfigError
from picker.sources.kubernetes.objects import EndpointSlice, Pod, SliceEndpoint, texts
from picker.sources.static import SCHEMES, join_address
from picker.types import NO_HEADERS, Endpoint, Role

# The names of llm-d, then those that came before.
ROLE_LABEL = "llm-d.ai/role"
ENGINE_LABELS = ("llm-d.ai/engine-type", "inference.networking.k8s.io/engine-type")
ACTIVE_PORTS = ("llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports")
# Picker's own, for what labels cannot hold: model names have slashes.
MODELS, SCHEME, EVENTS, REPLAY = "picker/models", "picker/scheme", "picker/kv-events", "picker/kv-replay"
_MAIN_CONTAINER = "kubectl.kubernetes.io/default-container"
_WORKER_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"

_ROLES = {
    "both": Role.BOTH,
    "prefill-decode": Role.BOTH,
    "encode-prefill-decode": Role.BOTH,
    "prefill": Role.PREFILL,
    "encode-prefill": Role.PREFILL,
    "decode": Role.DECODE,
}


class Standing(enum.Enum):
    """Whether requests may go there."""

    READY = "ready"
    NOT_READY = "not ready"  # perhaps later, perhaps again
    TERMINATING = "terminating"  # what runs may end, nothing new
    OVER = "over"  # its containers have ended for good


@dataclass(frozen=True, slots=True)
class Engine:
    """A container as it runs: another id is another process, whose cache is empty."""

    container: str
    id: str
    resources: Any = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class Member:
    """One server. uid: of the object behind it; another one under the same name is somebody else.

    ports: its own, where no pool tells; only: those that may be used of the pool's, None for all. notes: what is wrong
    with it, in plain words.
    """

    name: str
    uid: str
    host: str
    standing: Standing
    ports: tuple[int, ...] = ()
    only: frozenset[int] | None = None
    role: Role = Role.BOTH
    models: frozenset[str] = frozenset()
    scheme: str = "http"
    labels: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)
    events: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)
    engines: tuple[Engine, ...] = ()
    notes: tuple[str, ...] = ()

    def endpoints(self, ports: tuple[int, ...]) -> tuple[Endpoint, ...]:
        """One for each port, named as the endpoint picker names them. ports: of its pool, in the pool's order."""
        if not self.host:
            return ()
        numbered = enumerate(self.ports or ports)
        return tuple(self._endpoint(index, port) for index, port in numbered if self.only is None or port in self.only)

    def _endpoint(self, index: int, port: int) -> Endpoint:
        # No rank: behind a port of its own an engine has only itself to pin.
        return Endpoint(
            name=f"{self.name}-rank-{index}",
            address=join_address(self.host, port),
            models=self.models,
            role=self.role,
            scheme=self.scheme,
            labels={**self.labels, **{key: _shifted(url, index) for key, url in self.events.items()}},
        )


def _shifted(url: str, index: int) -> str:
    """vLLM adds a rank to the ports of its KV events."""
    head, _, port = url.rpartition(":")
    return f"{head}:{int(port) + index}" if index and port.isdecimal() else url


# --- pods --------------------------------------------------------------------------------------------------


def is_worker(pod: Pod) -> bool:
    """Whether it is a part of an engine whose leader answers: of a LeaderWorkerSet only leaders are servers."""
    return (pod.metadata.labels or {}).get(_WORKER_INDEX, "0") != "0"


def member_of_pod(pod: Pod) -> Member:
    meta, notes = pod.metadata, []
    labels, said = dict(meta.labels or {}), meta.annotations or {}
    standing, host = _standing(pod), pod.status.pod_ip
    if standing is Standing.READY and not _is_host(host):
        notes.append(f"is ready and has no usable IP address ({host!r})" if host else "is ready and has no IP address")
        host = ""
    if engine := next((labels[key] for key in ENGINE_LABELS if labels.get(key)), None):
        labels[ENGINE_LABELS[0]] = engine
    return Member(
        name=meta.name,
        uid=meta.uid,
        host=host,
        standing=standing,
        only=_only(said, notes),
        role=_role(labels, notes),
        models=frozenset(texts(said.get(MODELS, ""))),
        scheme=_scheme(said, notes),
        labels=labels,
        events={key.rpartition("/")[2]: said[key] for key in (EVENTS, REPLAY) if said.get(key)},
        engines=tuple(_engines(pod, said.get(_MAIN_CONTAINER))),
        notes=tuple(notes),
    )


def _standing(pod: Pod) -> Standing:
    if pod.status.phase in ("Succeeded", "Failed"):
        return Standing.OVER
    if pod.metadata.deletion_timestamp is not None:
        return Standing.TERMINATING
    return Standing.READY if pod.ready else Standing.NOT_READY


def _engines(pod: Pod, main: str | None) -> Iterator[Engine]:
    """The container that the pod names as the one that matters, else all of them.

    A sidecar that restarts costs what is known of the cache then. The other mistake would be worse, and ports do not
    tell them apart: in front of a prefill or decode engine it is the sidecar that has the pool's port.
    """
    statuses = pod.status.container_statuses or []
    named = [each for each in statuses if each.name == main]
    for each in named or statuses:
        yield Engine(each.name, each.container_id or f"#{each.restart_count}", each.resources)


def _role(labels: Mapping[str, str], notes: list[str]) -> Role:
    label = labels.get(ROLE_LABEL, "both")
    if label not in _ROLES:
        notes.append(f"has the label {ROLE_LABEL}={label}, which is none of {', '.join(_ROLES)}: it is used for all")
    return _ROLES.get(label, Role.BOTH)


def _scheme(said: Mapping[str, str], notes: list[str]) -> str:
    scheme = said.get(SCHEME, "http")
    if scheme not in SCHEMES:
        notes.append(f"has the annotation {SCHEME}={scheme}, which is neither http nor https: http is used")
        return "http"
    return scheme


def _only(said: Mapping[str, str], notes: list[str]) -> frozenset[int] | None:
    key = next((key for key in ACTIVE_PORTS if key in said), None)
    if key is None:
        return None
    ports = list(texts(said[key]))
    if not all(port.isdecimal() and len(port) < 6 for port in ports):
        notes.append(f"has the annotation {key}={said[key]}, which is no list of ports: all ports of the pool are used")
        return None
    return frozenset(map(int, ports))


def _is_host(host: str) -> bool:
    try:
        join_address(host, 1)
    except ConfigError:
        return False
    return True


# --- slices ------------------------------------------------------------------------------------------------


def members_of_slice(found: EndpointSlice, wanted: tuple[int, ...]) -> list[Member]:
    """Its addresses. wanted: the ports that count, empty for all TCP ports of the slice."""
    offered = [each.port for each in found.ports or () if each.port and each.protocol in (None, "TCP")]
    ports = tuple(port for port in offered if not wanted or port in wanted)
    members = (_member_of_slice(each, ports) for each in found.endpoints or ())
    return [member for member in members if member is not None]


def _member_of_slice(found: SliceEndpoint, ports: tuple[int, ...]) -> Member | None:
    host = next(iter(found.addresses or ()), "")
    if not _is_host(host):
        return None
    behind = found.target_ref
    pod = behind is not None and behind.kind == "Pod"
    return Member(
        name=behind.name if behind is not None and pod else host,
        uid=behind.uid if behind is not None and pod else host,
        host=host,
        standing=_slice_standing(found),
        ports=ports,
    )


def _slice_standing(found: SliceEndpoint) -> Standing:
    if found.conditions.terminating:
        return Standing.TERMINATING
    return Standing.NOT_READY if found.conditions.ready is False else Standing.READY
