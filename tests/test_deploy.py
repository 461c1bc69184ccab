"""Deployment files are what the code would write."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from picker.envoy import Topology, bootstrap

FOLDER = Path(__file__).parent.parent / "deploy" / "envoy"
FILES = {"envoy.yaml": Topology.OVERRIDE_HOST, "original-dst.yaml": Topology.ORIGINAL_DST}


@pytest.mark.parametrize("name", FILES)
def test_an_envoy_file_is_the_configuration_that_envoy_is_tested_with(name: str) -> None:
    written = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    pods = ["127.0.0.1:8001", "127.0.0.1:8002"]
    built = bootstrap(pods, "127.0.0.1:9002", topology=FILES[name], address="127.0.0.1:8081", admin="127.0.0.1:9901")
    assert written == built


def test_every_envoy_file_is_held_to_the_code() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FILES)
