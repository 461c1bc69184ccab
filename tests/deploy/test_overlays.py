"""The kustomize folders: one for each gateway, whole and of one piece."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from deploy import kustomize
from deploy.rendered import KUBERNETES, OVERLAYS, Json, deployment, kubectl, of, overlay, picker, problems
from picker.config import load_config
from picker.envoy import CONTROL_PREFIXES, validate
from picker.wire.extproc import CONTROL_HEADERS

BASE = KUBERNETES / "base"
GATEWAYS = [name for name in OVERLAYS if name != "envoy-sidecar"]


def test_there_is_one_for_each_gateway() -> None:
    assert OVERLAYS == ["agentgateway", "envoy-gateway", "envoy-sidecar", "gke", "istio"]


def test_the_renderer_of_these_tests_makes_what_kubectl_makes() -> None:
    def plain(found: list[Json]) -> list[str]:
        texts = [yaml.safe_dump(each) for each in found]
        return sorted(re.sub(r"(picker-(?:config|envoy))-(?:hash|[a-z0-9]{10})\b", r"\1", text) for text in texts)

    real = kubectl([KUBERNETES / "overlays" / name for name in OVERLAYS])
    for name, made in zip(OVERLAYS, real, strict=True):
        assert plain(overlay(name)) == plain(made), name


def test_the_renderer_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "kustomization.yaml").write_text("namePrefix: a-\n")
    with pytest.raises(ValueError, match="namePrefix"):
        kustomize.render(folder)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_every_kind_of_object(name: str) -> None:
    kinds = {each["kind"] for each in overlay(name)}
    wanted = {"InferencePool", "Deployment", "Service", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy"}
    wanted |= {"PodDisruptionBudget", "HorizontalPodAutoscaler", "ServiceMonitor", "PrometheusRule", "ConfigMap"}
    assert kinds >= wanted | ({"Gateway", "HTTPRoute"} if name in GATEWAYS else set())


@pytest.mark.parametrize("name", GATEWAYS)
def test_requests_go_from_the_gateway_by_the_route_to_the_pool(name: str) -> None:
    found = overlay(name)
    (gateway,), (route,), (pool,) = of("Gateway", found), of("HTTPRoute", found), of("InferencePool", found)
    assert [each["name"] for each in route["spec"]["parentRefs"]] == [gateway["metadata"]["name"]]
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert (backend["group"], backend["kind"]) == ("inference.networking.k8s.io", "InferencePool")
    assert backend["name"] == pool["metadata"]["name"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_with_an_election_one_serves_and_may_hold_its_lease(name: str, tmp_path: Path) -> None:
    component = KUBERNETES / "components" / "leader-election"
    plan = {"namespace": "llm", "resources": [str(KUBERNETES / "overlays" / name)], "components": [str(component)]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(plan))
    found = kustomize.render(tmp_path)
    assert picker(found)["args"] == [*picker(overlay(name))["args"], "--ha-enable-leader-election"]
    assert deployment(found)["spec"]["strategy"] == {"type": "Recreate"}
    assert of("PodDisruptionBudget", found) == []
    roles = {each["metadata"]["name"]: each["rules"] for each in of("Role", found)}
    assert [(rule["resources"], set(rule["verbs"])) for rule in roles["picker-leader"]] == [
        (["leases"], {"get", "create", "update"})
    ]
    bound = {each["roleRef"]["name"]: each["subjects"] for each in of("RoleBinding", found)}
    assert bound["picker-leader"] == bound["picker"]
    assert [(each["kind"], wrong) for each in found for wrong in problems(each)] == []


def test_envoy_gateway_takes_control_headers_from_clients() -> None:
    (policy,) = of("ClientTrafficPolicy", overlay("envoy-gateway"))
    early = policy["spec"]["headers"]["earlyRequestHeaders"]
    assert {each["value"] for each in early["removeOnMatch"]} == set(CONTROL_PREFIXES)
    assert set(early["remove"]) == {name for name in CONTROL_HEADERS if not name.startswith(CONTROL_PREFIXES)}


def test_istio_speaks_to_picker_by_its_services_name() -> None:
    (rule,) = of("DestinationRule", overlay("istio"))
    assert rule["spec"]["host"] == "picker.default.svc.cluster.local"
    assert rule["spec"]["trafficPolicy"]["tls"]["mode"] == "SIMPLE"


def test_the_envoy_beside_picker_is_configured_in_a_way_that_envoy_takes() -> None:
    (config,) = [each for each in of("ConfigMap", overlay("envoy-sidecar")) if "envoy.yaml" in each["data"]]
    values = yaml.safe_load(config["data"]["envoy.yaml"])
    (pool,) = [each for each in values["static_resources"]["clusters"] if each["name"] == "pool"]
    assert pool["type"] == "ORIGINAL_DST"
    assert "use_http_header" not in pool["original_dst_lb_config"]
    validate(values)


@pytest.mark.parametrize("name", ["envoy-gateway", "gke", "envoy-sidecar"])
def test_where_a_list_of_destinations_may_not_be_understood_one_is_named(name: str) -> None:
    assert "--fallbacks=false" in picker(overlay(name))["args"]


def test_the_configuration_is_one_that_picker_takes() -> None:
    config = load_config(BASE / "picker.yaml")
    assert config.epp.metrics_compat
    assert config.replicas.peers == ["picker-replicas:9005"]


def test_the_rule_for_the_metrics_adapter_makes_the_metric_that_engines_are_scaled_by() -> None:
    folder = KUBERNETES / "components" / "autoscaling"
    (rule,) = yaml.safe_load((folder / "adapter-rules.yaml").read_text(encoding="utf-8"))["externalRules"]
    (scaler,) = [each for each in of("HorizontalPodAutoscaler", overlay("istio")) if each["metadata"]["name"] == "vllm"]
    (metric,) = scaler["spec"]["metrics"]
    assert metric["external"]["metric"]["name"] == rule["name"]["as"]
