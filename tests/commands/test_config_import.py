import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from picker.commands.config import command
from picker.config import load_config
from picker.errors import ConfigError

FIXTURES = Path(__file__).parent.parent / "fixtures" / "epp"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command, ["import", *arguments], catch_exceptions=False)


def test_the_configuration_is_on_stdout_and_the_report_on_stderr() -> None:
    done = run(str(FIXTURES / "pd.yaml"))
    assert done.exit_code == 0
    assert yaml.safe_load(done.stdout)["profile"] == "decode"
    assert "missing   plugins[7] prefix-based-pd-decider: " in done.stderr
    assert done.stderr.rstrip().endswith("1 missing")


def test_json_has_both(tmp_path: Path) -> None:
    done = run(str(FIXTURES / "pd.yaml"), "--json")
    said = json.loads(done.stdout)
    assert said["from"] == "epp"
    assert said["config"]["profile"] == "decode"
    assert sum(said["counts"].values()) == len(said["report"])
    assert {"where", "fate", "says"} == set(said["report"][0])
    assert not done.stderr


def test_what_is_written_is_a_configuration_of_pickers_own(tmp_path: Path) -> None:
    written = tmp_path / "picker.yaml"
    done = run(str(FIXTURES / "precise-prefix-cache.yaml"), "--from", "epp", "--output", str(written))
    assert not done.stdout
    assert load_config(written).exact.mode == "bytes"
    assert written.read_text().startswith("# Imported from precise-prefix-cache.yaml (epp).\n")


@pytest.mark.parametrize(("name", "status"), [("pd", 1), ("optimized-baseline", 0)])
def test_strict_is_not_content_when_something_is_missing(name: str, status: int) -> None:
    assert run(str(FIXTURES / f"{name}.yaml"), "--strict").exit_code == status


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins: [{type: x}]\n")
    with pytest.raises(ConfigError, match=r"wrong\.yaml: plugins\[0\]\.type: there is no plugin type 'x'"):
        run(str(wrong))
    with pytest.raises(ConfigError, match="cannot read"):
        run(str(tmp_path / "none.yaml"))


def test_a_command_line_goes_behind_a_double_dash() -> None:
    done = run("--from", "vllm-router", "--json", "--", "--worker-urls", "http://a:8000", "--policy", "cache_aware")
    said = json.loads(done.stdout)
    assert (said["from"], said["config"]) == ("vllm-router", {"endpoints": ["http://a:8000"], "policy": "picker"})


def test_a_command_line_with_its_name_needs_no_from() -> None:
    done = run("--", "smg", "launch", "--worker-urls", "http://a:8000")
    assert yaml.safe_load(done.stdout) == {"endpoints": ["http://a:8000"]}


def test_an_endpoint_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="endpoint 'http://a:1/x' goes on with '/x'"):
        run("--from", "smg", "--", "--worker-urls", "http://a:1/x")
