"""What is checked at tier T4: a pool in a Kubernetes cluster with all that is around it, as the API server tells it.

Owns what is asked of the API server and of ports, and how it is read; judges nothing. Reads objects by its own rules.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp

from picker.check.verdict import Trace
from picker.errors import ConfigError
from picker.sources.kubernetes.client import ApiError, Client

Json = dict[str, Any]

POOL_GROUP = "inference.networking.k8s.io"
GATEWAYS = "/apis/gateway.networking.k8s.io/v1"
_REVIEWS = "/apis/authorization.k8s.io/v1"
# Every account has these; they are about itself.
_OF_EVERYBODY = ("authorization.k8s.io", "authentication.k8s.io")


@dataclass(frozen=True, slots=True)
class Asked:
    """namespace: None for that of the context. account: the service account whose rights count; None: one's own.

    gateway: URL where requests enter; None: as the Gateway's status says.
    """

    pool: str
    namespace: str | None = None
    kubeconfig: str | None = None
    context: str | None = None
    account: str | None = None
    gateway: str | None = None
    model: str | None = None


class Right(NamedTuple):
    group: str
    resource: str
    verb: str

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{'.' if self.group else ''}{self.group}"


# What picker asks for when it follows a pool (`deploy/kubernetes/base/rbac.yaml`).
WANTED = tuple(
    Right(group, resource, verb)
    for group, resource in (
        ("", "pods"),
        (POOL_GROUP, "inferencepools"),
        ("llm-d.ai", "inferenceobjectives"),
        ("llm-d.ai", "inferencemodelrewrites"),
        ("inference.networking.x-k8s.io", "inferenceobjectives"),
        ("inference.networking.x-k8s.io", "inferencemodelrewrites"),
    )
    for verb in ("list", "watch")
)

# What it asks for beside that where one of several replicas leads. Nobody else needs it, and it harms nobody.
ALLOWED = frozenset(WANTED) | {Right("coordination.k8s.io", "leases", verb) for verb in ("get", "create", "update")}


@dataclass(frozen=True, slots=True)
class Server:
    """A pod of the pool."""

    name: str
    ip: str
    ready: bool
    why: str


@dataclass(slots=True)
class Cluster:
    """evidence: what was measured, by what it is about, for the files that are written."""

    client: Client
    session: aiohttp.ClientSession
    asked: Asked
    namespace: str
    trace: Trace
    patience: float = 5.0
    evidence: dict[str, Any] = field(default_factory=dict)

    # --- the API server ---

    async def get(self, path: str, **query: str) -> Json | None:
        """An object or list; None where there is none. Raises OSError for what may not or cannot be read."""
        self.trace.send(f"GET {path}")
        try:
            found = json.loads(await self.client.get(path, query))
        except ApiError as error:
            self.trace.receive(str(error))
            if error.status == 404:
                return None
            raise OSError(f"{path}: {error}") from None
        return found if isinstance(found, dict) else None

    async def items(self, path: str, **query: str) -> list[Json]:
        found = await self.get(path, **query)
        return [] if found is None else [each for each in found.get("items") or () if isinstance(each, dict)]

    def within(self, group_version: str, plural: str, name: str = "", namespace: str | None = None) -> str:
        return f"{group_version}/namespaces/{namespace or self.namespace}/{plural}{'/' if name else ''}{name}"

    async def pools(self) -> list[Json]:
        return await self.items(self.within(f"/apis/{POOL_GROUP}/v1", "inferencepools"))

    async def pool(self) -> Json:
        """The pool in question. Raises ConfigError where there is none: nothing could be said of it."""
        found = {named(each): each for each in await self.pools()}
        if self.asked.pool not in found:
            there = f"there are {', '.join(sorted(found))}" if found else "there is none at all"
            raise ConfigError(f"no InferencePool {self.asked.pool} in the namespace {self.namespace}: {there}")
        return found[self.asked.pool]

    async def servers(self, pool: Json) -> list[Server]:
        selector = at(pool, "spec", "selector", "matchLabels")
        query = ",".join(f"{key}={value}" for key, value in selector.items())
        return [_server(each) for each in await self.items(self.within("/api/v1", "pods"), labelSelector=query)]

    # --- rights ---

    @property
    def _user(self) -> Mapping[str, Sequence[str]] | None:
        if self.asked.account is None:
            return None
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{self.namespace}", "system:authenticated")
        return {
            "Impersonate-User": (f"system:serviceaccount:{self.namespace}:{self.asked.account}",),
            "Impersonate-Group": groups,
        }

    async def _review(self, kind: str, spec: Json) -> Json:
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec}
        path = f"{_REVIEWS}/{kind.lower()}s"
        self.trace.send(f"POST {path} {json.dumps(spec)}")
        try:
            found = json.loads(await self.client.review(path, json.dumps(body).encode(), user=self._user))
        except ApiError as error:
            raise OSError(f"{kind}: {error}") from None
        status = found.get("status")
        self.trace.receive(json.dumps(status)[:300])
        return status if isinstance(status, dict) else {}

    async def may(self, right: Right) -> bool:
        attributes = {"namespace": self.namespace, "verb": right.verb, "group": right.group, "resource": right.resource}
        return bool((await self._review("SelfSubjectAccessReview", {"resourceAttributes": attributes})).get("allowed"))

    async def rights(self) -> tuple[set[Right], bool]:
        """(all rights in the namespace, whether the API server knows of all)."""
        status = await self._review("SelfSubjectRulesReview", {"namespace": self.namespace})
        found = {
            Right(group, resource, verb)
            for rule in status.get("resourceRules") or ()
            for group in rule.get("apiGroups") or ()
            for resource in rule.get("resources") or ()
            for verb in rule.get("verbs") or ()
            if group not in _OF_EVERYBODY
        }
        return found, not status.get("incomplete")

    # --- around the pool ---

    async def routes(self) -> list[Json]:
        """HTTPRoutes that lead to the pool."""
        found = await self.items(self.within(GATEWAYS, "httproutes"))
        return [each for each in found if any(self._is_ours(backend) for backend in backends(each))]

    def _is_ours(self, backend: Json) -> bool:
        here = backend.get("namespace") in (None, self.namespace)
        return here and backend.get("kind") == "InferencePool" and backend.get("name") == self.asked.pool

    async def gateways(self, route: Json) -> list[tuple[str, Json | None]]:
        """(name, object) of the Gateways that a route hangs on; None for one that is not there."""
        found = []
        for parent in listed(route, "spec", "parentRefs"):
            name, namespace = str(parent.get("name", "")), parent.get("namespace") or self.namespace
            if parent.get("kind", "Gateway") == "Gateway":
                path = self.within(GATEWAYS, "gateways", name, namespace)
                found.append((f"{namespace}/{name}", await self.get(path)))
        return found

    async def entrance(self) -> str | None:
        """Where requests enter: as told, or the first address of a Gateway."""
        if self.asked.gateway is not None:
            return self.asked.gateway.rstrip("/")
        for route in await self.routes():
            for _, gateway in await self.gateways(route):
                if gateway is not None and (url := _url(gateway)) is not None:
                    return url
        return None

    # --- ports ---

    async def answers(self, host: str, port: int) -> str | None:
        """None when a connection can be made, else why not."""
        self.trace.send(f"CONNECT {host}:{port}")
        try:
            async with asyncio.timeout(self.patience):
                _, writer = await asyncio.open_connection(host, port)
        except TimeoutError:
            return "silence"
        except OSError as error:
            return error.strerror or str(error)
        writer.transport.abort()
        return None

    async def speaks_tls(self, host: str, port: int) -> str | None:
        """The version of TLS that it speaks; None when it does not. Raises OSError when nobody is there."""
        if (why := await self.answers(host, port)) is not None:
            raise OSError(f"{host}:{port}: {why}")
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # gateways skip that, too
        context.set_alpn_protocols(["h2"])
        try:
            async with asyncio.timeout(self.patience):
                _, writer = await asyncio.open_connection(host, port, ssl=context)
        except (OSError, TimeoutError):
            return None
        version: str = writer.get_extra_info("ssl_object").version()
        writer.transport.abort()
        return version


# --- reading objects ---------------------------------------------------------------------------------------


def named(value: Json) -> str:
    return str(at(value, "metadata").get("name", ""))


def at(value: Json, *path: str) -> Json:
    """What lies there, an empty object where nothing does."""
    for key in path:
        found = value.get(key)
        value = found if isinstance(found, dict) else {}
    return value


def listed(value: Json, *path: str) -> list[Json]:
    found = at(value, *path[:-1]).get(path[-1])
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def backends(route: Json) -> Iterator[Json]:
    for rule in listed(route, "spec", "rules"):
        yield from listed(rule, "backendRefs")


def ports(pool: Json) -> list[int]:
    return [number for each in listed(pool, "spec", "targetPorts") if isinstance(number := each.get("number"), int)]


def unmet(conditions: Sequence[Json], *wanted: str) -> list[str]:
    """Of the wanted conditions those that are not true, in words."""
    by_type = {each.get("type"): each for each in conditions}
    found = []
    for name in wanted:
        each = by_type.get(name)
        if each is None:
            found.append(f"{name} is not told")
        elif each.get("status") != "True":
            found.append(f"{name} is {each.get('status')}: {each.get('reason')}: {each.get('message')}")
    return found


def _server(pod: Json) -> Server:
    status, deleting = at(pod, "status"), at(pod, "metadata").get("deletionTimestamp")
    is_ready = any(
        each.get("type") == "Ready" and each.get("status") == "True" for each in listed(status, "conditions")
    )
    why = "it is being deleted" if deleting else "it has no IP" if not status.get("podIP") else "it is not Ready"
    return Server(
        named(pod), str(status.get("podIP", "")), is_ready and not deleting and bool(status.get("podIP")), why
    )


def _url(gateway: Json) -> str | None:
    addresses = [str(each.get("value")) for each in listed(gateway, "status", "addresses") if each.get("value")]
    listeners = [each for each in listed(gateway, "spec", "listeners") if each.get("protocol") in ("HTTP", "HTTPS")]
    if not addresses or not listeners:
        return None
    host = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    return f"{str(listeners[0]['protocol']).lower()}://{host}:{listeners[0].get('port')}"
