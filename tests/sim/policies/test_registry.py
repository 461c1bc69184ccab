"""Whatever is registered routes a small cluster to its end, the same way every time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from picker.sim.cluster import Arrival, Cluster, Incident, Outcome, Router, Timing, Trouble
from picker.sim.engine import Engine
from picker.sim.latency import profile
from picker.sim.policies import POLICIES, PoolDescription
from picker.sim.policies.peer import Peer

BLOCK = 64
PROFILE = replace(profile("qwen3-32b-2xh100"), block_size=BLOCK, kv_tokens=BLOCK * 400, max_num_seqs=32, noise_sd=0.03)
PODS = 4
PEERS = {
    "consistent-hash",
    "dynamo",
    "llm-d-affinity",
    "llm-d-legacy",
    "lmetric",
    "longest-prefix",
    "sglang-cache-aware",
}


def arrivals(count: int = 120) -> list[Arrival]:
    rng = np.random.default_rng(3)
    made = []
    for number in range(count):
        group = int(rng.integers(10))
        blocks = [group * 1000 + i for i in range(30)] + [100_000 + 100 * number + i for i in range(10)]
        made.append(Arrival(0.06 * number, 40 * BLOCK + 9, 20, np.array(blocks, dtype=np.uint64)))
    return made


def make(name: str, *, exact: bool, seed: int = 1) -> Router:
    return POLICIES[name](PoolDescription(PODS, BLOCK, PROFILE, exact=exact), seed)


def engine(name: str, started_at: float) -> Engine:
    return Engine(PROFILE, name=name, noise=np.random.default_rng([7, int(name[-1])]), started_at=started_at)


def run(router: Router, *incidents: Incident) -> list[Outcome]:
    engines = [engine(f"pod-{i}", 0.0) for i in range(PODS)]
    timing = Timing(scrape_interval=0.05, think=float("inf"))
    return Cluster(router, engines, timing=timing, incidents=incidents, engine_of=engine).run(arrivals())


def test_all_peers_of_the_contract_are_there() -> None:
    assert PEERS | {"random", "round-robin", "least-request", "picker"} <= POLICIES.keys()


@pytest.mark.parametrize("exact", [False, True], ids=["approximate", "exact"])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_serves_everything_and_forgets_it(name: str, exact: bool) -> None:
    router = make(name, exact=exact)
    outcomes = run(router)
    assert len(outcomes) == 120
    assert not any(outcome.failed for outcome in outcomes)
    assert len({outcome.endpoint for outcome in outcomes}) > 1
    if isinstance(router, Peer):
        assert router.inflight == 0
        fleet = router.fleet
        assert not any(booked.any() for booked in (fleet.inflight, fleet.prefilling, fleet.uncached))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_same_seed_decides_the_same(name: str) -> None:
    first, second = (run(make(name, exact=False)) for _ in range(2))
    assert [(o.endpoint, o.ended_at) for o in first] == [(o.endpoint, o.ended_at) for o in second]


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_loses_nothing_when_a_pod_dies_before_its_first_tokens(name: str) -> None:
    router = make(name, exact=True)
    outcomes = run(router, Incident(2.0, Trouble.KILL, "pod-2"), Incident(4.0, Trouble.REVIVE, "pod-2"))
    lost = [outcome for outcome in outcomes if outcome.failed]
    assert all(outcome.first_token_at < float("inf") for outcome in lost)
    assert isinstance(router, Peer)
    assert router.inflight == 0


@pytest.mark.parametrize("name", ["llm-d-affinity", "dynamo", "sglang-cache-aware", "lmetric", "llm-d-legacy"])
def test_a_cache_aware_peer_hits_more_than_round_robin(name: str) -> None:
    def hits(policy: str) -> int:
        return sum(outcome.cached_tokens for outcome in run(make(policy, exact=False)))

    assert hits(name) > 1.1 * hits("round-robin")
