import numpy as np
import pytest

from fakes import pool, request, view
from picker.errors import ConfigError
from picker.scorers import SCORERS, build_scorer
from picker.scorers.inflight import Inflight
from picker.scorers.kv_usage import KvUsage
from picker.scorers.lora_affinity import LoraAffinity
from picker.scorers.prefix_cache import PrefixCache
from picker.scorers.queue_depth import QueueDepth
from picker.scorers.recency import Recency
from picker.scorers.running import Running
from picker.scorers.scale import less_is_better
from picker.scorers.session import Session


def approximately(*values: float) -> object:
    return pytest.approx(list(values), abs=1e-6)


@pytest.mark.parametrize(
    ("load", "scores"),
    [
        ([0.0, 5.0, 10.0], (1.0, 0.5, 0.0)),
        ([3.0, 3.0], (1.0, 1.0)),
        ([7.0], (1.0,)),
        ([0.0, 10.0, np.nan], (1.0, 0.0, 0.5)),
        ([4.0, np.nan], (1.0, 1.0)),
        ([np.nan, np.nan], (1.0, 1.0)),
    ],
)
def test_less_is_better_between_the_least_and_the_most(load: list[float], scores: tuple[float, ...]) -> None:
    assert less_is_better(np.array(load)).tolist() == approximately(*scores)


def test_queue_depth_prefers_fewer_waiting() -> None:
    made = pool(a={"waiting": 8}, b={"waiting": 2}, c={"waiting": 0})
    assert QueueDepth()(view(made), request()).tolist() == approximately(0.0, 0.75, 1.0)


def test_running_prefers_fewer_running() -> None:
    made = pool(a={"running": 4}, b={"running": 1}, c={"running": 0})
    assert Running()(view(made), request()).tolist() == approximately(0.0, 0.75, 1.0)


def test_inflight_counts_our_own_requests() -> None:
    assert Inflight()(view(pool(a=4, b=3, c=0)), request()).tolist() == approximately(0.0, 0.25, 1.0)


def test_kv_usage_is_what_is_left_and_unknown_is_the_mean_of_the_others() -> None:
    made = pool(a={"kv_usage": 0.9}, b={"kv_usage": 0.1}, c={})
    assert KvUsage()(view(made), request()).tolist() == approximately(0.1, 0.9, 0.5)
    assert KvUsage()(view(pool(a={}, b={})), request()).tolist() == approximately(0.5, 0.5)


def test_prefix_cache_is_the_matched_share_of_the_prompt() -> None:
    seen = view(pool(a=0, b=0, c=0), matched_blocks=np.array([0.0, 3.0, 4.0]), total_blocks=4)
    assert PrefixCache()(seen, request()).tolist() == approximately(0.0, 0.75, 1.0)


def test_a_prompt_without_a_full_block_matches_nowhere() -> None:
    assert PrefixCache()(view(pool(a=0, b=0)), request()).tolist() == [0.0, 0.0]


def test_lora_affinity_prefers_the_loaded_adapter_then_room_for_one() -> None:
    made = pool(
        loaded={"max_adapters": 1},
        roomy={"max_adapters": 2},
        full={"max_adapters": 1},
        mute={},
    )
    made.set_adapters(0, frozenset({"mine"}))
    made.set_adapters(1, frozenset({"other"}))
    made.set_adapters(2, frozenset({"other"}))
    seen = view(made, model="mine")
    assert LoraAffinity()(seen, request(model="mine")).tolist() == approximately(1.0, 0.8, 0.0, 0.0)
    assert LoraAffinity(room_score=0.5)(seen, request(model="mine")).tolist() == approximately(1.0, 0.5, 0.0, 0.0)


def test_recency_prefers_the_endpoint_picked_longest_ago() -> None:
    made = pool(a={"last_pick": 9}, never={}, b={"last_pick": 4}, newcomer={})
    assert Recency()(view(made), request()).tolist() == approximately(0.0, 1.0, 0.5, 1.0)


def test_session_prefers_the_endpoint_that_served_it() -> None:
    made = pool(a=0, b=0)
    assert Session()(view(made, session_row=1), request(session="s")).tolist() == [0.0, 1.0]
    assert Session()(view(made), request(session="s")).tolist() == [0.0, 0.0]


# --- finding them ---


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_a_short_name_is_the_name_the_scorer_answers_to(name: str) -> None:
    assert build_scorer(name, {}).name == name


def test_parameters_reach_the_scorer() -> None:
    assert build_scorer("lora-affinity-scorer", {"room_score": 0.3}) == LoraAffinity(room_score=0.3)


def test_a_scorer_is_found_by_module_and_class() -> None:
    assert build_scorer("picker.scorers.session:Session", {}) == Session()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("queue-scorerr", "there is no scorer 'queue-scorerr'; did you mean 'queue-scorer'"),
        ("zzz", "known: prefix-cache-scorer, .*or module:Class"),
        ("no.such.module:Scorer", "cannot be imported"),
        ("picker.scorers.session:Nobody", "cannot be imported"),
    ],
)
def test_an_unknown_scorer_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scorer(name, {})


def test_an_unknown_parameter_is_refused_with_the_scorer_it_was_meant_for() -> None:
    with pytest.raises(ConfigError, match=r"scorer 'queue-scorer'.*'threshold'"):
        build_scorer("queue-scorer", {"threshold": 1})
