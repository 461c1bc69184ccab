"""Each peer's rule on states made by hand, with numbers worked out from its published formula."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from peer_states import BLOCK, asked, names, request, router, sent
from picker.sim.policies.consistent_hash import ConsistentHash
from picker.sim.policies.dynamo import Dynamo
from picker.sim.policies.llm_d_affinity import LlmdAffinity
from picker.sim.policies.llm_d_legacy import LlmdLegacy
from picker.sim.policies.lmetric import LMetric
from picker.sim.policies.longest_prefix import LongestPrefix
from picker.sim.policies.sglang_cache_aware import SglangCacheAware
from picker.types import Finished, FirstToken, LoadObserved

TEN = range(10)


# --- longest prefix ---


def test_longest_prefix_ignores_load() -> None:
    peer = router(LongestPrefix, 3)
    peer.fleet.inflight[1] = 1000
    assert peer.cost(asked(TEN, [0, 3, 2])).argmin() == 1


# --- consistent hash ---


def test_equal_beginnings_meet_while_load_allows() -> None:
    peer = router(ConsistentHash, 4, bound=100.0, key_tokens=2 * BLOCK)
    homes = {sent(peer, request(i, [7, 8, 100 + i])) for i in range(20)}
    assert len(homes) == 1


def test_only_the_first_tokens_are_the_key() -> None:
    peer = router(ConsistentHash, 8, bound=100.0, key_tokens=BLOCK)
    homes = {sent(peer, request(i, [i, 8])) for i in range(40)}
    assert len(homes) > 4


def test_no_endpoint_exceeds_the_bound() -> None:
    peer = router(ConsistentHash, 4)
    for i in range(80):
        sent(peer, request(i, [7]))
    # ceil(1.25 * 80 / 4) at most; the bound lets the home run ahead of the others, not away from them.
    assert peer.fleet.inflight.max() == 25
    assert peer.fleet.inflight[:4].min() >= 5


def test_a_full_home_spills_to_the_same_next_one() -> None:
    peer = router(ConsistentHash, 8, bound=1.25)
    for i in range(3):
        sent(peer, request(i, [7]))
    ranked = peer.fleet.inflight[:8].copy()
    again = router(ConsistentHash, 8, seed=99)
    for i in range(3):
        sent(again, request(i, [7]))
    assert ranked.tolist() == again.fleet.inflight[:8].tolist()


def test_the_ring_moves_few_keys_when_one_leaves() -> None:
    peer = router(ConsistentHash, 8, bound=1000.0)
    homes = {i: sent(peer, request(i, [1000 + i])) for i in range(300)}
    assert max(Counter(homes.values()).values()) < 80
    moved = [i for i, home in homes.items() if sent(peer, request(1000 + i, [1000 + i], exclude=["pod-3"])) != home]
    assert sorted(moved) == [i for i, home in homes.items() if home == "pod-3"]


def test_prompts_without_a_full_block_are_spread() -> None:
    peer = router(ConsistentHash, 4, bound=1000.0)
    assert len({sent(peer, request(i, tokens=3)) for i in range(40)}) == 4


# --- llm-d, weighted blend ---


def test_legacy_blend_weighs_prefix_3_queue_2_kv_2() -> None:
    peer = router(LlmdLegacy, 3)
    for name, waiting, kv in zip(names(3), (0, 5, 10), (0.5, 0.25, 0.0), strict=True):
        peer.apply(LoadObserved(name, 1.0, waiting=waiting, kv_usage=kv), 1.0)
    cost = peer.cost(asked(TEN, [2, 5, 10]))
    assert cost == pytest.approx([-(0.6 + 2 + 1), -(1.5 + 1 + 1.5), -(3 + 0 + 2)])


def test_legacy_blend_sees_equal_queues_as_best_and_unknown_as_idle() -> None:
    cost = router(LlmdLegacy, 2).cost(asked(TEN, [0, 10]))
    assert cost == pytest.approx([-4.0, -7.0])


def test_legacy_blend_sees_nothing_between_scrapes() -> None:
    peer = router(LlmdLegacy, 2)
    peer.fleet.inflight[0], peer.fleet.uncached[0] = 100, 1e6
    assert peer.cost(asked(TEN, [0, 0])) == pytest.approx([-4.0, -4.0])


# --- llm-d, affinity ---


def affinity(*inflight: float) -> LlmdAffinity:
    peer = router(LlmdAffinity, len(inflight))
    peer.fleet.uncached[: len(inflight)] = inflight
    return peer


def test_four_fifths_cached_are_sticky_and_less_is_not() -> None:
    assert affinity(200_000, 0).cost(asked(TEN, [8, 0])).argmin() == 0
    assert affinity(200_000, 0).cost(asked(TEN, [7, 0])).argmin() == 1


def test_the_valve_opens_above_its_gap_only() -> None:
    assert affinity(286_704, 0).cost(asked(TEN, [10, 0])).argmin() == 0
    assert affinity(286_705, 0).cost(asked(TEN, [10, 0])).argmin() == 1


def test_the_gap_is_between_the_best_of_both_sides() -> None:
    assert affinity(400_000, 10, 0).cost(asked(TEN, [10, 9, 0])).argmin() == 1


def test_without_the_gate_inflight_and_own_uncached_tokens_decide() -> None:
    # 100 + 160 - 7 * 16 = 148 against 160 + 0
    assert affinity(100, 0).cost(asked(TEN, [7, 0])) == pytest.approx([148.0, 160.0])


def test_all_sticky_is_decided_by_tokens() -> None:
    assert affinity(500_000, 0).cost(asked(TEN, [10, 10])).argmin() == 1


def test_beyond_the_horizon_all_are_equal() -> None:
    cost = affinity(5e6, 9e6).cost(asked(TEN, [0, 0]))
    assert cost[0] == cost[1]


# --- Dynamo ---


def test_dynamo_adds_prefill_and_distinct_decode_blocks() -> None:
    peer = router(Dynamo, 2)
    peer.fleet.uncached[:2] = 5 * BLOCK, 0
    # pod 0: 5 waiting + 10 - 8 cached, and the 10 it will hold; pod 1: 10 to compute and 10 to hold.
    assert peer.cost(asked(TEN, [8, 0])) == pytest.approx([7 + 10, 10 + 10])


def test_dynamo_counts_shared_blocks_once_until_the_last_holder_ends() -> None:
    peer = router(Dynamo, 1)
    for number in (1, 2):
        sent(peer, request(number, range(10), tokens=10 * BLOCK + 3))
        peer.apply(FirstToken(number), 1.0)
    # 10 shared and a last one each; this prompt has 4 of them.
    assert peer.cost(asked([0, 1, 2, 3], [4])) == pytest.approx([1 / BLOCK + 12])
    peer.apply(Finished(1, 200), 2.0)
    assert peer.cost(asked([0, 1, 2, 3], [4])) == pytest.approx([1 / BLOCK + 11])
    peer.apply(Finished(2, 200), 3.0)
    assert peer.cost(asked([0, 1, 2, 3], [4])) == pytest.approx([1 / BLOCK + 4])


# --- sglang ---


def sglang(*inflight: int) -> SglangCacheAware:
    peer = router(SglangCacheAware, len(inflight))
    peer.fleet.inflight[: len(inflight)] = inflight
    return peer


def test_sglang_follows_a_match_above_three_tenths() -> None:
    assert sglang(50, 0).cost(asked(TEN, [4, 0])).argmin() == 0
    assert sglang(50, 0).cost(asked(TEN, [3, 0])).argmin() == 1


@pytest.mark.parametrize(
    ("loads", "winner"),
    [
        ((64, 0), 0),  # not more than 64 apart
        ((65, 0), 1),
        ((300, 200), 0),  # not more than 1.5 times
        ((301, 200), 1),
    ],
)
def test_sglang_leaves_the_cache_when_out_of_balance(loads: tuple[int, int], winner: int) -> None:
    assert sglang(*loads).cost(asked(TEN, [10, 0])).argmin() == winner


def test_sglang_prefers_the_less_loaded_of_equal_matches() -> None:
    assert sglang(9, 5, 0).cost(asked(TEN, [6, 6, 5])).argmin() == 1


# --- LMetric ---


def test_lmetric_multiplies_new_tokens_by_the_batch() -> None:
    peer = router(LMetric, 3)
    peer.fleet.inflight[:3] = 3, 0, 1
    assert peer.cost(asked(TEN, [8, 0, 5])) == pytest.approx([32 * 4, 160 * 1, 80 * 2])


def test_lmetric_can_count_queued_tokens_as_new() -> None:
    peer = router(LMetric, 2, queued=True)
    peer.fleet.inflight[:2] = 1, 1
    peer.fleet.uncached[:2] = 100, 0
    assert peer.cost(asked(TEN, [10, 0])) == pytest.approx([101 * 2, 160 * 2])
    assert np.argmin(router(LMetric, 2).cost(asked(TEN, [10, 0]))) == 0
