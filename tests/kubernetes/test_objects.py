from __future__ import annotations

import json
from typing import Any

import pytest

from kubernetes.manifests import old_pool, pod, pool
from picker.errors import WireError
from picker.sources.kubernetes import objects
from picker.sources.kubernetes.objects import Pool, read_event, read_page, read_status, read_version

V1 = objects.pools("ns", objects.POOL_GROUP)
OLD = objects.pools("ns", objects.OLD_POOL_GROUP)


def read(value: dict[str, Any], collection: objects.Collection[Pool] = V1) -> Pool:
    return collection.read(json.dumps(value).encode())


def test_a_pool_is_read_and_what_it_says_besides_is_skipped() -> None:
    value = pool(ports=(8000, 8001)) | {"status": {"parents": [{"new": 1}]}, "newField": None}
    found = read(value)
    assert (found.metadata.name, found.selector, found.ports) == ("pool", {"app": "vllm"}, (8000, 8001))
    assert found.app_protocol == "http"


def test_the_selector_is_spelled_as_the_api_server_takes_it() -> None:
    found = read(pool(labels={"b": "2", "a.io/x": "1"}))
    assert found.query == "a.io/x=1,b=2"
    assert found.selects({"a.io/x": "1", "b": "2", "c": "3"})
    assert not found.selects({"a.io/x": "1"})


def test_a_pool_of_the_older_version_says_the_same_with_other_words() -> None:
    found = read(old_pool(), OLD)
    assert (found.selector, found.ports, found.app_protocol) == ({"app": "vllm"}, (8000,), "http")
    assert OLD.path == "/apis/inference.networking.x-k8s.io/v1alpha2/namespaces/ns/inferencepools"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"selector": {"app": "vllm"}}, "its selector has no matchLabels"),
        ({"selector": {"matchLabels": None}}, "its selector has no matchLabels"),
        ({"selector": {"matchLabels": {"a,b": "c"}}}, "its selector's 'a,b': 'c' is no label"),
        ({"selector": {"matchLabels": {"a": "b,c"}}}, "its selector's 'a': 'b,c' is no label"),
        ({"targetPorts": None}, "it has 0 target ports"),
        ({"targetPorts": [{"number": n} for n in range(1, 10)]}, "it has 9 target ports"),
        ({"targetPorts": [{"number": 1}, {"number": 1}]}, "are not different ports"),
        ({"targetPorts": [{"number": 65536}]}, "ports from 1 to 65535"),
        ({"targetPorts": [{"number": "8000"}]}, r"it cannot be read: .*`int`.*targetPorts\[0\].number"),
    ],
)
def test_a_pool_that_its_schema_would_refuse_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    value = pool()
    value["spec"] |= change
    with pytest.raises(WireError, match=words):
        read(value)


def test_what_go_leaves_out_or_writes_as_null_is_nothing() -> None:
    found = objects.pods("ns", "").read(b'{"metadata": {"name": "a", "labels": null}, "status": {"conditions": null}}')
    assert not found.ready
    assert found.metadata.labels is None
    assert read_page(b'{"metadata": {}, "items": null}').items is None


def test_a_pod_is_ready_by_its_condition() -> None:
    reader = objects.pods("ns", "").read
    assert reader(json.dumps(pod("a")).encode()).ready
    assert not reader(json.dumps(pod("a", ready=False)).encode()).ready


def test_a_bookmark_has_a_version_and_no_name() -> None:
    event = read_event(b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"7","creationTimestamp":null}}}')
    assert (event.type, read_version(event.object)) == ("BOOKMARK", "7")


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"items": 1}', b"[" * 100_000])
def test_an_answer_that_is_no_list_says_so(body: bytes) -> None:
    with pytest.raises(WireError, match="the answer is no list"):
        read_page(body)
    assert read_status(body).message is None


def test_paths_are_those_of_the_api() -> None:
    assert objects.pods("ns", "a=b").path == "/api/v1/namespaces/ns/pods"
    assert objects.slices("ns", "s").path == "/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices"
    assert objects.objectives("ns", "llm-d.ai").kind == "inferenceobjectives.llm-d.ai/v1alpha2"
