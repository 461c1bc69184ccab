"""What may decide in the laboratory: each name makes a `Router` for a pool.

Each peer has a file of its own here; the ones below are the real scheduler with another profile, so that what is
compared is the rule alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from picker.core.profile import Cost, Profile, Weighted
from picker.core.scheduler import Scheduler, Settings
from picker.errors import ConfigError
from picker.prefix.approximate import ApproximateIndex
from picker.prefix.exact import Exact as Told
from picker.prefix.precise import PreciseIndex
from picker.prefix.spellers import ByHash
from picker.scorers.inflight import Inflight
from picker.scorers.recency import Recency
from picker.sim import latency
from picker.sim.cluster import BYTES_PER_TOKEN, Router
from picker.sim.policies.consistent_hash import ConsistentHash
from picker.sim.policies.dynamo import Dynamo
from picker.sim.policies.knowledge import Approximate, Exact
from picker.sim.policies.llm_d_affinity import LlmdAffinity
from picker.sim.policies.llm_d_legacy import LlmdLegacy
from picker.sim.policies.lmetric import LMetric
from picker.sim.policies.longest_prefix import LongestPrefix
from picker.sim.policies.peer import Peer
from picker.sim.policies.sglang_cache_aware import SglangCacheAware

_INDEX_BUDGET = 1 << 30
TOLD = "-exact"


@dataclass(frozen=True, slots=True)
class PoolDescription:
    """What an operator would tell a router. pods: how many there are at the start. block_tokens: of the block hashes.

    profile: the pods' as it is published; their real speeds may differ, and a router has to find out.
    exact: routers are told by KV events what the engines cache, and do not have to learn it from what they send.
    """

    pods: int
    block_tokens: int
    profile: latency.Profile
    exact: bool = False


Factory = Callable[[PoolDescription, int], Router]
"""(pool, seed) -> a router that knows no endpoint yet."""


def scheduler(pool: PoolDescription, seed: int, profile: Profile) -> Scheduler:
    """The real scheduler with `profile`, its index of the pool's block size."""
    settings = Settings(block_bytes=pool.block_tokens * BYTES_PER_TOKEN, seed=seed)
    exact = Told(PreciseIndex(_INDEX_BUDGET), ByHash()) if pool.exact else None
    return Scheduler(settings, ApproximateIndex(_INDEX_BUDGET), profile, exact=exact)


def peer(kind: Callable[..., Peer], **settings: Any) -> Factory:
    """Makes a policy of another project, with its defaults unless `settings` say otherwise."""

    def make(pool: PoolDescription, seed: int) -> Router:
        knowledge = Exact() if pool.exact else Approximate(ApproximateIndex(_INDEX_BUDGET))
        return kind(knowledge, np.random.default_rng(seed), block_tokens=pool.block_tokens, **settings)

    return make


POLICIES: Mapping[str, Factory] = {
    "random": lambda pool, seed: scheduler(pool, seed, Weighted([])),
    "round-robin": lambda pool, seed: scheduler(pool, seed, Weighted([(Recency(), 1.0)])),
    "least-request": lambda pool, seed: scheduler(pool, seed, Weighted([(Inflight(), 1.0)])),
    "longest-prefix": peer(LongestPrefix),
    "consistent-hash": peer(ConsistentHash),
    "llm-d-legacy": peer(LlmdLegacy),
    "llm-d-affinity": peer(LlmdAffinity),
    "dynamo": peer(Dynamo),
    "sglang-cache-aware": peer(SglangCacheAware),
    "lmetric": peer(LMetric),
    "picker": lambda pool, seed: scheduler(pool, seed, Cost()),
}


def policy(name: str) -> Factory:
    """The factory called `name`; with "-exact" behind it, the router is told by KV events what is cached.

    Raises ConfigError naming the nearest ones that exist, else all.
    """
    if name in POLICIES:
        return POLICIES[name]
    base = name.removesuffix(TOLD)
    if base != name and base in POLICIES:
        return lambda pool, seed: POLICIES[base](replace(pool, exact=True), seed)
    near = difflib.get_close_matches(base, POLICIES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(POLICIES)}"
    raise ConfigError(f"no policy {name!r}; {hint}")
