"""How an API server answers what picker asks it: the in-test one and a real one are held to the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kubernetes.manifests import LEASES, PODS, POOLS, Json, Kind, pod, pool
from kubernetes.stage import Stage, on_every_stage

FINALIZER = "picker.test/stays"
FAILURE = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}


async def listed(stage: Stage, kind: Kind, **query: str) -> Json:
    answer = await stage.ask("GET", stage.path(kind), query=query)
    assert answer.status == 200, answer
    return answer.value


async def version(stage: Stage, kind: Kind) -> str:
    return str((await listed(stage, kind))["metadata"]["resourceVersion"])


def names(found: Json) -> list[str]:
    return [each["metadata"]["name"] for each in found["items"]]


def told(events: list[Json]) -> list[tuple[str, str]]:
    """(type, name) of all but bookmarks."""
    return [(each["type"], each["object"]["metadata"]["name"]) for each in events if each["type"] != "BOOKMARK"]


# --- lists -------------------------------------------------------------------------------------------------


@on_every_stage
async def test_a_list_says_its_kind_and_its_items_do_so_only_where_they_are_of_a_crd(stage: Stage) -> None:
    for kind, value, version, name in (
        (PODS, pod("a"), "v1", "Pod"),
        (POOLS, pool(), f"{POOLS[0][6:]}", "InferencePool"),
    ):
        empty = await listed(stage, kind)
        assert (empty["kind"], empty["apiVersion"], empty["items"]) == (f"{name}List", version, [])
        await stage.apply(kind, value)
        (item,) = (await listed(stage, kind))["items"]
        assert ("kind" in item, "apiVersion" in item) == (kind == POOLS, kind == POOLS)


@on_every_stage
async def test_lists_come_in_pages_of_one_version(stage: Stage) -> None:
    for name in "abc":
        await stage.apply(PODS, pod(name, labels={"app": "vllm" if name != "c" else "other"}))
    first = await listed(stage, PODS, limit="2")
    assert (names(first), first["metadata"]["remainingItemCount"]) == (["a", "b"], 1)
    await stage.apply(PODS, pod("d"))
    query = {"limit": "2", "continue": first["metadata"]["continue"]}
    second = await listed(stage, PODS, **query)
    assert names(second) == ["c"]
    assert not second["metadata"].get("continue")
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    chosen = await listed(stage, PODS, limit="1", labelSelector="app=vllm")
    assert "remainingItemCount" not in chosen["metadata"]
    assert chosen["metadata"]["continue"]


@on_every_stage
async def test_a_list_of_version_0_comes_whole_and_one_of_another_version_in_pages(stage: Stage) -> None:
    for name in "ab":
        await stage.apply(PODS, pod(name))
    newer = {"limit": "1", "resourceVersionMatch": "NotOlderThan"}
    assert names(await listed(stage, PODS, resourceVersion="0", **newer)) == ["a", "b"]
    found = await listed(stage, PODS, resourceVersion=await version(stage, PODS), **newer)
    assert (names(found), bool(found["metadata"]["continue"])) == (["a"], True)


@on_every_stage
async def test_a_version_of_the_future_is_waited_for_and_then_refused(stage: Stage) -> None:
    newer = {"resourceVersion": "1000000000000", "resourceVersionMatch": "NotOlderThan"}
    answer = await stage.ask("GET", stage.path(PODS), query=newer)
    status, reason, message = answer.told
    assert (status, reason) == (504, "Timeout")
    assert "Too large resource version: 1000000000000, current: " in message
    assert answer.value["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge"
    assert answer.value["details"]["retryAfterSeconds"] == 1


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ({"resourceVersionMatch": "NotOlderThan"}, 422, "resourceVersionMatch is forbidden unless resourceVersion"),
        ({"resourceVersion": "x"}, 400, "invalid resource version"),
        ({"continue": "nonsense"}, 400, "continue key is not valid"),
        ({"labelSelector": "a b"}, 400, "unable to parse requirement"),
        ({"fieldSelector": "spec.image=x"}, 400, "field label not supported: spec.image"),
    ],
)
@on_every_stage
async def test_what_cannot_be_listed_is_refused(stage: Stage, query: dict[str, str], status: int, says: str) -> None:
    answer = await stage.ask("GET", stage.path(PODS), query=query)
    assert (answer.status, says in answer.value["message"]) == (status, True), answer
    assert {key: answer.value[key] for key in FAILURE} == FAILURE
    assert answer.value["code"] == status


# --- selectors ---------------------------------------------------------------------------------------------

LABELS: dict[str, Json] = {
    "a": {"app": "vllm", "tier": "gold"},
    "b": {"app": "vllm", "size": "7"},
    "c": {"app": "", "example.com/x": "y"},
}
LABEL_SELECTORS = {
    "app=vllm": "ab",
    "app==vllm": "ab",
    "app!=vllm": "c",
    "app=": "c",
    "app": "abc",
    "!tier": "bc",
    "! tier": "bc",
    "tier!=gold": "bc",
    "tier in (gold,silver)": "a",
    "tier notin (gold)": "bc",
    "app in (vllm),tier=gold": "a",
    "app in ( vllm , x )": "ab",
    "app in ()": "c",
    "app in (x,)": "c",
    "size>5": "b",
    "size<5": "",
    "example.com/x=y": "c",
    " app = vllm , tier ": "a",
    "": "abc",
}
NO_LABEL_SELECTORS = (
    "app in (vllm",
    "app in vllm",
    "app=a b",
    "=x",
    "-a",
    "app=-x",
    "app=x,",
    ",app=x",
    "a/b/c",
    "app=x;tier",
    "app is x",
    "size>x",
)
FIELD_SELECTORS = {
    "metadata.name=a": "a",
    "metadata.name!=a": "bc",
    "status.phase=Running": "ab",
    "status.phase==Pending": "c",
    "status.podIP=10.0.0.1": "a",
    "metadata.name=a,status.phase=Running": "a",
    "spec.nodeName=": "abc",
    "spec.schedulerName=nobody": "",
    "spec.restartPolicy=Never": "",
}
NO_FIELD_SELECTORS = ("metadata.uid=x", "metadata.labels.app=x", "spec.foo=x", "metadata.name in (a)", "metadata.name")


@on_every_stage
async def test_selectors_choose_and_are_refused_alike(stage: Stage) -> None:
    for number, (name, labels) in enumerate(LABELS.items()):
        value = pod(name, f"10.0.0.{number + 1}", phase="Pending" if name == "c" else "Running")
        value["metadata"]["labels"] = labels
        await stage.apply(PODS, value)
    chosen = {each: names(await listed(stage, PODS, labelSelector=each)) for each in LABEL_SELECTORS}
    assert chosen == {each: list(wanted) for each, wanted in LABEL_SELECTORS.items()}
    chosen = {each: names(await listed(stage, PODS, fieldSelector=each)) for each in FIELD_SELECTORS}
    assert chosen == {each: list(wanted) for each, wanted in FIELD_SELECTORS.items()}
    refused = [("labelSelector", each) for each in NO_LABEL_SELECTORS]
    refused += [("fieldSelector", each) for each in NO_FIELD_SELECTORS]
    said = {each: (await stage.ask("GET", stage.path(PODS), query={how: each})).status for how, each in refused}
    assert said == {each: 400 for _, each in refused}


@on_every_stage
async def test_of_crds_names_and_namespaces_are_the_only_fields(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    assert names(await listed(stage, POOLS, fieldSelector="metadata.name=pool")) == ["pool"]
    assert (await stage.ask("GET", stage.path(POOLS), query={"fieldSelector": "status.phase=x"})).status == 400


# --- watches -----------------------------------------------------------------------------------------------


@on_every_stage
async def test_a_watch_tells_what_has_changed_since_and_says_where_it_is_before_it_ends(stage: Stage) -> None:
    await stage.apply(PODS, pod("a"))
    since = await version(stage, PODS)
    await stage.apply(PODS, pod("b"))
    await stage.apply(PODS, pod("c", labels={"app": "other"}))
    await stage.apply(PODS, pod("a", labels={"app": "other"}))
    query = {"resourceVersion": since, "labelSelector": "app=vllm", "timeoutSeconds": "5"}
    events = await stage.events(stage.path(PODS), {"allowWatchBookmarks": "true", **query})
    of_b = [each for each in told(events) if each[1] == "b"]
    assert of_b in ([("ADDED", "b")], [("ADDED", "b"), ("MODIFIED", "b")])  # the status may come by itself
    (gone,) = [each["object"]["metadata"] for each in events if each["type"] == "DELETED"]
    assert gone["name"] == "a"
    assert gone["labels"] == {"app": "vllm"}, "as it was before"
    assert int(gone["resourceVersion"]) > int(since), "of the change"
    assert "c" not in {name for _, name in told(events)}
    assert events[-1]["type"] == "BOOKMARK"
    mark = events[-1]["object"]
    assert (mark["kind"], mark["apiVersion"], set(mark["metadata"])) == ("Pod", "v1", {"resourceVersion"})
    assert int(mark["metadata"]["resourceVersion"]) >= int(gone["resourceVersion"])
    without = await stage.events(stage.path(PODS), query)
    assert "BOOKMARK" not in {each["type"] for each in without}


@pytest.mark.parametrize("since", ["0", ""])
@on_every_stage
async def test_a_watch_of_any_version_begins_with_all_that_is_there(stage: Stage, since: str) -> None:
    for name in "ab":
        await stage.apply(PODS, pod(name))
        await stage.apply(PODS, pod(name, container="containerd://b"))
    await version(stage, PODS)  # so that a cache that is asked for whatever it has has this, too
    events = await stage.events(stage.path(PODS), {"resourceVersion": since, "timeoutSeconds": "2"})
    assert sorted(told(events)) == [("ADDED", "a"), ("ADDED", "b")]


@on_every_stage
async def test_a_streamed_list_ends_with_a_bookmark_that_says_so(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "allowWatchBookmarks": "true"}
    events = await stage.events(stage.path(POOLS), {"timeoutSeconds": "2", **query})
    if events[0]["type"] == "ERROR":
        pytest.skip(events[0]["object"]["message"])  # etcd before 3.5 does not tell how far it is
    assert told(events) == [("ADDED", "pool")]
    assert events[1]["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


@on_every_stage
async def test_a_version_that_is_forgotten_is_an_error_event_in_a_good_answer(stage: Stage) -> None:
    (event,) = await stage.events(stage.path(POOLS), {"resourceVersion": "1", "timeoutSeconds": "2"})
    assert event["type"] == "ERROR"
    said = event["object"]
    assert (said["code"], said["reason"], said["kind"]) == (410, "Expired", "Status")
    assert said["message"].startswith("too old resource version: 1 (")


@on_every_stage
async def test_of_a_version_of_the_future_a_watch_tells_nothing_at_all(stage: Stage) -> None:
    query = {"resourceVersion": "1000000000000", "allowWatchBookmarks": "true", "timeoutSeconds": "5"}
    await stage.apply(PODS, pod("a"))
    assert await stage.events(stage.path(PODS), query) == []


@on_every_stage
async def test_writing_what_is_there_changes_no_version_and_is_not_told(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    since = await version(stage, POOLS)
    before = await stage.get(POOLS, "pool")
    await stage.apply(POOLS, pool())
    assert (await stage.get(POOLS, "pool"))["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    assert await stage.events(stage.path(POOLS), {"resourceVersion": since, "timeoutSeconds": "1"}) == []


# --- going -------------------------------------------------------------------------------------------------


@on_every_stage
async def test_a_pod_is_told_to_go_in_thirty_seconds_then_at_once_then_it_is_gone(stage: Stage) -> None:
    await stage.apply(PODS, pod("a"))
    await stage.terminate("a")
    going = (await stage.get(PODS, "a"))["metadata"]
    assert going["deletionGracePeriodSeconds"] == 30
    assert (going["generation"], "deletionTimestamp" in going) == (2, True)
    since = await version(stage, PODS)
    await stage.delete(PODS, "a")
    events = await stage.events(stage.path(PODS), {"resourceVersion": since, "timeoutSeconds": "1"})
    assert [each["type"] for each in events] == ["MODIFIED", "DELETED"]
    assert {each["object"]["metadata"]["deletionGracePeriodSeconds"] for each in events} == {0}
    assert (await stage.ask("GET", f"{stage.path(PODS)}/a")).status == 404


@on_every_stage
async def test_a_pod_of_no_node_is_given_no_time(stage: Stage) -> None:
    await stage.apply(PODS, pod("a"))
    assert (await stage.ask("DELETE", f"{stage.path(PODS)}/a", {})).status == 200
    assert (await stage.ask("GET", f"{stage.path(PODS)}/a")).status == 404


@pytest.mark.parametrize(("kind", "value"), [(PODS, pod("a")), (POOLS, pool("a"))])
@on_every_stage
async def test_what_has_a_finalizer_stays_until_it_has_none(stage: Stage, kind: Kind, value: Json) -> None:
    value = copy.deepcopy(value)
    value["metadata"]["finalizers"] = [FINALIZER]
    await stage.apply(kind, value)
    since = await version(stage, kind)
    await stage.delete(kind, "a")
    assert "deletionTimestamp" in (await stage.get(kind, "a"))["metadata"]
    await stage.patch(kind, "a", {"metadata": {"finalizers": None}})
    events = await stage.events(stage.path(kind), {"resourceVersion": since, "timeoutSeconds": "1"})
    assert [each["type"] for each in events] in (["MODIFIED", "DELETED"], ["MODIFIED", "MODIFIED", "DELETED"])
    assert (await stage.ask("GET", f"{stage.path(kind)}/a")).status == 404


@on_every_stage
async def test_a_generation_counts_changes_of_what_is_wanted(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    assert (await stage.get(POOLS, "pool"))["metadata"]["generation"] == 1
    await stage.patch(POOLS, "pool", {"metadata": {"labels": {"a": "b"}}})
    assert (await stage.get(POOLS, "pool"))["metadata"]["generation"] == 1
    await stage.apply(POOLS, pool(ports=(9000,)))
    assert (await stage.get(POOLS, "pool"))["metadata"]["generation"] == 2


@on_every_stage
async def test_what_is_deleted_is_named_and_what_is_not_there_is_404(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    gone = await stage.ask("DELETE", f"{stage.path(POOLS)}/pool", {})
    assert (gone.status, gone.value["status"], gone.value["details"]["name"]) == (200, "Success", "pool")
    again = await stage.ask("DELETE", f"{stage.path(POOLS)}/pool", {})
    group = "inferencepools.inference.networking.k8s.io"
    assert again.told == (404, "NotFound", f'{group} "pool" not found')


# --- leases ------------------------------------------------------------------------------------------------

TIME = "2026-11-21T10:00:00.000001Z"
LEASE: Json = {
    "metadata": {"name": "l"},
    "spec": {
        "holderIdentity": "a",
        "leaseDurationSeconds": 15,
        "acquireTime": TIME,
        "renewTime": TIME,
        "leaseTransitions": 0,
    },
}


async def put(stage: Stage, value: Json) -> tuple[int, Any, Any]:
    return (await stage.ask("PUT", f"{stage.path(LEASES)}/l", value)).told


@on_every_stage
async def test_a_lease_is_written_over_by_who_has_read_it_last(stage: Stage) -> None:
    made = await stage.ask("POST", stage.path(LEASES), LEASE)
    assert made.status == 201
    again = await stage.ask("POST", stage.path(LEASES), LEASE)
    assert again.told == (409, "AlreadyExists", 'leases.coordination.k8s.io "l" already exists')
    changed = copy.deepcopy(made.value)
    changed["spec"]["holderIdentity"] = "b"
    assert (await put(stage, changed))[0] == 200
    words = "the object has been modified; please apply your changes to the latest version and try again"
    about = 'Operation cannot be fulfilled on leases.coordination.k8s.io "l": '
    assert await put(stage, changed) == (409, "Conflict", about + words)
    status, reason, message = await put(stage, LEASE)
    assert (status, reason) == (422, "Invalid")
    assert "metadata.resourceVersion: Invalid value" in message
    assert message.endswith(": must be specified for an update")


@on_every_stage
async def test_a_lease_that_is_not_there_is_made_by_put_unless_another_is_meant(stage: Stage) -> None:
    assert (await put(stage, LEASE))[0] == 201
    read = await stage.get(LEASES, "l")
    await stage.delete(LEASES, "l")
    status, reason, message = await put(stage, read)
    assert (status, reason, "Precondition failed: UID" in message) == (409, "Conflict", True)
    await stage.apply(LEASES, LEASE)
    status, reason, message = await put(stage, read)
    assert (status, reason, "Precondition failed: UID" in message) == (409, "Conflict", True)


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"leaseDurationSeconds": 0}, 422, "spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0"),
        ({"leaseTransitions": -1}, 422, "spec.leaseTransitions: Invalid value: -1: must be greater than or equal to 0"),
        ({"leaseDurationSeconds": "15"}, 400, "cannot be handled as a Lease"),
        ({"renewTime": "2026-11-21T10:00:00Z"}, 400, "cannot be handled as a Lease: parsing time"),
        ({"renewTime": "2026-11-21T10:00:00.123Z"}, 400, "cannot be handled as a Lease: parsing time"),
        ({"renewTime": "yesterday"}, 400, "cannot be handled as a Lease: parsing time"),
        ({"holderIdentity": ""}, 200, ""),
    ],
)
@on_every_stage
async def test_a_lease_is_looked_at(stage: Stage, change: Json, status: int, says: str) -> None:
    await stage.apply(LEASES, LEASE)
    value = await stage.get(LEASES, "l")
    value["spec"] |= change
    found = await put(stage, value)
    assert (found[0], says in (found[2] or "")) == (status, True), found


@on_every_stage
async def test_what_is_written_must_be_where_it_says(stage: Stage) -> None:
    other = copy.deepcopy(LEASE)
    other["metadata"]["name"] = "m"
    words = "the name of the object (m) does not match the name on the URL (l)"
    assert await put(stage, other) == (400, "BadRequest", words)
    other["metadata"] = {"name": "l", "namespace": "elsewhere"}
    words = "the namespace of the provided object does not match the namespace sent on the request"
    assert await put(stage, other) == (400, "BadRequest", words)
    nameless = await stage.ask("POST", stage.path(LEASES), {"spec": {}})
    assert nameless.told == (
        422,
        "Invalid",
        'Lease.coordination.k8s.io "" is invalid: metadata.name: Required value: name or generateName is required',
    )


# --- who asks, and for what --------------------------------------------------------------------------------


@on_every_stage
async def test_who_has_no_right_learns_nothing_else(stage: Stage) -> None:
    access = await stage.account({"rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]})
    pods, absent = stage.path(PODS), f"/apis/nowhere.example/v1/namespaces/{stage.namespace}/things"
    for path, words in {
        f"{pods}/none": 'pods "none" is forbidden: User "{}" cannot get resource "pods" in API group ""',
        stage.path(POOLS): 'inferencepools.inference.networking.k8s.io is forbidden: User "{}" cannot list resource '
        '"inferencepools" in API group "inference.networking.k8s.io"',
        absent: 'things.nowhere.example is forbidden: User "{}" cannot list resource "things" in API group '
        '"nowhere.example"',
    }.items():
        status, reason, message = (await stage.ask("GET", path, access=access)).told
        user = message.partition('User "')[2].partition('"')[0]
        assert user.startswith(f"system:serviceaccount:{stage.namespace}:")
        assert (status, reason) == (403, "Forbidden")
        assert message == f'{words.format(user)} in the namespace "{stage.namespace}"'
    watch = await stage.ask("GET", pods, query={"watch": "1"}, access=access)
    assert "cannot watch resource" in watch.value["message"]
    assert (await stage.ask("GET", pods, access=access)).status == 200


@on_every_stage
async def test_kinds_that_are_not_there_are_404_in_words_that_are_no_status(stage: Stage) -> None:
    here = f"namespaces/{stage.namespace}"
    for path in (f"/apis/nowhere.example/v1/{here}/things", f"{POOLS[0]}/{here}/things"):
        answer = await stage.ask("GET", path)
        assert (answer.status, answer.text) == (404, "404 page not found\n")
    core = await stage.ask("GET", f"/api/v1/{here}/things")
    assert core.told == (404, "NotFound", "the server could not find the requested resource")
    missing = await stage.ask("GET", f"{stage.path(PODS)}/none")
    assert missing.told == (404, "NotFound", 'pods "none" not found')
    assert missing.value["details"] == {"name": "none", "kind": "pods"}


@on_every_stage
async def test_a_token_of_nobody_is_401(stage: Stage) -> None:
    assert (await stage.ask("GET", stage.path(PODS), access=stage.stranger)).told == (
        401,
        "Unauthorized",
        "Unauthorized",
    )
