from __future__ import annotations

import json
from typing import Any

import pytest

from kubernetes.manifests import objective, rewrite, rule
from picker.rewrites import Rewriting
from picker.sources.kubernetes import objects
from picker.sources.kubernetes.objectives import Objectives
from picker.sources.kubernetes.objects import LLMD_GROUP, OLD_POOL_GROUP, Objective, Rewrite
from picker.sources.kubernetes.rewrites import Rewrites, fault
from picker.types import NO_HEADERS

OURS = frozenset({"pool"})


def parsed(value: dict[str, Any], created: str = "2026-01-01T00:00:00Z") -> Rewrite:
    value["metadata"]["creationTimestamp"] = created
    return objects.rewrites("ns", LLMD_GROUP).read(json.dumps(value).encode())


def wanted(name: str, priority: int | None, pool: str = "pool") -> Objective:
    return objects.objectives("ns", LLMD_GROUP).read(json.dumps(objective(name, priority, pool)).encode())


def target(known: Rewrites, model: str, point: float = 0.0) -> str | None:
    """What a request for the model gets."""
    rewriting = Rewriting(lambda: point, ("kubernetes",))
    rewriting.put("kubernetes", known.rules)
    choice = rewriting.choose(model, NO_HEADERS)
    return None if choice is None else choice.model


def test_targets_are_chosen_by_their_weights() -> None:
    known = Rewrites(OURS)
    assert known.put(LLMD_GROUP, parsed(rewrite("r", rule("m", v1=90, v2=10)))) is None
    assert [target(known, "m", point) for point in (0.0, 0.89, 0.9, 0.999)] == ["v1", "v1", "v2", "v2"]
    assert target(known, "other", 0.5) is None


def test_targets_without_weights_are_equal() -> None:
    known = Rewrites(OURS)
    known.put(LLMD_GROUP, parsed(rewrite("r", rule("m", v1=None, v2=None))))
    assert [target(known, "m", point) for point in (0.49, 0.51)] == ["v1", "v2"]


def test_every_change_is_told_at_once() -> None:
    known, told = Rewrites(OURS), list[list[str]]()
    known.on_change = lambda rules: told.append([rule.name for rule in rules])
    known.put(LLMD_GROUP, parsed(rewrite("a", rule("m", x=1))))
    known.put(LLMD_GROUP, parsed(rewrite("b", rule("m", x=1))))
    known.put(LLMD_GROUP, parsed(rewrite("a", rule("m", x=0))))
    known.drop(LLMD_GROUP, "b")
    assert told == [["a"], ["a", "b"], ["b"], []]


def test_an_exact_match_wins_then_the_oldest_then_the_first_rule() -> None:
    known = Rewrites(OURS)
    known.put(LLMD_GROUP, parsed(rewrite("young", rule("m", young=1)), "2026-02-01T00:00:00Z"))
    known.put(LLMD_GROUP, parsed(rewrite("all", rule(general=1)), "2025-01-01T00:00:00Z"))
    known.put(LLMD_GROUP, parsed(rewrite("old", rule("m", first=1), rule("m", second=1))))
    assert target(known, "m") == "first"
    assert target(known, "x") == "general"
    known.drop(LLMD_GROUP, "old")
    assert target(known, "m") == "young"


def test_of_two_groups_with_one_name_the_newer_counts() -> None:
    known = Rewrites(OURS)
    known.put(LLMD_GROUP, parsed(rewrite("r", rule("m", new=1))))
    known.put(OLD_POOL_GROUP, parsed(rewrite("r", rule("m", old=1))))
    assert target(known, "m") == "new"


def test_those_of_other_pools_do_not_count() -> None:
    known = Rewrites(OURS)
    assert known.put(LLMD_GROUP, parsed(rewrite("r", rule("m", x=0), pool="other"))) is None
    assert known.rules == ()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (rule("m", x=0), "the weight 0 of 'x' is not from 1 to 1,000,000"),
        (rule("m", x=1_000_001), "the weight 1000001 of 'x'"),
        (rule("m"), "a rule has no targets"),
        (rule("m", x=1, y=None), "some targets of a rule have a weight and others have none"),
        (rule("", x=1), "a rule matches a model without a name"),
        ({"matches": [{"model": {"type": "Regex", "value": "m"}}], "targets": [{"modelRewrite": "x"}]}, "'Regex'"),
        ({"targets": [{"modelRewrite": ""}]}, "a target names no model"),
        ({"targets": [{"modelRewrite": "a\r\n--b"}]}, "is no model's name"),
    ],
)
def test_a_rewrite_with_a_fault_is_left_out_as_a_whole(bad: dict[str, Any], words: str) -> None:
    known = Rewrites(OURS)
    known.put(LLMD_GROUP, parsed(rewrite("r", rule("m", good=1))))
    problem = known.put(LLMD_GROUP, parsed(rewrite("r", rule("m", good=1), bad)))
    assert problem is not None
    assert words in problem
    assert target(known, "m") is None


def test_a_rewrite_without_rules_has_no_fault() -> None:
    assert fault(parsed(rewrite("r"))) is None


def test_priorities_go_by_name_and_those_of_the_configuration_win() -> None:
    known = Objectives(OURS, {"chat": 3})
    known.put(OLD_POOL_GROUP, wanted("batch", -1))
    known.put(LLMD_GROUP, wanted("chat", 9))
    known.put(LLMD_GROUP, wanted("plain", None))
    assert dict(known) == {"batch": -1, "chat": 3, "plain": 0}
    assert bool(known)


def test_an_objective_that_goes_to_another_pool_is_gone() -> None:
    known = Objectives(OURS)
    known.put(LLMD_GROUP, wanted("chat", 9))
    known.put(LLMD_GROUP, wanted("chat", 9, pool="other"))
    assert len(known) == 0
