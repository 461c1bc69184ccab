"""`picker bench proxy` with numbers too small to mean anything: that it runs, and what it finds."""

import asyncio
from pathlib import Path

import pytest
from click.testing import CliRunner

from picker.bench import peers
from picker.bench.proxy import COLUMNS, rows
from picker.commands.bench import command

CONTRACT = {
    *("name", "prompt_bytes", "chunks", "requests_per_s", "cpu_us_per_request", "added_p50_ms", "added_p99_ms"),
    "rss_mb",
}


@pytest.mark.e2e
def test_every_way_gets_a_row_with_the_keys_of_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(peers.ENVIRONMENT, str(tmp_path / "nowhere"))
    broken = tmp_path / "smg"
    broken.write_text("#!/bin/sh\n# from smg.cli import main\necho out of order >&2\nexit 3\n")
    broken.chmod(0o755)
    warnings: list[str] = []
    found = asyncio.run(rows(prompt_bytes=[512], chunks=[0, 2], seconds=0.05, repeats=1, warn=warnings.append))
    assert [(row["name"], row["chunks"]) for row in found] == [
        ("direct", 0),
        ("picker", 0),
        ("direct", 2),
        ("picker", 2),
    ]
    assert all(row.keys() >= CONTRACT | set(COLUMNS) for row in found)
    direct, picker = found[:2]
    assert (direct["cpu_us_per_request"], direct["added_p50_ms"], direct["rss_mb"]) == (None, None, None)
    assert picker["cpu_us_per_request"] > 0
    assert picker["half_added_p99_ms"] is not None
    assert direct["half_added_p99_ms"] is None
    assert picker["rss_mb"] > 1
    (warning,) = warnings
    assert warning.startswith("smg is left out")
    assert "out of order" in warning


@pytest.mark.parametrize("wrong", ["--seconds=0", "--repeats=0", "--prompt-bytes=10", "--chunks=-1"])
def test_numbers_that_make_no_sense_are_wrong_usage(wrong: str) -> None:
    for name in ("extproc", "proxy"):
        assert CliRunner().invoke(command, [name, wrong]).exit_code == 2


@pytest.mark.parametrize("name", ["extproc", "proxy"])
def test_help_tells_the_defaults(name: str) -> None:
    done = CliRunner().invoke(command, [name, "--help"])
    assert done.exit_code == 0
    assert "220000" in done.output
