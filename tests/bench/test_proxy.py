"""`picker bench proxy` with numbers too small to mean anything: that it runs, and what it finds."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from picker.bench import peers
from picker.bench.client import AnswerError
from picker.bench.proxy import COLUMNS, Way, _own, has_envoy, rows
from picker.commands.bench import command

CONTRACT = {
    *("name", "prompt_bytes", "chunks", "requests_per_s", "cpu_us_per_request", "added_p50_ms", "added_p99_ms"),
    "rss_mb",
}


def measured(warnings: list[str]) -> list[dict[str, Any]]:
    """Rows, over a longer time where a slow machine comes to nothing in a short one."""
    hear = warnings.append
    for seconds in (0.05, 0.5, 5.0):
        warnings.clear()
        with contextlib.suppress(AnswerError):
            found = asyncio.run(rows(prompt_bytes=[512], chunks=[0, 2], seconds=seconds, repeats=1, warn=hear))
            if all(row["name"] == "direct" or row["cpu_us_per_request"] for row in found):
                return found
    raise AssertionError("no request was answered, or none cost anything")


@pytest.mark.e2e
def test_every_way_gets_a_row_with_the_keys_of_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(peers.ENVIRONMENT, str(tmp_path / "nowhere"))
    broken = tmp_path / "smg"
    broken.write_text("#!/bin/sh\n# from smg.cli import main\necho out of order >&2\nexit 3\n")
    broken.chmod(0o755)
    warnings: list[str] = []
    found = measured(warnings)
    behind_envoy = ["picker+envoy"] if has_envoy() else []
    ways = ["direct", "picker", *behind_envoy]
    assert [(row["name"], row["chunks"]) for row in found] == [(name, chunks) for chunks in (0, 2) for name in ways]
    assert all(row.keys() >= CONTRACT | set(COLUMNS) for row in found)
    direct, picker, *through_envoy = found[: len(ways)]
    assert direct["envoy_cpu_us_per_request"] is picker["envoy_cpu_us_per_request"] is None
    for row in through_envoy:
        assert row["cpu_us_per_request"] > 0
        assert row["envoy_cpu_us_per_request"] > 0
        assert row["envoy_rss_mb"] > 1
    assert (direct["cpu_us_per_request"], direct["added_p50_ms"], direct["rss_mb"]) == (None, None, None)
    assert picker["cpu_us_per_request"] > 0
    assert picker["half_added_p99_ms"] is not None
    assert direct["half_added_p99_ms"] is None
    assert picker["rss_mb"] > 1
    (warning,) = warnings
    assert warning.startswith("smg is left out")
    assert "out of order" in warning


def test_the_cpu_of_a_gateway_is_told_apart_from_that_of_its_envoy() -> None:
    assert Way((1,), 10, envoy=11).processes == {"gateway": 10, "envoy": 11}
    assert Way((1,), 10).processes == {"gateway": 10}
    assert not Way((1,), None).processes
    assert _own({"gateway": 5.0, "envoy": 3.0}) == 2.0
    assert _own({}) is None


@pytest.mark.parametrize("wrong", ["--seconds=0", "--repeats=0", "--prompt-bytes=10", "--chunks=-1"])
def test_numbers_that_make_no_sense_are_wrong_usage(wrong: str) -> None:
    for name in ("extproc", "proxy"):
        assert CliRunner().invoke(command, [name, wrong]).exit_code == 2


@pytest.mark.parametrize("name", ["extproc", "proxy"])
def test_help_tells_the_defaults(name: str) -> None:
    done = CliRunner().invoke(command, [name, "--help"])
    assert done.exit_code == 0
    assert "220000" in done.output
