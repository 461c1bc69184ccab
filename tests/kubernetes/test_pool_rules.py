"""What an API server has against an InferencePool, `picker check --files` has, too, and neither more nor less.

The verdicts stand here, held to a real API server where there is one. It does not look at the keys of labels.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kubernetes.manifests import POOLS, Json, pool
from kubernetes.stage import Stage, on_a_real_one
from picker.check.manifests import pool_schema
from picker.check.papers import Papers

# (what is changed, where and to what; None takes it away; whether it is refused)
CASES: list[tuple[str, Any, bool]] = [
    ("", None, False),
    ("selector", None, True),
    ("selector", {}, True),
    ("selector", {"matchLabels": {}}, True),
    ("selector", {"app": "vllm"}, True),
    ("selector", {"matchExpressions": [{"key": "app", "operator": "Exists"}]}, True),
    ("selector.matchLabels", {"app": "-vllm"}, True),
    ("selector.matchLabels", {"app": ""}, False),
    ("selector.matchLabels", {"app": 7}, True),
    ("selector.matchLabels", {"app": "x" * 63}, False),
    ("selector.matchLabels", {"app": "x" * 64}, True),
    ("selector.matchLabels", {"example.com/app": "a"}, False),
    ("selector.matchLabels", {"a b": "a"}, False),
    ("selector.matchLabels", {"/a": "a"}, False),
    ("selector.matchLabels", {"x" * 64: "a"}, False),
    ("selector.matchLabels", {f"l{number}": "a" for number in range(64)}, False),
    ("selector.matchLabels", {f"l{number}": "a" for number in range(65)}, True),
    ("targetPorts", None, True),
    ("targetPorts", [], True),
    ("targetPorts", [{"number": number} for number in range(1, 9)], False),
    ("targetPorts", [{"number": number} for number in range(1, 10)], True),
    ("targetPorts", [{"number": 8000}, {"number": 8000}], True),
    ("targetPorts", [{"number": 0}], True),
    ("targetPorts", [{"number": 65536}], True),
    ("targetPorts", [{"number": "8000"}], True),
    ("targetPorts", [{}], True),
    ("targetPortNumber", 8000, True),
    ("appProtocol", "http", False),
    ("appProtocol", "kubernetes.io/h2c", False),
    ("appProtocol", "grpc", True),
    ("endpointPickerRef", None, False),
    ("endpointPickerRef.name", None, True),
    ("endpointPickerRef.name", "", True),
    ("endpointPickerRef.name", "x" * 253, False),
    ("endpointPickerRef.name", "x" * 254, True),
    ("endpointPickerRef.port", None, True),
    ("endpointPickerRef.port", {"number": 70000}, True),
    ("endpointPickerRef.kind", "Service", False),
    ("endpointPickerRef.kind", "A Service", True),
    ("endpointPickerRef.kind", "", True),
    ("endpointPickerRef.group", "", False),
    ("endpointPickerRef.group", "example.com", False),
    ("endpointPickerRef.group", "Example", True),
    ("endpointPickerRef.failureMode", "FailOpen", False),
    ("endpointPickerRef.failureMode", "Open", True),
    ("endpointPickerRef.namespace", "other", True),
]


def changed(path: str, value: Any) -> Json:
    found = copy.deepcopy(pool())
    *above, last = path.split(".")
    at = found["spec"]
    for key in above:
        at = at[key]
    if value is None:
        at.pop(last, None)
    else:
        at[last] = value
    return {"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool", **found}


@pytest.mark.parametrize(("path", "value", "refused"), CASES)
def test_the_check_of_files_refuses_what_is_refused(path: str, value: Any, refused: bool) -> None:
    told = pool_schema(changed(path, value), Papers(()))
    assert (told is not None) is refused, told


@on_a_real_one
async def test_the_verdicts_are_the_api_servers(stage: Stage) -> None:
    collection = f"{POOLS[0]}/namespaces/{stage.namespace}/{POOLS[1]}"
    found = {}
    for number, (path, value, refused) in enumerate(CASES):
        answer = await stage.ask(
            "POST", collection, changed(path, value), {"dryRun": "All", "fieldValidation": "Strict"}
        )
        if (answer.status != 201) is not refused:
            found[number] = (path, value, answer.status, answer.value.get("message"))
    assert found == {}
