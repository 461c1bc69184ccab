"""The deployment files as manifests, however they come about, and what can be asked of any of them."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy import kustomize
from deploy.custom_resources import schema

Json = dict[str, Any]

# libyaml where PyYAML has it.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# The oldest that the chart takes, and the newest there is a schema of.
KUBERNETES_VERSIONS = ("1.29", "1.37")
ROOT = Path(__file__).parent.parent.parent
KUBERNETES = ROOT / "deploy" / "kubernetes"
CHART = ROOT / "deploy" / "helm" / "picker"
OVERLAYS = sorted(folder.name for folder in (KUBERNETES / "overlays").iterdir())

# The labels of the pods that are said to be the engines.
ENGINES = {"app": "vllm"}
_SERVED: Json = {"modelServers": {"matchLabels": ENGINES}}
_SCRAPED: Json = {"prometheus": {"enabled": True}}

# Values of the chart that together turn on everything that it has.
VALUES: dict[str, Json] = {
    "least": {"router": _SERVED},
    "istio": {
        "router": _SERVED | {"monitoring": _SCRAPED},
        "provider": {"name": "istio"},
        "httpRoute": {"create": True, "headerMatches": {"x-team": "a"}, "inferenceGatewayNamespace": "edge"},
        "picker": {
            "alerts": True,
            "dashboard": True,
            "autoscaling": {"enabled": True},
            "engineAutoscaling": {"enabled": True, "deployment": "vllm"},
            "tlsSecret": "picker-tls",
        },
    },
    "gke": {
        "router": _SERVED | {"monitoring": _SCRAPED | {"provider": {"name": "gmp"}}},
        "provider": {"name": "gke"},
        "httpRoute": {"create": True},
    },
    "envoy-gateway": {"router": _SERVED, "provider": {"name": "envoy-gateway"}, "httpRoute": {"create": True}},
    "agentgateway": {"router": _SERVED, "provider": {"name": "agentgateway"}, "httpRoute": {"create": True}},
    "standalone": {
        "router": _SERVED
        | {"proxy": {"enabled": True}, "inferencePool": {"create": False}, "tracing": {"enabled": True}},
        "picker": {"configSecret": "picker-config", "replicas": {"existingSecret": "shared"}},
    },
    "older-layout": {
        "inferenceExtension": {
            "replicas": 3,
            "flags": {"v": 2, "secure-serving": False, "refresh-metrics-interval": "50ms"},
            "env": [{"name": "ENABLE_EXPERIMENTAL_FEATURE", "value": "true"}],
            "failureMode": "FailOpen",
            "monitoring": {"interval": "5s", "prometheus": {"enabled": True, "auth": {"enabled": True}}},
            "pluginsConfigFile": "custom-plugins.yaml",
            "pluginsCustomConfig": {
                "custom-plugins.yaml": "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
            },
        },
        "inferencePool": {"modelServers": {"matchLabels": ENGINES}, "targetPortNumber": 8080},
        "inferenceObjectives": [{"name": "high", "priority": 5}],
        "experimentalHttpRoute": {"enabled": True, "requestTimeout": "60s"},
    },
}
EVERYTHING = [f"overlay {name}" for name in OVERLAYS] + [f"chart {name}" for name in VALUES]


@functools.cache
def overlay(name: str) -> list[Json]:
    return kustomize.render(KUBERNETES / "overlays" / name)


def helm() -> Any:
    return pytest.importorskip("helm_python", reason="helm-python-sdk, which carries Helm's library, is not installed")


@functools.cache
def _chart(name: str) -> list[Json]:
    return chart(VALUES[name])


@functools.cache
def _loaded() -> Any:
    return helm().Chart.load(str(CHART))


def chart(values: Json) -> list[Json]:
    """What Helm makes of these values for a release `vllm` in the namespace `llm`."""
    loaded = _loaded()
    loaded.validate_schema(values)
    texts = loaded.render(values, name="vllm", namespace="llm")
    documents = (yaml.load_all(text, LOADER) for name, text in texts.items() if name.endswith(".yaml"))
    return [each for several in documents for each in several if each]


def manifests(what: str) -> list[Json]:
    """By a name of EVERYTHING."""
    kind, _, name = what.partition(" ")
    return overlay(name) if kind == "overlay" else _chart(name)


def of(kind: str, found: list[Json]) -> list[Json]:
    return [each for each in found if each["kind"] == kind]


def deployment(found: list[Json]) -> Json:
    (one,) = of("Deployment", found)
    return one


def containers(found: list[Json]) -> Iterator[Json]:
    pod = deployment(found)["spec"]["template"]["spec"]
    yield from pod.get("initContainers", ())
    yield from pod["containers"]


def picker(found: list[Json]) -> Json:
    """picker's own container."""
    (one,) = deployment(found)["spec"]["template"]["spec"]["containers"]
    assert isinstance(one, dict)
    return one


def problems(manifest: Json) -> list[str]:
    """What its schema says against it: a custom resource's here, else Kubernetes' own."""
    return list(_problems(json.dumps(manifest, sort_keys=True)))


@functools.cache  # most objects are the same in every overlay, and reading schemas is slow
def _problems(text: str) -> list[str]:
    manifest: Json = json.loads(text)
    custom = schema(manifest["apiVersion"], manifest["kind"])
    if custom is not None:
        return [error.message for error in jsonschema.Draft202012Validator(custom).iter_errors(manifest)]
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    wrong = []
    for version in KUBERNETES_VERSIONS:
        try:
            validate.validate(manifest, version, strict=True)
        except (validate.ValidationError, validate.SchemaNotFoundError) as error:
            wrong.append(f"Kubernetes {version}: {error}")
    return wrong


def kubectl(folders: list[Path]) -> list[list[Json]]:
    """What the real one makes of each; skips where there is none."""
    binary = shutil.which("kubectl")
    if binary is None:
        pytest.skip("there is no kubectl on PATH")
    started = [
        subprocess.Popen([binary, "kustomize", str(each)], stdout=subprocess.PIPE, text=True) for each in folders
    ]
    texts = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(folders)
    return [[each for each in yaml.load_all(text, LOADER) if each] for text in texts]
