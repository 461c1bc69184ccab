"""Floors, ceilings and the pooled reference: against the engine itself, brute force and published figures."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.load.trace import load
from picker.sim.bounds import REFERENCES, floor, infinite_hit_ratio, lru_hit_ratio, min_hit_ratio, pooled_fcfs
from picker.sim.cluster import Arrival, Cluster, Outcome, Timing
from picker.sim.engine import Engine
from picker.sim.latency import profile
from picker.sim.policies import POLICIES, PoolDescription

PROFILE = replace(profile("qwen3-32b-2xh100"), block_size=16, kv_tokens=16 * 2000, max_num_seqs=32)
TIMING = Timing(scrape_interval=0.05)


def prompt(blocks: Iterable[int], *, at: float = 0.0, extra: int = 0, output: int = 1, size: int = 16) -> Arrival:
    hashes = np.array(list(blocks), dtype=np.uint64)
    return Arrival(at, hashes.size * size + extra, output, hashes)


def on_cluster(arrivals: Sequence[Arrival], pods: int = 1, policy: str = "round-robin") -> list[Outcome]:
    router = POLICIES[policy](PoolDescription(pods, 16, PROFILE), 0)
    engines = [Engine(PROFILE, name=f"pod-{i}") for i in range(pods)]
    return Cluster(router, engines, timing=TIMING).run(arrivals)


# --- floor ---


@pytest.mark.parametrize("tokens", [1, 16, 500, 8192, 8193, 20_000])
@pytest.mark.parametrize("output", [1, 2, 300])
def test_the_floor_of_one_request_is_what_an_idle_pod_takes(tokens: int, output: int) -> None:
    arrival = prompt(range(tokens // 16), extra=tokens % 16, output=output)
    (alone,), (served,) = floor([arrival], [PROFILE], TIMING), on_cluster([arrival])
    assert alone.ttft == pytest.approx(served.ttft)
    assert alone.e2e == pytest.approx(served.e2e)


def test_the_floor_caches_all_but_the_last_token_for_everybody() -> None:
    arrivals = [prompt(range(100), output=5), prompt(range(100), at=100.0, output=5)]
    first, second = floor(arrivals, [PROFILE], TIMING)
    assert (first.cached_tokens, second.cached_tokens) == (0, 99 * 16)
    assert second.ttft == pytest.approx(on_cluster(arrivals)[1].ttft)


def test_the_floor_takes_the_fastest_pod() -> None:
    arrival = prompt(range(100), output=50)
    fast, mixed = (floor([arrival], p, TIMING) for p in ([PROFILE.scaled(2.0)], [PROFILE, PROFILE.scaled(2.0)]))
    assert (fast[0].ttft, fast[0].e2e) == (mixed[0].ttft, mixed[0].e2e)


def conversation(turn: int, at: float = 0.0) -> Arrival:
    """Each turn is the last with its answer of 20 tokens and 12 tokens more."""
    tokens = 48 + 32 * turn
    return Arrival(
        at,
        tokens,
        20,
        np.arange(tokens // 16, dtype=np.uint64),
        hash_of=lambda index: index,
        then=lambda ended: conversation(turn + 1, ended + 1.0) if turn < 3 else None,
    )


def test_the_floor_follows_a_conversation_and_caches_its_answers() -> None:
    turns, served = floor([conversation(0)], [PROFILE], TIMING), on_cluster([conversation(0)])
    assert [t.cached_tokens for t in turns] == [s.cached_tokens for s in served] == [0, 64, 96, 128]
    assert [t.e2e for t in turns] == pytest.approx([s.e2e for s in served])


# --- pooled FCFS ---


def crowd(count: int = 150, gap: float = 0.05) -> list[Arrival]:
    rng = np.random.default_rng(2)
    groups = rng.integers(8, size=count)
    return [
        prompt([*range(g * 100, g * 100 + 60), *range(10_000 + 100 * i, 10_000 + 100 * i + 60)], at=gap * i, output=40)
        for i, g in enumerate(groups.tolist())
    ]


def test_alone_the_pooled_reference_is_an_idle_pod() -> None:
    arrival = prompt(range(700), output=30)
    (pooled,), (served,) = pooled_fcfs([arrival], [PROFILE] * 4, TIMING), on_cluster([arrival])
    assert pooled.ttft == pytest.approx(served.ttft)
    assert pooled.e2e == pytest.approx(served.e2e)


def test_the_pooled_reference_lies_between_floor_and_round_robin() -> None:
    def mean(outcomes: list[Outcome]) -> float:
        assert not any(outcome.failed for outcome in outcomes)
        return float(np.mean([outcome.ttft for outcome in outcomes]))

    arrivals = crowd()
    low, pooled = (mean(reference(arrivals, [PROFILE] * 4, TIMING)) for reference in (floor, pooled_fcfs))
    assert low < pooled < mean(on_cluster(arrivals, 4))


def test_every_pod_finds_what_another_computed() -> None:
    arrivals = [prompt(range(400), at=20.0 * i, output=100) for i in range(6)]
    cached = [outcome.cached_tokens for outcome in pooled_fcfs(arrivals, [PROFILE] * 3, TIMING)]
    assert cached == [0] + [399 * 16] * 5


def test_pods_short_of_memory_wait_for_each_other_and_finish() -> None:
    tight = replace(PROFILE, kv_tokens=16 * 130)
    outcomes = pooled_fcfs(crowd(60, gap=0.001), [tight] * 3, TIMING)
    assert not any(outcome.failed for outcome in outcomes)


def test_first_come_is_first_served() -> None:
    arrivals = [prompt(range(100 * i, 100 * i + 50), at=0.001 * i) for i in range(40)]
    begun = [outcome.first_token_at for outcome in pooled_fcfs(arrivals, [PROFILE], TIMING)]
    assert begun == sorted(begun)


def test_a_long_prompt_leaves_the_front_end_when_it_is_through() -> None:
    arrivals = [prompt(range(3)), prompt(range(100, 1600), at=0.001)]
    _, behind = pooled_fcfs(arrivals, [PROFILE] * 2, TIMING)
    (alone,) = pooled_fcfs(arrivals[1:], [PROFILE] * 2, TIMING)
    assert behind.ttft == pytest.approx(alone.ttft)


def test_a_faster_pod_gets_more() -> None:
    outcomes = pooled_fcfs(crowd(gap=0.02), [PROFILE, PROFILE.scaled(4.0)], TIMING)
    picks = [outcome.endpoint for outcome in outcomes]
    assert picks.count("pooled-1") > 2 * picks.count("pooled-0")


def test_references_are_named_as_the_command_names_them() -> None:
    assert set(REFERENCES) == {"pooled-fcfs", "greedy-oracle", "floor"}


# --- hit ratios ---

TRACES = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 1)).map(
        # Chained: a block is named after the path to it.
        lambda path: [path[0], 10 + 3 * path[0] + path[1], 100 + 10 * path[0] + 3 * path[1] + path[2]]
    ),
    min_size=1,
    max_size=7,
)


def best_by_brute_force(trace: list[list[int]], blocks: int) -> int:
    """Most leading hits that any choice of what to keep can get."""
    best = {frozenset[int](): 0}
    for prompt_blocks in trace:
        after: dict[frozenset[int], int] = {}
        for cache, hits in best.items():
            hits += sum(1 for _ in itertools.takewhile(cache.__contains__, prompt_blocks))
            everything = cache | set(prompt_blocks)
            for kept in itertools.combinations(sorted(everything), min(blocks, len(everything))):
                after[frozenset(kept)] = max(hits, after.get(frozenset(kept), 0))
        best = after
    return max(best.values())


@given(TRACES, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_min_is_the_best_there_is(trace: list[list[int]], blocks: int) -> None:
    arrivals = [prompt(p, size=1) for p in trace]
    assert min_hit_ratio(arrivals, 1, blocks) * 3 * len(trace) == pytest.approx(best_by_brute_force(trace, blocks))


@given(TRACES, st.integers(1, 30))
@settings(max_examples=60)
def test_lru_is_below_min_and_min_below_infinite(trace: list[list[int]], blocks: int) -> None:
    arrivals = [prompt(p, size=1) for p in trace]
    ratios = lru_hit_ratio(arrivals, 1, blocks), min_hit_ratio(arrivals, 1, blocks), infinite_hit_ratio(arrivals, 1)
    assert list(ratios) == sorted(ratios)


def test_lru_evicts_tails_before_heads() -> None:
    arrivals = [prompt([1, 2, 3]), prompt([9]), prompt([1, 2, 3])]
    assert lru_hit_ratio(arrivals, 16, 3) == pytest.approx(2 / 7)


# Published for the conversation trace: blocks of 512 tokens -> (LRU, MIN).
PUBLISHED = {600: (0.043, 0.153), 5000: (0.114, 0.348), 50_000: (0.362, 0.374)}


@pytest.mark.skipif("PICKER_TRACES" not in os.environ, reason="PICKER_TRACES names no folder of traces")
def test_hit_ratios_of_the_conversation_trace_are_the_published_ones() -> None:
    path = Path(os.environ["PICKER_TRACES"]) / "mooncake_conversation.jsonl"
    if not path.exists():
        pytest.skip("the conversation trace is not there")
    # The published figures count a prompt's last block, which may not be full.
    arrivals = [Arrival(r.at, r.prompt_tokens, 1, np.array(r.blocks, dtype=np.uint64)) for r in load(path) if r.blocks]
    assert infinite_hit_ratio(arrivals, 512) == pytest.approx(0.374, abs=6e-4)
    for blocks, (lru, clairvoyant) in PUBLISHED.items():
        assert lru_hit_ratio(arrivals, 512, blocks) == pytest.approx(lru, abs=6e-4)
        assert min_hit_ratio(arrivals, 512, blocks) == pytest.approx(clairvoyant, abs=6e-4)
