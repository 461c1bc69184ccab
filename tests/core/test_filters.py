import numpy as np
import pytest

from fakes import NOW, endpoint, pool, request
from picker.core.filters import below_limit, candidates
from picker.core.pool import Pool
from picker.types import Rejection, RejectReason, Request, Role


def names(of: Pool, asked: Request, now: float = NOW) -> list[str]:
    mask = candidates(of, asked, now)
    assert not isinstance(mask, Rejection), mask
    return [str(of.names[row]) for row in np.flatnonzero(mask)]


def refusal(of: Pool, asked: Request) -> tuple[RejectReason, int]:
    rejection = candidates(of, asked, NOW)
    assert isinstance(rejection, Rejection)
    return rejection.reason, rejection.status


def test_everyone_present_healthy_and_in_service_may_be_picked() -> None:
    made = pool(a=0, ill={"healthy": False}, leaving={"draining": True}, b=0)
    assert names(made, request()) == ["a", "b"]


def test_a_good_answer_outweighs_failing_probes_for_a_while() -> None:
    made = pool(
        answered={"healthy": False, "succeeded_at": NOW - 9.9},
        long_ago={"healthy": False, "succeeded_at": NOW - 10.0},
        leaving={"draining": True, "succeeded_at": NOW},
    )
    assert names(made, request()) == ["answered"]


def test_answers_of_nobody_knows_whom_count_only_where_nobody_is_known_to_answer() -> None:
    made = pool(
        a={"healthy": False, "vouched_at": NOW - 9.9},
        long_ago={"healthy": False, "vouched_at": NOW - 10.0},
        leaving={"draining": True, "vouched_at": NOW},
    )
    assert names(made, request()) == ["a"]
    made.healthy[1] = True
    assert names(made, request()) == ["long_ago"]


@pytest.mark.parametrize(("rested", "expected"), [(2, ["a", "b"]), (1, ["a", "c"])])
def test_those_at_rest_are_tried_when_fewer_than_half_are_left(rested: int, expected: list[str]) -> None:
    made = pool(a=0, b={"ejected_until": NOW + 9, "probe_at": NOW + 1}, c={"ejected_until": NOW + 9, "probe_at": NOW})
    if rested == 2:
        made.ejected_until[1] = NOW
    assert names(made, request()) == expected


def test_an_empty_pool_is_503_without_a_word_on_models() -> None:
    assert refusal(Pool(), request(model="m")) == (RejectReason.NO_ENDPOINTS, 503)


def test_nobody_healthy_is_503_to_be_tried_again() -> None:
    rejection = candidates(pool(a={"healthy": False}, b={"draining": True}), request(), NOW)
    assert isinstance(rejection, Rejection)
    assert (rejection.reason, rejection.status, rejection.retry_after) == (RejectReason.NO_ENDPOINTS, 503, 1.0)


def test_an_unknown_model_is_404_in_the_words_of_vllm() -> None:
    made = pool(endpoint("a", models=["llama", "lora-1"]), endpoint("b", models=["qwen"]))
    rejection = candidates(made, request(7, model="gpt"), NOW)
    assert isinstance(rejection, Rejection)
    assert (rejection.request_id, rejection.reason, rejection.status) == (7, RejectReason.UNKNOWN_MODEL, 404)
    assert rejection.message == "The model `gpt` does not exist. Valid aliases: llama, lora-1, qwen."
    assert rejection.retry_after is None


def test_a_model_whose_only_endpoint_is_ill_is_not_unknown() -> None:
    made = pool(endpoint("a", models=["m"]), endpoint("b", models=["other"]))
    made.healthy[0] = False
    assert refusal(made, request(model="m")) == (RejectReason.NO_ENDPOINTS, 503)


def test_a_model_goes_where_it_is_served() -> None:
    made = pool(endpoint("a", models=["x"]), endpoint("b", models=["x", "y"]), endpoint("c", models=["z"]))
    assert names(made, request(model="x")) == ["a", "b"]
    assert names(made, request(model="y")) == ["b"]
    assert names(made, request()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        (Role.BOTH, ["prefill", "decode", "both"]),
        (Role.PREFILL, ["prefill", "both"]),
        (Role.DECODE, ["decode", "both"]),
    ],
)
def test_a_role_is_played_by_its_own_kind_and_by_all_rounders(role: Role, expected: list[str]) -> None:
    made = pool(*(endpoint(each.value, role=each) for each in (Role.PREFILL, Role.DECODE, Role.BOTH)))
    assert names(made, request(role=role)) == expected


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        ("10.0.0.1:8000", ["a"]),
        ("10.0.0.1", ["a", "b"]),
        ("10.0.0.1:9", []),
        ("10.0.0", []),
        ("[fd00::7]:8000", ["c"]),
        ("[fd00::7]", ["c"]),
        ("fd00::7", ["c"]),
        ("[fd00::7]:9", []),
        ("gpu-1", ["d"]),
        ("gpu-1:8000", ["d"]),
    ],
)
def test_a_subset_names_addresses_with_or_without_a_port(hint: str, expected: list[str]) -> None:
    made = pool(
        endpoint("a", address="10.0.0.1:8000"),
        endpoint("b", address="10.0.0.1:8001"),
        endpoint("c", address="[fd00::7]:8000"),
        endpoint("d", address="gpu-1:8000"),
    )
    asked = request(subset=frozenset({hint}))
    if expected:
        assert names(made, asked) == expected
    else:
        assert refusal(made, asked) == (RejectReason.NO_MATCH, 503)


def test_an_empty_subset_allows_nobody() -> None:
    assert refusal(pool(a=0), request(subset=frozenset())) == (RejectReason.NO_MATCH, 503)


def test_what_was_tried_already_is_left_out() -> None:
    made = pool(a=0, b=0)
    assert names(made, request(exclude=frozenset({"a", "left the pool"}))) == ["b"]
    assert refusal(made, request(exclude=frozenset({"a", "b"}))) == (RejectReason.NO_MATCH, 503)


def test_an_ejected_endpoint_rests_until_its_time_is_over() -> None:
    made = pool(a={"ejected_until": NOW + 5}, b=0)
    assert names(made, request()) == ["b"]
    assert names(made, request(), now=NOW + 5) == ["a", "b"]


def test_when_all_are_ejected_they_are_tried_rather_than_none() -> None:
    made = pool(a={"ejected_until": NOW + 5}, b={"ejected_until": NOW + 9})
    assert names(made, request()) == ["a", "b"]


def test_an_ejected_endpoint_is_better_than_one_outside_the_subset() -> None:
    made = pool(a={"ejected_until": NOW + 5}, b=0)
    assert names(made, request(subset=frozenset({"a:8000"}))) == ["a"]


def test_asking_who_may_be_picked_changes_nothing() -> None:
    made = pool(endpoint("a", models=["m"]), endpoint("b", role=Role.DECODE))
    masks = {
        "present": made.present.copy(),
        "serving": made.serving("m").copy(),
        "decode": made.can(Role.DECODE).copy(),
    }
    candidates(made, request(model="m", role=Role.DECODE, exclude=frozenset({"a"})), NOW)
    np.testing.assert_array_equal(made.present, masks["present"])
    np.testing.assert_array_equal(made.serving("m"), masks["serving"])
    np.testing.assert_array_equal(made.can(Role.DECODE), masks["decode"])


def test_a_limit_counts_requests_in_flight() -> None:
    made = pool(a=0, b=1, c=2)
    assert below_limit(made, None) is None
    open_to = below_limit(made, 2)
    assert open_to is not None
    assert list(open_to[:3]) == [True, True, False]
