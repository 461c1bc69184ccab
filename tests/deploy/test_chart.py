"""The Helm chart: its values, in both layouts, and what it says no to."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import yaml

from deploy.rendered import (
    CHART,
    ENGINES,
    KUBERNETES_VERSIONS,
    VALUES,
    Json,
    chart,
    deployment,
    helm,
    of,
    picker,
    problems,
)
from picker import __version__

DEFAULTS: Json = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA: Json = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
LEAST = VALUES["least"]
# Of the Gateway API Inference Extension's charts; here they are read, but have no defaults.
OLDER = {"inferenceExtension", "inferencePool", "inferenceObjectives", "experimentalHttpRoute"}


def values(**changes: Any) -> Json:
    """Dotted keys with __ for the dots, over the least that is needed."""
    made: Json = copy.deepcopy(LEAST)
    for path, value in changes.items():
        *folders, last = path.split("__")
        at = made
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = value
    return made


@pytest.mark.parametrize("name", VALUES)
def test_helm_finds_nothing_wrong(name: str) -> None:
    report = helm().lint(str(CHART), VALUES[name], strict=True)
    assert report["errors"] == []
    assert [each["error"] for each in report["messages"] if each["severity"] > 1] == []


def test_the_versions_are_pickers() -> None:
    loaded = helm().Chart.load(str(CHART))
    assert loaded.metadata["appVersion"] == loaded.version == __version__


def test_the_oldest_kubernetes_is_one_that_manifests_are_tried_with() -> None:
    assert helm().Chart.load(str(CHART)).metadata["kubeVersion"] == f">={KUBERNETES_VERSIONS[0]}.0-0"


def test_the_schema_has_all_values_and_no_others() -> None:
    def compare(given: Json, schema: Json, path: str) -> None:
        assert schema["additionalProperties"] is False, path
        optional = OLDER | {"global", "preferredBackends", "presets", "replicas", "gke"}
        assert set(schema["properties"]) - set(given) <= optional, path
        for key, value in given.items():
            inner = schema["properties"][key]
            if isinstance(value, dict) and "properties" in inner and value:
                compare(value, inner, f"{path}.{key}")

    compare(DEFAULTS, SCHEMA, "")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("router__epp__replcas", 3, "replcas"),
        ("rooter", {}, "rooter"),
        ("picker__networkPolicy__enabeld", True, "enabeld"),
        ("router__epp__replicas", 0, "replicas"),
        ("router__epp__extProcPort", 70000, "extProcPort"),
        ("router__proxy__proxyType", "agentgateway", "proxyType"),
        ("router__proxy__mode", "service", "mode"),
        ("router__inferencePool__failureMode", "FailMaybe", "failureMode"),
        ("provider__name", "nginx", "name"),
        ("inferenceExtension__extProcProt", 9002, "extProcProt"),
    ],
)
def test_a_value_that_is_not_known_is_named(path: str, value: object, named: str) -> None:
    with pytest.raises(helm().HelmError, match=named):
        chart(values(**{path: value}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"router__modelServers": {}}, "matchLabels.* is required"),
        ({"router__modelServers__protocol": "grpc"}, "OpenAI API"),
        ({"router__proxy": {"enabled": True, "failOpen": True}}, "cannot go on without picker"),
        ({"router__epp__pluginsConfigFile": "payload-agnostic.yaml"}, 'has no "payload-agnostic.yaml"'),
        ({"picker__configSecret": "mine", "picker__config": {"seed": 1}}, "stands in picker.config"),
        ({"picker__engineAutoscaling": {"enabled": True}}, "deployment is required"),
        ({"provider__gke__preferredBackends": {"enabled": True}}, "none is preferred"),
    ],
)
def test_what_cannot_be_is_refused_in_words(changes: Json, says: str) -> None:
    with pytest.raises(helm().HelmRenderError, match=says):
        chart(values(**changes))


def test_both_layouts_make_the_same() -> None:
    ports = [{"number": 8000}, {"number": 8001}]
    old: Json = {
        "inferenceExtension": {
            "replicas": 3,
            "extProcPort": 9102,
            "image": {"registry": "images.example.org", "tag": "1.2.3"},
            "env": [{"name": "A", "value": "b"}],
            "flags": {"v": 3},
            "failureMode": "FailOpen",
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "monitoring": {"prometheus": {"enabled": True}},
            "tracing": {"enabled": True},
            "extraServicePorts": [{"name": "more", "port": 81}],
        },
        "inferencePool": {
            "modelServers": {"matchLabels": ENGINES},
            "targetPorts": [{"number": 8000}, {"number": 8001}],
        },
        "inferenceObjectives": [{"name": "high", "priority": 5}],
        "experimentalHttpRoute": {"enabled": True, "baseModel": "qwen"},
        "picker": {"replicas": {"existingSecret": "shared"}},
    }
    epp = {key: old["inferenceExtension"][key] for key in ("replicas", "extProcPort", "image", "env", "flags")}
    new: Json = {
        "router": {
            "epp": epp | {"tolerations": old["inferenceExtension"]["tolerations"]},
            "monitoring": old["inferenceExtension"]["monitoring"],
            "tracing": old["inferenceExtension"]["tracing"],
            "extraServicePorts": old["inferenceExtension"]["extraServicePorts"],
            "inferencePool": {"failureMode": "FailOpen"},
            "inferenceObjectives": old["inferenceObjectives"],
            "modelServers": {"matchLabels": ENGINES, "targetPorts": ports},
        },
        "httpRoute": {"create": True, "baseModel": "qwen"},
        "picker": old["picker"],
    }
    assert chart(old) == chart(new)
    assert picker(chart(old))["image"] == "images.example.org/picker:1.2.3"


def test_pods_by_labels_alone_as_the_older_standalone_chart_has_it() -> None:
    server = {"createInferencePool": False, "endpointSelector": "app=vllm,tier=gold", "targetPorts": [8000, 8001]}
    found = chart({"inferenceExtension": {"endpointsServer": server, "sidecar": {"enabled": True, "presets": {}}}})
    assert of("InferencePool", found) == []
    arguments = picker(found)["args"]
    assert "--endpoint-selector=app=vllm,tier=gold" in arguments
    assert "--endpoint-target-ports=8000,8001" in arguments
    (service,) = [each for each in of("Service", found) if each["spec"].get("clusterIP") != "None"]
    assert 8081 in [port["port"] for port in service["spec"]["ports"]]


@pytest.mark.parametrize(
    ("value", "shown"), [(2, "2"), (0.5, "0.5"), (True, "true"), ("50ms", "50ms"), (4194304000, "4194304000")]
)
def test_flags_are_written_as_they_were_given(value: object, shown: str) -> None:
    found = chart(values(router__epp__flags={"some-flag": value}))
    assert f"--some-flag={shown}" in picker(found)["args"]


@pytest.mark.parametrize("value", [True, "true", "T", 1])
def test_with_an_election_one_serves_and_may_hold_its_lease(value: object) -> None:
    found = chart(values(router__epp__flags={"ha-enable-leader-election": value}))
    (role,) = of("Role", found)
    verbs = {verb for rule in role["rules"] if rule["resources"] == ["leases"] for verb in rule["verbs"]}
    assert verbs == {"get", "create", "update"}
    assert deployment(found)["spec"]["strategy"] == {"type": "Recreate"}
    assert of("PodDisruptionBudget", found) == []
    assert [(each["kind"], wrong) for each in found for wrong in problems(each)] == []


def test_without_an_election_nothing_may_be_written() -> None:
    (role,) = of("Role", chart(values(router__epp__flags={"ha-enable-leader-election": False})))
    assert {verb for rule in role["rules"] for verb in rule["verbs"]} == {"list", "watch"}


def test_a_plugins_file_is_what_picker_reads() -> None:
    changes = {"pluginsConfigFile": "mine.yaml", "pluginsCustomConfig": {"mine.yaml": "kind: EndpointPickerConfig\n"}}
    found = chart(values(router__epp=changes))
    assert "--config-file=/config/mine.yaml" in picker(found)["args"]
    (config,) = of("ConfigMap", found)
    assert config["data"]["mine.yaml"] == "kind: EndpointPickerConfig\n"


def test_pickers_configuration_is_what_picker_reads() -> None:
    found = chart(values(picker__config={"scrape": {"interval_s": 0.5}}))
    (config,) = of("ConfigMap", found)
    assert yaml.safe_load(config["data"]["picker.yaml"]) == {"scrape": {"interval_s": 0.5}}


def test_a_change_of_the_configuration_is_a_rolling_update_and_nothing_else_is() -> None:
    def sums(**changes: object) -> str:
        template = deployment(chart(values(**changes)))["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert sums() == sums()
    assert sums(picker__config={"seed": 1}) != sums()


def test_a_secret_of_replicas_is_made_unless_one_is_named() -> None:
    (secret,) = of("Secret", chart(LEAST))
    assert secret["metadata"]["name"] == "vllm-epp-replicas"
    assert of("Secret", chart(values(picker__replicas={"existingSecret": "shared"}))) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, True),
        ({"provider__name": "istio"}, True),
        ({"provider__name": "gke"}, False),
        ({"router__proxy": {"enabled": True}}, False),
        ({"provider__name": "gke", "picker__fallbacks": True}, True),
        ({"picker__fallbacks": False}, False),
    ],
)
def test_destinations_to_retry_on_are_named_where_they_are_understood(changes: Json, named: bool) -> None:
    assert f"--fallbacks={str(named).lower()}" in picker(chart(values(**changes)))["args"]


def test_a_certificate_of_ones_own_is_mounted() -> None:
    found = chart(values(picker__tlsSecret="mine"))
    assert "--cert-path=/certs" in picker(found)["args"]
    volumes = {each["name"]: each for each in deployment(found)["spec"]["template"]["spec"]["volumes"]}
    assert volumes["certs"]["secret"] == {"secretName": "mine"}


def test_a_check_of_the_certificate_takes_the_place_of_none() -> None:
    tls = {"mode": "SIMPLE", "credentialName": "ca", "subjectAltNames": ["picker"]}
    (rule,) = of("DestinationRule", chart(values(provider={"name": "istio", "istio": _policy(tls)})))
    assert rule["spec"]["trafficPolicy"]["tls"] == tls


def _policy(tls: Json) -> Json:
    return {"destinationRule": {"trafficPolicy": {"tls": tls}}}


def test_the_port_of_the_envoy_beside_picker_follows_pickers() -> None:
    found = chart(values(router__proxy={"enabled": True}, router__epp__extProcPort=9102))
    (config,) = [each for each in of("ConfigMap", found) if "envoy.yaml" in each["data"]]
    clusters = yaml.safe_load(config["data"]["envoy.yaml"])["static_resources"]["clusters"]
    (ours,) = [each for each in clusters if each["name"] == "ext-proc"]
    (member,) = ours["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert member["endpoint"]["address"]["socket_address"]["port_value"] == 9102


def test_traces_may_leave_when_they_are_sent() -> None:
    def ports(found: list[Json]) -> set[int]:
        policies = of("NetworkPolicy", found)
        return {port["port"] for each in policies for rule in each["spec"]["egress"] for port in rule["ports"]}

    assert 4317 not in ports(chart(LEAST))
    assert 4317 in ports(chart(values(router__tracing={"enabled": True})))


@pytest.mark.parametrize("name", ["latencyPredictor", "tokenizer"])
def test_what_has_no_effect_is_said(name: str) -> None:
    loaded = helm().Chart.load(str(CHART))
    notes = loaded.render(values(**{f"router__{name}": {"enabled": True}}))["picker/templates/NOTES.txt"]
    assert f"router.{name} has no effect" in notes
