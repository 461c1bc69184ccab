"""`picker check` as a command: what it refuses, what it exits with, and a real run on picker itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from picker.check import registry
from picker.commands.check import command


def check(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to check"),
        (["--epp", "127.0.0.1:9002", "--self"], "one at a time"),
        (["--envoy", "--files", "."], "--envoy goes around a picker"),
        (["--self", "--only", "EPP-99"], "no such check"),
        (["--epp", "127.0.0.1:9002", "--tier", "T0"], "--tier T0 needs --files"),
        (["--epp", "127.0.0.1:9002", "--tier", "T2"], "--tier T2 needs --envoy"),
    ],
)
def test_wrong_usage_is_refused(arguments: list[str], complaint: str) -> None:
    result = check(*arguments)
    assert result.exit_code == 2
    assert complaint in result.output


def test_an_address_without_a_port_is_refused() -> None:
    assert "not host:port" in str(check("--epp", "localhost").exception)


def test_all_checks_are_listed_once() -> None:
    listed = [row["id"] for row in json.loads(check("--list", "--json").output)["checks"]]
    assert listed == [one.id for one in registry.ALL]
    assert len(set(listed)) == len(listed)


def test_good_files_exit_0_and_bad_ones_1(tmp_path: Path) -> None:
    path = tmp_path / "picker.yaml"
    path.write_text("queue: {size: 4}\n")
    assert check("--files", str(path)).exit_code == 0
    path.write_text("queue: {sise: 4}\n")
    result = check("--files", str(path), "--json", "--output", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failed"] == 1
    assert (tmp_path / "out" / "junit.xml").exists()


def picker(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "picker", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.e2e
def test_picker_passes_its_own_checks_by_grpc() -> None:
    done = picker("check", "--self", "--tier", "T1", "--bound", "4", "--json")  # this machine may be slow
    found = json.loads(done.stdout)
    bad = {row["id"]: row["why"] for row in found["results"] if row["verdict"] in ("fail", "error")}
    assert (bad, done.returncode) == ({}, 0)


@pytest.mark.e2e
def test_a_picker_that_is_not_there_is_told_in_one_line() -> None:
    done = picker("check", "--epp", "127.0.0.1:1")
    assert done.returncode == 2
    assert done.stderr.startswith("picker: no picker answers at 127.0.0.1:1")
    assert len(done.stderr.splitlines()) == 1
