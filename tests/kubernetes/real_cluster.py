"""A real API server as a stage: the cluster that `PICKER_TEST_KUBECONFIG` names, and a namespace of it.

Nobody runs the pods: no scheduler knows theirs, so that their status is what the test says. One that is asked to go is
bound to a node that does not exist, as only pods of nodes have time to go.
"""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from yarl import URL

from kubernetes.asking import Answer, Asking
from kubernetes.manifests import KIND_NAMES, PODS, Json, Kind
from kubernetes.relay import Relay, relaying
from picker.sources.kubernetes.credentials import Access, find_access, from_kubeconfig

KUBECONFIG = os.environ.get("PICKER_TEST_KUBECONFIG")
NODE = "picker-test"  # which does not exist
_SCHEDULER = "picker-test"  # neither does this
_RBAC = "/apis/rbac.authorization.k8s.io/v1"


class Real:
    """access: through the relay. direct: of whoever may do everything."""

    second = 0.2

    def __init__(self, kubeconfig: Path, relay: Relay, asking: Asking, namespace: str) -> None:
        self.namespace = namespace
        self.kubeconfig = kubeconfig
        direct = from_kubeconfig(kubeconfig)
        self._direct, self._relay, self._asking = direct, relay, asking
        self.access = self._through_relay(direct)
        self.stranger = self._with_token("nobody's")
        self.cut, self.stall, self.flow_for_new = relay.cut, relay.stall, relay.flow_for_new
        self.down, self.up = relay.down, relay.up
        self._kinds: dict[str, set[str]] = {}
        self._bound: dict[str, str] = {}  # pods, and of which version they are since

    def _through_relay(self, access: Access) -> Access:
        url = URL(access.url)
        here = url.with_host("127.0.0.1").with_port(self._relay.port)
        return replace(access, url=str(here).rstrip("/"), server_name=access.server_name or url.host)

    def _cluster(self) -> Json:
        """Of the kubeconfig's context, with an absolute path where it names a file."""
        whole: dict[str, Any] = yaml.safe_load(self.kubeconfig.read_text(encoding="utf-8"))
        names = {each["name"]: each["context"]["cluster"] for each in whole["contexts"]}
        (found,) = [each for each in whole["clusters"] if each["name"] == names[whole["current-context"]]]
        if (file := found["cluster"].get("certificate-authority")) is not None:
            found["cluster"]["certificate-authority"] = str(self.kubeconfig.parent / file)
        return {"name": "x", "cluster": found["cluster"]}

    def _with_token(self, token: str) -> Access:
        """The cluster of the kubeconfig, and nothing of its user."""
        context = {"name": "x", "context": {"cluster": "x", "user": "x"}}
        made = {"current-context": "x", "clusters": [self._cluster()], "contexts": [context]}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config"
            path.write_text(yaml.safe_dump(made | {"users": [{"name": "x", "user": {"token": token}}]}))
            return from_kubeconfig(path)

    @property
    def url(self) -> str:
        return self._direct.url

    @property
    def authority(self) -> bytes:
        """The certificate that the API server's is signed by."""
        cluster = self._cluster()["cluster"]
        if (data := cluster.get("certificate-authority-data")) is not None:
            return base64.b64decode(data)
        return Path(cluster["certificate-authority"]).read_bytes()

    # --- objects ---

    async def apply(self, kind: Kind, value: Json) -> None:
        await self._need(kind)
        version = kind[0].removeprefix("/apis/").removeprefix("/api/")
        whole = {"apiVersion": version, "kind": KIND_NAMES[kind[1]], **value}
        if kind == PODS:
            whole["spec"] = whole["spec"] | {"schedulerName": _SCHEDULER, "automountServiceAccountToken": False}
        path, name = self.path(kind), value["metadata"]["name"]
        if await self._create(path, whole) == 409:
            change = {"metadata": value["metadata"]} if kind == PODS else whole
            await self._do("PATCH", f"{path}/{name}", change)
        if "status" in value:
            await self.say(kind, value)

    async def say(self, kind: Kind, value: Json) -> None:
        """Write an object's status, and nothing else."""
        path = f"{self.path(kind)}/{value['metadata']['name']}/status"
        await self._do("PATCH", path, {"status": value["status"]})

    async def _create(self, path: str, value: Json) -> int:
        """A namespace that is new refuses pods until somebody has given it its service account."""
        for _ in range(20):
            answer = await self.ask("POST", path, value)
            if answer.status != 403:
                break
            await asyncio.sleep(0.5)
        assert answer.status in (201, 409), f"POST {path}: {answer}"
        return answer.status

    async def patch(self, kind: Kind, name: str, change: Json) -> None:
        await self._do("PATCH", f"{self.path(kind)}/{name}", change)

    async def get(self, kind: Kind, name: str) -> Json:
        return (await self._do("GET", f"{self.path(kind)}/{name}")).value

    async def delete(self, kind: Kind, name: str) -> None:
        await self._do("DELETE", f"{self.path(kind)}/{name}", {"gracePeriodSeconds": 0})

    async def terminate(self, pod: str) -> None:
        if pod not in self._bound:
            await self.bind(pod)
        # Without it the server may act on the pod as it was before: one of no node goes at once.
        as_bound = {"preconditions": {"resourceVersion": self._bound.pop(pod)}}
        await self._do("DELETE", f"{self.path(PODS)}/{pod}", {"gracePeriodSeconds": 30, **as_bound})

    async def bind(self, pod: str) -> None:
        """Give a pod a node that does not exist; it is not to change before it is asked to go."""
        target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
        bound = {"metadata": {"name": pod}, "target": target}
        await self._do("POST", f"{self.path(PODS)}/{pod}/binding", bound)
        self._bound[pod] = (await self.get(PODS, pod))["metadata"]["resourceVersion"]

    async def resize(self, pod: str, resources: Json) -> None:
        change = {"spec": {"containers": [{"name": "vllm", "resources": resources}]}}
        path = f"{self.path(PODS)}/{pod}/resize"
        answer = await self._asking.ask(self._direct, "PATCH", path, change, strategic=True)
        if answer.status == 404:
            pytest.skip("the API server cannot resize pods")
        assert answer.status == 200, answer

    def path(self, kind: Kind) -> str:
        return f"{kind[0]}/namespaces/{self.namespace}/{kind[1]}"

    async def _need(self, kind: Kind) -> None:
        """Skip the test where the CRD is not installed."""
        if kind[0] not in self._kinds:
            found = (await self.ask("GET", kind[0])).value
            self._kinds[kind[0]] = {each["name"] for each in found.get("resources", ())}
        if kind[1] not in self._kinds[kind[0]]:
            pytest.skip(f"the cluster does not have {kind[0]}/{kind[1]}")

    # --- others ---

    async def account(self, *roles: Json) -> Access:
        name = await self.named_account(*roles)
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{name}/token"
        made = await self._do("POST", path, {"spec": {}})
        return self._through_relay(self._with_token(made.value["status"]["token"]))

    async def named_account(self, *roles: Json) -> str:
        """The name of a service account that has these Roles and nothing else."""
        name = f"account-{secrets.token_hex(4)}"
        here, account = f"/namespaces/{self.namespace}", {"metadata": {"name": name}}
        await self._do("POST", f"/api/v1{here}/serviceaccounts", account)
        for number, role in enumerate(roles):
            named: Json = {"metadata": {"name": f"{name}-{number}"}}
            await self._do("POST", f"{_RBAC}{here}/roles", named | {"rules": role["rules"]})
            reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": f"{name}-{number}"}
            subject = {"kind": "ServiceAccount", "name": name, "namespace": self.namespace}
            bound = named | {"roleRef": reference, "subjects": [subject]}
            await self._do("POST", f"{_RBAC}{here}/rolebindings", bound)
        return name

    async def ask(
        self,
        method: str,
        path: str,
        value: Json | None = None,
        query: Mapping[str, str] | None = None,
        *,
        access: Access | None = None,
    ) -> Answer:
        return await self._asking.ask(access or self._direct, method, path, value, query)

    async def events(self, path: str, query: Mapping[str, str]) -> list[Json]:
        return await self._asking.events(self._direct, path, query)

    async def _do(self, method: str, path: str, value: Json | None = None) -> Answer:
        answer = await self.ask(method, path, value)
        assert answer.status in (200, 201, 202), f"{method} {path}: {answer}"
        return answer


@asynccontextmanager
async def real_cluster(kubeconfig: str | None = None) -> AsyncIterator[Real]:
    """A namespace of its own. kubeconfig: by default that of the environment."""
    named = kubeconfig or KUBECONFIG
    assert named is not None
    url, namespace = URL(find_access(named).url), f"picker-test-{secrets.token_hex(4)}"
    assert url.host is not None
    assert url.port is not None
    async with Asking() as asking, relaying(url.host, url.port) as relay:
        stage = Real(Path(named), relay, asking, namespace)
        await stage._do("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        try:
            yield stage
        finally:
            await stage._do("DELETE", f"/api/v1/namespaces/{namespace}", {})
