from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from picker.rewrites import HEADERS, Choice, Rewriting, Rule, build_rule, match_fault, targets_fault
from picker.types import NO_HEADERS

ORIGINS = ("kubernetes", "configuration")


def rule(*models: str, name: str = "r", **weights: int | None) -> Rule:
    return build_rule(name, models, list(weights.items()))


def rewriting(*rules: Rule, draw: Callable[[], float] = lambda: 0.0, heeds_header: bool = False) -> Rewriting:
    made = Rewriting(draw, ORIGINS, heeds_header=heeds_header)
    made.put("configuration", rules)
    return made


def target(made: Rewriting, model: str | None) -> str | None:
    choice = made.choose(model, NO_HEADERS)
    return None if choice is None else choice.model


def test_each_target_gets_as_much_of_the_line_as_its_weight() -> None:
    made = rule("m", v1=90, v2=9, v3=1)
    assert Counter(made.at(point / 1000) for point in range(1000)) == {"v1": 900, "v2": 90, "v3": 10}
    assert made.at(1 - 2**-53) == "v3"


def test_the_greatest_number_below_one_is_the_last_target_whatever_the_weights() -> None:
    assert build_rule("r", ("m",), [("a", 999_999), ("b", 1_000_000)]).at(1 - 2**-53) == "b"


def test_without_weights_targets_are_equal() -> None:
    assert Counter(rule("m", a=None, b=None).at(point / 10) for point in range(10)) == {"a": 5, "b": 5}


@pytest.mark.parametrize("weights", [(90, 10), (1, 2), (500_000, 1_000_000), (1, 999_999)])
def test_shares_are_those_of_the_weights(weights: tuple[int, int]) -> None:
    draws = 20_000
    made = rewriting(build_rule("r", ("m",), [("a", weights[0]), ("b", weights[1])]), draw=random.Random(7).random)
    found = Counter(target(made, "m") for _ in range(draws))
    share = weights[0] / sum(weights)
    assert abs(found["a"] - draws * share) <= 3 * (draws * share * (1 - share)) ** 0.5


def test_weights_that_change_apply_to_the_next_request_and_to_the_shares_from_then_on() -> None:
    made, found = rewriting(draw=random.Random(3).random), list[Counter[str | None]]()
    for share in (0.9, 0.5, 0.1):
        made.put("kubernetes", [rule("m", old=round(share * 100), new=round((1 - share) * 100))])
        found.append(Counter(target(made, "m") for _ in range(10_000)))
        assert abs(found[-1]["old"] - 10_000 * share) <= 3 * (10_000 * share * (1 - share)) ** 0.5
    made.put("kubernetes", [rule("m", new=1)])
    assert {target(made, "m") for _ in range(100)} == {"new"}
    made.put("kubernetes", [])
    assert target(made, "m") is None


def test_the_same_seed_chooses_the_same() -> None:
    def chosen() -> list[str | None]:
        made = rewriting(rule("m", a=1, b=1), draw=random.Random(5).random)
        return [target(made, "m") for _ in range(50)]

    assert chosen() == chosen()


def test_a_rule_that_names_the_model_wins_over_one_for_all_and_the_first_over_the_second() -> None:
    made = rewriting(rule(general=1), rule("m", first=1), rule("m", "n", second=1))
    assert [target(made, model) for model in ("m", "n", "x")] == ["first", "second", "general"]


def test_rules_of_kubernetes_come_before_those_of_the_configuration() -> None:
    made = rewriting(rule("m", file=1), rule(all_of_file=1))
    made.put("kubernetes", [rule("m", cluster=1), rule(all_of_cluster=1)])
    assert (target(made, "m"), target(made, "x")) == ("cluster", "all_of_cluster")
    made.put("kubernetes", [rule(all_of_cluster=1)])
    assert target(made, "m") == "file"  # it names the model


def test_a_request_that_names_no_model_is_for_rules_of_all_models() -> None:
    assert target(rewriting(rule("m", a=1)), None) is None
    assert target(rewriting(rule("m", a=1), rule(b=1)), None) == "b"


def test_a_match_without_a_model_is_for_all() -> None:
    made = rewriting(build_rule("r", ("m", None), [("a", None)]))
    assert target(made, "x") == "a"


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_wins_over_every_rule_where_it_is_heeded(name: str) -> None:
    made = rewriting(rule("m", a=1), heeds_header=True)
    assert made.choose("m", {name: "t"}) == Choice("t", HEADERS[0])
    assert made.choose("m", {name: ""}) == Choice("a", "r")
    made.heeds_header = False
    assert made.choose("m", {name: "t"}) == Choice("a", "r")


def test_of_two_headers_the_new_one_counts() -> None:
    assert rewriting(heeds_header=True).choose("m", dict(zip(HEADERS, "ab", strict=True))) == Choice("a", HEADERS[0])


def test_a_header_that_is_no_name_is_not_followed() -> None:
    assert rewriting(heeds_header=True).choose("m", {HEADERS[0]: "a\r\nb"}) is None


def test_followed_choices_are_counted_by_rewrite_model_and_target() -> None:
    made = rewriting(rule("m", a=1, name="canary"))
    for _ in range(2):
        choice = made.choose("m", NO_HEADERS)
        assert choice is not None
        made.count("m", choice)
    assert made.counts == {("canary", "m", "a"): 2}


def test_names_that_clients_make_up_are_counted_together_and_those_of_rules_apart() -> None:
    made = rewriting(rule("mine", a=1), rule(a=1))
    for number in range(1500):
        made.count(f"made-up-{number}", Choice("a", "r"))
    made.count("mine", Choice("a", "r"))
    assert len(made.counts) <= 1003
    assert made.counts["r", "mine", "a"] == 1
    assert sum(made.counts.values()) == 1501
    made.count("x" * 100_000, Choice("b", "r"))
    assert made.counts["r", "other", "other"] == 1


def test_long_names_are_shown_only_of_rules() -> None:
    made = rewriting(rule("y" * 300, a=1), rule(a=1))
    for name in ("x" * 300, "y" * 300):
        made.count(name, Choice("a", "r"))
    assert set(made.counts) == {("r", "other", "a"), ("r", "y" * 300, "a")}


def test_faults_are_told_in_words() -> None:
    assert match_fault("Exact", "m") is None
    assert "'Regex'" in str(match_fault("Regex", "m"))
    assert targets_fault([("a", 1), ("b", None)]) == "some targets of a rule have a weight and others have none"
    assert "no model's name" in str(targets_fault([("a\r\n", 1)]))
    assert targets_fault([("ä/b:1 c", 1)]) is None
