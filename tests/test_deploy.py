"""Deployment files are what the code would write."""

from __future__ import annotations

from pathlib import Path

import yaml

from picker.envoy import bootstrap

ROOT = Path(__file__).parent.parent


def test_the_envoy_file_is_the_configuration_that_envoy_is_tested_with() -> None:
    written = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text(encoding="utf-8"))
    pods = ["127.0.0.1:8001", "127.0.0.1:8002"]
    assert written == bootstrap(pods, "127.0.0.1:9002", address="127.0.0.1:8081", admin="127.0.0.1:9901")
