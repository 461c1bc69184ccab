"""What is written into a Lease is what client-go writes, and leaves alone what is somebody's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from picker.errors import WireError
from picker.sources.kubernetes.leases import Lease, Spec, claim, first, over, read_lease, release

THEN, NOW = "2026-11-21T10:00:00.000001Z", "2026-11-21T10:00:02.000002Z"


def lease(**spec: Any) -> Lease:
    meta = {"name": "l", "resourceVersion": "7", "labels": {"team": "a"}, "managedFields": [{"manager": "x"}]}
    return read_lease(json.dumps({"metadata": meta, "spec": spec}).encode())


HELD: dict[str, Any] = {
    "holderIdentity": "a",
    "leaseDurationSeconds": 15,
    "acquireTime": THEN,
    "renewTime": THEN,
    "leaseTransitions": 3,
}


def test_the_holder_renews_and_nothing_else() -> None:
    kept = claim(lease(**HELD).spec, "a", 15, NOW)
    assert kept == Spec("a", 15, THEN, NOW, 3)


def test_another_takes_over_with_one_transition_more() -> None:
    assert claim(lease(**HELD).spec, "b", 20, NOW) == Spec("b", 20, NOW, NOW, 4)


def test_a_lease_that_was_never_held_begins_its_transitions() -> None:
    assert claim(lease().spec, "b", 15, NOW) == Spec("b", 15, NOW, NOW, 1)
    made = json.loads(first("llm", "l", claim(Spec(), "b", 15, NOW)))
    assert made["spec"]["leaseTransitions"] == 0
    assert made["metadata"] == {"name": "l", "namespace": "llm"}


def test_letting_go_names_nobody_and_keeps_the_count() -> None:
    assert release(lease(**HELD).spec, NOW) == Spec("", 1, NOW, NOW, 3)


def test_what_else_a_lease_has_is_kept_with_its_version() -> None:
    before = lease(**HELD, strategy="OldestEmulationVersion")
    after = json.loads(over(before, claim(before.spec, "b", 15, NOW)))
    assert after["metadata"] == before.whole["metadata"]
    assert after["spec"]["strategy"] == "OldestEmulationVersion"
    assert (after["apiVersion"], after["kind"]) == ("coordination.k8s.io/v1", "Lease")


@pytest.mark.parametrize("body", [b"", b"[]", b'{"spec": 3}', b'{"spec": {"leaseDurationSeconds": "15"}}'])
def test_what_is_no_lease_is_an_error_in_words(body: bytes) -> None:
    with pytest.raises(WireError, match="the Lease cannot be read"):
        read_lease(body)
