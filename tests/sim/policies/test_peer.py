"""What all peers share: booking and release, who may be picked, ties."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import pytest

from peer_states import BLOCK, names, request, router, sent
from picker.sim.policies.lmetric import LMetric
from picker.sim.policies.longest_prefix import LongestPrefix
from picker.sim.policies.peer import Asked, Peer
from picker.types import (
    CacheCleared,
    Endpoint,
    EndpointAdded,
    EndpointDraining,
    EndpointRemoved,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    FloatArray,
    HealthObserved,
    LoadObserved,
    Rejection,
    RejectReason,
    ScrapeFailed,
    Usage,
)


class First(Peer):
    """Whoever joined first."""

    def cost(self, asked: Asked) -> FloatArray:
        return asked.rows.astype(np.float64)


def test_a_request_is_booked_at_submit_and_leaves_in_two_steps() -> None:
    peer = router(First, 2)
    sent(peer, request(1, range(4)))
    fleet = peer.fleet
    assert (fleet.inflight[0], fleet.prefilling[0], fleet.uncached[0]) == (1, 1, 4 * BLOCK)
    peer.apply(FirstToken(1), 1.0)
    assert (fleet.inflight[0], fleet.prefilling[0], fleet.uncached[0]) == (1, 0, 0)
    peer.apply(Finished(1, 200), 2.0)
    assert fleet.inflight[0] == 0
    assert peer.inflight == 0


@pytest.mark.parametrize("end", [Finished(1, 200), Failed(1, FailureReason.RESET)])
def test_an_end_without_a_first_token_releases_everything_once(end: Finished | Failed) -> None:
    peer = router(First, 1)
    sent(peer, request(1, range(4)))
    sent(peer, request(2, range(4, 8)))
    for fact in (end, end, FirstToken(1), FirstToken(9)):
        peer.apply(fact, 1.0)
    fleet = peer.fleet
    assert (fleet.inflight[0], fleet.prefilling[0], fleet.uncached[0]) == (1, 1, 4 * BLOCK)


def test_uncached_tokens_count_what_is_believed_cached() -> None:
    peer = router(First, 1)
    sent(peer, request(1, range(4)))
    sent(peer, request(2, range(6)))
    assert peer.fleet.uncached[0] == 4 * BLOCK + 2 * BLOCK


def test_the_last_token_is_always_computed() -> None:
    peer = router(First, 1)
    sent(peer, request(1, range(4)))
    sent(peer, request(2, range(4)))
    assert peer.fleet.uncached[0] == 4 * BLOCK + 1


def test_who_is_gone_sick_draining_or_tried_is_not_picked() -> None:
    peer = router(First, 5)
    peer.apply(EndpointRemoved("pod-0"), 0.0)
    peer.apply(HealthObserved("pod-1", healthy=False), 0.0)
    peer.apply(EndpointDraining("pod-2"), 0.0)
    assert sent(peer, request(1, exclude=["pod-3"])) == "pod-4"
    peer.apply(HealthObserved("pod-1", healthy=True), 0.0)
    assert sent(peer, request(2)) == "pod-1"


def test_only_endpoints_that_serve_the_model_are_picked() -> None:
    peer = router(First, 0)
    peer.apply(EndpointAdded(Endpoint("a", "a", frozenset({"llama"}))), 0.0)
    peer.apply(EndpointAdded(Endpoint("b", "b", frozenset({"qwen"}))), 0.0)
    assert sent(peer, msgspec.structs.replace(request(1), model="qwen")) == "b"
    peer.apply(EndpointAdded(Endpoint("a", "a", frozenset({"llama", "qwen"}))), 0.0)
    assert sent(peer, msgspec.structs.replace(request(2), model="qwen")) == "a"


def test_nobody_left_is_a_rejection() -> None:
    outcome = router(First, 1).submit(request(1, exclude=["pod-0"]), 0.0)
    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectReason.NO_ENDPOINTS


def test_ties_go_by_lot_and_the_lot_by_the_seed() -> None:
    def picks(seed: int) -> list[str]:
        peer = router(LongestPrefix, 4, seed=seed)
        return [sent(peer, request(i)) for i in range(200)]

    assert picks(1) == picks(1) != picks(2)
    assert min(Counter(picks(1)).values()) > 25


def test_more_endpoints_than_rows_make_room_and_keep_the_books() -> None:
    peer = router(First, 1)
    sent(peer, request(1, range(4)))
    for name in names(200)[1:]:
        peer.apply(EndpointAdded(Endpoint(name, name)), 0.0)
    assert peer.fleet.uncached[0] == 4 * BLOCK
    assert sent(peer, request(2, exclude=names(199))) == "pod-199"


def test_a_scrape_shows_load_and_a_failed_one_changes_nothing() -> None:
    peer = router(First, 1)
    assert np.isnan(peer.fleet.waiting[0])
    peer.apply(LoadObserved("pod-0", 3.0, waiting=7, running=2, kv_usage=0.5), 3.0)
    peer.apply(ScrapeFailed("pod-0", 4.0, "refused"), 4.0)
    peer.apply(LoadObserved("unknown", 4.0, waiting=9), 4.0)
    fleet = peer.fleet
    assert (fleet.waiting[0], fleet.running[0], fleet.kv_usage[0], fleet.observed_at[0]) == (7, 2, 0.5, 3.0)


@pytest.mark.parametrize(
    "fact",
    [
        CacheCleared("pod-0"),
        LoadObserved("pod-0", 2.0, started_at=500.0, queries=100),
        LoadObserved("pod-0", 2.0, started_at=1.0, queries=3),
    ],
    ids=["cleared", "restarted", "counter went back"],
)
def test_a_lost_cache_is_forgotten(fact: CacheCleared | LoadObserved) -> None:
    peer = router(LMetric, 1)
    peer.apply(LoadObserved("pod-0", 1.0, started_at=1.0, queries=50), 1.0)
    sent(peer, request(1, range(4)))
    peer.apply(fact, 2.0)
    sent(peer, request(2, range(4)))
    assert peer.fleet.uncached[0] == 2 * 4 * BLOCK


def test_the_scraped_capacity_bounds_what_is_believed_cached() -> None:
    peer = router(First, 1)
    peer.apply(LoadObserved("pod-0", 1.0, kv_capacity_tokens=4 * BLOCK), 1.0)
    sent(peer, request(1, range(4)))
    sent(peer, request(2, range(10, 14)))
    before = peer.fleet.uncached[0]
    sent(peer, request(3, range(4)))
    assert peer.fleet.uncached[0] - before == 4 * BLOCK


def test_reported_hits_teach_how_much_an_endpoint_retains() -> None:
    def believed(cached_tokens: int) -> int:
        peer = router(First, 1)
        peer.apply(LoadObserved("pod-0", 0.0, kv_capacity_tokens=40 * BLOCK), 0.0)
        for number in range(1, 60):
            sent(peer, request(number, range(20)))
            peer.apply(Finished(number, 200, Usage(20 * BLOCK, 1, cached_tokens)), 0.0)
        sent(peer, request(100, range(100, 120)))
        return int(peer.knowledge.match(request(101, range(20)).block_hashes, 0.0)[0])

    assert believed(20 * BLOCK) == 20
    assert believed(0) < 10
