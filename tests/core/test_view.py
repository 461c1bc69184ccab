import math
from contextlib import suppress

import numpy as np
import pytest

from fakes import NOW, learned, pool, speeds, view
from picker.core.view import PoolView


def test_a_view_shows_the_candidates_in_the_order_asked_for() -> None:
    made = pool(a={"waiting": 1}, b={"waiting": 2}, c={"waiting": 3})
    seen = PoolView(made, np.array([2, 0]), NOW)
    assert list(seen.waiting) == [3, 1]
    assert seen.n == 2


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2], [1], [2], [0, 2, 1], [2, 1], []])
def test_a_view_shows_each_row_its_own_whatever_the_order(rows: list[int]) -> None:
    made = pool(a={"waiting": 0}, b={"waiting": 1}, c={"waiting": 2})
    assert PoolView(made, np.array(rows, dtype=np.int64), NOW).waiting.tolist() == rows


SCRAPED = ("waiting", "running", "kv_usage", "kv_capacity", "age", "adapter_active", "adapter_room")
BOOKED = ("inflight", "prefilling", "backlog", "work", "awaited", "context", "pinned", "decoding", "last_pick")
LEARNED = ("prefill_speed", "decode_speed")


@pytest.mark.parametrize("rows", [[0, 1], [1]], ids=["everyone", "some"])
def test_writing_to_a_column_of_a_view_leaves_the_pool_alone(rows: list[int]) -> None:
    made = pool(a={"waiting": 1, "inflight": 1}, b={"waiting": 2})
    made.set_adapters(0, frozenset({"lora"}))
    seen = PoolView(made, np.array(rows), NOW, model="lora")
    for name in (*SCRAPED, *BOOKED, "recent", *LEARNED):
        before = getattr(seen, name).copy()
        with suppress(ValueError):  # read-only, where it is the pool's own
            getattr(seen, name)[:] = 99
        np.testing.assert_array_equal(getattr(seen, name), before, err_msg=name)


def test_recent_requests_fade_until_they_are_looked_at() -> None:
    made = pool(a={"recent": 4.0, "recent_at": NOW - 30}, b={"recent": 4.0, "recent_at": NOW}, c={})
    assert view(made).recent.tolist() == pytest.approx([4.0 * math.exp(-1.0), 4.0, 0.0])


def test_age_is_unknown_before_the_first_scrape() -> None:
    seen = view(pool(a={"observed_at": NOW - 3}, b={}))
    np.testing.assert_array_equal(seen.age, [3.0, np.nan])


def test_an_endpoint_is_silent_for_as_long_as_its_prefills_bring_nothing() -> None:
    made = pool(
        quiet={"busy_since": NOW - 9, "progress_at": NOW - 8},
        waits={"prefilling": 1, "busy_since": NOW - 5},
        moves={"prefilling": 1, "busy_since": NOW - 5, "progress_at": NOW - 2},
        fresh={"prefilling": 1, "busy_since": NOW - 1, "progress_at": NOW - 2},
    )
    seen = view(made)
    assert list(seen.silence(seen.prefilling)) == [0, 5, 2, 1]


def test_work_is_booked_in_nanoseconds_and_seen_in_seconds() -> None:
    seen = view(pool(a={"work": 2_500_000_000, "awaited": 500_000_000}))
    assert (seen.work.tolist(), seen.awaited.tolist()) == ([2.5], [0.5])


def test_speeds_are_those_of_the_candidates() -> None:
    taught = learned()
    speeds(taught.prefill_speed, (0.5, 1.0, 2.0))
    seen = PoolView(pool(a=0, b=0, c=0), np.array([2, 0]), NOW, learned=taught)
    assert seen.prefill_speed.tolist() == pytest.approx([2.0, 0.5], rel=0.01)
    assert seen.decode_speed.tolist() == [1.0, 1.0]


def test_room_for_an_adapter_is_false_where_the_engine_does_not_say() -> None:
    made = pool(roomy={"max_adapters": 2, "adapters": 1}, full={"max_adapters": 2, "adapters": 2}, mute={})
    assert list(view(made).adapter_room) == [True, False, False]


def test_no_adapter_is_active_for_a_request_without_a_model() -> None:
    made = pool(a=0, b=0)
    made.set_adapters(1, frozenset({"lora"}))
    assert list(view(made, model=None).adapter_active) == [False, False]
    assert list(view(made, model="other").adapter_active) == [False, False]
    assert list(view(made, model="lora").adapter_active) == [False, True]


def test_without_knowledge_of_prefixes_everything_is_uncached() -> None:
    seen = view(pool(a=0, b=0), prompt_tokens=12.0)
    assert list(seen.uncached) == [12, 12]
    assert list(seen.matched_blocks) == [0, 0]
    assert list(seen.shared) == [0, 0]
