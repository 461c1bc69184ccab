"""A real API server takes every manifest that is shipped, without a warning: schemas, CEL rules and defaults included.

Where `PICKER_TEST_KUBECONFIG` names none, all of it is skipped; kinds whose CRD a cluster does not have are told.
"""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import yaml

from deploy.rendered import EVERYTHING, KUBERNETES, LOADER, Json, manifests
from kubernetes.real_cluster import KUBECONFIG
from picker.sources.kubernetes.credentials import Access, find_access

pytestmark = pytest.mark.skipif(not KUBECONFIG, reason="PICKER_TEST_KUBECONFIG names no kubeconfig")

# What components need beside an overlay is applied by itself.
_MORE = [*sorted(KUBERNETES.glob("components/*/*.yaml")), KUBERNETES / "base" / "rbac-services.yaml"]
_CLUSTER_WIDE = {"namespaces", "clusterroles", "clusterrolebindings", "gatewayclasses"}


class Cluster:
    """A namespace in which objects are tried, and nothing is kept."""

    def __init__(self, access: Access, session: aiohttp.ClientSession) -> None:
        self.namespace = f"picker-test-{secrets.token_hex(4)}"
        self._access, self._session = access, session
        self._plurals: dict[str, dict[str, str]] = {}

    async def ask(self, method: str, path: str, value: Json | None = None, **query: str) -> tuple[int, Json, list[str]]:
        """(status, answer, warnings)."""
        kind = "application/apply-patch+yaml" if method == "PATCH" else "application/json"
        token = await self._access.tokens.token()
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {token}"} if token else {})
        async with self._session.request(
            method,
            self._access.url + path,
            params=query,
            data=None if value is None else json.dumps(value),
            headers=headers,
            ssl=self._access.tls,
            server_hostname=self._access.server_name,
        ) as response:
            answer = await response.json(content_type=None) if response.content_type == "application/json" else {}
            return response.status, answer, response.headers.getall("Warning", [])

    async def wrong(self, manifest: Json) -> str | None:
        """What the API server has against it. Skips the test where it does not know the kind."""
        root = ("/apis/" if "/" in manifest["apiVersion"] else "/api/") + manifest["apiVersion"]
        if root not in self._plurals:
            resources = (await self.ask("GET", root))[1].get("resources", ())
            self._plurals[root] = {each["kind"]: each["name"] for each in resources if "/" not in each["name"]}
        plural = self._plurals[root].get(manifest["kind"])
        if plural is None:
            pytest.skip(f"the cluster does not have {manifest['kind']} of {manifest['apiVersion']}")
        name, here = manifest["metadata"]["name"], f"/namespaces/{self.namespace}"
        path = f"{root}{'' if plural in _CLUSTER_WIDE else here}/{plural}/{name}"
        query = {"dryRun": "All", "fieldManager": "picker-test", "fieldValidation": "Strict", "force": "true"}
        status, answer, warnings = await self.ask("PATCH", path, _moved(manifest, self.namespace), **query)
        if status not in (200, 201):
            return f"{manifest['kind']} {name}: {answer.get('message', status)}"
        return f"{manifest['kind']} {name} is taken with {warnings}" if warnings else None


def _moved(manifest: Json, namespace: str) -> Json:
    moved = copy.deepcopy(manifest)
    moved["metadata"]["namespace"] = namespace
    return moved


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with aiohttp.ClientSession() as session:
        found = Cluster(find_access(KUBECONFIG), session)
        await found.ask("POST", "/api/v1/namespaces", {"metadata": {"name": found.namespace}})
        try:
            yield found
        finally:
            await found.ask("DELETE", f"/api/v1/namespaces/{found.namespace}", {})


async def _tried(cluster: Cluster, found: list[Json]) -> list[str]:
    wrong, absent = [], []
    for each in found:
        try:
            wrong.append(await cluster.wrong(each))
        except pytest.skip.Exception as skipped:
            absent.append(str(skipped))
    if absent and not any(wrong):
        pytest.skip("; ".join(sorted(set(absent))))
    return [each for each in wrong if each is not None]


@pytest.mark.parametrize("what", EVERYTHING)
async def test_the_api_server_takes_what_is_shipped(cluster: Cluster, what: str) -> None:
    assert await _tried(cluster, manifests(what)) == []


@pytest.mark.parametrize("file", _MORE, ids=lambda file: f"{file.parent.name}/{file.name}")
async def test_the_api_server_takes_what_may_be_added(cluster: Cluster, file: Any) -> None:
    documents = [each for each in yaml.load_all(file.read_text(encoding="utf-8"), LOADER) if each]
    whole = [each for each in documents if "metadata" in each and "kind" in each]
    assert await _tried(cluster, whole) == []


async def test_a_manifest_that_is_wrong_is_refused(cluster: Cluster) -> None:
    pool = copy.deepcopy(next(each for each in manifests("overlay istio") if each["kind"] == "InferencePool"))
    pool["spec"]["targetPorts"] *= 2
    assert "port number must be unique" in (await cluster.wrong(pool) or "")
