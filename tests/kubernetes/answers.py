"""What the in-test API server says instead of an object, word for word as a kube-apiserver does.

Owns the place that a path is about, and what is wrong with a request and with a Lease; keeps no objects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from aiohttp import web

Json = dict[str, Any]

_LEASE_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")


@dataclass(frozen=True, slots=True)
class Place:
    """What a path is about. name: empty for a collection."""

    group_version: str
    namespace: str
    plural: str
    name: str

    @property
    def group(self) -> str:
        return self.group_version.removeprefix("/apis/").partition("/")[0] if "/apis/" in self.group_version else ""

    @property
    def full(self) -> str:
        """The kind as messages have it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def collection(self) -> str:
        return f"{self.group_version}/namespaces/{self.namespace}/{self.plural}"

    def details(self, kind: str | None = None) -> Json:
        named = {"name": self.name} if self.name else {}
        return named | ({"group": self.group} if self.group else {}) | {"kind": kind or self.plural}


def place_of(path: str) -> Place:
    group_version, _, rest = path.partition("/namespaces/")
    namespace, _, rest = rest.partition("/")
    plural, _, name = rest.partition("/")
    return Place(group_version, namespace, plural, name)


def bad_versions(query: Any) -> web.Response | None:
    """What is wrong with the versions that a list or watch asks for."""
    version = query.get("resourceVersion") or ""
    if query.get("resourceVersionMatch") and not version and query.get("sendInitialEvents") != "true":
        words = "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided"
        return status(422, "Invalid", f'ListOptions.meta.k8s.io "" is invalid: resourceVersionMatch: {words}')
    if query.get("continue") and version:
        return status(400, "BadRequest", "specifying resource version is not allowed when using continue")
    if version and not version.isdecimal():
        return status(400, "BadRequest", f'invalid resource version: resourceVersion: Invalid value: "{version}"')
    return None


def unfit(place: Place, kind: str, value: Json, before: Json | None, verb: str) -> web.Response | None:
    """Why an object is not written."""
    about = f'{place.full} "{place.name}"'
    if (problem := _unreadable(value)) is not None:
        return status(400, "BadRequest", f'{kind} in version "v1" cannot be handled as a {kind}: {problem}')
    if verb == "create" and before is not None:
        return status(409, "AlreadyExists", f"{about} already exists", details=place.details())
    uid, meta = value["metadata"].get("uid"), value["metadata"]
    if verb == "update" and uid and (before is None or uid != before["metadata"]["uid"]):
        words = f"Precondition failed: UID in precondition: {uid}"
        return _conflict(place, f"StorageError: invalid object, Code: 4, AdditionalErrorMsg: {words}")
    if before is not None and not meta.get("resourceVersion"):
        words = "metadata.resourceVersion: Invalid value: 0: must be specified for an update"
        return status(422, "Invalid", f"{about} is invalid: {words}", details=place.details())
    if before is not None and meta["resourceVersion"] != before["metadata"]["resourceVersion"]:
        words = "the object has been modified; please apply your changes to the latest version and try again"
        return _conflict(place, words)
    if (problem := _invalid(value)) is not None:
        words = f'{kind}.{place.group} "{place.name}" is invalid: {problem}'
        return status(422, "Invalid", words, details=place.details(kind))
    return None


def _unreadable(value: Json) -> str | None:
    """What cannot be decoded of a Lease; other kinds are not written by requests."""
    spec = value.get("spec", {})
    for key in ("leaseDurationSeconds", "leaseTransitions"):
        if not isinstance(spec.get(key, 0), int):
            return f"json: cannot unmarshal string into Go struct field LeaseSpec.spec.{key} of type int32"
    for key in ("acquireTime", "renewTime"):
        if key in spec and not _LEASE_TIME.fullmatch(spec[key]):
            return f'parsing time "{spec[key]}" as "2006-01-02T15:04:05.000000Z07:00"'
    return None


def _invalid(value: Json) -> str | None:
    """What the validation of a Lease says."""
    if not value["metadata"].get("name"):
        return "metadata.name: Required value: name or generateName is required"
    spec = value.get("spec", {})
    if (seconds := spec.get("leaseDurationSeconds", 1)) <= 0:
        return f"spec.leaseDurationSeconds: Invalid value: {seconds}: must be greater than 0"
    if (count := spec.get("leaseTransitions", 0)) < 0:
        return f"spec.leaseTransitions: Invalid value: {count}: must be greater than or equal to 0"
    return None


def _conflict(place: Place, words: str) -> web.Response:
    about = f'Operation cannot be fulfilled on {place.full} "{place.name}"'
    return status(409, "Conflict", f"{about}: {words}", details=place.details())


def not_found(place: Place) -> web.Response:
    return status(404, "NotFound", f'{place.full} "{place.name}" not found', details=place.details())


def forbidden(place: Place, verb: str, user: str) -> web.Response:
    about = f'{place.full} "{place.name}"' if place.name else place.full
    words = f'User "{user}" cannot {verb} resource "{place.plural}" in API group "{place.group}"'
    message = f'{about} is forbidden: {words} in the namespace "{place.namespace}"'
    return status(403, "Forbidden", message, details=place.details())


def too_large(asked: int, current: int) -> web.Response:
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    words = f"Timeout: Too large resource version: {asked}, current: {current}"
    details = {"causes": [cause], "retryAfterSeconds": 1}
    return status(504, "Timeout", words, {"Retry-After": "1"}, details=details)


def failure(code: int, reason: str, message: str, details: Json | None = None) -> Json:
    failure = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    said = {} if details is None else {"details": details}
    return failure | {"message": message, "reason": reason} | said | {"code": code}


def status(
    code: int, reason: str, message: str, headers: dict[str, str] | None = None, *, details: Json | None = None
) -> web.Response:
    return web.json_response(failure(code, reason, message, details), status=code, headers=headers)
