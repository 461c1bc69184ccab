from pathlib import Path
from typing import Any

import pytest
import yaml

from picker.config import Config, from_values
from picker.core.saturation import Concurrency, Utilization
from picker.deciders import build_plan, build_saturation, build_scheduler
from picker.errors import ConfigError
from picker.imports import import_text, recognise
from picker.imports.epp_plugins import KINDS
from picker.imports.report import Fate, Imported

FIXTURES = Path(__file__).parent.parent / "fixtures" / "epp"
HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"


def fixture(name: str) -> Imported:
    return import_text((FIXTURES / f"{name}.yaml").read_text(encoding="utf-8"))


def read(text: str) -> Imported:
    return import_text(HEAD + text)


def config_of(imported: Imported) -> Config:
    return from_values(imported.values)


def fate_of(imported: Imported, where: str) -> list[Fate]:
    return [line.fate for line in imported.lines if line.where.endswith(where)]


def scorers(config: Config, profile: int = 0) -> list[tuple[str, float, dict[str, Any]]]:
    return [(each.name, each.weight, each.parameters) for each in config.profiles[profile].scorers]


def filters(config: Config, profile: int = 0) -> list[tuple[str, dict[str, Any]]]:
    return [(each.name, each.parameters) for each in config.profiles[profile].filters]


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_charts_ship_makes_a_scheduler_and_every_plugin_is_spoken_of(path: Path) -> None:
    imported = import_text(path.read_text(encoding="utf-8"))
    config = config_of(imported)
    build_scheduler(config)
    assert build_saturation(config) is not None
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    said = {line.where.rpartition(" ")[2] for line in imported.lines}
    assert {plugin.get("name", plugin["type"]) for plugin in document["plugins"]} <= said


def test_the_charts_default_is_queue_2_cache_2_prefix_3() -> None:
    config = config_of(fixture("chart-default"))
    assert scorers(config) == [
        ("queue-scorer", 2.0, {}),
        ("kv-cache-utilization-scorer", 2.0, {}),
        ("prefix-cache-scorer", 3.0, {}),
    ]
    assert (config.policy, config.profile, config.profiles[0].picker) == ("weighted", "default", "max-score-picker")
    assert (config.profiles[0].max_endpoints, config.epp.fallbacks) == (1, False)
    assert config.saturation.parameters == {"stale_s": 4.0}


def test_nothing_configured_means_the_same_default() -> None:
    assert scorers(config_of(read(""))) == scorers(config_of(fixture("chart-default")))


def test_the_older_spelling_of_version_detector_and_parser_is_read() -> None:
    imported = fixture("gie-v1.5-default")
    config = config_of(imported)
    assert [weight for _, weight, _ in scorers(config)] == [1.0, 1.0, 1.0]
    assert build_saturation(config) == Utilization(queue_depth=10, kv_usage=0.9, stale_s=4.0)
    assert (config.queue.size, config.queue.timeout_s, config.queue.max_inflight) == (2000, 90.0, None)
    assert fate_of(imported, "flowControl") == [Fate.MISSING]
    assert fate_of(imported, "metricsStalenessThreshold") == [Fate.PARTLY]


def test_thresholds_in_place_of_a_detector_are_the_older_spelling_of_it() -> None:
    config = config_of(read("saturationDetector: {queueDepthThreshold: 7, kvCacheUtilThreshold: 0.7}"))
    assert build_saturation(config) == Utilization(queue_depth=7, kv_usage=0.7, stale_s=4.0)


def test_the_affinity_gate_stands_before_token_load() -> None:
    config = config_of(fixture("optimized-baseline"))
    assert filters(config) == [("prefix-cache-affinity-filter", {"affinity_threshold": 0.8})]
    assert scorers(config) == [("token-load-scorer", 1.0, {})]
    assert not fixture("optimized-baseline").counts()["missing"]


def test_precise_prefix_caching_listens_to_kv_events_at_the_same_ports() -> None:
    config = config_of(fixture("precise-prefix-cache"))
    assert config.exact.mode == "bytes"
    assert (config.exact.events, config.exact.replay) == ("tcp://{host}:5556", "tcp://{host}:5558")
    assert [name for name, _, _ in scorers(config)] == [
        "active-request-scorer",
        "kv-cache-utilization-scorer",
        "prefix-cache-scorer",
        "no-hit-lru-scorer",
    ]
    assert scorers(config)[3][2] == {"lru_size": 2048}
    assert filters(config) == [("decode-filter", {})]


def test_disaggregation_routes_by_the_decode_profile_and_says_what_is_missing() -> None:
    imported = fixture("pd")
    config = config_of(imported)
    assert (config.profile, config.prefill_profile) == ("decode", "prefill")
    assert filters(config, 0) == [("prefill-filter", {})]
    assert filters(config, 1) == [("decode-filter", {})]
    assert fate_of(imported, "schedulingProfiles prefill") == [Fate.PARTLY]
    assert fate_of(imported, "prefix-based-pd-decider") == [Fate.MISSING]
    assert build_plan(config).default == "decode"


def test_predicted_latency_keeps_the_order_of_its_filters_and_what_its_producer_was_told() -> None:
    imported = fixture("predicted-latency")
    config = config_of(imported)
    assert [parameters.get("name", name) for name, parameters in filters(config)] == [
        "strict-affinity-filter",
        "slo-headroom-tier-filter",
        "loose-affinity-filter",
    ]
    assert scorers(config) == [("latency-scorer", 1.0, {"tokens": False, "buffer": 1.0})]
    assert config.profiles[0].picker == "weighted-random-picker"
    assert fate_of(imported, "latency-slo-admitter") == [Fate.MISSING]
    assert build_plan(config).headers == {
        *("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms", "x-llm-d-slo-tpot-ms", "x-slo-tpot-ms"),
    }


def test_a_session_scorer_reads_the_token_header_unless_it_goes_by_ids() -> None:
    config = config_of(fixture("payload-agnostic"))
    assert scorers(config)[1] == ("session-affinity-scorer", 1.0, {"token_header": "x-session-token"})
    text = "plugins: [{type: session-affinity-filter, parameters: {strategy: session_id}}]"
    assert filters(config_of(read(text))) == [("session-affinity-filter", {})]
    text = "plugins: [{type: session-affinity-scorer, parameters: {encodedEndpointHeaderConfig: {header: X-S}}}]"
    assert scorers(config_of(read(text)))[0][2] == {"token_header": "x-s"}


def test_plugins_without_profiles_make_one_of_all_that_schedules() -> None:
    config = config_of(read("plugins: [{type: queue-scorer}, {type: decode-filter}, {type: openai-parser}]"))
    assert (scorers(config), filters(config)) == ([("queue-scorer", 1.0, {})], [("decode-filter", {})])


def test_a_picker_of_the_file_is_used_by_profiles_that_name_none() -> None:
    text = """
plugins: [{type: queue-scorer}, {type: random-picker, parameters: {maxNumOfEndpoints: 3}}]
schedulingProfiles: [{name: one, plugins: [{pluginRef: queue-scorer}]}]
"""
    config = config_of(read(text))
    assert (config.profiles[0].picker, config.profiles[0].max_endpoints) == ("random-picker", 3)
    assert config.epp.fallbacks is True


def test_profiles_can_be_named_by_a_header() -> None:
    text = """
plugins: [{type: header-profile-handler}, {type: queue-scorer}, {type: prefill-filter}]
schedulingProfiles:
- {name: decode, plugins: [{pluginRef: queue-scorer}]}
- {name: prefill, plugins: [{pluginRef: prefill-filter}]}
"""
    config = config_of(read(text))
    assert (config.profile, config.profile_header) == ("decode", "EPP-Profile")
    assert "epp-profile" in build_plan(config).headers


def test_flow_control_with_a_bound_on_requests_queues_here() -> None:
    text = """
featureGates: [flowControl=true, haPopulateNonLeaderDatastore]
plugins:
- {type: queue-scorer}
- {name: busy, type: concurrency-detector, parameters: {maxConcurrency: 64, headroom: 0.2}}
- {type: round-robin-fairness-policy}
flowControl:
  saturationDetector: {pluginRef: busy}
  maxBytes: 1Gi
  defaultPriorityBand: {fairnessPolicyRef: round-robin-fairness-policy, orderingPolicyRef: fcfs-ordering-policy}
  priorityBands: [{priority: 10, maxRequests: 100}]
"""
    imported = read(text)
    config = config_of(imported)
    assert config.queue.max_inflight == 64
    assert build_saturation(config) == Concurrency(requests=64, headroom=0.2)
    assert (
        fate_of(imported, "flowControl.maxBytes") == fate_of(imported, "priorityBands[0].maxRequests") == [Fate.MISSING]
    )
    assert fate_of(imported, "round-robin-fairness-policy") == [Fate.MISSING]
    assert fate_of(imported, "haPopulateNonLeaderDatastore") == [Fate.REPLACED]


def test_a_gate_that_is_off_is_off() -> None:
    assert fate_of(read("featureGates: [flowControl=false]"), "flowControl") == []


def test_discovery_from_a_file_is_the_endpoints_file() -> None:
    text = """
plugins: [{type: queue-scorer}, {name: pods, type: file-discovery, parameters: {path: /etc/pods.yaml, watchFile: true}}]
dataLayer: {discovery: {pluginRef: pods}}
"""
    assert config_of(read(text)).endpoints_file == "/etc/pods.yaml"


def test_metrics_from_elsewhere_are_named_and_their_interval_is_kept() -> None:
    text = """
plugins:
- {type: queue-scorer}
- {type: metrics-data-source, parameters: {scheme: https, path: /m, port: 9000, interval: 200ms}}
- {type: core-metrics-extractor, parameters: {engineConfigs: [{name: mine}]}}
- {type: utilization-detector, parameters: {metricsStalenessThreshold: 2s}}
"""
    imported = read(text)
    assert config_of(imported).scrape.interval_s == 0.2
    assert config_of(imported).saturation.parameters["stale_s"] == 2.0
    for key, fate in (
        ("path", Fate.MISSING),
        ("port", Fate.MISSING),
        ("scheme", Fate.PARTLY),
        ("engineConfigs", Fate.MISSING),
    ):
        assert fate_of(imported, f"parameters.{key}") == [fate]


@pytest.mark.parametrize(
    ("type_", "given", "ours"),
    [
        (
            "active-request-scorer",
            {"idleThreshold": 1, "maxBusyScore": 0.5, "requestTimeout": "2m"},
            {"idle_threshold": 1, "max_busy_score": 0.5},
        ),
        ("token-load-scorer", {"queueThresholdTokens": 1000}, {"queue_threshold_tokens": 1000}),
        ("token-load-scorer", {"queueThresholdTokens": 0}, {}),
        ("load-aware-scorer", {"threshold": 10}, {"threshold": 10}),
        ("load-aware-scorer", {"threshold": -1}, {}),
        ("no-hit-lru-scorer", {"lruSize": 0}, {}),
        (
            "prefix-cache-scorer",
            {"matchLengthWeight": 0.5, "matchLengthScaleTokens": 4096},
            {"match_length_weight": 0.5, "match_length_scale_tokens": 4096},
        ),
        ("header-label-affinity-scorer", {"headerName": "X", "labelKey": "y"}, {"header_name": "X", "label_key": "y"}),
        (
            "latency-scorer",
            {"ttftWeight": 1, "headroomSelectionStrategy": "most"},
            {"ttft_weight": 1, "strategy": "most", "tokens": False, "buffer": 1.0},
        ),
        ("context-length-aware", {"label": "len"}, {"label": "len"}),
    ],
)
def test_the_parameters_of_scorers_keep_their_meaning(type_: str, given: dict[str, Any], ours: dict[str, Any]) -> None:
    config = config_of(read(yaml.safe_dump({"plugins": [{"type": type_, "parameters": given}]})))
    assert scorers(config) == [(type_, 1.0, ours)]
    build_scheduler(config)


@pytest.mark.parametrize(
    ("type_", "given", "name", "ours"),
    [
        (
            "by-label",
            {"label": "t", "validValues": ["a"], "allowsNoLabel": True},
            "by-label",
            {"label": "t", "valid_values": ["a"], "allows_no_label": True},
        ),
        ("by-label-selector", {"matchLabels": {"a": "b"}}, "label-selector-filter", {"match_labels": {"a": "b"}}),
        (
            "label-selector-filter",
            {"matchExpressions": [{"key": "a", "operator": "Exists"}]},
            "label-selector-filter",
            {"match_expressions": [{"key": "a", "operator": "Exists"}]},
        ),
        (
            "utilization-filter",
            {"conditions": [{"metric": "waiting-queue", "maxValue": 3}], "fallbackOnEmpty": True},
            "utilization-filter",
            {"conditions": [{"metric": "waiting-queue", "max_value": 3}], "fallback_on_empty": True},
        ),
        (
            "slo-headroom-tier-filter",
            {"epsilonExploreNeg": 0.1},
            "slo-headroom-tier-filter",
            {"epsilon_explore_neg": 0.1, "tokens": False, "buffer": 1.0},
        ),
        (
            "prefix-cache-affinity-filter",
            {"explorationProbability": 0.1, "peakPrefillThroughput": 9.0, "maxTTFTPenaltyMs": 1},
            "prefix-cache-affinity-filter",
            {"exploration_probability": 0.1, "peak_prefill_throughput": 9.0, "max_ttft_penalty_ms": 1},
        ),
    ],
)
def test_the_parameters_of_filters_keep_their_meaning(
    type_: str, given: dict[str, Any], name: str, ours: dict[str, Any]
) -> None:
    config = config_of(read(yaml.safe_dump({"plugins": [{"type": type_, "parameters": given}]})))
    assert filters(config) == [(name, ours)]
    build_scheduler(config)


def test_context_length_filters_too_when_it_is_told_to() -> None:
    text = "plugins: [{type: context-length-aware, parameters: {label: len, enableFiltering: true}}]"
    config = config_of(read(text))
    assert filters(config) == [("context-length-aware", {"label": "len"})]
    assert scorers(config) == [("context-length-aware", 1.0, {"label": "len"})]


@pytest.mark.parametrize("type_", sorted(KINDS))
def test_every_plugin_type_can_be_named_and_is_spoken_of(type_: str) -> None:
    needed: dict[str, Any] = {
        "by-label": {"label": "x", "validValues": ["y"]},
        "utilization-filter": {"conditions": [{"metric": "waiting-queue", "maxValue": 1}]},
        "label-selector-filter": {"matchLabels": {"x": "y"}},
    }
    document = {
        "plugins": [{"type": type_, "parameters": needed.get(type_, {})}, {"name": "q", "type": "queue-scorer"}]
    }
    profile = {"name": "decode", "plugins": [{"pluginRef": "q"}]}
    if KINDS[type_].part.schedules and type_ != "queue-scorer":
        profile["plugins"] = [{"pluginRef": type_}]
    imported = read(yaml.safe_dump(document | {"schedulingProfiles": [profile]}))
    assert fate_of(imported, f" {type_}") == [KINDS[type_].fate]
    build_scheduler(config_of(imported))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("plugns: []", r"plugns: unknown key; did you mean 'plugins'\?"),
        ("plugins: [{typ: x}]", r"plugins\[0\]\.typ: unknown key; did you mean 'type'\?"),
        ("plugins: [{name: x}]", r"plugins\[0\].*type"),
        (
            "plugins: [{type: queue-scorr}]",
            r"\[0\]\.type: there is no plugin type 'queue-scorr'; did you mean 'queue-scorer'\?",
        ),
        ("plugins: [{type: queue-scorer}, {type: queue-scorer}]", "two plugins are called 'queue-scorer'"),
        (
            "plugins: [{type: queue-scorer, parameters: {x: 1}}]",
            r"parameters\.x: unknown parameter: queue-scorer has no parameters",
        ),
        (
            "plugins: [{type: token-load-scorer, parameters: {queueThreshold: 1}}]",
            "unknown parameter of token-load-scorer; did you mean 'queueThresholdTokens'",
        ),
        (
            "plugins: [{type: utilization-filter, parameters: {conditions: [{metrics: x}]}}]",
            r"conditions\.metrics: unknown key; did you mean 'metric'",
        ),
        (
            "plugins: [{type: session-affinity-scorer, parameters: {strategy: x}}]",
            "must be encoded_endpoint_header or session_id",
        ),
        (
            "schedulingProfiles: [{name: a, plugins: [{pluginRef: x}]}]",
            r"schedulingProfiles\[0\]\.plugins\[0\]: there is no plugin 'x'",
        ),
        (
            "schedulingProfiles: [{name: a, plugins: [{pluginref: x}]}]",
            r"pluginref: unknown key; did you mean 'pluginRef'",
        ),
        ("schedulingProfiles: [{name: a, plugins: [{}]}]", "a pluginRef is missing"),
        ("schedulingProfiles: [{plugins: []}]", r"schedulingProfiles\[0\]: the name is missing"),
        ("schedulingProfiles: [{name: a}, {name: a}]", "two profiles are called 'a'"),
        ("schedulingProfiles: [{name: a}, {name: b}]", "several profiles need a profile handler"),
        (
            "plugins: [{type: single-profile-handler}]\nschedulingProfiles: [{name: a}, {name: b}]",
            "runs one profile, and there are 2",
        ),
        (
            "plugins: [{type: single-profile-handler}, {type: header-profile-handler}]",
            "one profile handler may be named",
        ),
        (
            "plugins: [{type: disagg-profile-handler}]\nschedulingProfiles: [{name: a}]",
            "no profile is called 'decode', which is the one",
        ),
        (
            "plugins: [{type: header-profile-handler}]\nschedulingProfiles: [{name: a}, {name: b}]",
            "no profile is called 'decode'",
        ),
        ("featureGates: [flowcontrol]", r"there is no feature gate 'flowcontrol'; did you mean 'flowControl'\?"),
        ("featureGates: [flowControl=maybe]", "'maybe' is neither true nor false"),
        ("saturationDetector: {pluginRef: x}", "saturationDetector: there is no plugin 'x'"),
        (
            "plugins: [{type: queue-scorer}]\nsaturationDetector: {pluginRef: queue-scorer}",
            "'queue-scorer' is no saturation detector",
        ),
        (
            "plugins: [{type: utilization-detector}]\nsaturationDetector: {queueDepthThreshold: 7}",
            "saturationDetector: thresholds here, or a plugin utilization-detector with them, not both",
        ),
        ("saturationDetector: {queueDepth: 7}", "saturationDetector.queueDepth: unknown key; did you mean 'queueDepth"),
        ("flowControl: {defaultRequestTTL: soon}", "'soon' is not a duration"),
        ("flowControl: {maxRequests: many}", "'many' is not a quantity"),
        ("flowControl: {defaultPriorityBand: {fairnessPolicyRef: fair}}", "there is no plugin 'fair'"),
        ("parser: {pluginRef: x}", "parser: there is no plugin 'x'"),
        ("plugins: {}", r"plugins: Expected `array \| null`"),
    ],
)
def test_what_the_endpoint_picker_would_not_start_with_is_refused_with_its_place(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        read(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kind: EndpointPickerConfig\napiVersion: v1", "apiVersion: 'v1' is not one of llm-d.ai/v1alpha1, inference"),
        ("kind: EndpointPickerConfig", "configuration: .*apiVersion"),
        ("kind: ConfigMap\napiVersion: v1", "no configuration of epp, .*: say whose with --from"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_no_such_configuration_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        import_text(text)


def test_an_older_version_can_be_asked_for_by_name() -> None:
    with pytest.raises(ConfigError, match="kind: expected EndpointPickerConfig, got 'X'"):
        import_text("apiVersion: llm-d.ai/v1alpha1\nkind: X", "epp")


def test_our_own_configuration_is_nobody_elses() -> None:
    assert recognise({"policy": "picker"}) is None
    assert recognise(None) is None
