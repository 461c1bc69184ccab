"""A LeaderWorkerSet group is one server, which serves when all of it does."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kubernetes.manifests import pod
from kubernetes.test_catalogue import Known
from picker.sources.kubernetes import objects
from picker.sources.kubernetes.groups import Groups
from picker.sources.kubernetes.members import Standing
from picker.sources.kubernetes.scope import Scope

PREFIX = "leaderworkerset.sigs.k8s.io"


def member(group: int, index: int, *, size: int | None = None, **more: Any) -> dict[str, Any]:
    labels = {f"{PREFIX}/name": "vllm", f"{PREFIX}/group-index": str(group), f"{PREFIX}/worker-index": str(index)}
    annotations = None if size is None else {f"{PREFIX}/size": str(size)}
    return pod(f"vllm-{group}-{index}", f"10.0.{group}.{index + 1}", labels=labels, annotations=annotations, **more)


def parsed(value: dict[str, Any]) -> objects.Pod:
    return objects.pods("ns", "").read(json.dumps(value).encode())


def standing(groups: Groups, value: dict[str, Any]) -> Standing | None:
    found = groups.put(parsed(value))
    return None if found is None else found.standing


def test_a_leader_is_ready_when_its_workers_are() -> None:
    groups = Groups()
    assert standing(groups, member(0, 0)) is Standing.READY
    assert standing(groups, member(0, 1, ready=False)) is Standing.NOT_READY
    assert standing(groups, member(0, 2)) is Standing.NOT_READY
    assert standing(groups, member(0, 1)) is Standing.READY


def test_a_worker_that_goes_takes_its_group_along() -> None:
    groups = Groups()
    groups.put(parsed(member(0, 0, size=2)))
    assert standing(groups, member(0, 1, size=2)) is Standing.READY
    assert standing(groups, member(0, 1, size=2, deleting=True)) is Standing.NOT_READY
    found = groups.drop("vllm-0-1")
    assert found is not None
    assert found.standing is Standing.NOT_READY
    assert found.notes == ("is ready and waits for 1 more workers",)


def test_a_group_that_is_not_complete_is_not_ready() -> None:
    groups = Groups()
    groups.put(parsed(member(0, 0, size=3)))
    assert standing(groups, member(0, 1, size=3)) is Standing.NOT_READY
    assert standing(groups, member(0, 2, size=3)) is Standing.READY


def test_where_only_leaders_are_selected_their_own_readiness_counts() -> None:
    assert standing(Groups(), member(0, 0, size=4)) is Standing.READY


def test_groups_are_told_apart() -> None:
    groups = Groups()
    groups.put(parsed(member(0, 0)))
    groups.put(parsed(member(0, 1, ready=False)))
    assert standing(groups, member(1, 0)) is Standing.READY


def test_a_leader_that_ends_is_over_whatever_its_workers_do() -> None:
    groups = Groups()
    groups.put(parsed(member(0, 1)))
    assert standing(groups, member(0, 0, deleting=True)) is Standing.TERMINATING


def test_a_pod_of_no_group_is_itself() -> None:
    groups = Groups()
    assert standing(groups, pod("a")) is Standing.READY
    assert groups.drop("a") is None


def test_the_scheduler_hears_of_leaders_only_and_of_all_that_befalls_their_groups() -> None:
    known = Known(Scope("ns", ("a",)))
    known.pool("a")
    for value in (member(0, 0), member(0, 1)):
        known.put_pod("pool/a", parsed(value))
    assert set(known.told.routable) == {"vllm-0-0-rank-0"}
    known.put_pod("pool/a", parsed(member(0, 1, ready=False)))
    assert not known.told.routable
    assert known.conditions["pod/vllm-0-0"] == "is ready and waits for its workers: vllm-0-1"
    known.put_pod("pool/a", parsed(member(0, 1)))
    assert set(known.told.routable) == {"vllm-0-0-rank-0"}
    assert "pod/vllm-0-0" not in known.conditions
    known.drop_pod("pool/a", "vllm-0-0")
    assert not known.told.routable
    assert set(known.names("pool/a")) == {"vllm-0-1"}  # so that whoever lists anew can tell that it is gone


STEPS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 2), st.sampled_from(("ready", "not", "gone"))), max_size=30
)


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_a_leader_serves_when_all_that_is_there_of_its_group_is_ready(steps: list[tuple[int, int, str]]) -> None:
    groups, pods = Groups(), dict[tuple[int, int], str]()
    standings: dict[int, Standing | None] = {0: None, 1: None}
    for group, index, what in steps:
        if what == "gone":
            pods.pop((group, index), None)
            found = groups.drop(f"vllm-{group}-{index}")
        else:
            pods[group, index] = what
            found = groups.put(parsed(member(group, index, ready=what == "ready")))
        standings[group] = found.standing if found is not None else standings[group] if (group, 0) in pods else None
        there = [state for (number, _), state in pods.items() if number == group]
        wanted = Standing.READY if "not" not in there else Standing.NOT_READY
        assert standings[group] is (wanted if (group, 0) in pods else None)
