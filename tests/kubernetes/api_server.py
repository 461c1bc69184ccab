"""An API server for tests: kept objects, lists and watches over HTTP as a kube-apiserver answers them, and its faults.

Held to a real one by `test_semantics.py`, as far as that goes:

- every write makes a new version of everything; lists name the version they are of; one that changes nothing is none
- watches begin after the version that is asked for and tell what has changed since; a change that makes an object leave
  the selector is told as DELETED, one that makes it enter as ADDED, both with the version of the change
- a watch of version 0, or of none, begins with all that is there
- a version that has been compacted away is answered 410, by watches as an ERROR event in an answer of status 200; of
  a version that is still to come a watch tells nothing at all until it has come
- a list of version 0 comes whole; all others come in pages, whose token belongs to the version of the first page, and
  expires with it
- a list `NotOlderThan` a version from the future is answered 504 with the cause ResourceVersionTooLarge
- bookmarks come every minute, and two seconds before a watch ends, to those who allow them, and carry nothing but the
  kind and a version
- a pod that is asked to go stays for its grace period; what has finalizers stays until they are gone
- objects may be created and replaced by requests, too; a version that is not the latest is a conflict (409), and a
  Lease without one is refused (422): it cannot be written over unread. PUT creates a Lease that is not there
- rights are looked at before anything else of a request is: who has none learns nothing (403)
- rights are asked for by posting reviews, about oneself or about whom one impersonates
- kinds that are not installed are 404, in a text that is no Status; without the right token it is 401
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web

from kubernetes.answers import (
    Place,
    bad_versions,
    failure,
    forbidden,
    not_found,
    place_of,
    status,
    too_large,
    unfit,
)
from kubernetes.selectors import selection

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
_BEGAN = datetime(2026, 11, 21, 10, tzinfo=UTC)
_BUILT_IN = ("", "coordination.k8s.io", "discovery.k8s.io")  # groups that are no CRDs
BOOKMARK_EVERY = 60.0
_BEFORE_THE_END = 2.0  # seconds before a watch ends it gets a bookmark
_WAITS_FOR_VERSION = 3.0  # seconds for which a list waits for a version that is still to come


@dataclass(frozen=True, slots=True)
class _Change:
    """before, after: the object, None where there was or is none."""

    version: int
    collection: str
    before: Json | None
    after: Json | None


@dataclass(frozen=True, slots=True)
class _Account:
    """Somebody with rights of one namespace: (group, resource, verb)."""

    name: str
    namespace: str
    rights: frozenset[tuple[str, str, str]]


@dataclass(slots=True, eq=False)
class _Watch:
    collection: str
    since: int
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
        self.accounts: dict[str, _Account] = {}  # by token
        self.rights: set[tuple[str, str, str]] = set()  # group, resource, verb, of whoever asks
        self.knows_all_rights = True
        self.reviewed_for: list[str] = []  # whom reviews were about
        self.failing: list[web.Response] = []  # answers to give instead, one request each
        self.ends_watches_at_once = False
        self.forgets_at_once = False  # every version that a watch could name
        self.compact_before_continuing = False
        self._objects: dict[str, dict[str, Json]] = {}
        self._version = 100
        self._compacted = self._version  # nothing is known of what was before
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
        value |= {"apiVersion": group_version.removeprefix("/apis/").removeprefix("/api/")}
        value |= {"kind": KINDS[group_version][plural]}
        self._complete(meta, value, before)
        if before is not None and before == value:
            return before
        self._version += 1
        meta["resourceVersion"] = str(self._version)
        kept[meta["name"]] = value
        self._tell(_Change(self._version, collection, before, value))
        if meta.get("deletionGracePeriodSeconds") == 0 and not meta.get("finalizers"):
            self._drop(collection, meta["name"])
        return value

    def patch(self, group_version: str, plural: str, change: Json, namespace: str = "default") -> Json:
        """Create an object, or merge what is said of it into what there is, as RFC 7396 has it."""
        kept = self._objects.get(f"{group_version}/namespaces/{namespace}/{plural}", {})
        before = kept.get(change["metadata"]["name"])
        return self.apply(group_version, plural, change if before is None else _merged(before, change))

    def _complete(self, meta: Json, value: Json, before: Json | None) -> None:
        if before is None:
            meta |= {"generation": 1, "resourceVersion": ""}
            meta.setdefault("uid", f"uid-{self._version + 1}")
            at = _BEGAN + timedelta(seconds=self._version + 1)  # in whole seconds, and none at the same time
            meta.setdefault("creationTimestamp", f"{at:%Y-%m-%dT%H:%M:%SZ}")
            return
        was = before["metadata"]
        meta["resourceVersion"] = was["resourceVersion"]
        meta.setdefault("uid", was["uid"])
        meta.setdefault("creationTimestamp", was["creationTimestamp"])
        goes = "deletionTimestamp" in meta and "deletionTimestamp" not in was
        meta["generation"] = was["generation"] + (value.get("spec") != before.get("spec") or goes)

    def get(self, group_version: str, plural: str, name: str, namespace: str = "default") -> Json:
        """A copy of an object, as it would be read before it is changed."""
        return copy.deepcopy(self._objects[f"{group_version}/namespaces/{namespace}/{plural}"][name])

    def terminate(
        self, group_version: str, plural: str, name: str, namespace: str = "default", *, seconds: int = 30
    ) -> None:
        """Ask an object to go; it does so at once where it is given no time and nobody holds it by a finalizer."""
        value = self.get(group_version, plural, name, namespace)
        at = f"2026-11-21T11:00:{seconds:02d}Z"
        value["metadata"] |= {"deletionTimestamp": at, "deletionGracePeriodSeconds": seconds}
        self.apply(group_version, plural, value)

    def delete(self, group_version: str, plural: str, name: str, namespace: str = "default") -> None:
        """Take an object away, at once. Of a pod it is told first that it has no time left."""
        collection = f"{group_version}/namespaces/{namespace}/{plural}"
        if plural == "pods" or self._objects[collection][name]["metadata"].get("finalizers"):
            self.terminate(group_version, plural, name, namespace, seconds=0)
        else:
            self._drop(collection, name)

    def _drop(self, collection: str, name: str) -> None:
        before = self._objects[collection].pop(name)
        self._version += 1
        self._tell(_Change(self._version, collection, before, None))

    def account(self, name: str, namespace: str, rules: Iterable[Json]) -> str:
        """The token of somebody who may do in a namespace what these rules of a Role say, and nothing else."""
        rights = {
            (group, resource, verb)
            for rule in rules
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        token = f"token-{len(self.accounts)}"
        self.accounts[token] = _Account(name, namespace, frozenset(rights))
        return token

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
        self._changes.clear()
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
        app.router.add_delete("/{path:.*}", self._delete)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=self.tls)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self._port}"

    # --- answers ---

    async def _get(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.path, dict(request.query)))
        place, query = place_of(request.path), request.query
        watches = query.get("watch") in ("1", "true")
        verb = "get" if place.name else "watch" if watches else "list"
        if (refusal := self._refusal(request, place, verb)) is not None:
            return refusal
        kind = KINDS[place.group_version][place.plural]
        if place.name:
            found = self._objects.get(place.collection, {}).get(place.name)
            return not_found(place) if found is None else web.json_response(found)
        try:
            matches = selection(query, kind)
        except ValueError as error:
            return status(400, "BadRequest", str(error))
        if (refusal := bad_versions(query)) is not None:
            return refusal
        if watches:
            await self._open.wait()
            return await self._watch(request, place.collection, matches)
        if int(query.get("resourceVersion") or 0) > self._version:
            await asyncio.sleep(_WAITS_FOR_VERSION)
        return self._list(request, place, kind, matches)

    def _refusal(self, request: web.Request, place: Place, verb: str) -> web.Response | None:
        if self.failing:
            return self.failing.pop(0)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.token is not None and token != self.token:
            return status(401, "Unauthorized", "Unauthorized")
        account = self.accounts.get(token)
        if token and self.token is None and account is None:
            return status(401, "Unauthorized", "Unauthorized")
        if account is not None and (
            place.namespace != account.namespace or (place.group, place.plural, verb) not in account.rights
        ):
            return forbidden(place, verb, f"system:serviceaccount:{account.namespace}:{account.name}")
        if place.plural in self.forbidden:
            return forbidden(place, verb, "system:serviceaccount:default:picker")
        if place.plural in KINDS.get(place.group_version, {}) and not self.absent & {place.plural, place.group_version}:
            return None
        if place.group:
            return web.Response(status=404, text="404 page not found\n")
        return status(404, "NotFound", "the server could not find the requested resource", details={})

    async def _write(self, request: web.Request) -> web.Response:
        place = place_of(request.path)
        verb = "create" if request.method == "POST" else "update"
        answer = self._refusal(request, place, verb) or self._written(place, await request.json(), verb)
        self.wrote.append((request.method, request.path, answer.status))
        return answer

    def _written(self, place: Place, value: Json, verb: str) -> web.Response:
        kind, meta = KINDS[place.group_version][place.plural], value.setdefault("metadata", {})
        name = meta.get("name", "")
        if meta.setdefault("namespace", place.namespace) != place.namespace:
            words = "the namespace of the provided object does not match the namespace sent on the request"
            return status(400, "BadRequest", words)
        if place.name and name != place.name:
            words = f"the name of the object ({name}) does not match the name on the URL ({place.name})"
            return status(400, "BadRequest", words)
        place = Place(place.group_version, place.namespace, place.plural, name)
        before = self._objects.get(place.collection, {}).get(name)
        if (refusal := unfit(place, kind, value, before, verb)) is not None:
            return refusal
        return web.json_response(self.apply(place.group_version, place.plural, value), status=200 if before else 201)

    async def _delete(self, request: web.Request) -> web.Response:
        place = place_of(request.path)
        if (refusal := self._refusal(request, place, "delete")) is not None:
            return refusal
        before = self._objects.get(place.collection, {}).get(place.name)
        if before is None:
            return not_found(place)
        options = await request.json() if request.can_read_body else {}
        runs = before.get("spec", {}).get("nodeName") and before["status"]["phase"] not in ("Succeeded", "Failed")
        seconds = options.get("gracePeriodSeconds", 30) if place.plural == "pods" and runs else 0
        where = (place.group_version, place.plural, place.name, place.namespace)
        if seconds:
            self.terminate(*where, seconds=seconds)
        else:
            self.delete(*where)
        left = self._objects[place.collection].get(place.name)
        gone = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return web.json_response(left or gone | {"details": place.details() | {"uid": before["metadata"]["uid"]}})

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

    def _list(self, request: web.Request, place: Place, kind: str, matches: Callable[[Json], bool]) -> web.Response:
        query = request.query
        asked, token = int(query.get("resourceVersion") or 0), query.get("continue")
        if asked > self._version:
            return too_large(asked, self._version)
        version, after = self._version, ""
        if token is not None:
            if self.compact_before_continuing:
                self.compact_before_continuing = False
                self._version += 1
                self.compact()
            try:
                version, after = json.loads(base64.b64decode(token))
            except ValueError:
                return status(400, "BadRequest", "invalid continue token: continue key is not valid")
            if version < self._compacted:
                return status(410, "Expired", "The provided continue parameter is too old")
        there = sorted(self._at(place.collection, version).items())
        found = [each for name, each in there if name > after and matches(each)]
        # The watch cache answers whole when it is asked for whatever it has.
        limit = 0 if query.get("resourceVersion") == "0" else int(query.get("limit") or 0)
        meta: Json = {"resourceVersion": str(version)}
        if limit and len(found) > limit:
            left, found = len(found) - limit, found[:limit]
            meta["continue"] = base64.b64encode(json.dumps([version, found[-1]["metadata"]["name"]]).encode()).decode()
            if not query.get("labelSelector") and not query.get("fieldSelector"):
                meta["remainingItemCount"] = left
        api_version = place.group_version.removeprefix("/apis/").removeprefix("/api/")
        if place.group in _BUILT_IN:
            # Items of a list do not say what they are: the list does. Those of a CRD do.
            found = [{key: each[key] for key in each if key not in ("kind", "apiVersion")} for each in found]
        return web.json_response({"kind": f"{kind}List", "apiVersion": api_version, "metadata": meta, "items": found})

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
        query = request.query
        since, seconds = int(query.get("resourceVersion") or 0), float(query.get("timeoutSeconds", "1800"))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        bookmarks = query.get("allowWatchBookmarks") == "true"
        watch = _Watch(collection, since or self._version, matches, bookmarks, request, response)
        await response.prepare(request)
        if since and (since < self._compacted or self.forgets_at_once):
            words = f"too old resource version: {since} ({self._compacted})"
            await self._send(response, {"type": "ERROR", "object": failure(410, "Expired", words)})
            return response
        if not since:
            await self._send_all(watch)
        for change in self._changes:
            if change.version > watch.since and change.collection == collection:
                watch.queue.put_nowait(change)
        if self.ends_watches_at_once:
            return response
        self._watches.add(watch)
        try:
            await self._stream(watch, seconds)
        finally:
            self._watches.discard(watch)
        return response

    async def _send_all(self, watch: _Watch) -> None:
        """What is there, as if it had just come, and a bookmark to say that this was all."""
        for _, each in sorted(self._objects.get(watch.collection, {}).items()):
            if watch.matches(each):
                await self._send(watch.response, {"type": "ADDED", "object": each})
        await self._bookmark(watch, annotations={"k8s.io/initial-events-end": "true"})

    async def _stream(self, watch: _Watch, seconds: float) -> None:
        clock = asyncio.get_running_loop().time
        flowing, end_at = self._flowing, clock() + seconds
        next_bookmark = min(clock() + BOOKMARK_EVERY, max(clock(), end_at - _BEFORE_THE_END))
        while clock() < end_at:
            try:
                async with asyncio.timeout(min(end_at, next_bookmark) - clock()):
                    change = await watch.queue.get()
            except TimeoutError:
                if next_bookmark <= clock():
                    near_the_end = end_at - _BEFORE_THE_END
                    next_bookmark = min(clock() + BOOKMARK_EVERY, near_the_end if near_the_end > clock() else end_at)
                    await flowing.wait()
                    await self._bookmark(watch)
                continue
            if change is None:
                return
            await flowing.wait()
            event = _event(watch.matches, change) if change.version > watch.since else None
            if event is not None:
                await self._send(watch.response, event)

    async def _bookmark(self, watch: _Watch, **metadata: Json) -> None:
        if watch.bookmarks and watch.since <= self._version:
            place = place_of(watch.collection)
            said = {"kind": KINDS[place.group_version][place.plural]}
            said["apiVersion"] = place.group_version.removeprefix("/apis/").removeprefix("/api/")
            meta = {"resourceVersion": str(self._version), **metadata}
            await self._send(watch.response, {"type": "BOOKMARK", "object": said | {"metadata": meta}})

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


def _merged(before: Json, change: Json) -> Json:
    merged = copy.deepcopy(before)
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


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
