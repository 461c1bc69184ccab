"""Tier T4: runs the checks of a cluster, and writes the evidence that the AI conformance programme asks for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from picker import __version__
from picker.check import cluster_checks, cluster_routing, runner
from picker.check.cluster import Asked, Cluster
from picker.check.verdict import Outcome, Trace, Verdict
from picker.sources.kubernetes.client import ApiError, Client
from picker.sources.kubernetes.credentials import find_access

REQUIREMENT = "advanced_inference_ingress"


async def run(
    asked: Asked, only: Sequence[str], patience: float, tell: Callable[[Verdict], None], evidence: Path | None
) -> list[Verdict]:
    """The verdicts. evidence: a folder that files are written to. Raises ConfigError without a way to a cluster."""
    access, trace = find_access(asked.kubeconfig, asked.context), Trace()
    namespace = asked.namespace or access.namespace or "default"
    async with Client(access) as client, aiohttp.ClientSession(headers={"user-agent": "picker-check"}) as session:
        cluster = Cluster(client, session, asked, namespace, trace, patience)
        await cluster.pool()
        cluster.evidence["kubernetes"] = await _version(client)
        verdicts = await runner.run(runner.chosen(cluster_checks.CHECKS, only), cluster, trace, tell=tell)
    if evidence is not None:
        write(evidence, verdicts, cluster.evidence, namespace)
    return verdicts


async def _version(client: Client) -> str | None:
    try:
        found = json.loads(await client.get("/version", {})).get("gitVersion")
    except (ApiError, ValueError, AttributeError):
        return None
    return str(found)


def write(folder: Path, verdicts: Sequence[Verdict], evidence: dict[str, Any], namespace: str) -> None:
    """One page for people and the requests behind it, for who checks them. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    requests = cluster_routing.rows(evidence)
    facts = {key: value for key, value in evidence.items() if key != "requests"}
    whole = {"requirement": REQUIREMENT, "namespace": namespace, "picker": __version__, **facts, "requests": requests}
    (folder / f"{REQUIREMENT}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (folder / f"{REQUIREMENT}.md").write_text(page(verdicts, facts, namespace, len(requests)), encoding="utf-8")


def page(verdicts: Sequence[Verdict], facts: dict[str, Any], namespace: str, requests: int) -> str:
    """In the words of the checklist: what was asked for, and what was seen."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = [
        f"# Evidence for {REQUIREMENT}",
        "",
        f"Measured at {at} by `picker check --kubernetes` {__version__}; Kubernetes "
        f"{facts.get('kubernetes') or 'unknown'}, namespace {namespace}.",
        "",
        *(
            f"- {key}: {_shown(value)}"
            for key, value in facts.items()
            if key not in ("kubernetes", "affinity", "spread")
        ),
        "",
        "| requirement | verdict | seen |",
        "|---|---|---|",
        *(f"| {each.requirement} | {each.outcome.value} | {each.why.replace('|', '/')} |" for each in verdicts),
        "",
        *_routing(facts, requests),
    ]
    failed = sum(each.outcome in (Outcome.FAIL, Outcome.ERROR) for each in verdicts)
    skipped = sum(each.outcome is Outcome.SKIP for each in verdicts)
    lines.append(f"{failed} of {len(verdicts)} requirements are not met, {skipped} were not exercised.")
    return "\n".join(lines) + "\n"


def _routing(facts: dict[str, Any], requests: int) -> list[str]:
    found = facts.get("affinity")
    if found is None:
        return ["Routing was not measured.", ""]
    return [
        "## Routing, measured",
        "",
        f"{requests} requests through the gateway: {cluster_routing.PROMPTS} prompts that nobody had sent before, each "
        f"once again, side by side. {found['found']} of {found['known']} repetitions "
        f"({found['share']:.0%}) found their prompt in the cache of the pod they were sent to. First requests by pod: "
        f"{_shown(facts.get('spread', {}))}. Every request is in `{REQUIREMENT}.json`.",
        "",
    ]


def _shown(value: Any) -> str:
    return (
        ", ".join(f"{key} {_shown(each)}" for key, each in value.items())
        if isinstance(value, dict)
        else (", ".join(map(str, value)) if isinstance(value, list) else str(value))
    )
