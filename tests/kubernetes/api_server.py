"""An API server for tests: kept objects, lists and watches over HTTP as a kube-apiserver answers them, and its faults.

After the API conventions and the watch cache of Kubernetes 1.3x:

- every write makes a new version of everything; lists name the version they are of
- watches begin after the version that is asked for and tell what has changed since; a change that makes an object leave
  the selector is told as DELETED, one that makes it enter as ADDED, both with the version of the change
- a version that has been compacted away is answered 410, by watches as an ERROR event in an answer of status 200
- lists in pages carry a token that belongs to the version of the first page, and expires with it
- a list `NotOlderThan` a version from the future is answered 504 with the cause ResourceVersionTooLarge
- bookmarks come every minute to those who allow them, and carry nothing but the kind and a version
- objects may be created and replaced by requests, too; a version that is not the latest is a conflict (409), and a
  Lease without one is refused (422): it cannot be written over unread
- rights are asked for by posting reviews, about oneself or about whom one impersonates
- kinds that are not installed are 404, what one may not do 403, without the right token 401, each as a Status
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Json = dict[str, Any]

KINDS = {
    "/api/v1": {"pods": "Pod", "services": "Service"},
    "/apis/gateway.networking.k8s.io/v1": {"gateways": "Gateway", "httproutes": "HTTPRoute"},
    "/apis/coordination.k8s.io/v1": {"leases": "Lease"},
    "/apis/discovery.k8s.io/v1": {"endpointslices": "EndpointSlice"},
    "/apis/inference.networking.k8s.io/v1": {"inferencepools": "InferencePool"},
    "/apis/inference.networking.x-k8s.io/v1alpha2": {
        "inferencepools": "InferencePool",
        "inferenceobjectives": "InferenceObjective",
        "inferencemodelrewrites": "InferenceModelRewrite",
    },
    "/apis/llm-d.ai/v1alpha2": {
        "inferenceobjectives": "InferenceObjective",
        "inferencemodelrewrites": "InferenceModelRewrite",
    },
}
BOOKMARK_EVERY = 60.0


@dataclass(frozen=True, slots=True)
class _Change:
    """before, after: the object, None where there was or is none."""

    version: int
    collection: str
    before: Json | None
    after: Json | None


@dataclass(slots=True, eq=False)
class _Watch:
    collection: str
    matches: Callable[[Json], bool]
    bookmarks: bool
    request: web.Request
    response: web.StreamResponse
    queue: asyncio.Queue[_Change | None] = field(default_factory=asyncio.Queue)


class ApiServer:
    """Use as `async with serving() as server`. asked: (path, query) of every request that came. token: who may ask."""

    def __init__(self) -> None:
        self.url = ""
        self.tls: ssl.SSLContext | None = None
        self.token: str | None = None
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.wrote: list[tuple[str, str, int]] = []  # (method, path, status) of every object that came
        self.absent: set[str] = set()  # plurals, or groups with their version, that are not installed
        self.forbidden: set[str] = set()  # plurals
        self.rights: set[tuple[str, str, str]] = set()  # group, resource, verb, of whoever asks
        self.knows_all_rights = True
        self.reviewed_for: list[str] = []  # whom reviews were about
        self.failing: list[web.Response] = []  # answers to give instead, one request each
        self.ends_watches_at_once = False
        self.compact_before_continuing = False
        self._objects: dict[str, dict[str, Json]] = {}
        self._version = 100
        self._compacted = 0
        self._changes: list[_Change] = []
        self._watches: set[_Watch] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._open = asyncio.Event()
        self._open.set()
        self._runner: web.AppRunner | None = None
        self._port = 0

    # --- objects ---

    def apply(self, group_version: str, plural: str, value: Json) -> Json:
        """Create an object or write over it. Metadata is completed as the server does it."""
        value = copy.deepcopy(value)
        meta = value.setdefault("metadata", {})
        collection = f"{group_version}/namespaces/{meta.setdefault('namespace', 'default')}/{plural}"
        kept = self._objects.setdefault(collection, {})
        before = kept.get(meta["name"])
        self._version += 1
        meta.setdefault("uid", before["metadata"]["uid"] if before else f"uid-{self._version}")
        created = before["metadata"]["creationTimestamp"] if before else f"2026-11-21T10:00:00.{self._version:06d}Z"
        meta.setdefault("creationTimestamp", created)
        meta["resourceVersion"] = str(self._version)
        value |= {"apiVersion": group_version.removeprefix("/apis/").removeprefix("/api/")}
        value |= {"kind": KINDS[group_version][plural]}
        kept[meta["name"]] = value
        self._tell(_Change(self._version, collection, before, value))
        return value

    def get(self, group_version: str, plural: str, name: str, namespace: str = "default") -> Json:
        """A copy of an object, as it would be read before it is changed."""
        return copy.deepcopy(self._objects[f"{group_version}/namespaces/{namespace}/{plural}"][name])

    def delete(self, group_version: str, plural: str, name: str, namespace: str = "default") -> None:
        """Take an object away, at once and for good."""
        collection = f"{group_version}/namespaces/{namespace}/{plural}"
        before = self._objects[collection].pop(name)
        self._version += 1
        self._tell(_Change(self._version, collection, before, None))

    def _tell(self, change: _Change) -> None:
        self._changes.append(change)
        for watch in self._watches:
            if watch.collection == change.collection:
                watch.queue.put_nowait(change)

    # --- faults ---

    @property
    def watches(self) -> int:
        return len(self._watches)

    def compact(self) -> None:
        """Forget all versions but the present one."""
        self._compacted = self._version
        self._changes.clear()

    def set_back(self) -> None:
        """As after a restore from a backup, or behind another server that is ahead: versions are of the past."""
        self._version -= 50
        self.end_watches()

    def lose(self, group_version: str, plural: str, name: str, namespace: str = "default") -> None:
        """Take an object away without telling anybody."""
        del self._objects[f"{group_version}/namespaces/{namespace}/{plural}"][name]

    def end_watches(self) -> None:
        """As when their time is up."""
        for watch in self._watches:
            watch.queue.put_nowait(None)

    def cut_watches(self) -> None:
        """Connections break in the middle of an answer."""
        for watch in list(self._watches):
            if watch.request.transport is not None:
                watch.request.transport.abort()

    def stall(self) -> None:
        """Connections stay, and nothing comes any more on any of them, those that come included."""
        self._flowing.clear()

    def flow_for_new_watches(self) -> None:
        """Those that are stalled stay so."""
        self._flowing = asyncio.Event()
        self._flowing.set()

    def hold_watches(self) -> None:
        """Answer no watch until they are let."""
        self._open.clear()

    def let_watches(self) -> None:
        self._open.set()

    async def down(self) -> None:
        """Nobody listens, and all connections are broken."""
        assert self._runner is not None
        self.cut_watches()
        await self._runner.cleanup()
        self._runner = None
        self._watches.clear()

    async def up(self) -> None:
        app = web.Application()
        app.router.add_get("/version", self._say_version)
        app.router.add_post("/apis/authorization.k8s.io/v1/{review}", self._review)
        app.router.add_get("/{path:.*}", self._get)
        app.router.add_post("/{path:.*}", self._write)
        app.router.add_put("/{path:.*}", self._write)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=self.tls)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self._port}"

    # --- answers ---

    async def _get(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.path, dict(request.query)))
        group_version, plural, name = _parts(request.path)
        if (refusal := self._refusal(request, group_version, plural)) is not None:
            return refusal
        if name:
            found = self._objects.get(request.path.rpartition("/")[0], {}).get(name)
            return (
                status(404, "NotFound", f"{plural} {name!r} not found") if found is None else web.json_response(found)
            )
        try:
            matches = selection(request.query)
        except ValueError as error:
            return status(400, "BadRequest", f"unable to parse requirement: {error}")
        if request.query.get("watch") in ("1", "true"):
            await self._open.wait()
            return await self._watch(request, request.path, matches)
        return self._list(request, request.path, KINDS[group_version][plural], matches)

    def _refusal(self, request: web.Request, group_version: str, plural: str) -> web.Response | None:
        if self.failing:
            return self.failing.pop(0)
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return status(401, "Unauthorized", "Unauthorized")
        if plural not in KINDS.get(group_version, {}) or self.absent & {plural, group_version}:
            return status(404, "NotFound", "the server could not find the requested resource")
        if plural in self.forbidden:
            return status(
                403, "Forbidden", f'{plural} is forbidden: User "system:serviceaccount:default:picker" cannot'
            )
        return None

    async def _write(self, request: web.Request) -> web.Response:
        value = await request.json()
        answer = self._written(request, value)
        self.wrote.append((request.method, request.path, answer.status))
        return answer

    def _written(self, request: web.Request, value: Json) -> web.Response:
        group_version, plural, name = _parts(request.path)
        if (refusal := self._refusal(request, group_version, plural)) is not None:
            return refusal
        meta, asked = value["metadata"], name or value["metadata"]["name"]
        kept = self._objects.get(request.path if request.method == "POST" else request.path.rpartition("/")[0], {})
        before = kept.get(asked)
        if request.method == "POST" and before is not None:
            return status(409, "AlreadyExists", f"{plural} {asked!r} already exists")
        if request.method == "PUT" and before is None:
            return status(404, "NotFound", f"{plural} {asked!r} not found")
        if (problem := _invalid(value, before)) is not None:
            return status(422, "Invalid", f"{plural} {asked!r} is invalid: {problem}")
        if before is not None and meta["resourceVersion"] != before["metadata"]["resourceVersion"]:
            words = "the object has been modified; please apply your changes to the latest version and try again"
            return status(409, "Conflict", f"Operation cannot be fulfilled on {plural} {asked!r}: {words}")
        return web.json_response(self.apply(group_version, plural, value), status=201 if before is None else 200)

    async def _say_version(self, request: web.Request) -> web.Response:
        return web.json_response({"major": "1", "minor": "35", "gitVersion": "v1.35.0"})

    async def _review(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.reviewed_for.append(request.headers.get("Impersonate-User", "oneself"))
        if request.match_info["review"] == "selfsubjectaccessreviews":
            wanted = asked["spec"]["resourceAttributes"]
            allowed = (wanted["group"], wanted["resource"], wanted["verb"]) in self.rights
            return web.json_response(asked | {"status": {"allowed": allowed}}, status=201)
        rules = [{"apiGroups": [group], "resources": [what], "verbs": [verb]} for group, what, verb in self.rights]
        rules.append({"apiGroups": ["authorization.k8s.io"], "resources": ["selfsubjectreviews"], "verbs": ["create"]})
        told = {"resourceRules": rules, "nonResourceRules": [], "incomplete": not self.knows_all_rights}
        return web.json_response(asked | {"status": told}, status=201)

    def _list(self, request: web.Request, collection: str, kind: str, matches: Callable[[Json], bool]) -> web.Response:
        query = request.query
        asked = int(query.get("resourceVersion") or 0)
        if asked > self._version:
            return status(504, "Timeout", f"Too large resource version: {asked}, current: {self._version}")
        version, after = self._version, ""
        if token := query.get("continue"):
            if self.compact_before_continuing:
                self.compact_before_continuing = False
                self._version += 1
                self.compact()
            version, after = json.loads(base64.b64decode(token))
            if version < self._compacted:
                return status(410, "Expired", "The provided continue parameter is too old")
        found = [each for name, each in sorted(self._at(collection, version).items()) if name > after and matches(each)]
        # The watch cache answers without paging when it is asked for whatever it has.
        limit = int(query.get("limit") or 0) if asked == 0 and "resourceVersion" not in query else 0
        meta: Json = {"resourceVersion": str(version)}
        if limit and len(found) > limit:
            found = found[:limit]
            last = found[-1]["metadata"]["name"]
            meta["continue"] = base64.b64encode(json.dumps([version, last]).encode()).decode()
        # Items of a list do not say what they are: the list does.
        items = [{key: each[key] for key in each if key not in ("kind", "apiVersion")} for each in found]
        return web.json_response({"kind": f"{kind}List", "apiVersion": "v1", "metadata": meta, "items": items})

    def _at(self, collection: str, version: int) -> dict[str, Json]:
        """The objects as they were."""
        kept = dict(self._objects.get(collection, {}))
        for change in reversed(self._changes):
            if change.version > version and change.collection == collection:
                name = (change.after or change.before or {})["metadata"]["name"]
                if change.before is None:
                    kept.pop(name, None)
                else:
                    kept[name] = change.before
        return kept

    async def _watch(
        self, request: web.Request, collection: str, matches: Callable[[Json], bool]
    ) -> web.StreamResponse:
        since = int(request.query.get("resourceVersion") or 0)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        bookmarks = request.query.get("allowWatchBookmarks") == "true"
        watch = _Watch(collection, matches, bookmarks, request, response)
        await response.prepare(request)
        if since and since < self._compacted:
            await self._send(response, {"type": "ERROR", "object": _status(410, "Expired", "too old resource version")})
            return response
        for change in self._changes:
            if change.version > since and change.collection == collection:
                watch.queue.put_nowait(change)
        if self.ends_watches_at_once:
            return response
        self._watches.add(watch)
        try:
            await self._stream(watch, float(request.query.get("timeoutSeconds", "1800")))
        finally:
            self._watches.discard(watch)
        return response

    async def _stream(self, watch: _Watch, seconds: float) -> None:
        clock = asyncio.get_running_loop().time
        flowing, end_at = self._flowing, clock() + seconds
        next_bookmark = clock() + BOOKMARK_EVERY
        while clock() < end_at:
            try:
                async with asyncio.timeout(min(end_at, next_bookmark) - clock()):
                    change = await watch.queue.get()
            except TimeoutError:
                if next_bookmark <= clock():
                    next_bookmark += BOOKMARK_EVERY
                    await flowing.wait()
                    await self._bookmark(watch)
                continue
            if change is None:
                return
            await flowing.wait()
            event = _event(watch.matches, change)
            if event is not None:
                await self._send(watch.response, event)

    async def _bookmark(self, watch: _Watch) -> None:
        if watch.bookmarks:
            meta = {"resourceVersion": str(self._version), "creationTimestamp": None}
            await self._send(watch.response, {"type": "BOOKMARK", "object": {"kind": "Pod", "metadata": meta}})

    async def bookmark(self) -> None:
        """Send every watch one now."""
        for watch in list(self._watches):
            await self._bookmark(watch)

    async def send_raw(self, data: bytes) -> None:
        """Send every watch these bytes, whatever they are."""
        for watch in list(self._watches):
            await watch.response.write(data)

    async def _send(self, response: web.StreamResponse, event: Json) -> None:
        await response.write(json.dumps(event).encode() + b"\n")


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[ApiServer]:
    server = ApiServer()
    server.tls = tls
    await server.up()
    try:
        yield server
    finally:
        server.let_watches()
        if server._runner is not None:
            await server.down()


def _event(matches: Callable[[Json], bool], change: _Change) -> Json | None:
    was = change.before is not None and matches(change.before)
    if change.after is not None and matches(change.after):
        return {"type": "MODIFIED" if was else "ADDED", "object": change.after}
    if not was:
        return None
    gone = copy.deepcopy(change.before)
    assert gone is not None
    gone["metadata"]["resourceVersion"] = str(change.version)
    return {"type": "DELETED", "object": gone}


def _parts(path: str) -> tuple[str, str, str]:
    """Group with its version, plural, name."""
    group_version, _, rest = path.partition("/namespaces/")
    plural, _, name = rest.partition("/")[2].partition("/")
    return group_version, plural, name


def _invalid(value: Json, before: Json | None) -> str | None:
    """What the validation of a Lease says; other kinds are not written by requests."""
    if before is not None and not value["metadata"].get("resourceVersion"):
        return "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update"
    spec = value.get("spec", {})
    if spec.get("leaseDurationSeconds", 1) <= 0:
        return "spec.leaseDurationSeconds: Invalid value: must be greater than 0"
    if spec.get("leaseTransitions", 0) < 0:
        return "spec.leaseTransitions: Invalid value: must be greater than or equal to 0"
    for key in ("acquireTime", "renewTime"):
        if key in spec and not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", spec[key]):
            return f"spec.{key}: Invalid value: parsing time"
    return None


def _status(code: int, reason: str, message: str) -> Json:
    failure = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return failure | {"message": message, "reason": reason, "code": code}


def status(code: int, reason: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(_status(code, reason, message), status=code, headers=headers)


# --- selectors ---------------------------------------------------------------------------------------------

_SET = re.compile(r"(?P<key>[\w./-]+)\s+(?P<how>in|notin)\s+\((?P<values>[^)]*)\)")
_EQUAL = re.compile(r"(?P<key>[\w./-]+)\s*(?P<how>==|=|!=)\s*(?P<value>[\w.-]*)")
_EXISTS = re.compile(r"(?P<not>!?)(?P<key>[\w./-]+)")


def selection(query: Any) -> Callable[[Json], bool]:
    """labelSelector and fieldSelector (metadata.name, metadata.namespace, status.phase, spec.nodeName) of a request."""
    labels = list(_requirements(query.get("labelSelector", "")))
    fields = list(_requirements(query.get("fieldSelector", "")))

    def matches(value: Json) -> bool:
        own = value["metadata"].get("labels") or {}
        return all(each(own) for each in labels) and all(each(_fields(value)) for each in fields)

    return matches


def _fields(value: Json) -> dict[str, str]:
    found = {f"metadata.{key}": value["metadata"].get(key, "") for key in ("name", "namespace")}
    found["status.phase"] = value.get("status", {}).get("phase", "")
    found["spec.nodeName"] = value.get("spec", {}).get("nodeName", "")
    return found


def _requirements(text: str) -> Iterator[Callable[[dict[str, str]], bool]]:
    for part in filter(None, map(str.strip, re.split(r",(?![^(]*\))", text))):
        if found := _SET.fullmatch(part):
            values = {value.strip() for value in found["values"].split(",")}
            yield _in(found["key"], values, found["how"] == "in")
        elif found := _EQUAL.fullmatch(part):
            yield _in(found["key"], {found["value"]}, found["how"] != "!=")
        elif found := _EXISTS.fullmatch(part):
            yield _exists(found["key"], not found["not"])
        else:
            raise ValueError(f"found {part!r}")


def _in(key: str, values: set[str], wanted: bool) -> Callable[[dict[str, str]], bool]:
    # As Kubernetes has it, an object without the label is not equal to any value.
    return lambda own: (own.get(key) in values) == wanted


def _exists(key: str, wanted: bool) -> Callable[[dict[str, str]], bool]:
    return lambda own: (key in own) == wanted
