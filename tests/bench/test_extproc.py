"""`picker bench extproc` with numbers too small to mean anything: that it runs, and what it prints."""

import json
import subprocess
import sys
from typing import Any

import pytest

from picker.bench.extproc import COLUMNS, WORKER_COLUMNS
from picker.envoy import find_envoy
from picker.errors import ConfigError

try:
    find_envoy()
    missing = ""
except ConfigError as error:
    missing = str(error)

CONTRACT = {
    *("mode", "prompt_bytes", "chunks", "requests_per_s", "picker_cpu_us_per_request", "envoy_cpu_us_per_request"),
    *("added_p50_ms", "added_p99_ms"),
}


COSTS = {
    *("picker_cpu_us_per_request", "envoy_cpu_us_per_request", "slow_picker_cpu_us_per_request"),
    *("decider_cpu_us_per_request", "worker_cpu_us_per_request"),
}


def measured(*flags: str) -> Any:
    """What the command prints, over a longer time where a slow machine comes to nothing in a short one."""
    command = [sys.executable, "-m", "picker", "bench", "extproc", "--prompt-bytes", "512", "--json", "--repeats", "1"]
    for seconds in ("0.05", "0.5", "5"):
        done = subprocess.run([*command, *flags, "--seconds", seconds], capture_output=True, check=False)
        if b"not one chunk came" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr.decode()
        result = json.loads(done.stdout)
        if all(row[key] for row in result["rows"] for key in COSTS & row.keys()):
            return result
    raise AssertionError(f"no request was answered, or none cost anything: {done.stdout!r} {done.stderr!r}")


@pytest.mark.e2e
@pytest.mark.skipif(bool(missing), reason=missing)
def test_every_row_has_the_keys_of_the_contract() -> None:
    result = measured("--chunks", "3")
    assert result["bench"] == "extproc"
    assert {"cpu", "cores", "commit"} <= result["machine"].keys()
    assert [row["mode"] for row in result["rows"]] == ["full", "lean"]
    for row in result["rows"]:
        assert row.keys() >= CONTRACT | set(COLUMNS)
        assert (row["prompt_bytes"], row["chunks"]) == (512, 3)
        assert row["picker_cpu_us_per_request"] > 0
        assert row["envoy_cpu_us_per_request"] > 0
        idle_us = row["picker_idle_cores"] * 1e6 / row["requests_per_s"]
        net = row["picker_cpu_us_per_request"] - idle_us
        assert row["slow_picker_cpu_us_per_request"] > 0
        rounding = 2e-3 * (row["picker_cpu_us_per_request"] + idle_us)  # rows have four digits
        assert row["picker_net_cpu_us_per_request"] == pytest.approx(net, abs=rounding)


@pytest.mark.e2e
@pytest.mark.skipif(bool(missing), reason=missing)
def test_with_workers_a_row_says_what_the_decider_and_a_worker_cost() -> None:
    (row,) = measured("--mode", "lean", "--workers", "2", "--chunks", "0")["rows"]
    assert row.keys() >= CONTRACT | set(COLUMNS) | set(WORKER_COLUMNS)
    assert row["workers"] == 2
    decider, worker = row["decider_cpu_us_per_request"], row["worker_cpu_us_per_request"]
    assert min(decider, worker) > 0
    assert decider + worker == pytest.approx(row["picker_cpu_us_per_request"], rel=0.01)
