"""`picker check --kubernetes` in a real cluster: rights, conditions and lists as that has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from check.test_t4 import GATEWAYS, HOSTS, ROUTES, SERVICES, Engines
from kubernetes.manifests import PODS, POOLS, SLICES, Json, address, endpoint_slice, pod, pool
from kubernetes.real_cluster import KUBECONFIG, Real
from kubernetes.stage import Stage, on_a_real_one
from kubernetes.test_rbac import documents
from picker.check import cluster_run
from picker.check.cluster import Asked
from picker.check.verdict import Outcome, Verdict

(ROLE,) = [each for each in documents("rbac.yaml") if each["kind"] == "Role"]
_PARENT = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "gate"}
_BACKEND = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "pool"}


def true(*names: str) -> list[Json]:
    more = {"message": "", "lastTransitionTime": "2026-11-21T10:00:00Z", "observedGeneration": 1}
    return [{"type": name, "status": "True", "reason": name} | more for name in names]


async def laid_out(stage: Stage, engines: Engines) -> None:
    """A pool in which all is well, as its gateway's controller would say."""
    taken = {"parentRef": _PARENT, "controllerName": "example.com/x", "conditions": true("Accepted", "ResolvedRefs")}
    await stage.apply(POOLS, pool(ports=(engines.port,)) | {"status": {"parents": [taken]}})
    for number, host in enumerate(HOSTS):
        await stage.apply(PODS, pod(f"p{number}", host))
    ports = [{"port": 9002, "appProtocol": "kubernetes.io/h2c"}]
    await stage.apply(SERVICES, {"metadata": {"name": "pool-epp"}, "spec": {"ports": ports, "clusterIP": "None"}})
    await stage.apply(SLICES, endpoint_slice("pool-epp-1", address("10.0.0.9", ready=True), service="pool-epp"))
    route: Json = {"parentRefs": [{"name": "gate"}], "rules": [{"backendRefs": [_BACKEND]}]}
    await stage.apply(ROUTES, {"metadata": {"name": "route"}, "spec": route, "status": {"parents": [taken]}})
    listeners = [{"name": "http", "protocol": "HTTP", "port": engines.gateway_port}]
    status = {"conditions": true("Accepted", "Programmed"), "addresses": [{"value": "127.0.0.1"}]}
    spec = {"gatewayClassName": "none", "listeners": listeners}
    await stage.apply(GATEWAYS, {"metadata": {"name": "gate"}, "spec": spec, "status": status})


async def checked(stage: Stage, account: str, *only: str, evidence: Path | None = None) -> dict[str, Verdict]:
    asked = Asked("pool", stage.namespace, KUBECONFIG, account=account)
    verdicts = await cluster_run.run(asked, only, 2.0, lambda verdict: None, evidence)
    return {verdict.id: verdict for verdict in verdicts}


@on_a_real_one
async def test_where_all_is_well_all_passes_and_evidence_is_written(stage: Stage, tmp_path: Path) -> None:
    assert isinstance(stage, Real)
    async with Engines().running() as engines:
        await laid_out(stage, engines)
        found = await checked(stage, await stage.named_account(ROLE), evidence=tmp_path)
    not_passed = {name: each.why for name, each in found.items() if each.outcome is not Outcome.PASS}
    assert not_passed == {"K8S-3.tls": "the Service pool-epp has no address of its own"}
    told = json.loads((tmp_path / "advanced_inference_ingress.json").read_text())
    assert told["kubernetes"] == (await stage.ask("GET", "/version")).value["gitVersion"]
    assert told["affinity"]["share"] == 1.0


@pytest.mark.parametrize(
    ("verbs", "name", "why"),
    [
        (["list"], "K8S-1.sufficient", "may not watch pods"),
        (["list", "watch", "get"], "K8S-1.no-more", "may also get pods"),
        (["*"], "K8S-1.no-more", "may also * pods"),
    ],
)
@on_a_real_one
async def test_rights_are_those_that_the_api_server_grants(stage: Stage, verbs: list[str], name: str, why: str) -> None:
    assert isinstance(stage, Real)
    await stage.apply(POOLS, pool())
    rules = [rule for rule in ROLE["rules"] if rule["resources"] != ["pods"]]
    rules.append({"apiGroups": [""], "resources": ["pods"], "verbs": verbs})
    found = (await checked(stage, await stage.named_account({"rules": rules}), name))[name]
    assert (found.outcome, why in found.why) == (Outcome.FAIL, True), found
