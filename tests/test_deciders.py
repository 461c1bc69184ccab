"""How a configuration's policy becomes what ranks and picks."""

import pytest

from fakes import NOW, request
from headed import labelled
from picker.config import parse_config
from picker.core.plan import Plan
from picker.core.saturation import Concurrency
from picker.deciders import build_plan, build_policy, build_saturation, build_scheduler
from picker.errors import ConfigError
from picker.types import Decision, EndpointAdded

TWO = """
policy: weighted
profiles:
  - {name: first, filters: [{name: decode-filter}], scorers: [{name: queue-scorer}], max_endpoints: 1}
  - {name: second, picker: random-picker, max_endpoints: 5}
"""


def test_filters_and_scorers_at_the_top_are_a_profile_of_their_own() -> None:
    config = parse_config("{policy: weighted, filters: [{name: decode-filter}], picker: power-of-two}")
    profile, _ = build_policy(config)
    assert isinstance(profile, Plan)
    assert [each.name for each in profile.routes["default"].filters] == ["decode-filter"]


def test_the_first_profile_is_the_one_to_go_by_unless_another_is_named() -> None:
    assert build_plan(parse_config(TWO)).default == "first"
    assert build_plan(parse_config(TWO + "profile: second")).default == "second"


@pytest.mark.parametrize(("profile", "named"), [("first", 1), ("second", 5)])
def test_a_decision_names_as_many_endpoints_as_its_profile_may(profile: str, named: int) -> None:
    made = build_scheduler(parse_config(f"{TWO}profile: {profile}"))
    for number in range(6):
        made.apply(EndpointAdded(labelled(f"e{number}")), NOW)
    decision = made.submit(request(1), NOW)
    assert isinstance(decision, Decision)
    assert 1 + len(decision.fallbacks) == named


def test_a_detector_is_built_where_one_is_named() -> None:
    assert build_saturation(parse_config("")) is None
    text = "saturation: {detector: concurrency-detector, parameters: {requests: 7}}"
    assert build_saturation(parse_config(text)) == Concurrency(requests=7)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("profiles: [{name: a, picker: best}]", "profile 'a': picker 'best' is not one of max-score"),
        ("profiles: [{name: a, filters: [{name: x}]}]", "there is no filter 'x'"),
        ("profiles: [{name: a, scorers: [{name: x}]}]", "there is no scorer 'x'"),
    ],
)
def test_what_a_profile_names_must_be_there(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build_scheduler(parse_config(f"policy: weighted\n{text}"))
