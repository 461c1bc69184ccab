"""Writes the files here that are made from others: `python -m deploy.generate`. tests/deploy holds them to it.

Owns which file is a copy of which: the dashboard, the alert rules, the rights and the Envoy configuration stand in the
kustomize folders and in the chart, and neither tool reads beyond its own folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml
from deploy.dashboard import dashboard

from picker.envoy import Topology, bootstrap, to_yaml

FOLDER = Path(__file__).parent
_KUBERNETES, _CHART = "kubernetes", "helm/picker/files"
_ENVOY = """\
# Envoy beside picker in one pod, for a pool whose members it does not know: it goes where picker's metadata says, never
# where a header says. python -m deploy.generate writes this file.
"""
_COPY = "# python -m deploy.generate writes this file from {}.\n"


def files() -> Mapping[str, str]:
    """What is made, by its path in this folder."""
    grafana = json.dumps(dashboard(), indent=1) + "\n"
    envoy = _ENVOY + to_yaml(_sidecar())
    rules, rights = f"{_KUBERNETES}/components/monitoring/rules.yaml", f"{_KUBERNETES}/base/rbac.yaml"
    election = f"{_KUBERNETES}/components/leader-election/rbac.yaml"
    return {
        f"{_KUBERNETES}/components/monitoring/picker.json": grafana,
        f"{_CHART}/dashboard.json": grafana,
        f"{_KUBERNETES}/overlays/envoy-sidecar/envoy.yaml": envoy,
        f"{_CHART}/envoy.yaml": envoy,
        f"{_CHART}/alerts.yaml": _COPY.format(rules) + _part(rules, "PrometheusRule", "spec"),
        f"{_CHART}/rights.yaml": _COPY.format(rights) + _part(rights, "Role", "rules"),
        f"{_CHART}/election.yaml": _COPY.format(election) + _part(election, "Role", "rules"),
    }


def _sidecar() -> dict[str, object]:
    to_picker = "127.0.0.1:9002"
    return bootstrap([], to_picker, topology=Topology.ORIGINAL_DST, address="0.0.0.0:8081", admin="127.0.0.1:9901")


def _part(path: str, kind: str, key: str) -> str:
    """One key of the one object of this kind in a file."""
    documents = yaml.safe_load_all((FOLDER / path).read_text(encoding="utf-8"))
    (value,) = [each[key] for each in documents if each["kind"] == kind]
    return yaml.safe_dump(value if key == "spec" else {key: value}, sort_keys=False, width=200)


def main() -> None:
    for path, text in files().items():
        (FOLDER / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
