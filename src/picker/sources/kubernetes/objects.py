"""What is read of Kubernetes objects: the fields that decide something here, and no others.

Unknown fields are skipped, as clients must: API servers are newer than their clients. A field of the wrong type makes
its own object unreadable and no other. Pure: bytes in, values out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from picker.errors import WireError

POOL_GROUP = "inference.networking.k8s.io"
OLD_POOL_GROUP = "inference.networking.x-k8s.io"
LLMD_GROUP = "llm-d.ai"
# Objectives and rewrites have moved from the second group to the first; of two with one name the first counts.
POLICY_GROUPS = (LLMD_GROUP, OLD_POOL_GROUP)
H2C = "kubernetes.io/h2c"

_MAX_TARGET_PORTS = 8  # of InferencePool v1
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


class Part(msgspec.Struct, frozen=True, rename="camel"):
    """A part of an object. Go writes empty lists and maps as null or leaves them out: both are None here."""


class Metadata(Part, frozen=True):
    name: str
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


class Object(Part, frozen=True):
    """What every object has."""

    metadata: Metadata


# --- pods --------------------------------------------------------------------------------------------------


class Condition(Part, frozen=True):
    type: str = ""
    status: str = ""


class ContainerStatus(Part, frozen=True):
    name: str = ""
    restart_count: int = 0
    container_id: str = msgspec.field(default="", name="containerID")
    resources: Any = None


class PodStatus(Part, frozen=True):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    conditions: list[Condition] | None = None
    container_statuses: list[ContainerStatus] | None = None


class Pod(Object, frozen=True):
    status: PodStatus = PodStatus()

    @property
    def ready(self) -> bool:
        return any(each.type == "Ready" and each.status == "True" for each in self.status.conditions or ())


# --- endpoint slices ---------------------------------------------------------------------------------------


class SliceConditions(Part, frozen=True):
    """ready absent means ready, by the API's own rule."""

    ready: bool | None = None
    terminating: bool | None = None


class Reference(Part, frozen=True):
    kind: str = ""
    name: str = ""
    uid: str = ""


class SliceEndpoint(Part, frozen=True):
    addresses: list[str] | None = None
    conditions: SliceConditions = SliceConditions()
    target_ref: Reference | None = None


class SlicePort(Part, frozen=True):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class EndpointSlice(Object, frozen=True):
    address_type: str = "IPv4"
    endpoints: list[SliceEndpoint] | None = None
    ports: list[SlicePort] | None = None


# --- pools -------------------------------------------------------------------------------------------------


class LabelSelector(Part, frozen=True):
    match_labels: dict[str, str] | None = None


class TargetPort(Part, frozen=True):
    number: int


class _PoolSpec(Part, frozen=True):
    selector: LabelSelector = LabelSelector()
    target_ports: list[TargetPort] | None = None
    app_protocol: str | None = None


class _PoolV1(Object, frozen=True):
    spec: _PoolSpec


class _OldPoolSpec(Part, frozen=True):
    selector: dict[str, str] | None = None
    target_port_number: int | None = None


class _OldPool(Object, frozen=True):
    spec: _OldPoolSpec


@dataclass(frozen=True, slots=True)
class Pool:
    """An InferencePool of either version. selector: every label that a pod must have. ports: each makes an endpoint."""

    metadata: Metadata
    selector: Mapping[str, str]
    ports: tuple[int, ...]
    app_protocol: str = "http"

    def selects(self, labels: Mapping[str, str]) -> bool:
        return all(labels.get(key) == value for key, value in self.selector.items())

    @property
    def query(self) -> str:
        """The selector as the API server takes it."""
        return ",".join(f"{key}={value}" for key, value in sorted(self.selector.items()))


def _pool_v1(pool: _PoolV1) -> Pool:
    ports = tuple(each.number for each in pool.spec.target_ports or ())
    selector = pool.spec.selector.match_labels
    return _checked(Pool(pool.metadata, selector or {}, ports, pool.spec.app_protocol or "http"))


def _old_pool(pool: _OldPool) -> Pool:
    number = pool.spec.target_port_number
    return _checked(Pool(pool.metadata, pool.spec.selector or {}, () if number is None else (number,)))


def _checked(pool: Pool) -> Pool:
    """What its schema demands; without a selector it would take every pod there is."""
    if not pool.selector:
        raise WireError("its selector has no matchLabels")
    for key, value in pool.selector.items():  # the API server looks at values only, and the two make a query
        if not (_LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(value)):
            raise WireError(f"its selector's {key!r}: {value!r} is no label")
    if not pool.ports or len(pool.ports) > _MAX_TARGET_PORTS:
        raise WireError(f"it has {len(pool.ports)} target ports, and 1 to {_MAX_TARGET_PORTS} are allowed")
    if len(set(pool.ports)) < len(pool.ports) or not all(0 < port < 1 << 16 for port in pool.ports):
        raise WireError(f"its target ports {', '.join(map(str, pool.ports))} are not different ports from 1 to 65535")
    return pool


# --- objectives and rewrites -------------------------------------------------------------------------------


class PoolRef(Part, frozen=True):
    name: str
    group: str = POOL_GROUP
    kind: str = "InferencePool"


class _ObjectiveSpec(Part, frozen=True):
    pool_ref: PoolRef
    priority: int | None = None


class Objective(Object, frozen=True):
    """Its name is what requests say; priority 0 where it has none, below 0 may be dropped."""

    spec: _ObjectiveSpec


class ModelMatch(Part, frozen=True):
    value: str
    type: str = "Exact"


class Match(Part, frozen=True):
    model: ModelMatch | None = None


class Target(Part, frozen=True):
    model_rewrite: str
    weight: int | None = None


class Rule(Part, frozen=True):
    matches: list[Match] | None = None
    targets: list[Target] | None = None


class _RewriteSpec(Part, frozen=True):
    pool_ref: PoolRef
    rules: list[Rule] | None = None


class Rewrite(Object, frozen=True):
    spec: _RewriteSpec


# --- collections -------------------------------------------------------------------------------------------

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Collection(Generic[T]):
    """Objects of one kind in one namespace. labels: a selector as the API server takes it, empty for all.

    read: makes the value of an object's bytes; raises WireError with what is wrong.
    """

    group: str
    version: str
    plural: str
    namespace: str
    read: Callable[[bytes | msgspec.Raw], T]
    labels: str = ""

    @property
    def path(self) -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        return f"{root}/namespaces/{self.namespace}/{self.plural}"

    @property
    def kind(self) -> str:
        """As people write it."""
        return f"{self.plural}.{self.group}/{self.version}" if self.group else self.plural


def pods(namespace: str, labels: str) -> Collection[Pod]:
    return Collection("", "v1", "pods", namespace, _Reader(Pod), labels)


def slices(namespace: str, service: str) -> Collection[EndpointSlice]:
    labels = f"kubernetes.io/service-name={service}"
    return Collection("discovery.k8s.io", "v1", "endpointslices", namespace, _Reader(EndpointSlice), labels)


def pools(namespace: str, group: str) -> Collection[Pool]:
    """Those of one group; the older group is read in its only version."""
    if group == OLD_POOL_GROUP:
        return Collection(group, "v1alpha2", "inferencepools", namespace, _Reader(_OldPool, _old_pool))
    return Collection(group, "v1", "inferencepools", namespace, _Reader(_PoolV1, _pool_v1))


def objectives(namespace: str, group: str) -> Collection[Objective]:
    return Collection(group, "v1alpha2", "inferenceobjectives", namespace, _Reader(Objective))


def rewrites(namespace: str, group: str) -> Collection[Rewrite]:
    return Collection(group, "v1alpha2", "inferencemodelrewrites", namespace, _Reader(Rewrite))


class _Reader:
    """Decodes one kind of object and maps it where the value is not the object itself."""

    __slots__ = ("_decode", "_map")

    def __init__(self, kind: type[Object], convert: Callable[[Any], Any] | None = None) -> None:
        self._decode = msgspec.json.Decoder(kind).decode
        self._map = convert

    def __call__(self, data: bytes | msgspec.Raw) -> Any:
        try:
            found = self._decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise WireError(f"it cannot be read: {error}") from None
        return found if self._map is None else self._map(found)


# --- answers of the API server -----------------------------------------------------------------------------


class _ListMetadata(Part, frozen=True):
    resource_version: str = ""
    continue_token: str = msgspec.field(default="", name="continue")


class Page(msgspec.Struct, frozen=True):
    """Some of a list; items as they came."""

    metadata: _ListMetadata = _ListMetadata()
    items: list[msgspec.Raw] | None = None


class Event(msgspec.Struct, frozen=True):
    """A line of a watch."""

    type: str
    object: msgspec.Raw


class Status(msgspec.Struct, frozen=True):
    """What the API server says instead of an object."""

    code: int | None = None
    reason: str | None = None
    message: str | None = None


class _Version(Part, frozen=True):
    resource_version: str | None = None


class _Bookmark(msgspec.Struct, frozen=True):
    metadata: _Version


_PAGE = msgspec.json.Decoder(Page)
_BOOKMARK = msgspec.json.Decoder(_Bookmark)
_EVENT = msgspec.json.Decoder(Event)
_STATUS = msgspec.json.Decoder(Status)
_OBJECT = msgspec.json.Decoder(Object)


def read_page(body: bytes) -> Page:
    try:
        return _PAGE.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(f"the answer is no list: {error}") from None


def read_event(line: bytes) -> Event:
    try:
        return _EVENT.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(f"a line of the watch is no event: {error}") from None


def read_status(body: bytes | msgspec.Raw) -> Status:
    """Empty where it is none: proxies answer in words of their own."""
    try:
        return _STATUS.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return Status()


def read_metadata(data: bytes | msgspec.Raw) -> Metadata:
    try:
        return _OBJECT.decode(data).metadata
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(f"it has no metadata that can be read: {error}") from None


def read_version(data: bytes | msgspec.Raw) -> str | None:
    """Of a bookmark, which has a version and nothing else, no name either."""
    try:
        return _BOOKMARK.decode(data).metadata.resource_version
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(f"a bookmark has no version that can be read: {error}") from None


def texts(comma_list: str) -> Iterator[str]:
    """The parts of an annotation's comma-separated list, without empty ones."""
    return (part for part in map(str.strip, comma_list.split(",")) if part)
