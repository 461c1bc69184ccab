import numpy as np

from fakes import NOW, pool, view
from picker.core.view import PoolView


def test_a_view_shows_the_candidates_in_the_order_asked_for() -> None:
    made = pool(a={"waiting": 1}, b={"waiting": 2}, c={"waiting": 3})
    seen = PoolView(made, np.array([2, 0]), NOW)
    assert list(seen.waiting) == [3, 1]
    assert seen.n == 2


def test_writing_to_a_column_of_a_view_leaves_the_pool_alone() -> None:
    made = pool(a={"waiting": 1, "inflight": 1}, b={"waiting": 2})
    made.set_adapters(0, frozenset({"lora"}))
    seen = view(made, model="lora")
    names = (
        "waiting",
        "running",
        "kv_usage",
        "kv_capacity",
        "inflight",
        "prefilling",
        "backlog",
        "context",
        "last_pick",
    )
    for name in (*names, "age", "idle_for", "adapter_active", "adapter_room"):
        before = getattr(seen, name)
        getattr(seen, name)[:] = 99
        np.testing.assert_array_equal(getattr(seen, name), before, err_msg=name)


def test_age_is_unknown_before_the_first_scrape() -> None:
    seen = view(pool(a={"observed_at": NOW - 3}, b={}))
    np.testing.assert_array_equal(seen.age, [3.0, np.nan])


def test_an_endpoint_is_idle_for_as_long_as_its_prefills_bring_nothing() -> None:
    made = pool(
        quiet={"busy_since": NOW - 9, "progress_at": NOW - 8},
        waits={"prefilling": 1, "busy_since": NOW - 5},
        moves={"prefilling": 1, "busy_since": NOW - 5, "progress_at": NOW - 2},
        fresh={"prefilling": 1, "busy_since": NOW - 1, "progress_at": NOW - 2},
    )
    assert list(view(made).idle_for) == [0, 5, 2, 1]


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
