"""`picker check` as a command: what it refuses, what it exits with, and a real run on picker itself."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from picker import envoy
from picker.check import registry, session
from picker.check.session import Plan, Run
from picker.check.verdict import Outcome, Tier
from picker.commands.check import command
from picker.envoy import Topology
from picker.errors import ConfigError


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


# --- without an Envoy ----------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """What would be run, on a machine without an Envoy."""
    plans: list[Plan] = []

    async def run(plan: Plan, tell: object) -> Run:
        plans.append(plan)
        return Run()

    def none() -> Path:
        raise ConfigError("No Envoy found. Install it")

    monkeypatch.setattr(session, "run", run)
    monkeypatch.setattr(envoy, "find_envoy", none)
    return plans


def test_picker_itself_is_checked_without_what_takes_an_envoy(planned: list[Plan]) -> None:
    check("--self")
    check("--self", "--only", "EPP-6")
    check("--self", "--only", "EPP-12")
    assert [plan.no_envoy for plan in planned] == ["No Envoy found. Install it", "", "No Envoy found. Install it"]


@pytest.mark.parametrize("asked", [("--self", "--tier", "T2"), ("--epp", "a:1", "--envoy"), ("--self", "--envoy")])
def test_an_envoy_that_is_asked_for_has_to_be_there(planned: list[Plan], asked: tuple[str, ...]) -> None:
    result = check(*asked)
    assert (str(result.exception), planned) == ("No Envoy found. Install it", [])


async def test_what_takes_an_envoy_is_skipped_with_the_reason() -> None:
    plan = Plan(frozenset({Tier.T2}), only=("CHURN",), topologies=tuple(Topology), no_envoy="No Envoy found.")
    done = await session.run(plan, lambda verdict: None)
    assert [(one.name, one.outcome, one.why) for one in done.verdicts] == [
        (f"CHURN-{check}[{topology}]", Outcome.SKIP, "No Envoy found.")
        for topology in ("override_host", "original_dst")
        for check in ("1.leave", "2.outage")
    ]


# --- nobody there --------------------------------------------------------------------------------------------


def test_an_address_where_nobody_listens_is_said_to_be_unreachable() -> None:
    with socket.socket() as held:  # bound and not listening: nobody else gets the port meanwhile
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        result = check("--engine", url, "--admin", url, "--json", "--only", "ADM-1", "--only", "KV-1")
    assert result.exit_code == 1
    whys = {row["id"]: row["why"] for row in json.loads(result.stdout)["results"]}
    assert whys["KV-1.caching"] == f"{url} cannot be reached: connection refused"
    assert whys["ADM-1.reachable"] == f"no picker can be reached at {url}: connection refused"


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
