from typing import Any

import numpy as np
import pytest

from fakes import endpoint, learned, pool, request, view
from headed import headed, labelled
from picker.core.candidates import draw
from picker.core.label_filters import (
    ByLabel,
    ContextLengthRange,
    DecodeRole,
    EncodeRole,
    HeaderSelection,
    LabelSelector,
    PrefillRole,
    SessionEndpoint,
)
from picker.core.load_filters import PrefixCacheAffinity, SloHeadroomTier, UtilizationBounds
from picker.core.plugin_filters import FILTERS, build_filter
from picker.errors import ConfigError
from picker.types import Role

VALVE_TOKENS = 286_704  # 18 s at 15,928 tokens/s


@pytest.mark.parametrize(
    ("matched", "backlog", "kept"),
    [
        ((10, 8, 7), (0, 0, 0), [True, True, False]),  # 0.8 is sticky, 0.7 is not
        ((7, 7, 0), (0, 0, 0), [True, True, True]),  # nobody is sticky
        ((10, 10, 10), (10**9, 0, 0), [True, True, True]),
        ((10, 0, 0), (VALVE_TOKENS, 0, 0), [True, False, False]),  # 18 s more is still worth it
        ((10, 0, 0), (VALVE_TOKENS + 1, 0, 0), [True, True, True]),  # and then everybody comes back
        ((10, 9, 0), (10**9, 0, 0), [True, True, False]),  # the soonest sticky endpoint counts
        ((10, 0, 0), (VALVE_TOKENS + 100, 10**9, 100), [True, False, False]),  # against the soonest other
    ],
)
def test_prefix_affinity_keeps_who_holds_the_prompt_until_the_wait_is_too_long(
    matched: tuple[int, ...], backlog: tuple[int, ...], kept: list[bool]
) -> None:
    made = pool(**{f"e{number}": {"backlog": tokens} for number, tokens in enumerate(backlog)})
    seen = view(made, matched_blocks=np.array(matched, dtype=float), total_blocks=10)
    assert PrefixCacheAffinity()(seen, request()).tolist() == kept


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"affinity_threshold": 0.0}, [True, True]),
        ({"exploration_probability": 1.0}, [True, True]),
        ({"max_ttft_penalty_ms": 0.0}, [True, False]),  # no gate
        ({"max_ttft_penalty_ms": 1000.0, "peak_prefill_throughput": 1e6}, [True, False]),  # 0.5 s
        ({"max_ttft_penalty_ms": 1000.0, "peak_prefill_throughput": 1e5}, [True, True]),  # 5 s
    ],
)
def test_prefix_affinity_is_as_strict_as_it_is_told(parameters: dict[str, float], kept: list[bool]) -> None:
    seen = view(pool(a={"backlog": 500_000}, b=0), matched_blocks=np.array([10.0, 0.0]), total_blocks=10)
    assert PrefixCacheAffinity(**parameters)(seen, request()).tolist() == kept  # type: ignore[arg-type]


def test_prefix_affinity_can_go_by_predictions() -> None:
    made = pool(a={"work": 6 * 10**9}, b=0)
    seen = view(made, matched_blocks=np.array([9.0, 0.0]), total_blocks=10, prompt_tokens=1000.0, learned=learned())
    for penalty, kept in ((5999.0, [True, True]), (6001.0, [True, False])):  # 7 s there, 1 s elsewhere
        asked = PrefixCacheAffinity(ttft_source="latencyPredictor", max_ttft_penalty_ms=penalty)
        assert asked(seen, request()).tolist() == kept


def test_a_single_candidate_is_never_filtered_for_its_cache() -> None:
    assert PrefixCacheAffinity()(view(pool(a=0)), request()).tolist() == [True]


def test_exploration_happens_as_often_as_it_should() -> None:
    seen = view(pool(a=0, b=0), matched_blocks=np.array([10.0, 0.0]), total_blocks=10)
    explores = PrefixCacheAffinity(exploration_probability=0.2)
    explored = sum(explores(seen, request(number)).all() for number in range(2000))
    assert 320 < explored < 480


def test_draws_are_even_and_the_same_for_the_same_question() -> None:
    drawn = np.array([draw(request(number), salt) for number in range(2000) for salt in (1, 2)])
    assert 0.0 <= drawn.min() < drawn.max() < 1.0
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    assert abs(np.corrcoef(drawn[::2], drawn[1::2])[0, 1]) < 0.06
    assert draw(request(7), 1) == draw(request(7), 1)


@pytest.mark.parametrize(
    ("ttft_ms", "kept"),
    [
        ("9000", [True, True, True]),
        ("1500", [True, False, False]),
        ("500", [True, True, True]),
        ("", [True, True, True]),
    ],
)
def test_the_positive_tier_is_kept_where_there_is_one(ttft_ms: str, kept: list[bool]) -> None:
    made = pool(a=0, b={"work": 10**9}, c={"work": 2 * 10**9})
    seen = view(made, prompt_tokens=1000.0, learned=learned())
    asked = headed({"x-llm-d-slo-ttft-ms": ttft_ms})
    assert SloHeadroomTier(epsilon_explore_neg=0.0, tokens=False)(seen, asked).tolist() == kept
    assert SloHeadroomTier(epsilon_explore_neg=1.0, tokens=False)(seen, asked).tolist() == (
        [not keep for keep in kept] if not all(kept) else kept
    )


@pytest.mark.parametrize(
    ("metric", "column", "values", "most", "kept"),
    [
        ("active-requests", "inflight", (2, 3), 2, [True, False]),
        ("running-requests", "running", (5.0, 6.0), 5, [True, False]),
        ("waiting-queue", "waiting", (0.0, 1.0), 0, [True, False]),
        ("kv-cache-utilization", "kv_usage", (0.8, 0.81), 0.8, [True, False]),
        ("waiting-queue", "waiting", (9.0, 9.0), 1, [False, False]),
    ],
)
def test_utilization_keeps_who_is_within_every_bound(
    metric: str, column: str, values: tuple[float, float], most: float, kept: list[bool]
) -> None:
    made = pool(a={column: values[0]}, b={column: values[1]})
    conditions = [{"metric": metric, "max_value": most}]
    assert UtilizationBounds(conditions)(view(made), request()).tolist() == kept
    lenient = UtilizationBounds(conditions, fallback_on_empty=True)(view(made), request()).tolist()
    assert lenient == (kept if any(kept) else [True, True])


# --- roles and labels ---

ROLES = ("decode", "prefill", "encode", "both", "prefill-decode", "encode-prefill", "encode-prefill-decode", "other")


@pytest.mark.parametrize(
    ("kind", "roles", "unlabelled"),
    [
        (DecodeRole, {"decode", "both", "prefill-decode", "encode-prefill-decode"}, True),
        (PrefillRole, {"prefill", "both", "prefill-decode", "encode-prefill", "encode-prefill-decode"}, False),
        (EncodeRole, {"encode", "encode-prefill", "encode-prefill-decode"}, False),
    ],
)
def test_a_role_filter_goes_by_the_role_label(kind: type[Any], roles: set[str], unlabelled: bool) -> None:
    made = pool(*(labelled(role, role_=role) for role in ROLES), labelled("none"))
    kept = kind()(view(made), request()).tolist()
    assert [role for role, keep in zip(ROLES, kept, strict=False) if keep] == [role for role in ROLES if role in roles]
    assert kept[-1] is unlabelled


def test_without_a_label_the_endpoints_own_role_counts() -> None:
    made = pool(endpoint("d", role=Role.DECODE), endpoint("p", role=Role.PREFILL), endpoint("b"))
    assert DecodeRole()(view(made), request()).tolist() == [True, False, True]
    assert PrefillRole()(view(made), request()).tolist() == [False, True, False]


def test_by_label_keeps_the_values_and_on_request_who_has_none() -> None:
    made = pool(labelled("a", tier="gold"), labelled("b", tier="tin"), labelled("c"))
    assert ByLabel("tier", ["gold"])(view(made), request()).tolist() == [True, False, False]
    assert ByLabel("tier", ["tin"], allows_no_label=True)(view(made), request()).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ({"key": "zone", "operator": "In", "values": ["x", "y"]}, [True, True, False]),
        ({"key": "zone", "operator": "NotIn", "values": ["x"]}, [False, True, True]),
        ({"key": "zone", "operator": "Exists"}, [True, True, False]),
        ({"key": "zone", "operator": "DoesNotExist"}, [False, False, True]),
    ],
)
def test_a_selector_selects_as_kubernetes_does(expression: dict[str, Any], kept: list[bool]) -> None:
    made = pool(labelled("a", zone="x", gpu="h"), labelled("b", zone="y"), labelled("c"))
    assert LabelSelector({}, [expression])(view(made), request()).tolist() == kept
    both = LabelSelector({"gpu": "h"}, [expression])(view(made), request()).tolist()
    assert both == [kept[0], False, False]


def test_a_context_range_keeps_the_prompts_it_is_for() -> None:
    key = "llm-d.ai/context-length-range"
    made = pool(
        labelled("a", **{key: "0-100"}), labelled("b", **{key: "100-200"}), labelled("c"), labelled("d", **{key: "x"})
    )
    assert ContextLengthRange()(view(made, prompt_tokens=100.0), request()).tolist() == [True, True, True, False]
    assert ContextLengthRange()(view(made, prompt_tokens=150.0), request()).tolist() == [False, True, True, False]


def test_a_session_keeps_its_endpoint_and_everybody_when_it_is_gone() -> None:
    made = pool(a=0, b=0)
    assert SessionEndpoint()(view(made, session_row=1), request(session="s")).tolist() == [False, True]
    assert SessionEndpoint()(view(made, session_row=3), request(session="s")).tolist() == [True, True]
    assert SessionEndpoint()(view(made), request()).tolist() == [True, True]


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("10.0.0.1", [True, True, False]),
        ("10.0.0.1:3001", [False, True, False]),
        ("10.0.0.1:3000, [::1]:3000", [True, False, True]),
        ("::1", [False, False, True]),
        ("[::1]", [False, False, True]),
        ("10.0.0.9", [False, False, False]),
        ("10.0.0.1:1", [False, False, False]),
        (" ", [False, False, False]),
    ],
)
def test_a_header_names_the_endpoints_of_a_conformance_test(asked: str, kept: list[bool]) -> None:
    made = pool(
        endpoint("a", address="10.0.0.1:3000"),
        endpoint("b", address="10.0.0.1:3001"),
        endpoint("c", address="[::1]:3000"),
    )
    chosen = HeaderSelection()(view(made), headed({"test-epp-endpoint-selection": asked}))
    assert chosen.tolist() == kept
    assert HeaderSelection()(view(made), request()).tolist() == [False, False, False]


# --- finding them ---


def test_a_filter_answers_to_the_name_it_is_found_by() -> None:
    needed: dict[str, dict[str, Any]] = {
        "utilization-filter": {"conditions": [{"metric": "waiting-queue", "max_value": 1}]},
        "by-label": {"label": "x", "valid_values": ["y"]},
    }
    assert {name: build_filter(name, needed.get(name, {})).name for name in FILTERS} == {name: name for name in FILTERS}


@pytest.mark.parametrize(
    ("name", "parameters", "complaint"),
    [
        ("decode-filtr", {}, r"there is no filter 'decode-filtr'; did you mean 'decode-filter'\?"),
        ("zzz", {}, "known: prefix-cache-affinity-filter"),
        ("decode-filter", {"x": 1}, "filter 'decode-filter': .*'x'"),
        ("prefix-cache-affinity-filter", {"affinity_threshold": 1.1}, "must be at most 1, got 1.1"),
        ("prefix-cache-affinity-filter", {"exploration_probability": 2}, "must be from 0 to 1"),
        ("prefix-cache-affinity-filter", {"max_ttft_penalty_ms": -1}, "must not be negative"),
        ("prefix-cache-affinity-filter", {"ttft_source": "guess"}, "one of prefillThroughput, latencyPredictor"),
        ("prefix-cache-affinity-filter", {"peak_prefill_throughput": 0}, "must be greater than 0"),
        ("slo-headroom-tier-filter", {"epsilon_explore_neg": -1}, "must be from 0 to 1"),
        ("utilization-filter", {}, "at least one"),
        ("utilization-filter", {"conditions": [{"metric": "heat", "max_value": 1}]}, "must be one of active-requests"),
        ("utilization-filter", {"conditions": [{"metric": "waiting-queue"}]}, "must be a number from 0, got None"),
        ("by-label", {"label": "x"}, "give valid_values, or allows_no_label"),
        ("label-selector-filter", {"match_expressions": [{"operator": "Exists"}]}, "has no key"),
        ("label-selector-filter", {"match_expressions": [{"key": "k", "operator": "Is"}]}, "one of In, NotIn"),
        ("label-selector-filter", {"match_expressions": [{"key": "k", "operator": "In"}]}, "In has no values"),
        (
            "label-selector-filter",
            {"match_expressions": [{"key": "k", "operator": "Exists", "values": ["v"]}]},
            "Exists takes no values",
        ),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(name: str, parameters: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build_filter(name, parameters)
