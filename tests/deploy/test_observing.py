"""The dashboard and the alert rules: every metric in them is one that picker has, and alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.dashboard import ROWS, dashboard
from deploy.generate import FOLDER, files

from deploy.rendered import KUBERNETES
from fakes import NOW, endpoint
from picker.app import App
from picker.commands.epp_serving import build
from picker.config import from_values
from picker.types import EndpointAdded, LoadObserved, RejectReason

MONITORING = KUBERNETES / "components" / "monitoring"
KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: a
clusters: [{name: a, cluster: {server: "http://127.0.0.1:1"}}]
contexts: [{name: a, context: {cluster: a, user: a, namespace: a}}]
users: [{name: a, user: {token: a}}]
"""
# Words of PromQL, which look like metrics.
_FUNCTIONS = {"sum", "max", "avg", "count", "rate", "increase", "absent", "histogram_quantile"}
_WORDS = {"by", "on", "le", "and", "or", "unless", "offset"} | _FUNCTIONS


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every sample that picker can show in a cluster, by name, with its labels."""
    kubeconfig = tmp_path_factory.mktemp("cluster") / "config"
    kubeconfig.write_text(KUBECONFIG)
    app = App(
        from_values(
            {
                "kubernetes": {"pools": ["vllm"], "kubeconfig": str(kubeconfig)},
                "exact": {"by": "bytes"},
                "epp": {"metrics_compat": True},
                "replicas": {"peers": ["a:1"], "secret": "only for this test"},
            }
        )
    )
    build(app)
    scheduler = app.runtime.scheduler
    scheduler.apply(EndpointAdded(endpoint("a")), NOW)
    scheduler.apply(LoadObserved("a", NOW, waiting=1.0, running=1.0, kv_usage=0.5), NOW)
    return dict(_samples(app.telemetry.registry.collect()))


def _samples(families: Iterable[Any]) -> Iterator[tuple[str, set[str]]]:
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    for family in families:
        labels = {label for sample in family.samples for label in sample.labels} | set(
            getattr(family, "_labelnames", ())
        )
        for ending in endings[family.type]:
            yield family.name + ending, labels


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((MONITORING / "rules.yaml").read_text(encoding="utf-8"))
    return [rule for group in document["spec"]["groups"] for rule in group["rules"]]


def metrics(query: str) -> set[str]:
    """The metrics that a query names."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|(?:by|on) \([^)]*\)', " ", query)
    return {word for word in re.findall(r"(?<![\w.])[a-zA-Z_:][a-zA-Z0-9_:]*", bare) if word not in _WORDS}


def queries() -> list[tuple[str, str]]:
    found = [(f"alert {rule['alert']}", rule["expr"]) for rule in rules()]
    found += [(panel.title, query) for row in ROWS for panel in row.panels for query, _ in panel.queries]
    adapter = yaml.safe_load(
        (KUBERNETES / "components" / "autoscaling" / "adapter-rules.yaml").read_text(encoding="utf-8")
    )
    return [*found, *(("adapter", rule["metricsQuery"]) for rule in adapter["externalRules"])]


def test_metrics_are_found_in_queries() -> None:
    query = 'max by (pod) (picker_a{b="c"}) > 1 and sum(rate(picker_d_total[5m])) / picker_e'
    assert metrics(query) == {"picker_a", "picker_d_total", "picker_e"}


@pytest.mark.parametrize(("where", "query"), queries())
def test_every_metric_is_one_that_picker_has(where: str, query: str, shown: dict[str, set[str]]) -> None:
    assert metrics(query)
    assert metrics(query) <= set(shown), where


def test_outcomes_in_alerts_are_outcomes() -> None:
    (rule,) = [rule for rule in rules() if rule["alert"] == "PickerRefusesRequests"]
    (left_out,) = re.findall(r'outcome!~"([^"]*)"', rule["expr"])
    assert set(left_out.split("|")) - {"picked"} <= {reason.value for reason in RejectReason}


def test_the_labels_that_alerts_speak_of_are_there(shown: dict[str, set[str]]) -> None:
    scraped = {"namespace", "pod", "service", "job"}  # put on by whoever scrapes
    for rule in rules():
        told = {label for text in rule["annotations"].values() for label in re.findall(r"\$labels\.(\w+)", text)}
        labels = set().union(*(shown[name] for name in metrics(rule["expr"])))
        assert told <= labels | scraped, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")


@pytest.mark.parametrize("path", files())
def test_a_file_that_is_made_is_as_it_would_be_made(path: str) -> None:
    assert (FOLDER / path).read_text(encoding="utf-8") == files()[path], "run python -m deploy.generate"


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    numbers = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_queries_of_the_dashboard_ask_for_the_chosen_pods_only() -> None:
    targets = [target for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    assert targets
    assert all('namespace=~"$namespace",pod=~"$pod"' in target["expr"] for target in targets)
    assert not any("MINE" in json.dumps(target) for target in targets)


def promtool() -> str:
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("there is no promtool on PATH (Debian has it in the package prometheus)")
    return binary


@pytest.fixture
def rule_file(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(files()["helm/picker/files/alerts.yaml"])
    return path


def test_prometheus_takes_the_rules(rule_file: Path) -> None:
    done = subprocess.run([promtool(), "check", "rules", str(rule_file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"{len(rules())} rules found" in done.stdout


def test_alerts_fire_when_they_should(rule_file: Path) -> None:
    """The stories in alert_stories.yaml, told to Prometheus."""
    stories = yaml.safe_load((Path(__file__).parent / "alert_stories.yaml").read_text(encoding="utf-8"))
    told = yaml.safe_load(rule_file.read_text(encoding="utf-8"))
    for rule in (rule for group in told["groups"] for rule in group["rules"]):
        del rule["annotations"]  # stories are about when, not about words
    rule_file.write_text(yaml.safe_dump(told))
    path = rule_file.with_name("stories.yaml")
    path.write_text(yaml.safe_dump(stories | {"rule_files": [str(rule_file)]}))
    done = subprocess.run([promtool(), "test", "rules", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_story() -> None:
    stories = yaml.safe_load((Path(__file__).parent / "alert_stories.yaml").read_text(encoding="utf-8"))["tests"]
    fired = {case["alertname"] for story in stories for case in story["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules()}
