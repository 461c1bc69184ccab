"""The shape of an `EndpointPickerConfig`, read as strictly as the endpoint picker does: an unknown key is an error."""

from __future__ import annotations

import difflib
import re
from typing import Any

import msgspec

from picker.errors import ConfigError

KIND = "EndpointPickerConfig"
API_VERSIONS = ("llm-d.ai/v1alpha1", "inference.networking.x-k8s.io/v1alpha1")  # the second is deprecated there


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="camel"):
    """A section; its fields are its keys, in camel case."""


class Plugin(Part, frozen=True):
    type: str
    name: str = ""
    parameters: dict[str, Any] | None = None


class Reference(Part, frozen=True):
    plugin_ref: str = ""


class Weighed(Part, frozen=True):
    plugin_ref: str = ""
    weight: float | None = None


class SchedulingProfile(Part, frozen=True):
    name: str = ""
    plugins: list[Weighed] = []


class DataSource(Part, frozen=True):
    plugin_ref: str = ""
    extractors: list[Reference] | None = None


class DataLayer(Part, frozen=True):
    inject_defaults: bool | None = None
    sources: list[DataSource] | None = None
    discovery: Reference | None = None
    peer_discovery: Reference | None = None
    cross_replica_syncer_plugin_ref: str = ""
    cross_replica_sync_interval: str | None = None


class Band(Part, frozen=True):
    priority: int = 0
    max_bytes: str | int | None = None
    max_requests: str | int | None = None
    fairness_policy_ref: str = ""
    ordering_policy_ref: str = ""


class FlowControl(Part, frozen=True):
    max_bytes: str | int | None = None
    max_requests: str | int | None = None
    default_request_ttl: str | None = msgspec.field(default=None, name="defaultRequestTTL")
    no_endpoint_request_ttl: str | None = msgspec.field(default=None, name="noEndpointRequestTTL")
    default_priority_band: Band | None = None
    default_negative_priority_band: Band | None = None
    priority_bands: list[Band] | None = None
    usage_limit_policy_plugin_ref: str = ""
    saturation_detector: Reference | None = None
    enable_eviction: bool = False


class Detector(Reference, frozen=True):
    """The thresholds are how it was spelled before detectors were plugins (up to v1.4 of the extension)."""

    queue_depth_threshold: int | None = None
    kv_cache_util_threshold: float | None = None
    metrics_staleness_threshold: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The thresholds under the names that the plugin has for them."""
        given = {
            "queueDepthThreshold": self.queue_depth_threshold,
            "kvCacheUtilThreshold": self.kv_cache_util_threshold,
            "metricsStalenessThreshold": self.metrics_staleness_threshold,
        }
        return {key: value for key, value in given.items() if value is not None}


class RequestHandler(Part, frozen=True):
    parsers: list[Reference] | None = None


class Document(Part, frozen=True):
    api_version: str
    kind: str
    metadata: dict[str, Any] | None = None
    feature_gates: list[str] | None = None
    plugins: list[Plugin] | None = None
    scheduling_profiles: list[SchedulingProfile] | None = None
    data_layer: DataLayer | None = None
    flow_control: FlowControl | None = None
    request_handler: RequestHandler | None = None
    saturation_detector: Detector | None = None
    parser: Reference | None = None


def convert(document: Any) -> Document:
    """The document with its types checked; raises ConfigError naming what is wrong, and where."""
    try:
        read = msgspec.convert(document, Document)
    except msgspec.ValidationError as error:
        raise ConfigError(_explained(str(error))) from None
    if read.kind != KIND:
        raise ConfigError(f"kind: expected {KIND}, got {read.kind!r}")
    if read.api_version not in API_VERSIONS:
        raise ConfigError(f"apiVersion: {read.api_version!r} is not one of {', '.join(API_VERSIONS)}")
    return read


def near(word: str, words: list[str]) -> str:
    """`; did you mean ...?`, or all that would have been right."""
    found = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; known here: {', '.join(words)}"


_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`(?: - at `\$\.?(?P<where>[^`]*)`)?")
_PLACE = re.compile(r" - at `\$\.?(?P<where>[^`]*)`")
_SECTIONS: dict[str, type[Part]] = {
    "plugins": Plugin,
    "schedulingProfiles": SchedulingProfile,
    "sources": DataSource,
    "dataLayer": DataLayer,
    "flowControl": FlowControl,
    "priorityBands": Band,
    "defaultPriorityBand": Band,
    "defaultNegativePriorityBand": Band,
    "requestHandler": RequestHandler,
    "saturationDetector": Detector,
}


def _explained(message: str) -> str:
    if (unknown := _UNKNOWN.search(message)) is not None:
        where, key = unknown["where"] or "", unknown["key"]
        return f"{where}{'.' if where else ''}{key}: unknown key{near(key, _keys_at(where))}"
    place = _PLACE.search(message)
    return f"{place['where'] if place else 'configuration'}: {_PLACE.sub('', message)}"


def _keys_at(where: str) -> list[str]:
    last = where.rpartition(".")[2].partition("[")[0]
    if last == "plugins" and where.startswith("schedulingProfiles"):
        section: type[Part] = Weighed
    else:
        section = _SECTIONS.get(last, Reference if last else Document)
    return [field.encode_name for field in msgspec.structs.fields(section)]


# --- values as Kubernetes and Go write them ---

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"(\d+(?:\.\d*)?)\s*([kKMGT]i?|)")
_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def seconds(text: str, where: str) -> float:
    """A Go duration ("1m30s", "200ms", "0"); raises ConfigError."""
    pieces = _DURATION.findall(text)
    if text.strip() == "0":
        return 0.0
    if not pieces or "".join(number + unit for number, unit in pieces) != text.strip():
        raise ConfigError(f"{where}: {text!r} is not a duration; write for example 200ms or 1m30s")
    return sum(float(number) * _SECONDS[unit] for number, unit in pieces)


def quantity(value: str | int, where: str) -> int:
    """A Kubernetes quantity ("5k", "1Gi", 5000); raises ConfigError."""
    found = _QUANTITY.fullmatch(str(value).strip())
    if found is None:
        raise ConfigError(f"{where}: {value!r} is not a quantity; write for example 5000 or 1Gi")
    return int(float(found[1]) * {**_FACTORS, **_BINARY}[found[2]])
