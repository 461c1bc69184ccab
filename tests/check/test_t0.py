"""Tier T0 on files as they should be, and on files with one fault for each check."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from picker import envoy
from picker.check import registry, rig, runner
from picker.check.papers import Papers, read, within
from picker.check.verdict import Outcome
from picker.envoy import EXT_PROC, GATEWAY, POOL
from picker.errors import ConfigError

try:
    envoy.find_envoy()
    missing = ""
except ConfigError as error:
    missing = str(error)

Json = dict[str, Any]
Files = dict[str, Any]

MANIFESTS = """
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: pool}
spec:
  selector: {matchLabels: {app: vllm}}
  targetPorts: [{number: 8000}]
  endpointPickerRef: {name: picker, port: {number: 9002}, failureMode: FailClose}
---
apiVersion: v1
kind: Service
metadata: {name: picker}
spec:
  ports: [{port: 9002, appProtocol: http2}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: picker}
rules:
- {apiGroups: [""], resources: [pods], verbs: [get, list, watch]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: picker}
spec:
  template:
    spec:
      securityContext: {runAsNonRoot: true}
      containers:
      - name: picker
        securityContext:
          readOnlyRootFilesystem: true
          allowPrivilegeEscalation: false
          capabilities: {drop: [ALL]}
        livenessProbe: {grpc: {port: 9003, service: liveness}}
        readinessProbe: {grpc: {port: 9003, service: readiness}}
        resources: {requests: {cpu: 1}}
"""


def good() -> Files:
    """By name: what stands in the file, as YAML or as text."""
    pool, service, role, deployment = yaml.safe_load_all(MANIFESTS)
    return {
        "envoy.yaml": envoy.bootstrap(["127.0.0.1:8001"], "127.0.0.1:9002"),
        "pool.yaml": pool,
        "service.yaml": service,
        "role.yaml": role,
        "deployment.yaml": deployment,
        "picker.yaml": {"queue": {"size": 4}},
        "endpoints.yaml": {"endpoints": [{"address": "127.0.0.1", "port": "8001"}]},
    }


def write(folder: Path, files: Files) -> None:
    for name, value in files.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


async def failures(folder: Path, files: Files) -> dict[str, str]:
    write(folder, files)
    papers = Papers(read([folder]))
    # To ask Envoy takes longer than all other checks, and it has been asked about its configuration as it should be.
    asked = not missing and (files == good() or files["envoy.yaml"] != good()["envoy.yaml"])
    checks = [check for check in registry.T0 if asked or check.id != "ENVOY-1.valid"]
    verdicts = await runner.run(checks, papers, papers.trace)
    return {verdict.id: verdict.why for verdict in verdicts if verdict.outcome is not Outcome.PASS}


async def test_good_files_pass_every_check(tmp_path: Path) -> None:
    assert await failures(tmp_path, good()) == {}


async def test_files_of_other_programs_are_named_and_are_no_fault(tmp_path: Path) -> None:
    told = await failures(tmp_path, good() | {"adapter.yaml": {"externalRules": []}})
    assert told == {"FILES-2.recognised": "not recognised, and so not checked: adapter.yaml"}
    many: Files = {f"{number:02}.json": {"rules": []} for number in range(10)}
    (why,) = (await failures(tmp_path, good() | many)).values()
    assert why.endswith("06.json, 07.json and 3 more")  # with the one above


@pytest.mark.parametrize("folder", ["envoy", "kubernetes"])
async def test_the_files_of_this_project_pass(folder: str) -> None:
    papers = Papers(read([Path(__file__).parents[2] / "deploy" / folder]))
    checks = [check for check in registry.T0 if not (missing and check.id == "ENVOY-1.valid")]
    verdicts = await runner.run(checks, papers, papers.trace)
    bad = {verdict.id: verdict.why for verdict in verdicts if verdict.outcome not in (Outcome.PASS, Outcome.SKIP)}
    assert bad == {}


def config(change: Callable[[Json], object]) -> Callable[[Files], None]:
    """A change of the Envoy configuration."""

    def apply(files: Files) -> None:
        change(files["envoy.yaml"])

    return apply


def gateway(settings: Json) -> Callable[[Files], None]:
    return config(lambda made: rig.manager(rig.listener(made, GATEWAY)).update(settings))


def ext_proc(settings: Json) -> Callable[[Files], None]:
    return config(lambda made: rig.ext_proc(rig.listener(made, GATEWAY)).update(settings))


def original_dst(settings: Json) -> Callable[[Json], None]:
    """The pool is one that Envoy does not know the members of."""

    def apply(made: Json) -> None:
        other = envoy.bootstrap(["127.0.0.1:8001"], "127.0.0.1:9002", topology=envoy.Topology.ORIGINAL_DST)
        made["static_resources"]["clusters"][0] = rig.cluster(other, POOL) | settings
        made["static_resources"]["listeners"] = copy.deepcopy(other["static_resources"]["listeners"])

    return apply


def open_original_dst(files: Files) -> None:
    original_dst({})(files["envoy.yaml"])
    ext_proc({"failure_mode_allow": True})(files)


def spec(**changes: object) -> Callable[[Files], None]:
    return lambda files: files["pool.yaml"]["spec"].update(changes)


def unretried(made: Json) -> None:
    host = rig.manager(rig.listener(made, GATEWAY))["route_config"]["virtual_hosts"][0]
    host["routes"][0]["route"].pop("retry_policy")


def container(files: Files) -> Json:
    found: Json = files["deployment.yaml"]["spec"]["template"]["spec"]["containers"][0]
    return found


def elsewhere(made: Json) -> None:
    (member,) = rig.cluster(made, EXT_PROC)["load_assignment"]["endpoints"][0]["lb_endpoints"]
    member["endpoint"]["address"]["socket_address"]["address"] = "10.0.0.9"


def half_streamed(made: Json) -> None:
    rig.ext_proc(rig.listener(made, GATEWAY))["processing_mode"]["response_body_mode"] = "BUFFERED"


def without_picker(made: Json) -> None:
    http = rig.manager(rig.listener(made, GATEWAY))["http_filters"]
    del http[0]


def http1(made: Json) -> None:
    cluster = rig.cluster(made, EXT_PROC)
    del cluster["typed_extension_protocol_options"]
    del cluster["health_checks"]  # Envoy itself wants HTTP/2 for them


def unwatched(made: Json) -> None:
    cluster = rig.cluster(made, EXT_PROC)
    del cluster["health_checks"]
    for http2 in within(cluster, "http2_protocol_options"):
        http2.pop("connection_keepalive", None)


FAULTS: dict[str, list[Callable[[Files], object]]] = {
    "FILES-1.readable": [
        lambda files: files.update({"bad.yaml": "a: [1"}),
        lambda files: files.update({"l.yaml": "[1]"}),
    ],
    "FILES-2.recognised": [
        lambda files: files.update({"adapter.yaml": {"externalRules": []}}),
        lambda files: files.update({f"{number}.json": {"rules": []} for number in range(20)}),
    ],
    "CONFIG-1.picker": [lambda files: files.update({"picker.yaml": {"queue": {"sise": 4}}})],
    "CONFIG-2.endpoints": [lambda files: files.update({"endpoints.yaml": {"endpoints": [{"adress": "x"}]}})],
    "CRD-2.pool": [
        spec(selector={"app": "vllm"}),
        spec(selector={"matchLabels": {}}),
        spec(targetPorts=[]),
        spec(targetPorts=[{"number": 8000}, {"number": 8000}]),
        spec(targetPorts=[{"number": 70000}]),
        spec(appProtocol="grpc"),
        spec(extensionRef={"name": "picker"}),
        spec(endpointPickerRef={"name": "picker", "kind": "Other", "failureMode": "Open"}),
    ],
    "POOL-3.service": [
        lambda files: files["service.yaml"]["metadata"].update(name="other"),
        lambda files: files["service.yaml"]["spec"].update(type="ExternalName"),
        lambda files: files["service.yaml"]["spec"]["ports"][0].update(port=9000),
        lambda files: files["service.yaml"]["spec"]["ports"][0].pop("appProtocol"),
    ],
    "SEC-5.rbac": [
        lambda files: files["role.yaml"]["rules"][0].update(verbs=["*"]),
        lambda files: files["role.yaml"]["rules"][0].update(resources=["secrets"]),
    ],
    "POD-1.confined": [
        lambda files: container(files)["securityContext"].pop("capabilities"),
        lambda files: container(files)["securityContext"].update(runAsNonRoot=False),
    ],
    "POD-2.probed": [
        lambda files: container(files).pop("readinessProbe"),
        lambda files: container(files).pop("resources"),
    ],
    "ENVOY-1.valid": [gateway({"stat_prefixes": "x"})],
    "ENVOY-1.picker": [config(without_picker)],
    "ENVOY-2.modes": [config(half_streamed)],
    "ENVOY-3.metadata": [ext_proc({"metadata_options": {}})],
    "ENVOY-3.served": [ext_proc({"response_attributes": ["response.code"]})],
    "ENVOY-4.stripped": [gateway({"early_header_mutation_extensions": []})],
    "ENVOY-5.idle": [gateway({"stream_idle_timeout": "0s"}), gateway({"stream_idle_timeout": "86400s"})],
    "ENVOY-6.header": [
        config(original_dst({"original_dst_lb_config": {"use_http_header": True, "http_header_name": "x-to"}}))
    ],
    "ENVOY-7.cluster": [
        config(lambda made: rig.cluster(made, EXT_PROC).update(connect_timeout="1000s")),
        config(http1),
        config(unwatched),
    ],
    "ENVOY-8.open": [open_original_dst],
    "ENVOY-9.retries": [config(unretried)],
    "ENVOY-10.tls": [config(elsewhere)],
}


def test_every_check_has_a_fault() -> None:
    assert set(FAULTS) == {check.id for check in registry.T0}


CASES = [(name, number) for name, faults in FAULTS.items() for number in range(len(faults))]


@pytest.mark.parametrize(("name", "number"), CASES)
async def test_a_fault_is_found_by_its_check_and_by_no_other(name: str, number: int, tmp_path: Path) -> None:
    if missing and name == "ENVOY-1.valid":
        pytest.skip(missing)
    files = good()
    FAULTS[name][number](files)
    found = await failures(tmp_path, files)
    assert set(found) == {name}, found
