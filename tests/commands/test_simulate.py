from __future__ import annotations

import json
import multiprocessing
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.progress import Progress, TaskID

from picker.commands import simulate as commands_simulate
from picker.commands.simulate import command
from picker.errors import ConfigError

# One process: workers cost more than these runs.
SMALL = ("--scenario", "S2", "--pods", "2", "--limit", "25", "--jobs", "1")
KEYS = {
    *("policy", "scenario", "model", "pods", "load", "seed", "requests", "failed", "ttft_mean_s", "ttft_p50_s"),
    *("ttft_p95_s", "ttft_p99_s", "e2e_mean_s", "e2e_p95_s", "tpot_mean_s", "hit_ratio", "output_tokens_per_s"),
    *("duration_s", "picks_max_over_mean"),
}


def call(*flags: str) -> Result:
    return CliRunner().invoke(command, flags, catch_exceptions=False)


def runs(*flags: str) -> list[dict[str, Any]]:
    result = call(*flags, "--json")
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)["runs"]
    return found


def trace_file(folder: Path) -> str:
    lines = [
        {"timestamp": 3000 * n, "input_length": 1024, "output_length": 5, "hash_ids": [0, n % 3]} for n in range(12)
    ]
    path = folder / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def test_there_is_a_run_for_each_policy_load_and_seed() -> None:
    found = runs(*SMALL, "--policy", "round-robin,picker", "--load", "0.2,0.4", "--seeds", "2")
    assert [(run["policy"], run["load"], run["seed"]) for run in found] == [
        (policy, load, seed) for load in (0.2, 0.4) for seed in (1, 2) for policy in ("round-robin", "picker")
    ]
    assert found[0].keys() >= KEYS
    assert (found[0]["scenario"], found[0]["pods"]) == ("agentic", 2)


def test_the_same_seed_prints_the_same_bytes() -> None:
    first, again = (call(*SMALL, "--policy", "picker,random", "--json").stdout for _ in range(2))
    assert first == again


def test_workers_print_what_one_process_prints() -> None:
    flags = (*SMALL[:-2], "--policy", "picker,random", "--limit", "8", "--json")
    assert (
        json.loads(call(*flags, "--jobs", "2").stdout)["runs"] == json.loads(call(*flags, "--jobs", "1").stdout)["runs"]
    )


def test_a_number_and_a_name_are_the_same_scenario() -> None:
    by_name = ("--scenario", "agentic", *SMALL[2:])
    assert runs(*SMALL, "--policy", "random") == runs(*by_name, "--policy", "random")


def test_a_trace_is_replayed_whole_without_a_load(tmp_path: Path) -> None:
    flags = ("--trace", trace_file(tmp_path), "--pods", "2", "--policy", "round-robin")
    (run,) = runs(*flags)
    assert (run["requests"], run["scenario"], run["load"], run["model"]) == (12, "trace", None, "qwen3-32b-2xh100")
    (quick,) = runs(*flags, "--rate-scale", "3")
    assert quick["duration_s"] < run["duration_s"]


def test_a_trace_may_take_the_pods_of_a_scenario(tmp_path: Path) -> None:
    (run,) = runs("--scenario", "S4", "--trace", trace_file(tmp_path), "--policy", "picker", "--limit", "10")
    assert (run["scenario"], run["pods"]) == ("conversation", 8)


def test_a_ladder_tells_of_its_stages() -> None:
    (run,) = runs("--scenario", "S1", "--policy", "round-robin", "--limit", "30")
    assert run["load"] is None
    assert [stage["rate"] for stage in run["stages"][:3]] == [15.0, 3.0, 10.0]
    assert run["stages"][0]["requests"] == 30


def test_people_get_a_table() -> None:
    result = call(*SMALL, "--policy", "random,picker", "--load", "0.3")
    assert "picker" in result.stdout
    assert "TTFT / random" in result.stdout
    assert "load 0.3" in result.stdout


def test_the_list_names_scenarios_policies_and_models() -> None:
    for flags in (("--list",), ("--list", "--json")):
        said = call(*flags).stdout
        assert all(word in said for word in ("S2", "agentic", "least-request", "deepseek-v3-8xh200"))


def test_several_scenarios_are_run_one_after_the_other_and_each_once() -> None:
    found = runs("--scenario", "S2,agentic,S3", *SMALL[2:], "--policy", "random", "--limit", "5")
    assert [run["scenario"] for run in found] == ["agentic", "bursty-chat"]


def test_the_table_tells_how_sure_a_ratio_is_when_there_are_seeds() -> None:
    flags = (*SMALL, "--policy", "random,picker", "--limit", "40")
    assert not re.search(r"\d \[\d", call(*flags).stdout)
    assert re.search(r"\d \[\d\.\d+, \d\.\d+\]", call(*flags, "--seeds", "2").stdout)


def saved(folder: Path, name: str, *flags: str) -> str:
    path = folder / name
    path.write_text(call(*SMALL, *flags, "--json").stdout, encoding="utf-8")
    return str(path)


def test_what_was_saved_is_joined_and_shown_without_running(tmp_path: Path) -> None:
    first = saved(tmp_path, "a.json", "--policy", "picker")
    other = saved(tmp_path, "b.json", "--policy", "random")
    joined = json.loads(call("--from", first, "--from", other, "--json").stdout)
    assert [run["policy"] for run in joined["runs"]] == ["picker", "random"]
    assert json.loads(Path(first).read_text(encoding="utf-8"))["runs"] == joined["runs"][:1]
    assert "Agentic coding sessions" in call("--from", first).stdout


def test_a_report_is_written_beside_the_json(tmp_path: Path) -> None:
    for library in ("matplotlib", "jinja2"):
        pytest.importorskip(library, reason=f"needs {library}: pip install matplotlib jinja2")
    page = tmp_path / "out.html"
    result = call(*SMALL, "--policy", "random", "--json", "--report", str(page))
    assert json.loads(result.stdout)["runs"]
    assert str(page) in result.stderr
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_without_its_libraries_a_report_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "picker.sim.report.page", raising=False)
    monkeypatch.delitem(sys.modules, "picker.sim.report.plots", raising=False)
    monkeypatch.delattr("picker.sim.report.page", raising=False)
    with pytest.raises(ConfigError, match="pip install matplotlib jinja2"):
        call(*SMALL, "--report", str(tmp_path / "out.html"))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ((), "--scenario NAME or --trace FILE"),
        ((*SMALL, "--policy", "leastrequest"), "did you mean least-request"),
        ((*SMALL, "--policy", "foo"), "no policy 'foo'; there are random, round-robin, "),
        (("--scenario", "agentc"), "agentic"),
        ((*SMALL, "--model", "llama"), "no model profile"),
        ((*SMALL, "--model", "xyz"), "no model profile 'xyz'; there are "),
        (("--scenario", "xyzzy"), "'xyzzy' is unknown; known: S1"),
        ((*SMALL, "--load", "0.5", "--rate-scale", "2"), "give one of them"),
        ((*SMALL, "--trace-format", "mooncake"), "without --trace"),
        (("--trace", "absent.jsonl"), "absent.jsonl"),
        (("--scenario", "S2,S3", "--trace", "absent.jsonl"), "name one scenario"),
        ((*SMALL, "--policy", ","), "names none"),
        (("--from", "absent.json"), r"absent\.json: No such file"),
        (("--from", "pyproject.toml"), "is not JSON"),
        ((*SMALL, "--from", "runs.json"), "leave out --scenario"),
        ((*SMALL, "--report", "absent/out.html"), "no folder absent"),
    ],
)
def test_wrong_usage_is_told_in_a_line(flags: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        call(*flags)


@pytest.mark.parametrize("load", ["much", "inf", "0.5,nan", "0"])
def test_a_load_that_is_no_number_is_refused(load: str) -> None:
    result = call(*SMALL, "--load", load)
    assert (result.exit_code, "one number or several" in result.stderr) == (2, True)


def test_the_table_says_what_the_warm_up_leaves_out() -> None:
    shown = call(*SMALL, "--policy", "random")
    assert "what arrives in the warm-up is sent and not counted: the first 180 s" in shown.stdout
    assert "warm-up" not in call(*SMALL, "--policy", "random", "--json").stdout


def test_an_access_log_is_known_by_its_lines(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    lines = ({"time": n, "prompt_tokens": 100, "output_tokens": 3} for n in range(5))
    log.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    assert runs("--trace", str(log), "--pods", "2", "--policy", "random")[0]["requests"] == 5


def test_an_interrupt_ends_what_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(bar: Progress, task: TaskID) -> None:
        raise KeyboardInterrupt

    # The first trial ends at once, and the second as good as never.
    monkeypatch.setattr(commands_simulate, "simulate", time.sleep)
    monkeypatch.setattr(Progress, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commands_simulate._run([0.0, 1e6], jobs=2)  # type: ignore[list-item]
    assert multiprocessing.active_children() == []
