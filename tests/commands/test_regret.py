"""`picker regret`: what it prints, and that it leaves nothing behind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from forked import no_children_left
from picker.commands.regret import command
from picker.errors import ConfigError
from picker.sim import forks

SMALL = ("--scenario", "S2", "--pods", "2", "--limit", "40", "--load", "0.7", "--samples", "3", "--horizon", "5")


def call(*flags: str) -> Result:
    result = CliRunner().invoke(command, flags)
    if isinstance(result.exception, ConfigError | KeyboardInterrupt | RuntimeError):
        raise result.exception
    return result


def document(*flags: str) -> dict[str, Any]:
    result = call(*flags, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_every_alternative_of_every_decision_is_told() -> None:
    found = document(*SMALL)
    assert (found["scenario"], found["policy"], found["load"], found["continuations"]) == ("agentic", "picker", 0.7, 3)
    figures = found["metrics"]["ttft"]
    assert figures["classes"]["all"]["decisions"] == len(figures["decisions"]) == 3
    for decision in figures["decisions"]:
        assert [endpoint["name"] for endpoint in decision["endpoints"]] == ["pod-0", "pod-1"]
        assert decision["chosen"] in ("pod-0", "pod-1")
        assert all(len(endpoint["own_ttft_s"]) == 3 for endpoint in decision["endpoints"])
        assert all({"queue", "prefill"} <= endpoint["terms"].keys() for endpoint in decision["endpoints"])
    assert no_children_left()


def test_the_same_seed_gives_the_same_figures() -> None:
    first, again = (document(*SMALL, "--jobs", jobs)["metrics"] for jobs in ("1", "3"))
    assert first == again


def test_one_metric_is_given_alone() -> None:
    assert list(document(*SMALL, "--metric", "e2e", "--continuations", "1")["metrics"]) == ["e2e"]


def test_a_policy_that_names_no_terms_has_its_regret_all_the_same() -> None:
    figures = document(*SMALL, "--policy", "lmetric")["metrics"]["ttft"]
    assert figures["weights"] == {}
    assert figures["classes"]["all"]["decisions"] == 3


def test_people_get_tables() -> None:
    printed = call(*SMALL, "--policy", "round-robin", "--metric", "ttft").stdout
    assert "3 decisions of round-robin" in printed
    assert "seconds of TTFT" in printed
    assert "clearly wrong" in printed


def test_turning_away_from_the_cache_is_shown_among_the_worst() -> None:
    printed = call(*SMALL, "--samples", "8", "--policy", "round-robin", "--metric", "ttft").stdout
    assert "hit left" in printed
    assert "Worst decisions" in printed


def test_an_interrupt_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    born: list[int] = []
    fork = forks._fork

    def interrupted() -> int:
        if len(born) == 2:
            raise KeyboardInterrupt
        born.append(fork())
        return born[-1]

    monkeypatch.setattr(forks, "_fork", interrupted)
    result = CliRunner().invoke(command, [*SMALL, "--jobs", "4"])
    assert result.exit_code == 1
    assert len(born) == 2
    assert no_children_left()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--scenario", "agentc"), "agentic"),
        ((*SMALL, "--policy", "pickr"), "picker"),
        ((*SMALL, "--policy", "floor"), "is a reference"),
    ],
)
def test_wrong_usage_is_told_in_a_line(flags: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        call(*flags)


def test_what_nobody_can_know_is_a_dash() -> None:
    result = call(*SMALL[:-4], "--samples", "1", "--horizon", "5", "--continuations", "1")
    assert result.exit_code == 0, result.output
    assert "nan" not in result.stdout
