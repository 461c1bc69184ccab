"""docs/deploy.md: its table of values is the chart's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deploy.rendered import CHART, KUBERNETES, OVERLAYS, ROOT, deployment, kubectl, of, picker

MANUAL = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


def leaves(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Values that stand for themselves; what the schema leaves open is one."""
    for key, value in values.items():
        inner = schema["properties"][key]
        if isinstance(value, dict) and "properties" in inner and value:
            yield from leaves(value, inner, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def test_the_table_has_every_value_and_its_default() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \|", MANUAL, flags=re.MULTILINE))
    assert rows == {path: json.dumps(value) for path, value in leaves(VALUES, SCHEMA)}


def test_every_row_says_something() -> None:
    rows = re.findall(r"^\| `[\w.]+` \| `[^`]*` \| (.*) \|$", MANUAL, flags=re.MULTILINE)
    assert rows
    assert all(rows)


def test_every_overlay_is_named() -> None:
    assert all(f"| `{name}` |" in MANUAL for name in OVERLAYS)


def test_files_that_are_named_exist() -> None:
    for path in re.findall(r"`((?:deploy|docs|bench|tests)/[\w./-]+)`", MANUAL):
        assert (ROOT / path).exists(), path


def test_the_overlay_of_ones_own_is_one_that_kubectl_takes(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(# kustomization.yaml\n.*?)```", MANUAL, flags=re.DOTALL)
    plan = yaml.safe_load(text)
    (named,) = plan["resources"]
    there = KUBERNETES / named.partition("deploy/kubernetes/")[2]
    plan["resources"] = [os.path.relpath(there, tmp_path.resolve())]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(plan))
    (found,) = kubectl([tmp_path])
    assert picker(found)["image"] == "images.example.org/picker:0.1.0"
    assert deployment(found)["metadata"]["namespace"] == "llm"
    (pool,) = of("InferencePool", found)
    assert pool["spec"]["selector"]["matchLabels"] == {"app": "my-engines"}


def test_the_commands_of_the_manual_set_values_that_there_are() -> None:
    for path in re.findall(r"--set ([\w.]+)=", MANUAL):
        at = SCHEMA
        for key in path.split("."):
            at = at["properties"][key] if "properties" in at else at["additionalProperties"]
        assert at
