from collections import Counter
from typing import Any

import numpy as np
import pytest

from fakes import BLOCK_BYTES, NOW, blocks, endpoint, request, scheduler
from picker.core.profile import Weighted
from picker.core.scheduler import Scheduler
from picker.scorers.inflight import Inflight
from picker.scorers.lora_affinity import LoraAffinity
from picker.scorers.recency import Recency
from picker.scorers.session import Session
from picker.types import (
    CacheCleared,
    Decision,
    EndpointAdded,
    EndpointDraining,
    EndpointRemoved,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    HealthObserved,
    LoadObserved,
    ModelsObserved,
    Rejection,
    RejectReason,
    Request,
    ResponseStarted,
    ScrapeFailed,
    Sleep,
    UInt64Array,
    Usage,
)


def decide(subject: Scheduler, asked: Request, now: float = NOW) -> Decision:
    outcome = subject.submit(asked, now)
    assert isinstance(outcome, Decision), outcome
    return outcome


def picked(subject: Scheduler, asked: Request, now: float = NOW) -> str:
    return decide(subject, asked, now).endpoint.name


def burst(subject: Scheduler, count: int, *, now: float = NOW, first_id: int = 1000, **fields: Any) -> Counter[str]:
    """Where so many requests go that arrive together, each with a prompt of its own unless one is given."""
    return Counter(picked(subject, request(first_id + n, **fields), now) for n in range(count))


def pinned(name: str) -> frozenset[str]:
    return frozenset({f"{name}:8000"})


def serve(subject: Scheduler, asked: Request, name: str, *, seconds: float = 0.0, now: float = NOW) -> None:
    """A request that went to this endpoint, had its first token after so many seconds, and ended well."""
    assert picked(subject, asked, now) == name
    subject.apply(FirstToken(asked.id), now + seconds)
    subject.apply(Finished(asked.id, 200), now + seconds)


def cached(subject: Scheduler, prompt: UInt64Array, name: str) -> None:
    """Let one endpoint, and no other, hold this prompt."""
    serve(subject, request(999_999, prompt, subset=pinned(name)), name)


def fault(subject: Scheduler, name: str, request_id: int, *, now: float = NOW, times: int = 1) -> None:
    for number in range(times):
        subject.submit(request(request_id + number, subset=pinned(name)), now)
        subject.apply(Failed(request_id + number, FailureReason.CONNECT), now)


def column(subject: Scheduler, name: str, of: str) -> float:
    row = subject.pool.row(name)
    assert row is not None
    return float(getattr(subject.pool, of)[row])


def load(name: str, **fields: Any) -> LoadObserved:
    return LoadObserved(name, NOW, **fields)


# --- a decision ---


def test_a_decision_names_the_best_then_the_next_best() -> None:
    subject = scheduler("a", "b", "c", "d", fallbacks=2)
    for number, name in enumerate("aabbbcccc"):
        picked(subject, request(number, subset=pinned(name)))
    decision = decide(subject, request(99))
    assert [decision.endpoint.name, *(each.name for each in decision.fallbacks)] == ["d", "a", "b"]
    assert decision.ranking is not None
    assert [each.endpoint for each in decision.ranking.candidates()] == ["d", "a", "b", "c"]
    assert decision.charged


@pytest.mark.parametrize(("fallbacks", "named"), [(0, 0), (1, 1), (5, 2)])
def test_there_are_no_more_fallbacks_than_asked_for_or_than_endpoints(fallbacks: int, named: int) -> None:
    assert len(decide(scheduler("a", "b", "c", fallbacks=fallbacks), request()).fallbacks) == named


def test_a_ranking_explains_its_total_by_its_parts() -> None:
    ranking = decide(scheduler("a", "b"), request()).ranking
    assert ranking is not None
    for candidate in ranking.candidates():
        assert candidate.total == pytest.approx(-sum(candidate.parts.values()))


def test_a_decision_says_what_is_cached_there() -> None:
    subject = scheduler("a", "b")
    cached(subject, blocks(system=8), "a")
    decision = decide(subject, request(1, blocks(system=8, mine=2), subset=pinned("a")))
    assert (decision.matched_blocks, decision.total_blocks) == (8, 10)
    assert decision.prompt_tokens == pytest.approx(10 * BLOCK_BYTES / 4)
    assert decision.matched_tokens == pytest.approx(8 * BLOCK_BYTES / 4)


def test_the_last_token_of_a_prompt_is_always_computed_again() -> None:
    subject = scheduler("a")
    cached(subject, blocks(system=8), "a")
    decision = decide(subject, request(1, blocks(system=8)))
    assert decision.prompt_tokens - decision.matched_tokens == pytest.approx(1.0)


def test_a_number_of_tokens_that_is_known_is_used_as_it_is() -> None:
    subject = scheduler("a")
    decision = decide(subject, request(1, prompt_tokens=123, prompt_bytes=492, extra_bytes=400))
    assert decision.prompt_tokens == pytest.approx(123 + 100)


def test_a_request_without_a_prompt_is_routed_by_load_alone() -> None:
    subject = scheduler("a", "b")
    decision = decide(subject, request(1, prompt_bytes=0))
    assert (decision.prompt_tokens, decision.matched_tokens) == (0.0, 0.0)


def test_an_explicit_no_books_nothing() -> None:
    subject = scheduler(endpoint("a", models=["m"]))
    refusal = subject.submit(request(model="x"), NOW)
    assert isinstance(refusal, Rejection)
    assert (refusal.reason, refusal.status) == (RejectReason.UNKNOWN_MODEL, 404)
    assert len(subject.charges) == 0
    assert column(subject, "a", "inflight") == 0


# --- a burst ---


@pytest.mark.parametrize("endpoints", [2, 3, 8])
def test_a_burst_of_equal_requests_spreads_evenly_though_nothing_is_reported_between(endpoints: int) -> None:
    subject = scheduler(*(f"e{n}" for n in range(endpoints)))
    counts = burst(subject, 5 * endpoints)
    assert set(counts.values()) == {5}


def test_a_burst_of_one_and_the_same_prompt_is_shared_too() -> None:
    subject = scheduler("a", "b", "c", "d")
    counts = burst(subject, 40, prompt=blocks(same=40))
    assert len(counts) == 4
    assert max(counts.values()) <= 20


def test_the_first_of_equals_is_drawn_not_the_first_of_the_list() -> None:
    firsts = {picked(scheduler("a", "b", "c", seed=seed), request()) for seed in range(20)}
    assert firsts == {"a", "b", "c"}


def test_the_same_seed_draws_the_same() -> None:
    assert len({picked(scheduler("a", "b", "c", seed=7), request()) for _ in range(9)}) == 1


# --- prefixes ---


def test_a_long_shared_prefix_draws_requests_to_where_it_is_cached() -> None:
    subject = scheduler("a", "b", "c", "d")
    cached(subject, blocks(document=100), "c")
    for number in range(5):
        serve(subject, request(number, blocks(document=100, **{f"q{number}": 2})), "c")


def test_a_tiny_shared_prefix_does_not_pull_everything_to_one_endpoint() -> None:
    subject = scheduler("a", "b", "c", "d")
    cached(subject, blocks(system=1), "c")
    counts = Counter(picked(subject, request(n, blocks(system=1, **{f"q{n}": 60}))) for n in range(40))
    assert set(counts) == {"a", "b", "c", "d"}
    assert max(counts.values()) <= 13


def test_under_a_heavy_backlog_even_a_long_prefix_is_left_for_an_idle_endpoint() -> None:
    subject = scheduler("a", "b")
    cached(subject, blocks(document=100), "a")
    burst(subject, 30, subset=pinned("a"), prompt_bytes=40_000)
    assert picked(subject, request(1, blocks(document=100, question=2))) == "b"


def test_the_next_request_of_a_group_finds_what_the_first_has_only_just_been_sent_for() -> None:
    subject = scheduler("a", "b")
    first = picked(subject, request(1, blocks(document=100)))
    decision = decide(subject, request(2, blocks(document=100), subset=pinned(first)))
    assert decision.matched_blocks == 100


def test_an_endpoint_that_left_leaves_no_memory_in_its_row() -> None:
    subject = scheduler("a", "b")
    cached(subject, blocks(document=100), "a")
    for number in range(20):
        for name, seconds in (("a", 20.0), ("b", 2.0)):
            asked = request(2 * number + (name == "b"), prompt_bytes=40_000, subset=pinned(name))
            serve(subject, asked, name, seconds=seconds, now=NOW + 100 * number)
    subject.apply(load("a", waiting=9, kv_usage=0.9, kv_capacity_tokens=1000), NOW)
    row = subject.pool.row("a")
    slow, fast = (state.prefill_tokens_per_s for state in subject.snapshot(NOW))
    assert slow < 0.5 * fast
    subject.apply(EndpointRemoved("a"), NOW)
    subject.apply(EndpointAdded(endpoint("c")), NOW)
    assert subject.pool.row("c") == row
    assert decide(subject, request(50, blocks(document=100), subset=pinned("c"))).matched_blocks == 0
    known, state = subject.snapshot(NOW)
    assert (state.waiting, state.kv_usage, state.kv_capacity_tokens, state.index_trust) == (None, None, None, 1.0)
    assert state.prefill_tokens_per_s == known.prefill_tokens_per_s


def test_what_is_heard_late_of_an_endpoint_that_left_teaches_its_row_nothing() -> None:
    subject = scheduler("a", "b", eject_after=1)
    picked(subject, request(1, prompt_bytes=40_000, subset=pinned("a")))
    picked(subject, request(2, prompt_bytes=40_000, subset=pinned("a")))
    subject.apply(EndpointRemoved("a"), NOW)
    subject.apply(FirstToken(1), NOW + 50)
    subject.apply(Failed(2, FailureReason.RESET), NOW + 50)
    subject.apply(EndpointAdded(endpoint("c")), NOW + 50)
    speeds = {state.name: state.prefill_tokens_per_s for state in subject.snapshot(NOW + 50)}
    assert speeds["b"] == speeds["c"]


def test_how_a_request_ends_is_not_put_down_to_who_has_the_row_since() -> None:
    subject = scheduler("a")
    for number in (1, 2):
        picked(subject, request(number))
    subject.apply(EndpointRemoved("a"), NOW)
    subject.apply(EndpointAdded(endpoint("c")), NOW)
    subject.apply(Failed(1, FailureReason.RESET), NOW)
    assert column(subject, "c", "failures") == 0
    fault(subject, "c", 10)
    subject.apply(Finished(2, 200), NOW)
    assert column(subject, "c", "failures") == 1


def test_what_requests_in_flight_share_is_held_once() -> None:
    subject = scheduler("a", "b")
    for number, mine in enumerate("xy"):
        picked(subject, request(number, blocks(**{"system": 8, mine: 2}), subset=pinned("a")))
    tokens = BLOCK_BYTES / 4
    assert (column(subject, "a", "context"), column(subject, "a", "pinned")) == (20 * tokens, 12 * tokens)
    subject.apply(Finished(0, 200), NOW)
    assert column(subject, "a", "pinned") == 10 * tokens
    subject.apply(Failed(1, FailureReason.CLIENT_GONE), NOW)
    assert (column(subject, "a", "pinned"), len(subject.charges.pins)) == (0, 0)


def test_what_an_endpoint_that_left_held_is_not_given_back_to_who_has_its_row_since() -> None:
    subject = scheduler("a")
    document = blocks(document=40)
    for number in (1, 2):
        picked(subject, request(number, document))
    subject.apply(EndpointRemoved("a"), NOW)
    assert len(subject.charges.pins) == 0
    subject.apply(EndpointAdded(endpoint("c")), NOW)
    picked(subject, request(3, document))
    subject.apply(Finished(1, 200), NOW)
    subject.apply(Failed(2, FailureReason.RESET), NOW)
    assert column(subject, "c", "pinned") == 40 * BLOCK_BYTES / 4
    subject.apply(Finished(3, 200), NOW)
    assert (column(subject, "c", "pinned"), len(subject.charges.pins)) == (0, 0)


def test_requests_are_tied_whose_prompts_are_mostly_cached_where_they_go() -> None:
    fresh, again, hardly = (scheduler("a") for _ in range(3))
    for subject, system, mine in ((fresh, 0, 20), (again, 19, 1), (hardly, 5, 15)):
        for number in range(100):
            serve(subject, request(number, blocks(**{"system": system, f"{number}": mine})), "a")
    assert fresh.learned.tied == hardly.learned.tied == 0.0
    assert again.learned.tied > 0.8


def test_with_full_caches_a_request_joins_those_that_hold_its_prefix() -> None:
    """Both endpoints have computed all of it once; only one of them holds it for a request in flight."""
    subject = scheduler("a", "b")
    document, other = blocks(document=100), blocks(other=86)
    for number, name in enumerate("ab"):
        serve(subject, request(number, document, subset=pinned(name)), name)
        subject.apply(load(name, kv_capacity_tokens=12_000), NOW)
    for number in range(6):
        for name, shared in (("a", document), ("b", other)):
            asked = request(100 + 10 * number + (name == "b"), shared, subset=pinned(name))
            picked(subject, asked)
            subject.apply(FirstToken(asked.id), NOW)
    ranking = decide(subject, request(999, document), NOW + 2).ranking
    assert ranking is not None
    joined, apart = ranking.candidates()
    assert joined.endpoint == "a"
    assert joined.parts["prefill"] == pytest.approx(apart.parts["prefill"], rel=0.1)
    assert joined.parts["queue"] == 0.0 < apart.parts["queue"]
    assert joined.parts["memory"] < apart.parts["memory"]


def test_growing_beyond_the_first_rows_keeps_index_and_speeds_in_step() -> None:
    subject = scheduler(*(f"e{n}" for n in range(70)))
    cached(subject, blocks(document=100), "e69")
    assert picked(subject, request(1, blocks(document=100))) == "e69"
    assert set(burst(subject, 70).values()) == {1}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"started_at": 1000.0}, {"started_at": 1900.0}),
        ({"queries": 500.0}, {"queries": 3.0}),
        ({"queries": 500.0, "started_at": 1000.0}, {"queries": 900.0, "started_at": 1900.0}),
    ],
)
def test_a_restarted_engine_is_taken_to_hold_nothing(before: dict[str, float], after: dict[str, float]) -> None:
    subject = scheduler("a", "b")
    for name in "ab":
        cached(subject, blocks(document=100), name)
        subject.apply(load(name, **before), NOW)
    subject.apply(load("a", **after), NOW)
    assert decide(subject, request(1, blocks(document=100), subset=pinned("a"))).matched_blocks == 0
    assert decide(subject, request(2, blocks(document=100), subset=pinned("b"))).matched_blocks == 100


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"started_at": 1000.0}, {"started_at": 1000.4}),
        ({"started_at": 1000.0}, {}),
        ({"queries": 500.0}, {"queries": 500.0}),
        ({"queries": 500.0}, {}),
        ({}, {"queries": 0.0, "started_at": 1000.0}),
    ],
)
def test_an_engine_that_runs_on_is_taken_to_hold_what_it_held(
    before: dict[str, float], after: dict[str, float]
) -> None:
    subject = scheduler("a")
    subject.apply(load("a", **before), NOW)
    cached(subject, blocks(document=100), "a")
    subject.apply(load("a", **after), NOW)
    assert decide(subject, request(1, blocks(document=100))).matched_blocks == 100


def test_a_cache_that_was_cleared_holds_nothing() -> None:
    subject = scheduler("a")
    cached(subject, blocks(document=100), "a")
    subject.apply(CacheCleared("a"), NOW)
    assert decide(subject, request(1, blocks(document=100))).matched_blocks == 0


def test_an_endpoint_holds_no_more_than_its_capacity() -> None:
    subject = scheduler("a")
    subject.apply(load("a", kv_capacity_tokens=50 * BLOCK_BYTES // 4), NOW)
    cached(subject, blocks(document=100), "a")
    assert decide(subject, request(1, blocks(document=100))).matched_blocks == 50


# --- what is unknown ---


def test_an_endpoint_never_scraped_gets_its_share_and_no_more() -> None:
    subject = scheduler("a", "b", "c")
    for name in "ab":
        subject.apply(load(name, waiting=4, running=8, kv_usage=0.5, kv_capacity_tokens=100_000), NOW)
    assert set(burst(subject, 30).values()) == {10}


def test_a_scrape_that_shows_less_than_the_last_makes_the_rest_unknown_and_not_zero() -> None:
    subject = scheduler("a")
    subject.apply(load("a", waiting=4, kv_usage=0.5), NOW)
    subject.apply(load("a", running=3), NOW)
    state = subject.snapshot(NOW)[0]
    assert (state.waiting, state.kv_usage, state.running) == (None, None, 3)


def test_a_failed_scrape_keeps_the_old_values_and_lets_them_age() -> None:
    subject = scheduler("a")
    subject.apply(load("a", waiting=4, kv_usage=0.5, kv_capacity_tokens=1000), NOW)
    subject.apply(ScrapeFailed("a", NOW + 5, "timeout"), NOW + 5)
    state = subject.snapshot(NOW + 5)[0]
    assert (state.waiting, state.kv_usage, state.kv_capacity_tokens, state.scrape_age_s) == (4, 0.5, 1000, 5.0)


def test_a_failed_scrape_changes_no_decision() -> None:
    subjects = [scheduler("a", "b"), scheduler("a", "b")]
    for subject in subjects:
        subject.apply(load("a", waiting=3), NOW)
        subject.apply(load("b", waiting=0), NOW)
    subjects[1].apply(ScrapeFailed("b", NOW, "refused"), NOW)
    assert burst(subjects[0], 20) == burst(subjects[1], 20)


# --- endpoints that fail ---


def test_an_endpoint_rests_after_so_many_faults_in_a_row_and_comes_back() -> None:
    subject = scheduler("a", "b", eject_after=3, eject_s=10.0)
    fault(subject, "a", 1, times=2)
    assert "a" in burst(subject, 4)
    fault(subject, "a", 11)
    assert set(burst(subject, 10, first_id=2000, now=NOW + 9.9)) == {"b"}
    assert "a" in burst(subject, 40, first_id=3000, now=NOW + 10)


def test_each_further_fault_doubles_the_rest_up_to_a_limit() -> None:
    subject = scheduler("a", "b", eject_after=2, eject_s=1.0, eject_max_s=5.0)
    fault(subject, "a", 1)
    rests, now = [], NOW
    for number in range(5):
        fault(subject, "a", 10 + number, now=now)
        rests.append(column(subject, "a", "ejected_until") - now)
        now = column(subject, "a", "ejected_until")
    assert rests == [1.0, 2.0, 4.0, 5.0, 5.0]
    fault(subject, "a", 100, times=60, now=now)
    assert column(subject, "a", "ejected_until") == now + 5.0


def test_a_success_wipes_the_slate_and_a_client_error_does_not() -> None:
    subject = scheduler("a", eject_after=3)
    fault(subject, "a", 1, times=2)
    picked(subject, request(10))
    subject.apply(Finished(10, 404), NOW)
    assert column(subject, "a", "failures") == 2
    picked(subject, request(11))
    subject.apply(Finished(11, 200), NOW)
    assert column(subject, "a", "failures") == 0


@pytest.mark.parametrize("fact", [Finished(1, 500), Finished(1, 503), Failed(1, FailureReason.TRUNCATED)])
def test_a_server_error_is_a_fault(fact: Finished | Failed) -> None:
    subject = scheduler("a")
    picked(subject, request(1))
    subject.apply(fact, NOW)
    assert column(subject, "a", "failures") == 1


@pytest.mark.parametrize("reason", [FailureReason.CLIENT_GONE, FailureReason.SHUTDOWN])
def test_what_is_not_the_endpoints_fault_is_never_held_against_it(reason: FailureReason) -> None:
    subject = scheduler("a", "b", eject_after=1)
    for number in range(20):
        picked(subject, request(number))
        subject.apply(Failed(number, reason), NOW)
    assert [state.failures for state in subject.snapshot(NOW)] == [0, 0]
    assert set(burst(subject, 10).values()) == {5}


def test_with_every_endpoint_ejected_one_is_tried_all_the_same() -> None:
    subject = scheduler("a", "b", eject_after=1, eject_s=10.0)
    for number, name in enumerate("ab"):
        fault(subject, name, number)
    assert set(burst(subject, 10)) == {"a", "b"}


def test_a_failed_request_goes_elsewhere_when_it_comes_again() -> None:
    subject = scheduler("a", "b")
    first = picked(subject, request(1))
    subject.apply(Failed(1, FailureReason.CONNECT), NOW)
    second = picked(subject, request(1, exclude=frozenset({first})))
    assert {first, second} == {"a", "b"}
    refusal = subject.submit(request(2, exclude=frozenset({"a", "b"})), NOW)
    assert isinstance(refusal, Rejection)
    assert refusal.reason is RejectReason.NO_MATCH


def test_a_hanging_endpoint_gets_dearer_until_a_busy_one_is_preferred() -> None:
    subject = scheduler("hangs", "moves")
    picked(subject, request(1, subset=pinned("hangs")))
    keep_moving(subject, NOW + 1)
    assert picked(subject, request(2), NOW + 1) == "hangs"
    keep_moving(subject, NOW + 60)
    assert picked(subject, request(3), NOW + 60) == "moves"


def test_a_burst_spreads_also_when_every_endpoint_has_fallen_silent() -> None:
    subject = scheduler("a", "b", "c")
    burst(subject, 4)
    counts = burst(subject, 14, first_id=2000, now=NOW + 60)
    assert max(counts.values()) - min(counts.values()) <= 1


def keep_moving(subject: Scheduler, now: float) -> None:
    """Give `moves` ten prefills more, the first of which is done in the expected time."""
    first = int(now) * 100
    for number in range(10):
        picked(subject, request(first + number, subset=pinned("moves")), now - 0.125)
    subject.apply(FirstToken(first), now)


def test_a_hanging_endpoint_is_not_taken_to_live_because_its_clients_give_up() -> None:
    subject = scheduler("hangs", "moves")
    for number in (1, 2):
        picked(subject, request(number, subset=pinned("hangs")))
    keep_moving(subject, NOW + 60)
    subject.apply(Failed(1, FailureReason.CLIENT_GONE), NOW + 60)
    assert picked(subject, request(3), NOW + 60) == "moves"


def test_health_and_draining_take_an_endpoint_out_and_back_in() -> None:
    subject = scheduler("a", "b")
    for out, back in (
        (HealthObserved("a", healthy=False), HealthObserved("a", healthy=True)),
        (EndpointDraining("a"), EndpointDraining("a", draining=False)),
    ):
        subject.apply(out, NOW)
        assert set(burst(subject, 4)) == {"b"}
        for number in range(1000, 1004):
            subject.apply(Finished(number, 200), NOW)
        subject.apply(back, NOW)
        assert set(burst(subject, 4)) == {"a", "b"}
        for number in range(1000, 1004):
            subject.apply(Finished(number, 200), NOW)


def test_an_engine_that_sleeps_gets_nothing_until_it_wakes() -> None:
    subject = scheduler("a", "b")
    for sleep in (Sleep.LIGHT, Sleep.DEEP):
        subject.apply(load("a", sleep=sleep), NOW)
        assert set(burst(subject, 4)) == {"b"}
        for number in range(1000, 1004):
            subject.apply(Finished(number, 200), NOW)
        state = next(each for each in subject.snapshot(NOW) if each.name == "a")
        assert (state.healthy, state.draining, state.asleep) == (True, True, True)
        subject.apply(load("a", sleep=Sleep.AWAKE), NOW)
        assert set(burst(subject, 4)) == {"a", "b"}
        for number in range(1000, 1004):
            subject.apply(Finished(number, 200), NOW)
    assert list(subject.notices) == ["a sleeps", "a is awake again"] * 2


def test_an_engine_that_wakes_while_it_is_drained_stays_drained_and_the_other_way_round() -> None:
    subject = scheduler("a", "b")
    subject.apply(load("a", sleep=Sleep.DEEP), NOW)
    subject.apply(EndpointDraining("a"), NOW)
    subject.apply(load("a", sleep=Sleep.AWAKE), NOW)
    assert column(subject, "a", "draining")
    subject.apply(load("a", sleep=Sleep.DEEP), NOW)
    subject.apply(EndpointDraining("a", draining=False), NOW)
    assert column(subject, "a", "draining")
    subject.apply(load("a"), NOW)  # a page that does not say leaves it as it was
    assert column(subject, "a", "draining")
    subject.apply(load("a", sleep=Sleep.AWAKE), NOW)
    assert not column(subject, "a", "draining")


@pytest.mark.parametrize(("sleep", "kept"), [(Sleep.LIGHT, 8), (Sleep.DEEP, 0)])
def test_what_a_deep_sleeper_had_cached_is_forgotten(sleep: Sleep, kept: int) -> None:
    subject = scheduler("a", "b")
    prompt = blocks(shared=8)
    cached(subject, prompt, "a")
    subject.apply(load("a", sleep=sleep), NOW)
    subject.apply(load("a", sleep=Sleep.AWAKE), NOW)
    assert decide(subject, request(1, prompt, subset=pinned("a"))).matched_blocks == kept


def test_an_endpoint_that_answers_is_used_whatever_its_probes_say_until_its_first_fault() -> None:
    subject = scheduler("a", "b")
    serve(subject, request(1, subset=pinned("a")), "a")
    subject.apply(HealthObserved("a", healthy=False), NOW)
    assert set(burst(subject, 4)) == {"a", "b"}
    subject.apply(Failed(next(n for n in range(1000, 1004) if at(subject, n) == "a"), FailureReason.RESET), NOW)
    assert set(burst(subject, 4, first_id=2000)) == {"b"}


def at(subject: Scheduler, request_id: int) -> str:
    """Where an open request is."""
    charge = subject.charges.get(request_id)
    assert charge is not None
    return subject.pool.endpoint(charge.row).name


# --- speed ---


def test_a_faster_endpoint_gets_more() -> None:
    subject = scheduler("slow", "fast")
    for number in range(200):
        name, seconds = ("slow", 1.0) if number % 2 else ("fast", 0.25)
        asked = request(number, prompt_bytes=16_000, subset=pinned(name))
        serve(subject, asked, name, seconds=seconds, now=NOW + 2.0 * number)
    counts = burst(subject, 50, now=NOW + 1000, prompt_bytes=16_000)
    assert counts["fast"] > 2 * counts["slow"] > 0


def test_prefills_that_end_in_one_step_are_all_credited_with_it() -> None:
    together, apart = scheduler("a"), scheduler("a")
    for turn in range(100):
        start, tokens = NOW + 100.0 * turn, 500 * (1 + turn % 8)
        step = tokens / 4000.0
        for number in range(4):
            for subject in (together, apart):
                picked(subject, request(10 * turn + number, prompt_bytes=4 * tokens), start)
        for number in range(4):
            request_id = 10 * turn + number
            together.apply(FirstToken(request_id), start + 4 * step)
            apart.apply(FirstToken(request_id), start + step * (number + 1))
            for subject in (together, apart):
                subject.apply(Finished(request_id, 200), start + 50.0)
    for subject in (together, apart):
        assert subject.snapshot(NOW)[0].prefill_tokens_per_s == pytest.approx(4000.0, rel=0.1)


def test_a_first_token_nobody_sees_teaches_nothing() -> None:
    subject = scheduler("a")
    before = subject.snapshot(NOW)[0].prefill_tokens_per_s
    for number in range(20):
        serve(subject, request(number, streaming=False), "a", seconds=30.0, now=NOW + 100 * number)
    assert subject.snapshot(NOW)[0].prefill_tokens_per_s == before


def streamed(subject: Scheduler, request_id: int, *, tokens: int, seconds: float, **fields: Any) -> None:
    """A request that had its first token at once and the last one after so many seconds."""
    now = NOW + 1000.0 * request_id
    picked(subject, request(request_id, **fields), now)
    subject.apply(FirstToken(request_id), now + 0.1)
    subject.apply(Finished(request_id, 200, Usage(1000, tokens)), now + 0.1 + seconds)


def test_how_long_and_how_fast_answers_are_is_learned_from_whole_streams() -> None:
    subject = scheduler("a")
    for number in range(200):
        streamed(subject, number, tokens=101, seconds=5.0)
    assert subject.learned.output_tokens.value == pytest.approx(101, rel=0.05)
    step = subject.learned.step(np.array([1]), np.array([1050.0]))
    assert step.tolist() == pytest.approx([0.05], rel=0.05)


def test_a_stream_is_not_blamed_for_the_prefills_it_waited_for() -> None:
    """Half of the time of every stream goes to the prefill of another."""
    subject = scheduler("a")
    for number in range(200):
        now = NOW + 1000.0 * number
        picked(subject, request(2 * number), now)
        subject.apply(FirstToken(2 * number), now + 0.1)
        picked(subject, request(2 * number + 1, prompt_tokens=50_000), now + 1.0)
        prefill = subject.learned.work(50_000.0, 50_000.0)
        subject.apply(FirstToken(2 * number + 1), now + 1.0 + prefill)
        subject.apply(Finished(2 * number, 200, Usage(1000, 101)), now + 0.1 + 5.0 + prefill)
        subject.apply(Finished(2 * number + 1, 200), now + 500.0)
    step = subject.learned.step(np.array([1]), np.array([1050.0]))
    assert step.tolist() == pytest.approx([0.05], rel=0.15)


@pytest.mark.parametrize(
    "fields", [{"extra_bytes": 4000}, {"streaming": False}, {"tokens": 15}], ids=["batch", "silent", "short"]
)
def test_an_answer_that_tells_nothing_of_decoding_teaches_nothing_about_it(fields: dict[str, Any]) -> None:
    subject = scheduler("a")
    for number in range(20):
        streamed(subject, number, **({"tokens": 101, "seconds": 5.0} | fields))
    assert subject.learned.decode.count == 0


def test_a_capacity_of_zero_is_one_nobody_has_told_yet() -> None:
    subject = scheduler("a")
    subject.apply(load("a", kv_capacity_tokens=0), NOW)
    assert subject.snapshot(NOW)[0].kv_capacity_tokens is None
    assert np.isfinite(decide(subject, request(1)).ranking.total).all()  # type: ignore[union-attr]


# --- tokens and trust, learned from usage ---


def test_bytes_per_token_are_learned_from_usage() -> None:
    subject = scheduler("a")
    for number in range(300):
        picked(subject, request(number, prompt_bytes=4000))
        subject.apply(Finished(number, 200, Usage(prompt_tokens=2000, completion_tokens=1)), NOW)
    assert decide(subject, request(999, prompt_bytes=4000)).prompt_tokens == pytest.approx(2000, rel=0.02)


@pytest.mark.parametrize("fields", [{"extra_bytes": 4000}, {"prompt_tokens": 1000}, {"prompt_bytes": 0}])
def test_what_is_no_single_text_teaches_nothing_about_bytes_per_token(fields: dict[str, Any]) -> None:
    subject = scheduler("a")
    for number in range(300):
        picked(subject, request(number, **({"prompt_bytes": 4000} | fields)))
        subject.apply(Finished(number, 200, Usage(prompt_tokens=2000, completion_tokens=1)), NOW)
    assert decide(subject, request(999, prompt_bytes=4000)).prompt_tokens == pytest.approx(1000)


def answered(subject: Scheduler, request_id: int, cached_tokens: int | None, **fields: Any) -> None:
    """A request of 100 blocks and 6,400 tokens whose answer says how many of them were cached."""
    picked(subject, request(request_id, blocks(document=100), **fields))
    subject.apply(Finished(request_id, 200, Usage(6400, 1, cached_tokens)), NOW)


def trust(subject: Scheduler) -> float:
    return subject.snapshot(NOW)[0].index_trust


def test_an_endpoint_that_does_not_cache_is_trusted_less_and_less() -> None:
    subject = scheduler("a")
    for number in range(40):
        answered(subject, number, cached_tokens=0)
    assert trust(subject) < 0.3
    decision = decide(subject, request(99, blocks(document=100)))
    assert decision.matched_blocks == 100
    assert decision.matched_tokens < 0.3 * decision.prompt_tokens


@pytest.mark.parametrize("cached_tokens", [6399, 6384, None])
def test_an_endpoint_that_caches_as_predicted_stays_trusted(cached_tokens: int | None) -> None:
    subject = scheduler("a")
    answered(subject, 1, cached_tokens=0)
    for number in range(2, 30):
        answered(subject, number, cached_tokens=cached_tokens)
    assert trust(subject) == 1.0


def test_a_batch_says_nothing_about_the_cache_of_its_first_prompt() -> None:
    subject = scheduler("a")
    for number in range(20):
        answered(subject, number, cached_tokens=600, extra_bytes=1_000_000)
    assert trust(subject) == 1.0


# --- another endpoint answered ---


def test_a_charge_follows_its_request_to_the_endpoint_that_answered() -> None:
    subject = scheduler("a", "b")
    picked(subject, request(1, blocks(document=100), subset=pinned("a")))
    subject.apply(ResponseStarted(1, 200, served_by="b:8000"), NOW)
    assert [column(subject, name, "inflight") for name in "ab"] == [0, 1]
    assert [column(subject, name, "failures") for name in "ab"] == [1, 0]
    assert [column(subject, name, "pinned") for name in "ab"] == [0, 100 * BLOCK_BYTES / 4]
    assert decide(subject, request(2, blocks(document=100), subset=pinned("b"))).matched_blocks == 100
    subject.apply(Finished(1, 200), NOW)
    assert column(subject, "b", "failures") == 0


@pytest.mark.parametrize("served_by", [None, "a:8000", "10.9.9.9:80"])
def test_a_charge_stays_where_it_is_when_nobody_known_took_over(served_by: str | None) -> None:
    subject = scheduler("a", "b")
    picked(subject, request(1, subset=pinned("a")))
    subject.apply(ResponseStarted(1, 200, served_by), NOW)
    assert [column(subject, name, "inflight") for name in "ab"] == [1, 0]
    assert column(subject, "a", "failures") == 0


def test_ranks_behind_one_address_are_not_mistaken_for_each_other() -> None:
    ranks = [endpoint(f"a#{rank}", address="a:8000", rank=rank) for rank in range(3)]
    subject = scheduler(*ranks)
    for number in range(9):
        name = picked(subject, request(number))
        subject.apply(ResponseStarted(number, 200, served_by="a:8000"), NOW)
        assert column(subject, name, "failures") == 0
    assert [column(subject, each.name, "inflight") for each in ranks] == [3, 3, 3]


# --- endpoints come and go ---


def test_a_new_description_keeps_the_state_of_the_endpoint() -> None:
    subject = scheduler(endpoint("a", models=["old"]))
    picked(subject, request(1))
    subject.apply(EndpointAdded(endpoint("a", models=["new"])), NOW)
    assert column(subject, "a", "inflight") == 1
    assert isinstance(subject.submit(request(2, model="old"), NOW), Rejection)
    assert picked(subject, request(3, model="new")) == "a"


def test_discovery_without_models_does_not_forget_those_asked_for() -> None:
    subject = scheduler("a")
    subject.apply(ModelsObserved("a", frozenset({"m"})), NOW)
    subject.apply(EndpointAdded(endpoint("a")), NOW)
    assert picked(subject, request(1, model="m")) == "a"
    assert isinstance(subject.submit(request(2, model="x"), NOW), Rejection)


def test_the_same_name_at_another_address_is_another_endpoint() -> None:
    subject = scheduler("a")
    cached(subject, blocks(document=100), "a")
    picked(subject, request(1))
    subject.apply(EndpointAdded(endpoint("a", address="elsewhere:1")), NOW)
    assert column(subject, "a", "inflight") == 0
    decision = decide(subject, request(2, blocks(document=100)))
    assert (decision.matched_blocks, decision.endpoint.address) == (0, "elsewhere:1")
    subject.apply(Finished(1, 200), NOW)
    assert column(subject, "a", "inflight") == 1


def test_facts_about_who_is_gone_are_ignored() -> None:
    subject = scheduler("a")
    for fact in (
        EndpointRemoved("x"),
        EndpointDraining("x"),
        HealthObserved("x", healthy=False),
        CacheCleared("x"),
        ModelsObserved("x", frozenset()),
        load("x", waiting=1),
        ScrapeFailed("x", NOW, ""),
        FirstToken(7),
        ResponseStarted(7, 200, "a:8000"),
        Finished(7, 200, Usage(1, 1)),
        Failed(7, FailureReason.RESET),
    ):
        subject.apply(fact, NOW)
    assert picked(subject, request(1)) == "a"
    assert column(subject, "a", "failures") == 0


# --- weighted profiles ---


def test_recency_alone_is_round_robin() -> None:
    subject = scheduler("a", "b", "c", profile=Weighted([(Recency(), 1.0)]))
    order = [picked(subject, request(number)) for number in range(12)]
    assert order == order[:3] * 4
    assert set(order[:3]) == {"a", "b", "c"}


def test_inflight_alone_is_least_request() -> None:
    subject = scheduler("a", "b", profile=Weighted([(Inflight(), 1.0)]))
    assert set(burst(subject, 10).values()) == {5}
    for number in range(2000, 2005):
        picked(subject, request(number, subset=pinned("b")))
    assert set(burst(subject, 5, first_id=3000)) == {"a"}


# --- LoRA and sessions ---


def test_lora_affinity_keeps_an_adapter_where_it_is_loaded() -> None:
    models = ["base", "lora-1", "lora-2"]
    subject = scheduler(
        endpoint("a", models=models), endpoint("b", models=models), profile=Weighted([(LoraAffinity(), 1.0)])
    )
    subject.apply(load("a", adapters=frozenset({"lora-1"}), max_adapters=1), NOW)
    subject.apply(load("b", adapters=frozenset({"lora-2"}), max_adapters=1), NOW)
    assert {picked(subject, request(number, model="lora-1")) for number in range(9)} == {"a"}
    assert {picked(subject, request(number, model="lora-2")) for number in range(10, 19)} == {"b"}
    subject.apply(load("a"), NOW)
    assert picked(subject, request(30, model="lora-1")) == "a"
    subject.apply(load("a", adapters=frozenset()), NOW)
    assert column(subject, "a", "adapters") == 0


def sticky(*names: str, **settings: Any) -> Scheduler:
    return scheduler(*names, profile=Weighted([(Session(), 1.0)]), **settings)


def test_a_session_goes_back_to_the_endpoint_that_served_it() -> None:
    subject = sticky("a", "b", "c")
    first = picked(subject, request(1, session="s"))
    assert {picked(subject, request(number, session="s")) for number in range(2, 12)} == {first}
    assert len({picked(subject, request(number)) for number in range(12, 60)}) == 3


def test_a_session_follows_its_request_to_another_endpoint() -> None:
    subject = sticky("a", "b")
    picked(subject, request(1, session="s", subset=pinned("a")))
    subject.apply(ResponseStarted(1, 200, served_by="b:8000"), NOW)
    assert picked(subject, request(2, session="s")) == "b"


def test_a_session_whose_endpoint_left_starts_over() -> None:
    subject = sticky("a", "b")
    picked(subject, request(1, session="s", subset=pinned("a")))
    subject.apply(EndpointRemoved("a"), NOW)
    assert picked(subject, request(2, session="s")) == "b"


def test_sessions_are_forgotten_longest_unused_first() -> None:
    subject = sticky("a", "b", sessions=2, fallbacks=0)
    for number, session in enumerate(("old", "kept", "old", "new")):
        picked(subject, request(number, session=session, subset=pinned("a")))
    for session, remembered in (("old", True), ("new", True), ("kept", False)):
        ranking = decide(subject, request(hash(session), session=session, subset=pinned("a"))).ranking
        assert ranking is not None
        assert bool(ranking.total[0]) is remembered, session


# --- fail-open, explanations ---


def test_a_fallback_is_uncharged_and_keeps_to_what_the_request_allows() -> None:
    subject = scheduler("a", "b", "c", endpoint("other", models=["other"]))
    subject.apply(EndpointDraining("c"), NOW)
    decision = subject.fallback(request(1, model="m", exclude=frozenset({"a"})))
    assert isinstance(decision, Decision)
    assert (decision.endpoint.name, decision.charged) == ("b", False)
    assert len(subject.charges) == 0
    within = {subject.fallback(request(1, subset=pinned("a"))).endpoint.name for _ in range(20)}  # type: ignore[union-attr]
    assert within == {"a"}
    refusal = subject.fallback(request(1, subset=frozenset({"10.9.9.9"})))
    assert isinstance(refusal, Rejection)
    assert refusal.status == 503


def test_a_snapshot_says_unknown_where_nothing_is_known() -> None:
    state = scheduler(endpoint("a", models=["n", "m"])).snapshot(NOW)[0]
    assert (state.name, state.address, state.models, state.role) == ("a", "a:8000", ("m", "n"), "both")
    assert (state.waiting, state.running, state.kv_usage, state.kv_capacity_tokens, state.scrape_age_s) == (None,) * 5
    assert (state.healthy, state.draining, state.ejected_for_s, state.failures) == (True, False, None, 0)


def test_a_snapshot_shows_what_is_booked_and_learned() -> None:
    subject = scheduler("a", eject_after=1, eject_s=4.0)
    fault(subject, "a", 1)
    picked(subject, request(2, blocks(document=10)))
    state = subject.snapshot(NOW + 1)[0]
    assert (state.inflight_requests, state.prefilling_requests, state.backlog_tokens) == (1, 1, 640)
    assert (state.context_tokens, state.index_blocks, state.ejected_for_s) == (640, 10, 3.0)


def test_a_decision_is_the_same_whatever_order_the_endpoints_joined_in() -> None:
    names = ["a", "b", "c"]
    chosen = set()
    for order in (names, names[::-1]):
        subject = scheduler(*order)
        cached(subject, blocks(document=100), "b")
        chosen.add(picked(subject, request(1, blocks(document=100))))
    assert chosen == {"b"}


def test_a_very_long_prompt_is_decided() -> None:
    hashes = np.arange(5000, dtype=np.uint64)
    assert decide(scheduler("a", "b"), request(1, hashes)).total_blocks == 5000
