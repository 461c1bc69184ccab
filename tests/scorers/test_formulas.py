"""The endpoint picker's formulas, with numbers worked out by hand."""

import base64
from typing import Any

import numpy as np
import pytest

from fakes import endpoint, learned, pool, request, speeds, view
from headed import headed, labelled
from picker.core.adapters import Adapters
from picker.errors import ConfigError
from picker.scorers import build_scorer
from picker.scorers.active_request import ActiveRequest
from picker.scorers.context_length import ContextLength
from picker.scorers.header_label import HeaderLabel
from picker.scorers.kv_usage import KvUsage
from picker.scorers.latency import Latency
from picker.scorers.load_aware import LoadAware
from picker.scorers.lora_affinity import LoraAffinity
from picker.scorers.no_hit_lru import NoHitLru
from picker.scorers.prefix_cache import PrefixCache
from picker.scorers.queue_depth import QueueDepth
from picker.scorers.running import Running
from picker.scorers.session import Session
from picker.scorers.token_load import TokenLoad


def approximately(*values: float) -> object:
    return pytest.approx(list(values), abs=1e-6)


@pytest.mark.parametrize(
    ("scorer", "column", "states", "scores"),
    [
        # (max - q) / (max - min)
        (QueueDepth(), "waiting", (10, 4, 2), (0.0, 0.75, 1.0)),
        (QueueDepth(), "waiting", (7, 7), (1.0, 1.0)),
        (Running(), "running", (30, 25, 10), (0.0, 0.25, 1.0)),
        # 1 - usage
        (KvUsage(), "kv_usage", (0.0, 0.35, 1.0), (1.0, 0.65, 0.0)),
        # 0.5 for an empty queue, else 0.5 * (1 - min(w, 128) / 128)
        (LoadAware(), "waiting", (0, 32, 64, 128, 500), (0.5, 0.375, 0.25, 0.0, 0.0)),
        (LoadAware(threshold=10), "waiting", (1, 5), (0.45, 0.25)),
        # (max - n) / max, 1 when idle
        (ActiveRequest(), "inflight", (0, 1, 4), (1.0, 0.75, 0.0)),
        (ActiveRequest(), "inflight", (3, 3), (0.0, 0.0)),
        (ActiveRequest(), "inflight", (0, 0), (1.0, 1.0)),
        (ActiveRequest(idle_threshold=2, max_busy_score=0.5), "inflight", (2, 3, 12), (1.0, 0.375, 0.0)),
    ],
)
def test_load_is_scored_as_the_endpoint_picker_scores_it(
    scorer: Any, column: str, states: tuple[float, ...], scores: tuple[float, ...]
) -> None:
    made = pool(**{f"e{number}": {column: state} for number, state in enumerate(states)})
    assert scorer(view(made), request()).tolist() == approximately(*scores)


def test_token_load_counts_what_is_booked_and_what_this_request_adds() -> None:
    made = pool(a={"backlog": 0}, b={"backlog": 1_048_576}, c={"backlog": 9_000_000})
    seen = view(made, prompt_tokens=1_048_576.0, uncached=np.array([1_048_576.0, 0.0, 0.0]))
    # 1 - (0 + 2^20) / 2^22, 1 - (2^20 + 0) / 2^22, and beyond the horizon 0
    assert TokenLoad()(seen, request()).tolist() == approximately(0.75, 0.75, 0.0)
    assert TokenLoad(queue_threshold_tokens=2_097_152)(seen, request()).tolist() == approximately(0.5, 0.5, 0.0)


def test_one_token_makes_a_difference_to_token_load() -> None:
    scores = TokenLoad()(view(pool(a={"backlog": 7}, b={"backlog": 8})), request())
    assert scores[0] > scores[1]


@pytest.mark.parametrize(
    ("weight", "scores"),
    [
        (0.0, (0.0, 0.5, 1.0)),
        # tokens cached: 0, 2,048, 4,096 of a scale of 8,192: squares of 0, 1/4, 1/2
        (1.0, (0.0, 0.0625, 0.25)),
        (0.4, (0.0, 0.4 * 0.0625 + 0.6 * 0.5, 0.4 * 0.25 + 0.6 * 1.0)),
    ],
)
def test_a_match_counts_by_its_share_and_by_its_length(weight: float, scores: tuple[float, ...]) -> None:
    seen = view(
        pool(a=0, b=0, c=0),
        matched_blocks=np.array([0.0, 4.0, 8.0]),
        total_blocks=8,
        prompt_tokens=4096.0,
        uncached=np.array([4096.0, 2048.0, 0.0]),
    )
    assert PrefixCache(match_length_weight=weight)(seen, request()).tolist() == approximately(*scores)


def test_a_match_longer_than_the_scale_counts_no_more() -> None:
    known = {
        "matched_blocks": np.array([1.0]),
        "total_blocks": 2,
        "prompt_tokens": 40_000.0,
        "uncached": np.array([0.0]),
    }
    scorer = PrefixCache(match_length_weight=1.0, match_length_scale_tokens=1000)
    assert scorer(view(pool(a=0), **known), request()).tolist() == [1.0]


def test_an_adapter_that_waits_for_a_slot_beats_one_that_is_not_there() -> None:
    made = pool(
        full={"max_adapters": 1, "adapters": 1}, waits={"max_adapters": 1, "adapters": 1}, roomy={"max_adapters": 2}
    )
    adapters = Adapters(made.rows)
    adapters.known.add("mine")
    adapters.book("mine", 1)
    seen = view(made, model="mine", adapters=adapters)
    assert LoraAffinity()(seen, request(model="mine")).tolist() == approximately(0.0, 0.6, 0.8)


# --- no-hit-lru ---


def test_cold_prompts_go_to_who_never_had_one_then_to_who_had_one_longest_ago() -> None:
    made, scorer = pool(a=0, b=0, c=0, d=0), NoHitLru()
    seen = view(made)
    # none used: 1 - i / 3
    assert scorer(seen, request()).tolist() == approximately(1.0, 2 / 3, 1 / 3, 0.0)
    scorer.picked(seen, request(), "c")
    scorer.picked(seen, request(), "a")
    # never used: b, d at 1 and 2/3; then c (1 - (2 + 0) / 3), a (1 - (2 + 1) / 3)
    assert scorer(seen, request()).tolist() == approximately(0.0, 1.0, 1 / 3, 2 / 3)
    scorer.picked(seen, request(), "c")
    assert scorer(seen, request()).tolist() == approximately(1 / 3, 1.0, 0.0, 2 / 3)


def test_a_prompt_somebody_has_is_neutral_and_not_remembered() -> None:
    made, scorer = pool(a=0, b=0), NoHitLru()
    warm = view(made, matched_blocks=np.array([0.0, 1.0]), total_blocks=4)
    assert scorer(warm, request()).tolist() == [0.5, 0.5]
    scorer.picked(warm, request(), "a")
    assert scorer(view(made), request()).tolist() == [1.0, 0.0]


def test_a_single_candidate_is_best_and_old_endpoints_are_forgotten() -> None:
    scorer, made = NoHitLru(lru_size=2), pool(a=0)
    assert scorer(view(made), request()).tolist() == [1.0]
    for name in ("a", "b", "c"):
        scorer.picked(view(made), request(), name)
    assert scorer(view(pool(a=0, b=0, c=0)), request()).tolist() == approximately(1.0, 0.5, 0.0)


def test_more_remembered_than_there_are_candidates_never_scores_below_0() -> None:
    scorer = NoHitLru()
    for name in ("x", "y", "z", "a"):
        scorer.picked(view(pool(a=0)), request(), name)
    assert scorer(view(pool(a=0, b=0)), request()).tolist() == [0.0, 1.0]


# --- labels, headers, sessions ---

RANGE = "llm-d.ai/context-length-range"


@pytest.mark.parametrize(
    ("text", "length", "score"),
    [
        # 0.3 + 0.7 * (0.7 / (1 + 10,000 / 10,000) + 0.3 * 5,000 / 10,000)
        ("0-10000", 5000.0, 0.3 + 0.7 * (0.35 + 0.15)),
        ("0-10000", 10_000.0, 0.3 + 0.7 * 0.35),
        ("500-500", 500.0, 1.0),
        # 0.3 / (1 + 1,000 / 1,000), above and below
        ("0-2000", 3000.0, 0.15),
        ("3000-9000", 2000.0, 0.15),
        ("long", 10.0, 0.0),
        ("9-1", 5.0, 0.0),
        (None, 10.0, 0.5),
    ],
)
def test_context_length_is_scored_by_the_range_of_the_label(text: str | None, length: float, score: float) -> None:
    made = pool(labelled("a", **({} if text is None else {RANGE: text})))
    assert ContextLength()(view(made, prompt_tokens=length), request()).tolist() == approximately(score)


def test_a_header_prefers_the_endpoints_labelled_with_it() -> None:
    made = pool(labelled("a", zone="east"), labelled("b", zone="west"), labelled("c"))
    scorer = HeaderLabel(header_name="X-Zone", label_key="zone")
    assert scorer(view(made), headed({"x-zone": "west"})).tolist() == [0.0, 1.0, 0.0]
    assert scorer(view(made), headed({})).tolist() == [0.0, 0.0, 0.0]
    assert scorer(view(made), request()).tolist() == [0.0, 0.0, 0.0]
    assert scorer.headers == ("x-zone",)


@pytest.mark.parametrize(
    ("token", "scores"),
    [
        (base64.b64encode(b"default/b").decode(), [0.0, 1.0]),
        (base64.b64encode(b"b").decode(), [0.0, 1.0]),
        (base64.b64encode(b"other/b").decode(), [0.0, 0.0]),
        ("not base64!", [0.0, 0.0]),
        (base64.b64encode(b"\xff\xfe").decode(), [0.0, 0.0]),
        ("", [0.0, 0.0]),
    ],
)
def test_a_session_token_names_its_endpoint(token: str, scores: list[float]) -> None:
    seen = view(pool(endpoint("a"), endpoint("b")))
    assert Session(token_header="x-session-token")(seen, headed({"x-session-token": token})).tolist() == scores


# --- latency ---


def latencies(**backlogs: float) -> Any:
    """Endpoints on which a prompt of 1,000 tokens, at 1,000 tokens/s, waits behind so many seconds of prefill."""
    states = {name: {"work": round(seconds * 1e9), "inflight": int(seconds > 0)} for name, seconds in backlogs.items()}
    return view(pool(**states), prompt_tokens=1000.0, learned=learned())


@pytest.mark.parametrize(
    ("scorer", "headers", "scores"),
    [
        # predicted 1, 2 and 5 s. No objective: headrooms -1, -2, -5 s, the idle endpoint is scored alone, at 0.51
        (Latency(), {}, (0.51, 0.0, 0.0)),
        # 6 s: headrooms 5, 4, 1 s: all met; least: 1 - (h - 1) / 4 in hundredths plus one: 0.01, 0.26, 1.01 cut to 1
        (Latency(), {"x-llm-d-slo-ttft-ms": "6000"}, (0.01, 0.26, 1.0)),
        (Latency(), {"x-slo-ttft-ms": "6000"}, (0.01, 0.26, 1.0)),
        (Latency(strategy="most"), {"x-llm-d-slo-ttft-ms": "6000"}, (1.0, 0.76, 0.01)),
        # 3 s: headrooms 2, 1, -2 s: those that miss it score 0
        (Latency(), {"x-llm-d-slo-ttft-ms": "3000"}, (0.01, 1.0, 0.0)),
        (Latency(), {"x-llm-d-slo-ttft-ms": "soon"}, (0.51, 0.0, 0.0)),
        (Latency(), {"x-llm-d-slo-ttft-ms": "nan"}, (0.51, 0.0, 0.0)),
    ],
)
def test_latency_is_scored_by_what_is_left_of_the_objectives(
    scorer: Latency, headers: dict[str, str], scores: tuple[float, ...]
) -> None:
    assert scorer(latencies(a=0.0, b=1.0, c=4.0), headed(headers)).tolist() == approximately(*scores)


def test_where_all_are_late_and_busy_the_soonest_scores_best() -> None:
    # headrooms -2, -3, -6 s: distances from 0 to 1: 0, 0.25, 1
    scores = Latency(strategy="most")(latencies(a=1.0, b=2.0, c=5.0), headed({}, streaming=False))
    assert scores.tolist() == approximately(1.0, 0.76, 0.01)


def test_who_is_late_and_slow_is_behind_who_is_only_late() -> None:
    taught = learned(step=0.02)
    speeds(taught.decode_speed, (2.0, 0.5))
    made = pool(a={"work": 10**9, "inflight": 1}, b={"work": 0, "inflight": 1})
    seen = view(made, prompt_tokens=1000.0, learned=taught)
    # tokens take 10 ms on a and 40 ms on b; both miss 500 ms to the first, b would miss it by less
    asked = headed({"x-llm-d-slo-ttft-ms": "500", "x-llm-d-slo-tpot-ms": "15"})
    assert Latency()(seen, asked).tolist() == approximately(0.51, 0.0)
    assert Latency(tokens=False)(seen, asked).tolist() == approximately(0.01, 1.0)


def test_who_is_only_slow_is_before_who_is_only_late() -> None:
    taught = learned(step=0.02)
    speeds(taught.decode_speed, (2.0, 0.5))
    made = pool(late={"work": 10**10, "inflight": 1}, slow={"work": 0, "inflight": 1})
    seen = view(made, prompt_tokens=1000.0, learned=taught)
    asked = headed({"x-llm-d-slo-ttft-ms": "1500", "x-llm-d-slo-tpot-ms": "15"})
    assert Latency()(seen, asked).tolist() == approximately(0.0, 0.51)


@pytest.mark.parametrize(
    ("name", "parameters", "complaint"),
    [
        ("prefix-cache-scorer", {"match_length_weight": 1.5}, "must be from 0 to 1, got 1.5"),
        ("prefix-cache-scorer", {"match_length_weight": 1, "match_length_scale_tokens": 0}, "greater than 0"),
        ("active-request-scorer", {"max_busy_score": 2}, "must be from 0 to 1, got 2"),
        ("token-load-scorer", {"queue_threshold_tokens": 0}, "must be greater than 0, got 0"),
        ("load-aware-scorer", {"threshold": -1}, "must be greater than 0, got -1"),
        ("latency-scorer", {"strategy": "middling"}, "one of least, most, got 'middling'"),
    ],
)
def test_a_parameter_out_of_range_is_refused(name: str, parameters: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"scorer '{name}': .*{complaint}"):
        build_scorer(name, parameters)
