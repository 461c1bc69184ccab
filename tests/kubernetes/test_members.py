from __future__ import annotations

import json
from typing import Any

import pytest

from kubernetes.manifests import address, endpoint_slice, pod
from picker.sources.kubernetes import objects
from picker.sources.kubernetes.members import Member, Standing, is_worker, member_of_pod, members_of_slice
from picker.types import Role


def parsed(*arguments: Any, **more: Any) -> objects.Pod:
    return objects.pods("ns", "").read(json.dumps(pod(*arguments, **more)).encode())


def member(*arguments: Any, **more: Any) -> Member:
    return member_of_pod(parsed(*arguments, **more))


@pytest.mark.parametrize(
    ("more", "standing"),
    [
        ({}, Standing.READY),
        ({"ready": False}, Standing.NOT_READY),
        ({"deleting": True}, Standing.TERMINATING),
        ({"deleting": True, "ready": False}, Standing.TERMINATING),
        ({"phase": "Failed"}, Standing.OVER),
        ({"phase": "Succeeded", "deleting": True}, Standing.OVER),
    ],
)
def test_a_pods_standing(more: dict[str, Any], standing: Standing) -> None:
    assert member("a", **more).standing is standing


def test_every_port_is_an_endpoint_of_its_own_by_the_endpoint_pickers_name() -> None:
    endpoints = member("a", labels={"zone": "x"}).endpoints((8000, 8001))
    assert [(each.name, each.address, each.rank) for each in endpoints] == [
        ("a-rank-0", "10.0.0.1:8000", None),
        ("a-rank-1", "10.0.0.1:8001", None),
    ]
    assert endpoints[0].labels == {"app": "vllm", "zone": "x"}


def test_an_ipv6_address_is_put_in_brackets() -> None:
    assert member("a", "fd00::1").endpoints((8000,))[0].address == "[fd00::1]:8000"


@pytest.mark.parametrize("key", ["llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports"])
def test_active_ports_keep_their_place_in_the_pool(key: str) -> None:
    endpoints = member("a", annotations={key: " 8001,9999 "}).endpoints((8000, 8001))
    assert [(each.name, each.address) for each in endpoints] == [("a-rank-1", "10.0.0.1:8001")]


@pytest.mark.parametrize(
    ("label", "role"),
    [
        ("prefill", Role.PREFILL),
        ("encode-prefill", Role.PREFILL),
        ("decode", Role.DECODE),
        ("both", Role.BOTH),
        ("prefill-decode", Role.BOTH),
    ],
)
def test_the_role_is_a_label(label: str, role: Role) -> None:
    assert member("a", labels={"llm-d.ai/role": label}).role is role


def test_models_scheme_and_engine_type_are_read() -> None:
    found = member(
        "a",
        annotations={"picker/models": "Qwen/Qwen3-32B, sql-lora", "picker/scheme": "https"},
        labels={"inference.networking.k8s.io/engine-type": "sglang"},
    )
    endpoint = found.endpoints((8000,))[0]
    assert endpoint.models == {"Qwen/Qwen3-32B", "sql-lora"}
    assert endpoint.scheme == "https"
    assert endpoint.labels["llm-d.ai/engine-type"] == "sglang"


def test_kv_events_are_at_a_port_of_their_own_for_each_rank() -> None:
    said = {"picker/kv-events": "tcp://{host}:5557", "picker/kv-replay": "tcp://{host}:5600"}
    endpoints = member("a", annotations=said).endpoints((8000, 8001))
    assert [(each.labels["kv-events"], each.labels["kv-replay"]) for each in endpoints] == [
        ("tcp://{host}:5557", "tcp://{host}:5600"),
        ("tcp://{host}:5558", "tcp://{host}:5601"),
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"ip": ""}, "is ready and has no IP address"),
        ({"ip": "not an address"}, "is ready and has no usable IP address ('not an address')"),
        ({"labels": {"llm-d.ai/role": "dekode"}}, "has the label llm-d.ai/role=dekode, which is none of both"),
        ({"annotations": {"picker/scheme": "ftp"}}, "picker/scheme=ftp, which is neither http nor https"),
        (
            {"annotations": {"llm-d.ai/active-ports": "8000;1"}},
            "active-ports=8000;1, which is no list of ports",
        ),
    ],
)
def test_what_is_wrong_with_a_pod_is_said_in_plain_words(more: dict[str, Any], words: str) -> None:
    found = member("a", **more)
    assert words in found.notes[0]
    assert bool(found.endpoints((8000,))) == ("ip" not in more)


def test_a_pod_that_waits_for_its_address_is_nothing_to_talk_about() -> None:
    assert member("a", "", ready=False, phase="Pending").notes == ()


def test_workers_of_a_group_are_told_from_its_leader() -> None:
    label = "leaderworkerset.sigs.k8s.io/worker-index"
    assert [is_worker(parsed("a", labels={label: index})) for index in ("0", "1")] == [False, True]
    assert not is_worker(parsed("a"))


def test_of_several_containers_all_count_unless_one_is_named() -> None:
    value = pod("a", annotations={"kubectl.kubernetes.io/default-container": "vllm"})
    value["status"]["containerStatuses"].append({"name": "proxy", "containerID": "containerd://p"})
    reader = objects.pods("ns", "").read
    assert [each.container for each in member_of_pod(reader(json.dumps(value).encode())).engines] == ["vllm"]
    del value["metadata"]["annotations"]
    assert [each.container for each in member_of_pod(reader(json.dumps(value).encode())).engines] == ["vllm", "proxy"]


def test_slices_list_addresses_with_their_ports_and_standing() -> None:
    value = endpoint_slice(
        "s",
        address("10.0.0.1", "a"),
        address("10.0.0.2", "b", ready=False),
        address("10.0.0.3", "c", ready=False, serving=True, terminating=True),
        address("10.0.0.4"),
        {"addresses": []},
    )
    value["ports"] += [{"port": 9090, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}, {"name": "none"}]
    found = objects.slices("ns", "s").read(json.dumps(value).encode())
    members = members_of_slice(found, ())
    assert [(each.name, each.standing, each.ports) for each in members] == [
        ("a", Standing.READY, (8000, 9090)),
        ("b", Standing.NOT_READY, (8000, 9090)),
        ("c", Standing.TERMINATING, (8000, 9090)),
        ("10.0.0.4", Standing.READY, (8000, 9090)),
    ]
    assert members_of_slice(found, (8000,))[0].ports == (8000,)
