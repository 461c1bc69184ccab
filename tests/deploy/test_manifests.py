"""What holds for everything that is shipped, overlay or chart."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from deploy.rendered import ENGINES, EVERYTHING, ROOT, Json, containers, deployment, manifests, of, picker, problems
from picker.check import manifests as checks
from picker.check.papers import Kind, Paper, Papers
from picker.check.verdict import Outcome
from picker.commands.epp import command, load_any
from picker.commands.epp_flags import configured, given_flags
from picker.config import Config, override

MANUAL = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.parametrize("what", EVERYTHING)


def parsed(found: list[Json]) -> dict[str, Any]:
    """The arguments of picker's container as its command line takes them."""
    first, *rest = picker(found)["args"]
    assert first == "epp"
    return command.make_context("epp", list(rest)).params


def settings(found: list[Json]) -> Config:
    """What picker runs with, as far as it is written in a ConfigMap."""
    given = parsed(found)
    name = str(given["epp_config_file"]).rpartition("/")[2]
    texts = [each["data"][name] for each in of("ConfigMap", found) if name in each["data"]]
    config = load_any(None, text=texts[0] if texts else "{}")
    keys = {"drain_delay": "epp.drain_delay_s", "secure_serving": "epp.secure_serving", "grpc_port": "epp.grpc_port"}
    keys |= {"grpc_health_port": "epp.grpc_health_port", "metrics_host": "admin.host", "fallbacks": "epp.fallbacks"}
    changes = {key: given[flag] for flag, key in keys.items()}
    return override(config, changes | configured(given_flags(given), given["pools"]))


def test_every_manifest_keeps_to_its_schema(what: str) -> None:
    assert [(each["kind"], wrong) for each in manifests(what) for wrong in problems(each)] == []


def test_no_object_is_there_twice(what: str) -> None:
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in manifests(what)]
    assert len(names) == len(set(names))


def test_containers_can_do_nothing_that_they_need_not(what: str) -> None:
    pod = deployment(manifests(what))["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(manifests(what)):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


def test_picker_takes_its_arguments_and_its_configuration(what: str) -> None:
    config = settings(manifests(what))
    assert config.kubernetes.wanted
    assert config.admin.host == "0.0.0.0"


def test_probes_ask_for_what_picker_serves(what: str) -> None:
    found = manifests(what)
    port = settings(found).epp.grpc_health_port
    container = picker(found)
    assert container["livenessProbe"]["grpc"] == {"port": port, "service": "liveness"}
    assert container["startupProbe"]["grpc"] == {"port": port, "service": "liveness"}
    assert container["readinessProbe"]["grpc"] == {"port": port, "service": "readiness"}


def test_a_pod_is_given_the_time_that_draining_takes(what: str) -> None:
    found = manifests(what)
    config = settings(found)
    grace = deployment(found)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= config.epp.drain_delay_s + config.drain_timeout_s + 5


def test_every_replica_is_told_of_the_others(what: str) -> None:
    found = manifests(what)
    peers = settings(found).replicas.peers or list(parsed(found)["peers"])
    names = {each["metadata"]["name"] for each in of("Service", found) if each["spec"].get("clusterIP") == "None"}
    assert [peer.partition(":")[0] for peer in peers] == list(names)
    assert any(each["name"] == "PICKER_REPLICAS_SECRET" for each in picker(found)["env"])


def test_services_select_the_pods_and_their_ports_exist(what: str) -> None:
    found = manifests(what)
    labels = deployment(found)["spec"]["template"]["metadata"]["labels"]
    named = {port["name"] for container in containers(found) for port in container["ports"]}
    for service in of("Service", found):
        assert service["spec"]["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named


def test_the_protocol_of_the_service_is_the_one_that_is_served(what: str) -> None:
    found = manifests(what)
    config = settings(found)
    ports = [port for service in of("Service", found) for port in service["spec"]["ports"]]
    (served,) = [port for port in ports if port["port"] == config.epp.grpc_port]
    assert served["appProtocol"] == ("http2" if config.epp.secure_serving else "kubernetes.io/h2c")


def test_the_pool_names_the_service_that_picker_serves(what: str) -> None:
    found = manifests(what)
    for pool in of("InferencePool", found):
        reference = pool["spec"]["endpointPickerRef"]
        (service,) = [each for each in of("Service", found) if each["metadata"]["name"] == reference["name"]]
        assert reference["port"]["number"] in {port["port"] for port in service["spec"]["ports"]}
        assert settings(found).kubernetes.pools == [pool["metadata"]["name"]]


def test_the_network_policies_let_through_what_is_needed(what: str) -> None:
    found = manifests(what)
    labels = deployment(found)["spec"]["template"]["metadata"]["labels"]
    policies = [each["spec"] for each in of("NetworkPolicy", found)]
    assert all(each["podSelector"]["matchLabels"].items() <= labels.items() for each in policies)
    reached = {port["port"] for each in policies for rule in each.get("ingress", ()) for port in rule["ports"]}
    assert {9090, 9005} < reached
    assert all(rule["from"] for each in policies for rule in each.get("ingress", ()))
    called = [rule for each in policies for rule in each.get("egress", ())]
    engines = {port["port"] for rule in called if _to_engines(rule) for port in rule["ports"]}
    pool = of("InferencePool", found)
    assert {port["number"] for each in pool for port in each["spec"]["targetPorts"]} < engines | (
        {0} if not pool else set()
    )


def _to_engines(rule: Json) -> bool:
    return any(peer.get("podSelector", {}).get("matchLabels") == ENGINES for peer in rule.get("to", ()))


def test_replicas_are_set_by_one_hand(what: str) -> None:
    found = manifests(what)
    name = deployment(found)["metadata"]["name"]
    scaled = any(each["spec"]["scaleTargetRef"]["name"] == name for each in of("HorizontalPodAutoscaler", found))
    assert ("replicas" in deployment(found)["spec"]) != scaled


def test_disruptions_and_scalers_are_of_what_is_there(what: str) -> None:
    found = manifests(what)
    labels = deployment(found)["spec"]["template"]["metadata"]["labels"]
    (budget,) = of("PodDisruptionBudget", found)
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    targets = {each["spec"]["scaleTargetRef"]["name"] for each in of("HorizontalPodAutoscaler", found)}
    assert targets <= {deployment(found)["metadata"]["name"], "vllm"}


def test_metrics_are_scraped_from_a_port_of_the_service(what: str) -> None:
    found = manifests(what)
    for monitor in of("ServiceMonitor", found):
        chosen = monitor["spec"]["selector"]["matchLabels"].items()
        services = [each for each in of("Service", found) if chosen <= each["metadata"]["labels"].items()]
        named = {port["name"] for each in services for port in each["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= named


def test_roles_are_namespaced_and_bound_to_pickers_account(what: str) -> None:
    found = manifests(what)
    assert not of("ClusterRole", found) + of("ClusterRoleBinding", found)
    (role,), (binding,), (account,) = of("Role", found), of("RoleBinding", found), of("ServiceAccount", found)
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [each["name"] for each in binding["subjects"]] == [account["metadata"]["name"]]
    assert [each["namespace"] for each in binding["subjects"]] == [account["metadata"]["namespace"]]
    assert deployment(found)["spec"]["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert {verb for rule in role["rules"] for verb in rule["verbs"]} == {"list", "watch"}


def test_images_have_versions_and_stand_in_the_manual(what: str) -> None:
    for container in containers(manifests(what)):
        assert re.fullmatch(r"[a-z/]+:[a-z0-9.v-]*\d+\.\d+\.\d+", container["image"])
        assert f"`{container['image']}`" in MANUAL


def test_what_else_must_be_there_stands_in_the_manual(what: str) -> None:
    """Names of what is not made here: classes, namespaces, Secrets, Deployments."""
    found = manifests(what)
    variables = [each["valueFrom"].get("secretKeyRef") for each in picker(found)["env"] if "valueFrom" in each]
    wanted = {("Secret", each["name"]) for each in variables if each}
    wanted |= {("Deployment", each["spec"]["scaleTargetRef"]["name"]) for each in of("HorizontalPodAutoscaler", found)}
    wanted |= {("GatewayClass", each["spec"]["gatewayClassName"]) for each in of("Gateway", found)}
    spaces = re.findall(r"kubernetes\.io/metadata\.name: ([a-z-]+)", yaml.safe_dump(of("NetworkPolicy", found)))
    wanted |= {("Namespace", name) for name in spaces}
    made = {(each["kind"], each["metadata"]["name"]) for each in found} | {("Secret", "shared")}
    assert {each for each in wanted - made if f"`{each[1]}`" not in MANUAL} == set()


async def test_pickers_own_checks_pass(what: str, tmp_path: Any) -> None:
    papers = Papers(tuple(Paper(tmp_path / "all.yaml", Kind.MANIFEST, each) for each in manifests(what)))
    for check in checks.CHECKS:
        finding = await check.run(papers)
        assert finding.outcome in (Outcome.PASS, Outcome.SKIP), (check.id, finding)
