import math
from typing import Any

import numpy as np
import pytest

from fakes import NOW, endpoint, pool
from picker.core.pool import COLUMNS, RECENT_S, Pool
from picker.types import Role


def test_an_endpoint_is_found_by_name_and_by_address() -> None:
    made = pool(endpoint("a", address="10.0.0.1:8000"))
    row = made.row("a")
    assert row is not None
    assert made.row_of_address("10.0.0.1:8000") == row
    assert made.endpoint(row).name == "a"
    assert made.names[row] == "a"
    assert (len(made), [name.name for _, name in made]) == (1, ["a"])


def test_an_unknown_number_is_nan_and_a_count_is_zero() -> None:
    made = pool(endpoint("a"))
    row = made.row("a")
    for column in ("waiting", "running", "kv_usage", "kv_capacity", "observed_at", "started_at", "block_size"):
        assert np.isnan(getattr(made, column)[row]), column
    for column in ("inflight", "prefilling", "backlog", "work", "context", "pinned", "decoding", "recent", "last_pick"):
        assert getattr(made, column)[row] == 0, column


def test_a_reused_row_remembers_nothing_but_its_generation() -> None:
    made = pool(endpoint("a", models=["m"], role=Role.DECODE))
    row = made.row("a")
    assert row is not None
    made.set_adapters(row, frozenset({"lora"}))
    for column, default in COLUMNS.items():
        if column not in ("generation", "present"):
            getattr(made, column)[row] = not default if isinstance(default, bool) else 7
    generation = int(made.generation[row])
    made.remove(row)
    assert made.add(endpoint("b"), NOW + 1) == row
    for column, default in COLUMNS.items():
        if column not in ("generation", "present", "added_at"):
            np.testing.assert_equal(getattr(made, column)[row], default, err_msg=column)
    assert made.generation[row] > generation
    assert made.added_at[row] == NOW + 1
    assert made.active_adapter("lora") is None
    assert not made.has_model("no such") or made.models() == []
    assert made.can(Role.PREFILL)[row]


def test_an_endpoint_that_left_is_found_no_more() -> None:
    made = pool(endpoint("a", models=["m"]), endpoint("b", models=["other"]))
    row = made.row("a")
    assert row is not None
    made.remove(row)
    assert (made.row("a"), made.row_of_address("a:8000")) == (None, None)
    assert (len(made), made.models(), made.has_model("m")) == (1, ["other"], False)
    assert not made.present[row]
    with pytest.raises(AssertionError, match="is free"):
        made.endpoint(row)


def test_names_are_replaced_and_never_written() -> None:
    made = pool(endpoint("a"))
    before = made.names
    made.add(endpoint("b"), NOW)
    assert list(before) == ["a", "", "", ""]
    assert list(made.names) == ["a", "b", "", ""]


def test_growing_keeps_everything_in_its_row() -> None:
    made = Pool(rows=2)
    for name in "abcde":
        row = made.add(endpoint(name, models=[f"model-{name}"], role=Role.DECODE), NOW)
        made.set_adapters(row, frozenset({f"lora-{name}"}))
        made.waiting[row] = row
        made.book(row, tokens=10 * row, context=20 * row, pinned=15 * row, work=30 * row, now=NOW)
    assert (made.rows, len(made)) == (8, 5)
    for row, each in made:
        assert made.waiting[row] == row
        assert (made.backlog[row], made.context[row], made.work[row]) == (10 * row, 20 * row, 30 * row)
        assert (made.pinned[row], made.recent[row]) == (15 * row, 1.0)
        assert list(np.flatnonzero(made.serving(f"model-{each.name}"))) == [row]
        active = made.active_adapter(f"lora-{each.name}")
        assert active is not None
        assert list(np.flatnonzero(active)) == [row]
        assert made.can(Role.DECODE)[row]
        assert not made.can(Role.PREFILL)[row]
    assert all(getattr(made, column).size == made.rows for column in COLUMNS)
    assert np.isnan(made.waiting[5:]).all()


def test_an_endpoint_of_unknown_models_may_serve_any() -> None:
    made = pool(endpoint("knows", models=["m"]), endpoint("mute"))
    assert list(np.flatnonzero(made.serving("m"))) == [0, 1]
    assert list(np.flatnonzero(made.serving("x"))) == [1]
    assert list(np.flatnonzero(made.serving(None))) == [0, 1]
    assert made.has_model("x")
    made.set_models(1, frozenset({"x"}))
    assert list(np.flatnonzero(made.serving("m"))) == [0]
    assert (made.has_model("y"), made.models()) == (False, ["m", "x"])


def test_a_new_description_replaces_models_and_role() -> None:
    made = pool(endpoint("a", models=["old"], role=Role.PREFILL))
    made.describe(0, endpoint("a", models=["new"], role=Role.DECODE))
    assert made.models() == ["new"]
    assert [made.can(role)[0] for role in (Role.BOTH, Role.PREFILL, Role.DECODE)] == [True, False, True]


def test_adapters_are_followed_as_they_come_and_go() -> None:
    made = pool(a=0, b=0)
    made.set_adapters(0, frozenset({"x", "y"}))
    made.set_adapters(1, frozenset({"y"}))
    assert list(made.adapters[:2]) == [2, 1]
    made.set_adapters(0, frozenset({"x"}))
    active = made.active_adapter("y")
    assert active is not None
    assert list(np.flatnonzero(active)) == [1]
    made.set_adapters(1, frozenset())
    assert made.active_adapter("y") is None


def test_the_last_endpoint_at_an_address_is_the_one_found_there() -> None:
    made = pool(endpoint("old", address="10.0.0.1:80"))
    made.add(endpoint("new", address="10.0.0.1:80"), NOW)
    assert made.row_of_address("10.0.0.1:80") == 1
    made.remove(0)
    assert made.row_of_address("10.0.0.1:80") == 1


def book(of: Pool, tokens: int, now: float = NOW) -> None:
    """A prompt of twice so many tokens, half of it cached and held there already, at a microsecond a token."""
    of.book(0, tokens=tokens, context=2 * tokens, pinned=tokens, work=1000 * tokens, now=now)


def prefilled(of: Pool, tokens: int, now: float = NOW) -> None:
    of.prefilled(0, tokens=tokens, context=2 * tokens, work=1000 * tokens, now=now)


def test_a_request_is_in_every_column_until_it_leaves_it() -> None:
    made = pool(a=0)
    columns = ("inflight", "prefilling", "backlog", "work", "context", "pinned", "decoding")

    def booked() -> tuple[int, ...]:
        return tuple(int(getattr(made, column)[0]) for column in columns)

    book(made, 5)
    assert booked() == (1, 1, 5, 5000, 10, 5, 0)
    prefilled(made, 5)
    assert booked() == (1, 0, 0, 0, 10, 5, 10)
    made.release(0, context=10, pinned=5, decoding=True, now=NOW)
    assert booked() == (0, 0, 0, 0, 0, 0, 0)


def test_busy_since_is_when_the_first_of_the_open_prefills_began() -> None:
    made = pool(a=0)
    book(made, 5)
    book(made, 5, NOW + 1)
    assert made.busy_since[0] == NOW
    prefilled(made, 5, NOW + 2)
    prefilled(made, 5, NOW + 3)
    assert made.progress_at[0] == NOW + 3
    book(made, 5, NOW + 4)
    assert made.busy_since[0] == NOW + 4


def test_what_is_booked_during_a_silence_is_not_what_the_silence_awaits() -> None:
    made = pool(a=0)
    book(made, 5)
    book(made, 70, NOW + 1)
    assert made.awaited[0] == 5000
    prefilled(made, 5, NOW + 2)
    book(made, 900, NOW + 3)
    assert made.awaited[0] == 70_000


def test_integrals_count_who_decodes_for_as_long_as_it_does() -> None:
    made = pool(a=0)
    book(made, 50, NOW)
    prefilled(made, 50, NOW + 5)
    book(made, 100, NOW + 6)
    prefilled(made, 100, NOW + 8)
    made.release(0, context=100, pinned=50, decoding=True, now=NOW + 9)
    made.integrate(0, NOW + 12)
    assert made.decodes_area[0] == pytest.approx(3 + 2 * 1 + 3)
    assert made.context_area[0] == pytest.approx(3 * 100 + 1 * 300 + 3 * 200)
    assert made.prefill_area[0] == pytest.approx(150e-6)


def test_a_booking_counts_as_recent_and_fades_whether_or_not_it_has_ended() -> None:
    made = pool(a=0)
    book(made, 5)
    assert (made.recent[0], made.recent_at[0]) == (1.0, NOW)
    made.abandoned(0, tokens=5, work=5000)
    made.release(0, context=10, pinned=5, decoding=False, now=NOW + 1)
    book(made, 5, NOW + RECENT_S)
    assert (made.recent[0], made.recent_at[0]) == (pytest.approx(1.0 + math.exp(-1.0)), NOW + RECENT_S)


def test_releasing_what_was_not_booked_raises() -> None:
    made = pool(a=0)
    with pytest.raises(AssertionError, match="a prefill was released twice"):
        prefilled(made, 0)
    with pytest.raises(AssertionError, match="a charge was released twice"):
        made.release(0, context=0, pinned=0, decoding=False, now=NOW)


@pytest.mark.parametrize(
    ("more", "message"), [({"tokens": 6}, "more tokens"), ({"work": 8}, "more work")], ids=["tokens", "work"]
)
def test_a_prefill_that_is_larger_than_booked_raises(more: dict[str, int], message: str) -> None:
    made = pool(a=0)
    made.book(0, tokens=5, context=6, pinned=6, work=7, now=NOW)
    with pytest.raises(AssertionError, match=message):
        made.prefilled(0, **({"tokens": 5, "context": 6, "work": 7} | more), now=NOW)


@pytest.mark.parametrize(
    ("more", "message"),
    [({"context": 8}, "more context"), ({"pinned": 6}, "more pinned"), ({"decoding": True}, "more decoding")],
    ids=["context", "pinned", "decoding"],
)
def test_a_request_that_is_larger_than_booked_raises(more: dict[str, Any], message: str) -> None:
    made = pool(a=0)
    made.book(0, tokens=5, context=7, pinned=5, work=0, now=NOW)
    with pytest.raises(AssertionError, match=message):
        made.release(0, **({"context": 7, "pinned": 5, "decoding": False} | more), now=NOW)
