"""The scheduler with KV events: what it makes of them when it decides, and how it finds out that they lie."""

from __future__ import annotations

from typing import Any

import numpy as np

from fakes import NOW, request, scheduler
from picker.core.scheduler import Scheduler
from picker.prefix.exact import Exact
from picker.prefix.precise import PreciseIndex
from picker.prefix.spellers import ByHash
from picker.types import (
    BlocksStored,
    CacheCleared,
    Decision,
    EventsChanged,
    EventState,
    Finished,
    FirstToken,
    LoadObserved,
    Usage,
)

SIZE = 64  # tokens a block: as many as 256 bytes have
PROMPT = np.arange(100, 120, dtype=np.uint64)


def told(*endpoints: str, state: EventState = EventState.WHOLE, **settings: Any) -> Scheduler:
    made = scheduler(*endpoints, exact=Exact(PreciseIndex(1 << 22), ByHash()), **settings)
    for name in endpoints:
        made.apply(LoadObserved(name, NOW, block_size=SIZE), NOW)
        made.apply(EventsChanged(name, state), NOW)
    return made


def stored(name: str, blocks: int) -> BlocksStored:
    return BlocksStored(name, tuple(PROMPT[:blocks].tolist()), block_size=SIZE)


def decide(of: Scheduler, number: int = 1, now: float = NOW) -> Decision:
    decision = of.submit(request(number, PROMPT), now)
    assert isinstance(decision, Decision)
    return decision


def answer(of: Scheduler, number: int, cached: int | None, now: float = NOW) -> None:
    of.apply(FirstToken(number), now)
    of.apply(Finished(number, 200, Usage(PROMPT.size * SIZE, 4, cached)), now)


def serve(of: Scheduler, cached: int | None, *, times: int, first: int = 100) -> None:
    for number in range(first, first + times):
        decide(of, number)
        answer(of, number, cached)


def test_a_request_goes_where_events_say_its_prompt_is() -> None:
    made = told("a", "b", "c")
    made.apply(stored("b", 16), NOW)
    decision = decide(made)
    assert (decision.endpoint.name, decision.matched_tokens) == ("b", 16.0 * SIZE)


def test_what_was_sent_does_not_count_where_events_say_otherwise() -> None:
    made = told("a")
    decide(made)
    answer(made, 1, 0)
    assert decide(made, 2).matched_tokens == 0.0, "the engine did not say that it kept anything"


def test_what_requests_in_flight_hold_counts_before_events_tell_of_it() -> None:
    made = told("a")
    decide(made)
    assert decide(made, 2).matched_tokens >= 0.9 * PROMPT.size * SIZE


def test_a_partial_stream_adds_to_what_is_believed_and_takes_nothing_away() -> None:
    made = told("a", state=EventState.PARTIAL)
    decide(made)
    answer(made, 1, 0)
    guessed = decide(made, 2).matched_tokens
    assert guessed > 0.9 * PROMPT.size * SIZE
    fresh = told("a", state=EventState.PARTIAL)
    fresh.apply(stored("a", 16), NOW)
    assert decide(fresh).matched_tokens == 16.0 * SIZE


def test_without_a_stream_what_was_sent_is_what_is_believed() -> None:
    made = told("a", state=EventState.ABSENT)
    decide(made)
    answer(made, 1, 0)
    assert decide(made, 2).matched_tokens > 0.9 * PROMPT.size * SIZE


def test_an_empty_cache_is_empty() -> None:
    made = told("a")
    made.apply(stored("a", 16), NOW)
    made.apply(CacheCleared("a"), NOW)
    assert decide(made).matched_tokens == 0.0


def test_predictions_that_come_true_are_counted() -> None:
    made = told("a")
    made.apply(stored("a", 16), NOW)
    serve(made, 16 * SIZE, times=20)
    (state,) = made.snapshot(NOW)
    assert (state.kv_events, state.predictions, state.predictions_over, state.predictions_under) == ("whole", 20, 0, 0)
    assert not made.notices


def test_events_that_keep_telling_wrong_are_not_believed_and_somebody_is_told() -> None:
    made = told("a")
    made.apply(stored("a", 16), NOW)
    serve(made, 0, times=10)
    (state,) = made.snapshot(NOW)
    assert state.kv_events == "doubted"
    assert [notice.startswith("a: its KV events are not believed") for notice in made.notices] == [True]
    assert decide(made, 2).matched_tokens != 16.0 * SIZE


def test_events_are_believed_again_when_they_tell_right_and_a_new_stream_at_once() -> None:
    made = told("a")
    made.apply(stored("a", 16), NOW)
    serve(made, 0, times=10)
    serve(made, 16 * SIZE, times=32, first=200)
    assert made.snapshot(NOW)[0].kv_events == "whole"
    serve(made, 0, times=10, first=300)
    made.apply(EventsChanged("a", EventState.WHOLE, "restarted"), NOW)
    assert made.snapshot(NOW)[0].kv_events == "whole"


def test_a_sharing_request_in_flight_explains_a_higher_hit() -> None:
    made = told("a")
    for number in range(1, 40):
        decide(made, number)
    for number in range(1, 40):
        answer(made, number, 0 if number == 1 else (PROMPT.size - 1) * SIZE)
    assert made.snapshot(NOW)[0].kv_events == "whole"


def test_engines_that_report_nothing_are_judged_by_their_counters() -> None:
    made = told("a")
    made.apply(stored("a", 16), NOW)
    made.apply(LoadObserved("a", NOW, block_size=SIZE, queries=0.0, hits=0.0), NOW)
    serve(made, None, times=20)
    asked = 20.0 * PROMPT.size * SIZE
    made.apply(LoadObserved("a", NOW + 1, block_size=SIZE, queries=asked, hits=0.0), NOW + 1)
    assert made.snapshot(NOW + 1)[0].kv_events == "doubted"


def test_an_endpoint_that_comes_back_has_a_clean_record() -> None:
    made = told("a", "b")
    made.apply(stored("a", 16), NOW)
    serve(made, 0, times=10)
    made.apply(EventsChanged("a", EventState.SUSPECT, "a gap"), NOW)
    state = made.snapshot(NOW)[0]
    assert (state.kv_events, state.kv_events_reason, state.predictions) == ("suspect", "a gap", 0)
    assert made.notices[-1] == "a: its KV events cannot be relied on: a gap"


def test_an_absent_source_has_no_word_in_the_state_of_a_pool_that_does_not_listen() -> None:
    made = scheduler("a")
    made.apply(EventsChanged("a", EventState.WHOLE), NOW)
    made.apply(stored("a", 16), NOW)
    assert made.snapshot(NOW)[0].kv_events == "off"
    assert decide(made).matched_tokens == 0.0
