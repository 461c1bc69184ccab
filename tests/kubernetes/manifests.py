"""Objects as they lie in a cluster, in few words."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
Kind = tuple[str, str]  # where the group's version is, and the plural

PODS = ("/api/v1", "pods")
SLICES = ("/apis/discovery.k8s.io/v1", "endpointslices")
POOLS = ("/apis/inference.networking.k8s.io/v1", "inferencepools")
OLD_POOLS = ("/apis/inference.networking.x-k8s.io/v1alpha2", "inferencepools")
OBJECTIVES = ("/apis/llm-d.ai/v1alpha2", "inferenceobjectives")
OLD_OBJECTIVES = ("/apis/inference.networking.x-k8s.io/v1alpha2", "inferenceobjectives")
REWRITES = ("/apis/llm-d.ai/v1alpha2", "inferencemodelrewrites")
LEASES = ("/apis/coordination.k8s.io/v1", "leases")

KIND_NAMES = {
    "pods": "Pod",
    "services": "Service",
    "endpointslices": "EndpointSlice",
    "leases": "Lease",
    "gateways": "Gateway",
    "httproutes": "HTTPRoute",
    "inferencepools": "InferencePool",
    "inferenceobjectives": "InferenceObjective",
    "inferencemodelrewrites": "InferenceModelRewrite",
}

DELETED_AT = "2026-11-21T11:00:00Z"


def pod(
    name: str,
    ip: str = "10.0.0.1",
    *,
    ready: bool = True,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    deleting: bool = False,
    phase: str = "Running",
    container: str = "containerd://a",
    resources: Json | None = None,
    **metadata: Any,
) -> Json:
    meta: Json = {"name": name, "labels": {"app": "vllm"} | (labels or {}), **metadata}
    if annotations:
        meta["annotations"] = annotations
    if deleting:
        meta["deletionTimestamp"] = DELETED_AT
    engine: Json = {"name": "vllm", "restartCount": 0, "containerID": container, "ready": ready}
    if resources is not None:
        engine["resources"] = resources
    conditions = [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": str(ready)}]
    status: Json = {"phase": phase, "conditions": conditions, "containerStatuses": [engine]}
    if ip:
        status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
    own: Json = {"name": "vllm", "image": "vllm"} | ({} if resources is None else {"resources": resources})
    return {"metadata": meta, "spec": {"containers": [own]}, "status": status}


def pool(name: str = "pool", *, labels: dict[str, str] | None = None, ports: tuple[int, ...] = (8000,)) -> Json:
    selector = {"matchLabels": {"app": "vllm"} if labels is None else labels}
    reference = {"name": f"{name}-epp", "port": {"number": 9002}}
    spec = {"selector": selector, "targetPorts": [{"number": port} for port in ports], "endpointPickerRef": reference}
    return {"metadata": {"name": name}, "spec": spec}


def old_pool(name: str = "pool") -> Json:
    spec = {"selector": {"app": "vllm"}, "targetPortNumber": 8000, "extensionRef": {"name": "epp"}}
    return {"metadata": {"name": name}, "spec": spec}


def objective(name: str, priority: int | None, pool: str = "pool") -> Json:
    spec: Json = {"poolRef": {"name": pool}}
    return {"metadata": {"name": name}, "spec": spec if priority is None else spec | {"priority": priority}}


def rewrite(name: str, *rules: Json, pool: str = "pool") -> Json:
    return {"metadata": {"name": name}, "spec": {"poolRef": {"name": pool}, "rules": list(rules)}}


def rule(*models: str, **weights: int | None) -> Json:
    """models: those it matches, none for all. weights: model to ask for instead -> weight."""
    matches = [{"model": {"type": "Exact", "value": model}} for model in models]
    targets: list[Json] = [{"modelRewrite": model} for model in weights]
    for target, weight in zip(targets, weights.values(), strict=True):
        if weight is not None:
            target["weight"] = weight
    return {"matches": matches, "targets": targets} if matches else {"targets": targets}


def endpoint_slice(name: str, *endpoints: Json, service: str = "vllm", kind: str = "IPv4", port: int = 8000) -> Json:
    labels = {"kubernetes.io/service-name": service}
    ports = [{"name": "http", "port": port, "protocol": "TCP"}]
    return {
        "metadata": {"name": name, "labels": labels},
        "addressType": kind,
        "endpoints": list(endpoints),
        "ports": ports,
    }


def address(ip: str, pod: str | None = None, **conditions: bool) -> Json:
    found: Json = {"addresses": [ip], "conditions": conditions}
    return found if pod is None else found | {"targetRef": {"kind": "Pod", "name": pod, "uid": f"uid-of-{pod}"}}
