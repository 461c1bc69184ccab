"""What a Lease says about who leads, and what to write into one. Pure.

After client-go's `leaderelection` (record and rules) and the API's `coordination.k8s.io/v1`. What a Lease has beyond
that is kept as it was: labels and annotations are somebody's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from picker.errors import WireError

GROUP_VERSION = "coordination.k8s.io/v1"
_RELEASED_FOR = 1  # seconds: a Lease must have a duration, and this one is nobody's


class Spec(msgspec.Struct, frozen=True, rename="camel"):
    """holder_identity: None or empty for nobody. Times are as the API has them, and nobody computes with them."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None

    @property
    def holder(self) -> str:
        return self.holder_identity or ""


@dataclass(frozen=True, slots=True)
class Lease:
    """spec: what counts. whole: all of it, as it came."""

    spec: Spec
    whole: dict[str, Any]


def read_lease(body: bytes) -> Lease:
    """Raises WireError."""
    try:
        whole = msgspec.json.decode(body, type=dict[str, Any])
        return Lease(msgspec.convert(whole.get("spec") or {}, Spec), whole)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise WireError(f"the Lease cannot be read: {error}") from None


def claim(before: Spec, identity: str, seconds: int, now: str) -> Spec:
    """The words of one who takes it, or keeps it."""
    kept = before.holder == identity
    return Spec(
        holder_identity=identity,
        lease_duration_seconds=seconds,
        acquire_time=before.acquire_time if kept else now,
        renew_time=now,
        lease_transitions=(before.lease_transitions or 0) + (0 if kept else 1),
    )


def release(before: Spec, now: str) -> Spec:
    """The words of one who lets go of it: anybody may take it at once."""
    return Spec("", _RELEASED_FOR, now, now, before.lease_transitions or 0)


def first(namespace: str, name: str, spec: Spec) -> bytes:
    """A Lease that is not there yet; taking it is no transition."""
    made = msgspec.structs.replace(spec, lease_transitions=0)
    return _written({"metadata": {"name": name, "namespace": namespace}}, made)


def over(before: Lease, spec: Spec) -> bytes:
    """A Lease in the place of another; good only as long as nobody has written it since: it names its version."""
    return _written(before.whole, spec)


def _written(whole: dict[str, Any], spec: Spec) -> bytes:
    said = {key: value for key, value in msgspec.to_builtins(spec).items() if value is not None}
    said = (whole.get("spec") or {}) | said
    return msgspec.json.encode(whole | {"apiVersion": GROUP_VERSION, "kind": "Lease", "spec": said})
