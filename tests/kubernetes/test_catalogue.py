from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from kubernetes.manifests import address, endpoint_slice, pod, pool
from kubernetes.stage import Told
from picker.sources.kubernetes import objects
from picker.sources.kubernetes.catalogue import Catalogue
from picker.sources.kubernetes.conditions import Conditions
from picker.sources.kubernetes.scope import Scope


class Known(Catalogue):
    """A catalogue that takes objects as they are written. told: by the facts."""

    def __init__(self, scope: Scope) -> None:
        self.told = Told()
        super().__init__(scope, self.told)

    def pool(self, name: str, **more: Any) -> None:
        found = objects.pools("ns", objects.POOL_GROUP).read(json.dumps(pool(name, **more)).encode())
        self.put_pool(found)

    def pod(self, origin: str, *arguments: Any, **more: Any) -> None:
        self.put_pod(origin, objects.pods("ns", "").read(json.dumps(pod(*arguments, **more)).encode()))

    def slice(self, service: str, *arguments: Any, **more: Any) -> None:
        value = endpoint_slice(*arguments, service=service, **more)
        self.put_slice(service, objects.slices("ns", service).read(json.dumps(value).encode()))


def test_a_pool_that_selects_nothing_says_what_it_asks_for() -> None:
    known = Known(Scope("ns", ("a",)))
    known.pool("a")
    known.listed("pools")
    assert dict(known.conditions) == {}  # its pods have not been listed
    known.listed("pool/a")
    assert known.conditions["pool/a"] == "it has no pods: none in namespace ns has the labels app=vllm"


def test_a_pool_that_asks_for_other_labels_is_not_judged_before_its_pods_are_listed() -> None:
    known = Known(Scope("ns", ("a",)))
    known.pool("a")
    known.listed("pools")
    known.listed("pool/a")
    known.pool("a", labels={"app": "other"})
    assert "pool/a" not in known.conditions
    known.listed("pool/a")
    assert "app=other" in known.conditions["pool/a"]


def test_two_pools_that_select_the_same_pods_are_named_with_an_example() -> None:
    known = Known(Scope("ns", ("a",)))
    known.pool("a")
    known.pool("b", labels={"tier": "gold"})
    known.pod("pool/a", "x", labels={"tier": "gold"})
    known.pod("pool/a", "y", "10.0.0.2", labels={"tier": "gold"})
    known.pod("pool/a", "z", "10.0.0.3")
    words = "b selects pods of a, too (such as x): what it sends there shows in their metrics only"
    assert known.conditions["pool/a/also-in/b"] == words
    assert len(known.told.routable) == 3
    known.drop_pod("pool/a", "x")
    assert "such as y" in known.conditions["pool/a/also-in/b"]
    known.drop_pool("b")
    assert dict(known.conditions) == {}


def test_a_pool_that_comes_later_is_compared_with_the_pods_that_are_there() -> None:
    known = Known(Scope("ns", ("a", "b")))
    known.pool("a")
    known.pod("pool/a", "x")
    known.pool("b")
    known.pod("pool/b", "x")
    assert "b selects pods of a, too" in known.conditions["pool/a/also-in/b"]
    assert set(known.told.routable) == {"x-rank-0"}
    known.pool("b", labels={"app": "other"})
    assert "pool/a/also-in/b" not in known.conditions


def test_a_pod_without_an_address_is_told_of_and_the_rest_goes_on() -> None:
    known = Known(Scope("ns", ("a",)))
    known.pool("a")
    known.pod("pool/a", "x", "")
    known.pod("pool/a", "y", "10.0.0.2")
    assert known.conditions["pod/x"] == "is ready and has no IP address"
    assert set(known.told.routable) == {"y-rank-0"}
    known.pod("pool/a", "x", "10.0.0.1")
    assert dict(known.conditions) == {}
    assert len(known.told.routable) == 2


def test_only_the_leader_of_a_group_is_an_endpoint() -> None:
    known = Known(Scope("ns", ("a",)))
    known.pool("a")
    for index in range(3):
        labels = {"leaderworkerset.sigs.k8s.io/worker-index": str(index)}
        known.pod("pool/a", f"lws-0-{index}", f"10.0.0.{index + 1}", labels=labels)
    assert known.told.routable == {"lws-0-0-rank-0": "10.0.0.1:8000"}


def test_gone_pods_and_pools_leave_no_words_behind() -> None:
    known = Known(Scope("ns", ("a",)))
    known.pool("a")
    known.pod("pool/a", "x", "")
    known.drop_pod("pool/a", "x")
    assert "pod/x" not in known.conditions
    known.pod("pool/a", "x", "")
    known.drop_pool("a")
    assert dict(known.conditions) == {}


def test_gprc_pools_are_served_by_load_and_that_is_said() -> None:
    known = Known(Scope("ns", ("a",)))
    value = pool("a")
    value["spec"]["appProtocol"] = "kubernetes.io/h2c"
    known.put_pool(objects.pools("ns", objects.POOL_GROUP).read(json.dumps(value).encode()))
    assert "gRPC requests are not read" in known.conditions["pool/a/protocol"]


def test_a_server_with_an_address_of_each_family_is_one_endpoint() -> None:
    known = Known(Scope("ns", services=("s",)))
    known.slice("s", "s-6", address("fd00::1", "x"), kind="IPv6")
    known.slice("s", "s-4", address("10.0.0.1", "x"))
    assert known.told.routable == {"x-rank-0": "10.0.0.1:8000"}
    known.drop_slice("s", "s-4")
    assert known.told.routable == {"x-rank-0": "[fd00::1]:8000"}


def test_an_address_that_leaves_its_slice_is_gone() -> None:
    known = Known(Scope("ns", services=("s",)))
    known.slice("s", "s-1", address("10.0.0.1", "x"), address("10.0.0.2", "y"))
    known.slice("s", "s-1", address("10.0.0.2", "y"))
    assert known.told.endpoints.keys() == {"y-rank-0"}
    known.slice("s", "s-2", address("10.0.0.2", "y"))
    known.slice("s", "s-1")
    assert known.told.routable == {"y-rank-0": "10.0.0.2:8000"}


def test_a_service_without_endpoints_is_named() -> None:
    known = Known(Scope("ns", services=("s",)))
    known.listed("service/s")
    assert known.conditions["service/s"] == "it has no pods"
    known.slice("s", "s-4", address("10.0.0.1", "x", ready=False))
    assert known.conditions["service/s"] == "none of its pods is ready"
    known.slice("s", "s-4", address("10.0.0.1", "x", ready=True))
    assert dict(known.conditions) == {}


def test_conditions_are_told_to_the_log_when_they_change(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "picker.kubernetes")
    known = Conditions()
    known.note("pool/a", "bad")
    known.note("pool/a", "bad")
    known.note("pool/a", None)
    known.note("pool/a", None)
    assert [record.getMessage() for record in caplog.records] == ["pool/a: bad", "pool/a: good again"]
