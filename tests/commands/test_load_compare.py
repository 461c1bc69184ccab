from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from load.runs import noisy
from picker.__main__ import cli
from picker.errors import ConfigError
from picker.load.saved import dump


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["load", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of the same plan, of which the second is slower."""
    paths = tmp_path / "before.json", tmp_path / "after.json"
    for path, run in zip(paths, (noisy(1), noisy(2, slower=1.5)), strict=True):
        path.write_text(dump(run), encoding="utf-8")
    return paths


def test_saved_runs_are_compared(files: tuple[Path, Path]) -> None:
    result = invoke("compare", *files)
    assert result.exit_code == 0
    assert "A: before, B: after (300 requests, paired)" in result.stdout
    assert "B is worse" in result.stdout
    assert "repeat them" in result.stderr


def test_json_is_all_there_is_on_stdout(files: tuple[Path, Path]) -> None:
    payload = json.loads(invoke("compare", *files, "--json", "--slo", "ttft=0.5").stdout)
    assert payload["baseline"] == "before"
    (compared,) = payload["compared"]
    assert (compared["name"], compared["paired"]) == ("after", 300)
    ttft = compared["metrics"][0]
    assert ttft["low"] < ttft["ratio"] < ttft["high"]
    assert "good: TTFT ≤ 0.5 s" in [line["metric"] for line in compared["metrics"]]


def test_the_page_of_a_comparison_is_written(files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib jinja2")
    pytest.importorskip("jinja2", reason="pip install matplotlib jinja2")
    page = tmp_path / "compare.html"
    assert invoke("compare", *files, "--html", page).exit_code == 0
    assert "after beside before" in page.read_text(encoding="utf-8")


def test_a_report_is_made_again_of_a_saved_run(files: tuple[Path, Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert invoke("report", files[0], "--report", report).exit_code == 0
    assert json.loads(report.read_text(encoding="utf-8"))["version"] == "0.2.1"


def test_runs_at_several_rates_say_where_the_knee_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install matplotlib jinja2")
    paths = []
    for rate, slower in ((4, 1.0), (8, 9.0)):
        paths.append(tmp_path / f"at-{rate}.json")
        paths[-1].write_text(dump(replace(noisy(rate, slower=slower), rate=float(rate))), encoding="utf-8")
    result = invoke("report", *paths, "--html", tmp_path / "ladder.html", "--slo", "ttft=1")
    assert "at 4/s, missed at 8/s" in result.stdout
    assert "Latency against rate" in (tmp_path / "ladder.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("compare", "one.json"), "two saved runs"),
        (("compare", "one.json", "two.json"), r"one\.json: No such file"),
        (("report", "one.json"), "--html or --report"),
        (("report", "one.json", "--report", "x.txt"), "must end in"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        invoke(*arguments)


def test_help_names_what_stands_beside_a_url() -> None:
    text = invoke("--help").stdout
    for words in ("load URL", "load compare FILE...", "load report FILE..."):
        assert words in text.replace("[OPTIONS] ", "")
