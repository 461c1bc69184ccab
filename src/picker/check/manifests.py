"""FILES, CRD, POOL, SEC, POD, CONFIG at tier T0: Kubernetes manifests and picker's own files.

The schema of InferencePool v1 is written out by hand, its two CEL rules included: no cluster is asked.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from picker.check.papers import Kind, Paper, Papers
from picker.check.verdict import Check, Finding, Level, Tier, failed, passed, skipped
from picker.config import load_config
from picker.errors import ConfigError
from picker.sources.file import load_endpoints

Json = dict[str, Any]
Try = Callable[[Papers], Awaitable[Finding]]

POOL_GROUP = "inference.networking.k8s.io"
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_KIND = re.compile(r"[a-zA-Z]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?")
_GROUP = re.compile(r"|[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_POOL_KEYS = {"selector", "targetPorts", "appProtocol", "endpointPickerRef"}
_NAMED = 8  # files in one sentence
_REF_KEYS = {"group", "kind", "name", "port", "failureMode"}

# What an endpoint picker may ask of the API server; "*" never.
_ALLOWED: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        ("pods", "inferencepools", "inferenceobjectives", "inferencemodelrewrites", "endpointslices", "configmaps"),
        frozenset({"get", "list", "watch"}),
    ),
    "leases": frozenset({"get", "list", "watch", "create", "update", "patch"}),
    "events": frozenset({"create", "patch"}),
    "tokenreviews": frozenset({"create"}),
    "subjectaccessreviews": frozenset({"create"}),
}


def _each(kinds: Sequence[str], test: Callable[[Json, Papers], str | None]) -> Try:
    """A check of every manifest of these kinds; the test says what is wrong with one."""

    async def run(papers: Papers) -> Finding:
        found = papers.manifests(*kinds)
        for paper in found:
            papers.trace.send(paper.name)
            if wrong := test(paper.value, papers):
                return failed(f"{paper.name}: {wrong}")
        return passed() if found else skipped(f"no {' or '.join(kinds)} among the files")

    return run


async def readable(papers: Papers) -> Finding:
    bad = papers.of(Kind.UNREADABLE)
    if bad:
        return failed(f"{bad[0].name}: {bad[0].problem}")
    return passed(f"{len(papers.all)} documents") if papers.all else skipped("no files")


async def recognised(papers: Papers) -> Finding:
    """Files of other programs are no fault of these; whoever misspelt the only key of a configuration reads it here."""
    others = sorted({paper.name for paper in papers.of(Kind.OTHER)})
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        return skipped(f"not recognised, and so not checked: {', '.join(others[:_NAMED])}{more}")
    return passed()


# --- InferencePool -----------------------------------------------------------------------------------------


def pool_schema(value: Json, papers: Papers) -> str | None:
    if str(value.get("apiVersion")) != f"{POOL_GROUP}/v1":
        return f"apiVersion is {value.get('apiVersion')}, not {POOL_GROUP}/v1"
    spec = value.get("spec")
    if not isinstance(spec, dict):
        return "there is no spec"
    if unknown := set(spec) - _POOL_KEYS:
        return f"unknown: spec.{sorted(unknown)[0]}"
    return _selector(spec.get("selector")) or _ports(spec.get("targetPorts")) or _rest(spec)


def _selector(selector: object) -> str | None:
    keys: Json = selector if isinstance(selector, dict) else {}
    labels = keys.get("matchLabels")
    if not isinstance(labels, dict) or not 1 <= len(labels) <= 64 or set(keys) != {"matchLabels"}:
        return "spec.selector must have matchLabels alone, with 1 to 64 entries (labels right under it are v1alpha2)"
    bad = [name for name, label in labels.items() if not isinstance(label, str) or not _LABEL_VALUE.fullmatch(label)]
    return f"spec.selector.matchLabels.{bad[0]} is no label value" if bad else None


def _ports(ports: object) -> str | None:
    if not isinstance(ports, list) or not 1 <= len(ports) <= 8:
        return "spec.targetPorts must have 1 to 8 entries"
    numbers = [one.get("number") if isinstance(one, dict) else None for one in ports]
    if not all(_is_port(number) for number in numbers):
        return "spec.targetPorts: every entry needs a number from 1 to 65535"
    return "spec.targetPorts has a number twice" if len(set(numbers)) != len(numbers) else None


def _is_port(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= 65535


def _rest(spec: Json) -> str | None:
    if spec.get("appProtocol", "http") not in ("http", "kubernetes.io/h2c"):
        return f"spec.appProtocol {spec['appProtocol']!r} is neither http nor kubernetes.io/h2c"
    ref = spec.get("endpointPickerRef")
    if ref is None:
        return None
    if not isinstance(ref, dict) or not 1 <= len(str(ref.get("name", ""))) <= 253:
        return "spec.endpointPickerRef needs a name"
    if unknown := set(ref) - _REF_KEYS:
        return f"unknown: spec.endpointPickerRef.{sorted(unknown)[0]}"
    for key, usual, form in (("kind", "Service", _KIND), ("group", "", _GROUP)):
        if not form.fullmatch(str(ref.get(key, usual))):
            return f"spec.endpointPickerRef.{key} {ref[key]!r} is no {key}"
    if ref.get("failureMode", "FailClose") not in ("FailOpen", "FailClose"):
        return f"spec.endpointPickerRef.failureMode {ref['failureMode']!r} is neither FailOpen nor FailClose"
    port = ref.get("port")
    number = port.get("number") if isinstance(port, dict) else None
    needed = ref.get("kind", "Service") == "Service" or port is not None
    return "spec.endpointPickerRef.port.number is required for a Service" if needed and not _is_port(number) else None


def pool_service(value: Json, papers: Papers) -> str | None:
    ref = value.get("spec", {}).get("endpointPickerRef")
    if not isinstance(ref, dict) or ref.get("kind", "Service") != "Service":
        return None
    wanted = (_namespace(value), ref.get("name"))
    services = [one.value for one in papers.manifests("Service") if _named(one) == wanted]
    if not services:
        return f"its picker's Service {ref.get('name')} is not among the files"
    if services[0].get("spec", {}).get("type") == "ExternalName":
        return f"the Service {ref.get('name')} is an ExternalName"
    number = (ref.get("port") or {}).get("number")
    ports = [one for one in services[0].get("spec", {}).get("ports", ()) if one.get("port") == number]
    if not ports:
        return f"the Service {ref.get('name')} has no port {number}"
    protocol = ports[0].get("appProtocol")
    good = protocol in ("http2", "kubernetes.io/h2c", "grpc")
    return (
        None if good else f"port {number} of the Service {ref.get('name')} has appProtocol {protocol}, not http2 or h2c"
    )


def _namespace(value: Json) -> str:
    return str(value.get("metadata", {}).get("namespace", "default"))


def _named(paper: Paper) -> tuple[str, object]:
    return _namespace(paper.value), paper.value.get("metadata", {}).get("name")


# --- the picker's own objects ------------------------------------------------------------------------------


def least_rights(value: Json, papers: Papers) -> str | None:
    for rule in value.get("rules") or ():
        for resource in rule.get("resources") or ():
            plain = str(resource).partition("/")[0]
            extra = set(rule.get("verbs") or ()) - _ALLOWED.get(plain, frozenset())
            if extra:
                return f"{', '.join(sorted(map(str, extra)))} on {resource} is more than a picker needs"
    return None


def _containers(value: Json) -> list[Json]:
    pod = value.get("spec", {}).get("template", {}).get("spec", {})
    return [one for one in pod.get("containers", ()) if isinstance(one, dict)]


def _pod_context(value: Json) -> Json:
    found = value.get("spec", {}).get("template", {}).get("spec", {}).get("securityContext")
    return found if isinstance(found, dict) else {}


def confined(value: Json, papers: Papers) -> str | None:
    for container in _containers(value):
        told = _pod_context(value) | (container.get("securityContext") or {})
        wanted = {"runAsNonRoot": True, "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False}
        missing = [f"{key}: {str(want).lower()}" for key, want in wanted.items() if told.get(key) is not want]
        if "ALL" not in ((told.get("capabilities") or {}).get("drop") or ()):
            missing.append("capabilities.drop: [ALL]")
        if missing:
            return f"container {container.get('name')} lacks {', '.join(missing)}"
    return None


def probed(value: Json, papers: Papers) -> str | None:
    for container in _containers(value):
        missing = [probe for probe in ("livenessProbe", "readinessProbe") if not container.get(probe)]
        if missing:
            return f"container {container.get('name')} has no {missing[0]}"
        if not (container.get("resources") or {}).get("requests"):
            return f"container {container.get('name')} requests no resources"
    return None


# --- picker's files ----------------------------------------------------------------------------------------


async def picker_config(papers: Papers) -> Finding:
    return _loads(papers.of(Kind.PICKER), load_config, "picker configuration")


async def endpoints_file(papers: Papers) -> Finding:
    return _loads(papers.of(Kind.POOL), load_endpoints, "endpoints file")


def _loads(papers: Iterable[Paper], load: Callable[..., object], what: str) -> Finding:
    found = list(papers)
    for paper in found:
        try:
            load(paper.path)
        except ConfigError as error:
            return failed(str(error))
    return passed() if found else skipped(f"no {what} among the files")


def _check(name: str, requirement: str, run: Try, source: str, level: Level = Level.MUST) -> Check[Papers]:
    return Check(name, Tier.T0, requirement, source, run, level)


_CRD = "InferencePool v1 CRD"

CHECKS: Sequence[Check[Papers]] = (
    _check("FILES-1.readable", "Every file can be read.", readable, "practice"),
    _check("FILES-2.recognised", "Every file is of a kind that is checked.", recognised, "practice", Level.SHOULD),
    _check("CONFIG-1.picker", "picker takes its configuration.", picker_config, "picker"),
    _check("CONFIG-2.endpoints", "picker takes its endpoints file.", endpoints_file, "picker"),
    _check("CRD-2.pool", "InferencePools keep to the v1 schema.", _each(["InferencePool"], pool_schema), _CRD),
    _check(
        "POOL-3.service",
        "A pool's picker is a Service with its port, speaking HTTP/2.",
        _each(["InferencePool"], pool_service),
        "endpointPickerRef",
    ),
    _check(
        "SEC-5.rbac",
        "Roles give a picker what it needs.",
        _each(["Role", "ClusterRole"], least_rights),
        "least privilege",
    ),
    _check(
        "POD-1.confined",
        "Containers are confined.",
        _each(["Deployment", "StatefulSet"], confined),
        "pod security",
        Level.SHOULD,
    ),
    _check(
        "POD-2.probed",
        "Containers have probes and request resources.",
        _each(["Deployment", "StatefulSet"], probed),
        "practice",
        Level.SHOULD,
    ),
)
