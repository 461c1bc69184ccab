"""The endpoint picker's plugin types: what each is here, and how its parameters are called.

Names, defaults and parameters: llm-d router, August 2026, and Gateway API Inference Extension v1.5.0.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from picker.errors import ConfigError
from picker.imports.epp_schema import near, seconds
from picker.imports.report import Fate

Parameters = Mapping[str, Any]


class Part(enum.Enum):
    """What a plugin does in a configuration."""

    SCORER = "scorer"
    FILTER = "filter"
    BOTH = "scorer and filter"
    PICKER = "picker"
    HANDLER = "profile handler"
    DETECTOR = "saturation detector"  # also a filter
    OTHER = "plugin"

    @property
    def scores(self) -> bool:
        return self in (Part.SCORER, Part.BOTH)

    @property
    def filters(self) -> bool:
        return self in (Part.FILTER, Part.BOTH, Part.DETECTOR)

    @property
    def schedules(self) -> bool:
        """Whether it may stand in a profile and is put there by itself when there is none."""
        return self.scores or self.filters or self is Part.PICKER


@dataclass(frozen=True, slots=True)
class Kind:
    """A plugin type. name: ours, empty for the same. says: what is to be said of it, behind its fate.

    keys: its parameters -> ours; an empty name: known, and without effect here, which `idle` explains. any_keys: what
    it has is not looked at; elsewhere: those that count elsewhere all the same. rest: makes ours of what a mere
    renaming does not; None drops one.
    """

    part: Part
    fate: Fate = Fate.SAME
    says: str = ""
    name: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    idle: str = "picker has one such source of it"
    any_keys: bool = False
    elsewhere: tuple[str, ...] = ()
    rest: Callable[[Parameters, str], dict[str, Any]] | None = None


def translate(type_: str, kind: Kind, given: Parameters, where: str) -> tuple[dict[str, Any], list[str]]:
    """(our parameters, names of those without effect here); raises ConfigError for one that there is not."""
    if kind.any_keys:
        return {}, sorted(given.keys() - set(kind.elsewhere))
    ours: dict[str, Any] = {} if kind.rest is None else kind.rest(given, where)
    idle = []
    for key, value in given.items():
        if key not in kind.keys:
            known = f" of {type_}{near(key, list(kind.keys))}" if kind.keys else f": {type_} has no parameters"
            raise ConfigError(f"{where}.parameters.{key}: unknown parameter{known}")
        if not kind.keys[key]:
            idle.append(key)
        elif kind.rest is None or kind.keys[key] not in ours:
            ours[kind.keys[key]] = value
    return {key: value for key, value in ours.items() if not (key.startswith("=") or value is None)}, idle


# --- parameters that are more than a renaming; "=" marks keys that `rest` reads itself ---

_READ = "=read"
_PRODUCERS = {
    "prefixMatchInfoProducerName": "",
    "inFlightLoadProducerName": "",
    "latencyPredictionInfoProducerName": "",
}


def _positive(given: Parameters, key: str, ours: str) -> dict[str, Any]:
    """A number that the endpoint picker replaces by its default when it is not positive."""
    value = given.get(key)
    return {ours: value if isinstance(value, int | float) and value > 0 else None}


def _session(given: Parameters, where: str) -> dict[str, Any]:
    strategy = given.get("strategy", "encoded_endpoint_header")
    if strategy == "session_id":
        return {_READ: None}
    if strategy != "encoded_endpoint_header":
        words = "encoded_endpoint_header or session_id"
        raise ConfigError(f"{where}.parameters.strategy: must be {words}, got {strategy!r}")
    config = given.get("encodedEndpointHeaderConfig") or {}
    return {"token_header": str(config.get("header") or "x-session-token").lower(), _READ: None}


def _conditions(given: Parameters, where: str) -> dict[str, Any]:
    names = {"metric": "metric", "maxValue": "max_value"}
    conditions = []
    for condition in given.get("conditions") or []:
        for key in condition:
            if key not in names:
                raise ConfigError(f"{where}.parameters.conditions.{key}: unknown key{near(key, list(names))}")
        conditions.append({names[key]: value for key, value in condition.items()})
    return {"conditions": conditions}


def _utilization(given: Parameters, where: str) -> dict[str, Any]:
    stale = given.get("metricsStalenessThreshold", "200ms")
    return {"stale_s": seconds(str(stale), f"{where}.parameters.metricsStalenessThreshold")}


_SCORER, _FILTER, _OTHER = Part.SCORER, Part.FILTER, Part.OTHER
_SESSION_KEYS = {
    "strategy": _READ,
    "encodedEndpointHeaderConfig": _READ,
    "sessionIdConfig": "",
    "profileName": "",
}
_SESSION_SAYS = (
    "a token header is read, but responses are not given one; by session id it is whole: those in "
    "x-session-id, session-id, x-session-affinity, x-claude-code-session-id and in the body"
)
_NO_MULTI_CLUSTER = "picker knows endpoints, not clusters"
_AFFINITY_KEYS = {
    "affinityThreshold": "affinity_threshold",
    "explorationProbability": "exploration_probability",
    "maxTTFTPenaltyMs": "max_ttft_penalty_ms",
    "ttftSource": "ttft_source",
    "peakPrefillThroughput": "peak_prefill_throughput",
}
_UNREAD = "its requests are forwarded and routed by load, their prompts not read"
_STAGES = ("profiles", "decodeProfile", "prefillProfile", "encodeProfile")
_DETECTOR_KEYS = {"headroom": "headroom", "inFlightLoadProducerName": ""}
_SELECTOR_KEYS = {"matchLabels": "match_labels", "matchExpressions": "match_expressions"}


def _replaced(says: str, *elsewhere: str, part: Part = _OTHER) -> Kind:
    return Kind(part, Fate.REPLACED, says, any_keys=True, elsewhere=elsewhere)


def _partly(says: str, *elsewhere: str, part: Part = _OTHER) -> Kind:
    return Kind(part, Fate.PARTLY, says, any_keys=True, elsewhere=elsewhere)


def _missing(says: str, part: Part = _OTHER) -> Kind:
    return Kind(part, Fate.MISSING, says, any_keys=True)


KINDS: Mapping[str, Kind] = {
    # scorers
    "queue-scorer": Kind(_SCORER),
    "running-requests-size-scorer": Kind(_SCORER),
    "kv-cache-utilization-scorer": Kind(_SCORER),
    "load-aware-scorer": Kind(
        _SCORER, rest=lambda p, _: _positive(p, "threshold", "threshold"), keys={"threshold": "threshold"}
    ),
    "active-request-scorer": Kind(
        _SCORER,
        keys={"idleThreshold": "idle_threshold", "maxBusyScore": "max_busy_score", "requestTimeout": "", **_PRODUCERS},
        idle="requests in flight are booked when they are decided, and need no time-out",
    ),
    "token-load-scorer": Kind(
        _SCORER,
        keys={"queueThresholdTokens": "queue_threshold_tokens", **_PRODUCERS},
        rest=lambda p, _: _positive(p, "queueThresholdTokens", "queue_threshold_tokens"),
    ),
    "prefix-cache-scorer": Kind(
        _SCORER,
        keys={
            "matchLengthWeight": "match_length_weight",
            "matchLengthScaleTokens": "match_length_scale_tokens",
            **_PRODUCERS,
            **dict.fromkeys(
                ("blockSize", "blockSizeTokens", "maxPrefixBlocksToMatch", "lruCapacityPerServer", "autoTune"), ""
            ),
        },
        idle="there is one index, with blocks and capacity of its own",
    ),
    "precise-prefix-cache-scorer": Kind(
        _SCORER, Fate.REPLACED, "scored by KV events", "prefix-cache-scorer", any_keys=True
    ),
    "no-hit-lru-scorer": Kind(
        _SCORER,
        keys={"lruSize": "lru_size", "prefixPluginType": "", "prefixPluginName": "", **_PRODUCERS},
        rest=lambda p, _: _positive(p, "lruSize", "lru_size"),
    ),
    "lora-affinity-scorer": Kind(_SCORER),
    "session-affinity-scorer": Kind(
        _SCORER,
        Fate.PARTLY,
        _SESSION_SAYS,
        keys=_SESSION_KEYS,
        rest=_session,
        idle="sessions have sources of their own",
    ),
    "context-length-aware": Kind(Part.BOTH, keys={"label": "label", "enableFiltering": _READ}),
    "header-label-affinity-scorer": Kind(_SCORER, keys={"headerName": "header_name", "labelKey": "label_key"}),
    "latency-scorer": Kind(
        _SCORER,
        Fate.REPLACED,
        "its formula, on predictions from what the pool itself has taught; there always is one",
        keys={
            "ttftWeight": "ttft_weight",
            "tpotWeight": "tpot_weight",
            "headroomSelectionStrategy": "strategy",
            **dict.fromkeys(("compositeKVWeight", "compositeQueueWeight", "compositePrefixWeight"), ""),
            **_PRODUCERS,
        },
        idle="predictions are never missing",
    ),
    "predicted-latency-scorer": _missing("the one-piece scorer of v1.4: use latency-scorer", _SCORER),
    "mm-embeddings-cache-scorer": _missing("encoder caches are not tracked", _SCORER),
    "endpoint-attribute-scorer": _missing("there are no attributes beyond what scrapes bring", _SCORER),
    "topology-affinity-scorer": _missing("topology is not known", _SCORER),
    "multicluster-queue-scorer": _missing(_NO_MULTI_CLUSTER, _SCORER),
    "multicluster-kv-cache-utilization-scorer": _missing(_NO_MULTI_CLUSTER, _SCORER),
    "multicluster-prefix-cache-scorer": _missing(_NO_MULTI_CLUSTER, _SCORER),
    # filters
    "prefix-cache-affinity-filter": Kind(_FILTER, keys={**_AFFINITY_KEYS, **_PRODUCERS}),
    "slo-headroom-tier-filter": Kind(
        _FILTER,
        Fate.REPLACED,
        "its rule, on predictions from what the pool itself has taught",
        keys={"epsilonExploreNeg": "epsilon_explore_neg", **_PRODUCERS},
    ),
    "utilization-filter": Kind(
        _FILTER,
        keys={"conditions": "conditions", "fallbackOnEmpty": "fallback_on_empty", **_PRODUCERS},
        rest=_conditions,
    ),
    "decode-filter": Kind(_FILTER),
    "prefill-filter": Kind(_FILTER),
    "encode-filter": Kind(_FILTER),
    "by-label": Kind(
        _FILTER, keys={"label": "label", "validValues": "valid_values", "allowsNoLabel": "allows_no_label"}
    ),
    "label-selector-filter": Kind(_FILTER, keys=_SELECTOR_KEYS),
    "by-label-selector": Kind(_FILTER, name="label-selector-filter", keys=_SELECTOR_KEYS),
    "session-affinity-filter": Kind(
        _FILTER,
        Fate.PARTLY,
        _SESSION_SAYS,
        keys=_SESSION_KEYS,
        rest=_session,
        idle="sessions have sources of their own",
    ),
    "header-based-testing-filter": Kind(
        _FILTER, Fate.PARTLY, "an address without a port keeps all its ports, not one of them"
    ),
    "endpoint-attribute-filter": _missing("there are no attributes beyond what scrapes bring", _FILTER),
    "topology-affinity-filter": _missing("topology is not known", _FILTER),
    "multicluster-session-affinity-filter": _missing(_NO_MULTI_CLUSTER, _FILTER),
    # pickers
    "max-score-picker": Kind(Part.PICKER, keys={"maxNumOfEndpoints": _READ}),
    "random-picker": Kind(Part.PICKER, keys={"maxNumOfEndpoints": _READ}),
    "weighted-random-picker": Kind(Part.PICKER, keys={"maxNumOfEndpoints": _READ}),
    # saturation
    "utilization-detector": Kind(
        Part.DETECTOR,
        keys={
            "queueDepthThreshold": "queue_depth",
            "kvCacheUtilThreshold": "kv_usage",
            "metricsStalenessThreshold": "stale_s",
            **_DETECTOR_KEYS,
        },
        rest=_utilization,
    ),
    "concurrency-detector": Kind(
        Part.DETECTOR,
        keys={
            "maxConcurrency": "requests",
            "maxTokenConcurrency": "tokens",
            "concurrencyMode": "mode",
            "capacityMode": "mode",
            **_DETECTOR_KEYS,
        },
    ),
    # profile handlers and deciders; `epp` reads their parameters
    "single-profile-handler": Kind(Part.HANDLER, any_keys=True),
    "header-profile-handler": Kind(Part.HANDLER, any_keys=True, elsewhere=("headerName", "defaultProfile")),
    "data-parallel-profile-handler": _replaced("each rank is an endpoint of its own", part=Part.HANDLER),
    "disagg-profile-handler": _partly("the decode profile routes", *_STAGES, part=Part.HANDLER),
    "pd-profile-handler": _partly("the decode profile routes", *_STAGES, part=Part.HANDLER),
    "disagg-headers-handler": _missing("requests are not split into prefill and decode"),
    "prefill-header-handler": _missing("requests are not split into prefill and decode"),
    "prefix-based-pd-decider": _missing("requests are not split into prefill and decode"),
    "always-disagg-pd-decider": _missing("requests are not split into prefill and decode"),
    "always-disagg-multimodal-decider": _missing("requests are not split into encode and decode"),
    # producers
    "approx-prefix-cache-producer": _replaced("picker's own prefix index, bounded by index.budget_bytes"),
    "precise-prefix-cache-producer": _replaced("exact knowledge by KV events (exact.by: bytes)", "kvEventsConfig"),
    "inflight-load-producer": _replaced("picker's own bookings: made with the decision, released with the response"),
    "predicted-latency-producer": _replaced(
        "what the pool's own behaviour has taught; no sidecar is asked", "streamingMode", "sloBufferFactor"
    ),
    "token-producer": _replaced("prompts are matched as bytes; tokens are counted from what engines report"),
    "tokenizer": _replaced("prompts are matched as bytes; tokens are counted from what engines report"),
    "session-id-producer": Kind(
        _OTHER,
        Fate.PARTLY,
        "sessions are those in x-session-id, session-id, x-session-affinity, x-claude-code-session-id and in the body",
        any_keys=True,
    ),
    "agent-identity": Kind(
        _OTHER, Fate.PARTLY, "of the agents' headers, those with session ids are read", any_keys=True
    ),
    "burst-prefix-cache-producer": _replaced("a decision is booked before the next one is made: bursts see each other"),
    "mm-embeddings-cache-producer": _missing("encoder caches are not tracked"),
    "p2p-source-producer": _missing("engines are not told to pull from each other"),
    "multicluster-approx-prefix-cache-producer": _missing(_NO_MULTI_CLUSTER),
    # data layer
    "metrics-data-source": _replaced("picker's scraper", "scheme", "path", "port", "interval"),
    "core-metrics-extractor": _replaced(
        "metrics of vLLM, SGLang and TensorRT-LLM are told apart by their names", "engineConfigs"
    ),
    "models-data-source": _replaced("model names are asked from /v1/models"),
    "models-data-extractor": _replaced("model names are asked from /v1/models"),
    "endpoint-notification-source": _replaced("whoever needs to know of endpoints is told"),
    "k8s-notification-source": _missing("Kubernetes objects are not offered to plugins"),
    "file-discovery": _replaced("endpoints_file, which is always watched", "path", "watchFile"),
    "multicluster-file-discovery": _missing(_NO_MULTI_CLUSTER),
    "multicluster-metrics-data-source": _missing(_NO_MULTI_CLUSTER),
    "multicluster-metrics-extractor": _missing(_NO_MULTI_CLUSTER),
    "topology-extractor": _missing("topology is not known"),
    "dcgm-data-source": _missing("GPUs are not scraped"),
    "dcgm-extractor": _missing("GPUs are not scraped"),
    "disaggregatedset-rollout-pod-extractor": _missing("rollouts of disaggregated sets are not followed"),
    "disaggregatedset-rollout-screener": _missing("rollouts of disaggregated sets are not followed"),
    "local-syncer": _missing("replicas do not share state"),
    # admission
    "latency-slo-admitter": _missing("requests are not refused for their predicted latency"),
    "probabilistic-admitter": _missing("requests are not refused by chance"),
    # flow control
    "fcfs-ordering-policy": Kind(_OTHER, any_keys=True, says="the queue is first come, first served within a priority"),
    "edf-ordering-policy": Kind(
        _OTHER,
        Fate.PARTLY,
        "all requests may wait equally long, which makes it first come, first served",
        any_keys=True,
    ),
    "global-strict-fairness-policy": Kind(_OTHER, any_keys=True, says="there is one queue"),
    "slo-deadline-ordering-policy": _missing("the queue does not look at objectives"),
    "round-robin-fairness-policy": _missing("the queue knows no flows"),
    "program-aware-fairness": _missing("the queue knows no flows"),
    "static-usage-limit-policy": _missing("priorities have no ceilings of their own"),
    "priority-holdback-policy": _missing("priorities have no ceilings of their own"),
    "soft-reflective-ceiling-policy": _missing("priorities have no ceilings of their own"),
    "sheddable-eviction-filter": _missing("running requests are not evicted"),
    "priority-then-time-eviction-order-policy": _missing("running requests are not evicted"),
    # parsers
    "openai-parser": Kind(_OTHER, any_keys=True),
    "passthrough-parser": Kind(
        _OTHER, Fate.PARTLY, "what is understood is still parsed; the rest is forwarded as it is", any_keys=True
    ),
    "anthropic-parser": _partly(_UNREAD),
    "vllmhttp-parser": _partly(_UNREAD),
    "sglanghttp-parser": _partly(_UNREAD),
    "vertexai-parser": _partly(_UNREAD),
    "vllmgrpc-parser": _missing("gRPC requests are not understood"),
    # tests and reports
    "request-attribute-reporter": _missing("no metadata is attached to responses"),
    "destination-endpoint-served-verifier": _missing("responses do not get the conformance suite's header"),
}
