from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import NOW, endpoint, learned, pool, request, speeds, view
from picker.core.adapters import Adapters
from picker.core.cost import CostModel
from picker.core.learned import Learned
from picker.core.pool import Pool
from picker.core.view import PoolView

# At 1,000 tokens a second, which `learned` has unless told otherwise.
NS_PER_TOKEN = 1_000_000


def terms(of: Pool, *, prompt_tokens: float = 500.0, now: float = NOW, **known: Any) -> dict[str, list[float]]:
    known.setdefault("learned", learned(rows=of.rows))
    seen = view(of, prompt_tokens=prompt_tokens, now=now, **known)
    return {name: seconds.tolist() for name, seconds in CostModel().terms(seen, request()).items()}


def total(of: Pool, *, now: float = NOW, **known: Any) -> list[float]:
    return [float(sum(each)) for each in zip(*terms(of, now=now, **known).values(), strict=True)]


def booked(count: int, tokens: int, *, since: float = 0.0) -> dict[str, float]:
    """So many prefills of so many tokens each, booked `since` seconds ago."""
    backlog = count * tokens
    work = backlog * NS_PER_TOKEN
    since_then = {"busy_since": NOW - since, "awaited": work}
    return {"prefilling": count, "inflight": count, "backlog": backlog, "work": work} | since_then


def busy(taught: Learned, *, arrivals: float, load: float, tied: bool = False) -> Learned:
    """So many requests and so many seconds of prefill each second, for all endpoints together, up to `NOW`."""
    for number in range(2000):
        taught.booked(load / arrivals, tied=tied, now=NOW - (1999 - number) / arrivals)
    return taught


# --- one term after the other ---


def test_an_idle_endpoint_costs_only_its_own_prefill() -> None:
    assert terms(pool(a=0)) == {
        "queue": [0.0],
        "prefill": [0.5],
        "followers": [0.0],
        "neighbours": [0.0],
        "decoding": [0.0],
        "memory": [0.0],
        "stall": [0.0],
    }


def test_what_is_cached_is_not_computed_again() -> None:
    assert terms(pool(a=0, b=0), uncached=np.array([500.0, 100.0]))["prefill"] == pytest.approx([0.5, 0.1])


def test_attention_to_what_is_cached_is_paid_all_the_same() -> None:
    taught = learned(token=0.0, attention=1e-6)
    cost = terms(pool(a=0, b=0), uncached=np.array([500.0, 100.0]), learned=taught)
    assert cost["prefill"] == pytest.approx([1e-6 * 500 * 250, 1e-6 * 100 * 450])


def test_a_faster_endpoint_costs_less_for_the_same_work() -> None:
    taught = learned()
    speeds(taught.prefill_speed, (0.5, 2.0))
    cost = terms(pool(slow=booked(1, 2000), fast=booked(1, 2000)), learned=taught)
    assert cost["prefill"] == pytest.approx([1.0, 0.25], rel=0.01)
    assert cost["queue"] == pytest.approx([4.0, 1.0], rel=0.01)


def test_a_prefill_takes_the_steps_it_is_cut_into_and_waits_for_the_one_in_progress() -> None:
    taught = learned(token=0.0, step=0.1)
    made = pool(idle=0, decodes=1, queued={"prefilling": 2, "inflight": 2, "backlog": 12_000})
    cost = terms(made, prompt_tokens=8000, learned=taught)
    assert cost["prefill"] == pytest.approx([0.1, 0.15, 0.35])


def test_a_step_is_longer_the_more_decode_and_the_more_they_remember() -> None:
    taught = learned(token=0.0, sequence=0.01, context=1e-6, output_tokens=200.0)
    made = pool(few=2, many=10, long={"inflight": 2, "decoding": 99_800})
    steps = 1.5
    few, many, long = 0.02 + 200e-6, 0.1 + 1000e-6, 0.02 + 200e-6 + 99_800e-6
    assert terms(made, learned=taught)["prefill"] == pytest.approx([few * steps, many * steps, long * steps])


def test_the_queue_shrinks_by_what_was_done_since_but_not_below_the_prefills_behind_the_first() -> None:
    made = pool(a=booked(2, 1000))
    assert terms(made)["queue"] == pytest.approx([2.0])
    assert terms(made, now=NOW + 0.4)["queue"] == pytest.approx([1.6])
    assert terms(made, now=NOW + 50)["queue"] == pytest.approx([1.0])


def test_requests_of_other_gateways_cost_their_prefills() -> None:
    made = pool(alone={"waiting": 2} | booked(2, 1000), shared={"waiting": 5} | booked(2, 1000))
    assert terms(made)["queue"] == pytest.approx([2.0, 5.0])


def test_with_nothing_of_ours_to_go_by_others_are_taken_to_be_like_this_request() -> None:
    assert terms(pool(a={"waiting": 3}), prompt_tokens=500)["queue"] == pytest.approx([1.5])


def test_an_unknown_queue_is_taken_to_be_like_the_others() -> None:
    queue = terms(pool(known={"waiting": 6}, idle={"waiting": 2}, unknown={}))["queue"]
    assert queue == pytest.approx([3.0, 1.0, 2.0])


def test_nothing_waits_where_nobody_was_scraped() -> None:
    assert terms(pool(a=0, b=0))["queue"] == [0.0, 0.0]


def test_who_comes_next_waits_for_the_queue_and_the_prefill_the_more_the_more_come() -> None:
    made = pool(idle=0, queued=booked(1, 1000))
    taught = busy(learned(), arrivals=4.0, load=1.0)
    arrivals, load = taught.rates(2, NOW)
    cost = terms(made, learned=taught)["followers"]
    assert (arrivals, load) == pytest.approx((2.0, 0.5), rel=0.02)
    factor = arrivals / (2 * (1 - load))
    assert cost == pytest.approx([0.5 * 0.5 * factor, 0.5 * (2 * 1.0 + 0.5) * factor])


def test_a_prefill_is_felt_by_every_request_in_flight_there() -> None:
    assert terms(pool(a=0, b=10))["neighbours"] == pytest.approx([0.0, 0.35 * 0.5 * 10])


def test_an_answer_takes_longer_where_steps_do() -> None:
    taught = learned(step=0.02, output_tokens=100.0)
    speeds(taught.decode_speed, (0.5, 2.0))
    assert terms(pool(slow=0, fast=0), learned=taught)["decoding"] == pytest.approx([1.4, 0.35], rel=0.01)


# --- memory ---


def memory(of: Pool, **known: Any) -> list[float]:
    """Where steps take 0.02 s, answers 100 tokens, and one request a second comes."""
    taught = busy(learned(step=0.02, output_tokens=100.0), arrivals=1.0, load=0.1)
    return terms(of, learned=taught, **known)["memory"]


def cache(*, filled: float, requests: int, capacity: int = 100_000) -> dict[str, float]:
    """An endpoint whose KV cache is so full, half answers included, of the prompts of so many that decode."""
    return {"kv_capacity": capacity, "inflight": requests, "pinned": filled * capacity - requests * 50}


def test_a_cache_that_is_just_full_costs_half_the_share_taken_for_as_long_as_it_is_and_as_long_a_wait() -> None:
    """500 tokens and 100 of an answer, of six hundred, for 0.5 s of prefill and 101 steps of 0.02 s."""
    assert memory(pool(a={"kv_capacity": 600})) == pytest.approx([0.5 * 1.0 * 2.52**2], rel=0.02)


def test_memory_is_dear_where_many_come_who_would_wait_and_more_come_to_the_fast() -> None:
    """Four times the speed: a quarter of the time held, squared, and four times as many who would wait."""
    taught = busy(learned(output_tokens=20.0, step=0.1), arrivals=1.0, load=0.0)
    for factors in (taught.prefill_speed, taught.decode_speed):
        speeds(factors, (0.5, 2.0))
    slow, fast = terms(pool(slow={"kv_capacity": 600}, fast={"kv_capacity": 600}), learned=taught)["memory"]
    assert slow / fast == pytest.approx(16 / 4, rel=0.02)


def test_memory_costs_next_to_nothing_until_the_cache_is_nearly_full() -> None:
    levels = (0.0, 0.5, 0.8, 0.95, 1.0, 2.0)
    made = pool(**{f"a{number}": cache(filled=level, requests=100) for number, level in enumerate(levels)})
    costs = np.array(memory(made, prompt_tokens=500.0)) / (600 / 100_000)
    empty, half, most, nearly, full, over = costs.tolist()
    assert max(empty, half) < 1e-6
    assert most < 0.05 * full
    assert half < most < nearly < full < over
    holding = 0.5 + 0.02 * 1.5 + 100 * 0.02
    assert over == pytest.approx(holding * holding / len(levels), rel=0.02)


def test_a_few_large_requests_fill_a_cache_by_chance_sooner_than_many_small_ones() -> None:
    """The same filling with as long a prefill and as many tokens of this request; only those there differ."""
    few, some, many = memory(
        pool(
            few=cache(filled=0.8, requests=4), some=cache(filled=0.8, requests=20), many=cache(filled=0.8, requests=200)
        )
    )
    assert few > 2 * some > 4 * many > 0.0


def test_a_prompt_takes_no_memory_where_others_hold_it_and_all_of_its_own_where_it_is_only_cached() -> None:
    made = pool(together=cache(filled=0.98, requests=20), apart=cache(filled=0.98, requests=20))
    cached = np.array([500.0, 500.0])
    together, apart = memory(made, prompt_tokens=5000.0, uncached=cached, shared=np.array([4500.0, 0.0]))
    assert 0.0 < together < 0.2 * apart
    same, again = memory(made, prompt_tokens=5000.0, uncached=cached)
    assert same == again == apart


def test_where_the_cache_is_full_the_queue_is_also_until_enough_of_it_is_given_back() -> None:
    """In the time of an answer, 100 steps of 0.02 s, all that is held is given back once."""
    taught = learned(step=0.02, output_tokens=100.0)
    levels = (0.5, 0.9, 1.0, 1.1, 1.2)
    made = pool(**{f"a{number}": cache(filled=level, requests=100) for number, level in enumerate(levels)})
    missing = np.array([max(0.0, level + 0.05 - 1.0) / level for level in levels])
    queue = terms(made, learned=taught, prompt_tokens=5000.0)["queue"]
    assert queue == pytest.approx(missing * 100 * 0.02)
    assert queue[:2] == [0.0, 0.0]
    assert 0.0 < queue[2] < queue[3] < queue[4]


def test_who_comes_to_a_full_cache_waits_for_what_he_does_not_share() -> None:
    made = pool(together=cache(filled=1.0, requests=10), apart=cache(filled=1.0, requests=10))
    taught = learned(step=0.02, output_tokens=100.0)
    shared = np.array([5000.0, 1000.0])
    together, apart = terms(made, learned=taught, prompt_tokens=5000.0, shared=shared)["queue"]
    assert [together, apart] == pytest.approx([0.0, 0.04 * 100 * 0.02])


def test_an_empty_cache_that_is_smaller_than_the_prompt_has_a_price_that_is_finite() -> None:
    made = pool(small={"kv_capacity": 10}, large={"kv_capacity": 100_000})
    small, large = memory(made, prompt_tokens=5000.0)
    assert np.isfinite(small)
    assert small > large


def test_a_capacity_nobody_knows_has_no_price_and_one_unknown_is_like_the_others() -> None:
    assert memory(pool(a={"pinned": 99_999}, b={"pinned": 1, "inflight": 9})) == [0.0, 0.0]
    assert terms(pool(a={"pinned": 99_999}))["queue"] == [0.0]
    known, unknown = memory(pool(known={"kv_capacity": 1000}, unknown={}))
    assert known == unknown > 0


# --- followers are drawn ---


def slots(adapters: Adapters, of: Pool, *, model: str = "a") -> list[float]:
    """The price of a request for an adapter, of which two run at a time; the life of a request is a second."""
    of.max_adapters[:] = 2
    seen = view(of, prompt_tokens=1000.0, learned=learned(rows=of.rows), adapters=adapters, model=model)
    costs: list[float] = (
        CostModel(adapter_load=0.5, slot_weight=0.1).terms(seen, request(model=model))["adapter"].tolist()
    )
    return costs


def running(rows: int, **where: tuple[int, ...]) -> Adapters:
    """Adapters of which a request runs on each of these rows."""
    adapters = Adapters(rows)
    adapters.known |= set("abcd")
    for adapter, at in where.items():
        for row in at:
            adapters.book(adapter, row)
            adapters.begin(adapter, row)
    return adapters


def test_an_adapter_is_loaded_where_it_does_not_run_and_waits_where_all_slots_are_taken() -> None:
    made = pool(idle=0, here=1, full=2)
    here, other = running(made.rows, a=(1,), b=(2,), c=(2,)), 0.5
    costs = slots(here, made)
    assert costs[:2] == [other, 0.0]
    assert costs[2] > other + 0.4  # half a life: the first of two slots


def test_each_adapter_that_waits_already_makes_the_wait_longer_and_the_slots_in_use_dearer() -> None:
    made = pool(full=2)
    adapters = running(made.rows, b=(0,), c=(0,))
    before, held = slots(adapters, made)[0], slots(adapters, made, model="b")[0]
    adapters.book("d", 0)
    assert slots(adapters, made)[0] > before
    assert (held, slots(adapters, made, model="b")[0] > 0.0) == (0.0, True)


def test_where_an_adapter_is_awaited_it_is_neither_loaded_again_nor_its_own_rival() -> None:
    made = pool(full=2)
    adapters = running(made.rows, b=(0,))
    adapters.book("a", 0)
    assert slots(adapters, made) == [0.0]


def test_a_base_model_has_no_price_for_adapters() -> None:
    assert "adapter" not in terms(pool(a=0))


def followers(*, tied: bool, factors: tuple[float, ...] = (), **recent: float) -> list[float]:
    """Of equally busy endpoints that so many requests went to lately; factors: their speeds, if not all alike."""
    taught = busy(learned(), arrivals=4.0, load=1.0, tied=tied)
    speeds(taught.prefill_speed, factors)
    made = pool(**{name: {"recent": count, "recent_at": NOW} | booked(1, 1000) for name, count in recent.items()})
    return terms(made, learned=taught)["followers"]


def test_who_comes_next_goes_to_where_others_went_as_far_as_requests_are_tied() -> None:
    popular, deserted = followers(tied=True, popular=10.0, deserted=0.0)
    assert popular > 100 * deserted
    popular, deserted = followers(tied=False, popular=10.0, deserted=0.0)
    assert popular == deserted > 0.0


@pytest.mark.parametrize(("slow", "fast", "power"), [(0.0, 0.0, 1.0), (4.0, 4.0, 0.40), (0.0, 100.0, 1.33)])
def test_who_is_tied_nowhere_favours_the_fast_as_others_did_and_in_part_as_speeds_say(
    slow: float, fast: float, power: float
) -> None:
    """Four times the speed is a sixteenth of the delay to one follower, for each of whom there are 4 ** power."""
    costs = followers(tied=False, factors=(0.5, 2.0), slow=slow, fast=fast)
    assert costs[0] / costs[1] == pytest.approx(16 / 4**power, rel=0.02)


def test_on_which_of_two_equals_others_went_is_chance() -> None:
    slow, popular, deserted = followers(tied=False, factors=(0.25, 2.0, 2.0), slow=1.0, popular=9.0, deserted=1.0)
    assert popular == pytest.approx(deserted, rel=1e-3)
    assert slow > 10 * popular


def test_where_all_came_to_the_slow_somewhat_more_are_expected_at_the_fast_all_the_same() -> None:
    """A quarter of the power is that of the speeds whatever they did."""
    slow, fast = followers(tied=False, factors=(0.5, 2.0), slow=100.0, fast=0.0)
    assert slow / fast == pytest.approx(16 / 4**0.25, rel=0.02)


def test_thousands_of_slow_endpoints_and_one_that_all_went_to_leave_costs_that_are_numbers() -> None:
    taught = busy(learned(rows=4096), arrivals=4.0, load=1.0)
    made = pool(fast={"recent": 1e6, "recent_at": NOW}, **{f"slow{number}": 0 for number in range(3000)})
    taught.prefill_speed.add(0, expected=1e6, took=1e3)
    for row in range(1, 3001):
        taught.prefill_speed.add(row, expected=1.0, took=1.0)
    costs = np.array(terms(made, learned=taught)["followers"])
    assert np.isfinite(costs).all()
    assert costs[0] > costs[1] >= 0.0


def test_followers_are_as_many_in_all_however_they_are_drawn() -> None:
    drawn, alike = followers(tied=True, a=9.0, b=3.0, c=0.0), followers(tied=False, a=9.0, b=3.0, c=0.0)
    assert sum(drawn) == pytest.approx(sum(alike))
    assert drawn[0] == pytest.approx(3 * drawn[1], rel=0.01)


def test_where_nobody_went_lately_followers_are_drawn_to_nowhere() -> None:
    assert followers(tied=True, a=0.0, b=0.0) == pytest.approx(followers(tied=False, a=1.0, b=1.0))


@pytest.mark.parametrize("hours", [1.0, 5.93, 5.96, 6.0, 6.2, 6.3, 50.0])
def test_hours_in_which_nobody_came_leave_a_cost_that_is_a_number(hours: float) -> None:
    """After six hours without a request what is recent is smaller than the smallest number with a reciprocal."""
    taught = busy(learned(), arrivals=4.0, load=1.0, tied=True)
    made = pool(last={"recent": 3.0, "recent_at": NOW}, never={})
    last, never = terms(made, learned=taught, now=NOW + 3600 * hours)["followers"]
    assert 0.0 <= never <= last < 1e-6


# --- silence ---


def test_silence_beyond_the_expected_makes_an_endpoint_dearer_by_the_second() -> None:
    made = pool(hangs=booked(1, 1000))
    assert terms(made, now=NOW + 3)["stall"] == [0.0]
    assert terms(made, now=NOW + 4)["stall"] == pytest.approx([1.0])
    assert terms(made, now=NOW + 60)["stall"] == pytest.approx([57.0])


def test_a_slow_endpoint_is_given_the_time_it_takes() -> None:
    taught = learned()
    speeds(taught.prefill_speed, (0.5, 2.0))
    made = pool(slow=booked(1, 1000), fast=booked(1, 1000))
    assert terms(made, now=NOW + 5, learned=taught)["stall"] == pytest.approx([0.0, 3.0], abs=0.02)


# --- all together ---


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 5), tokens=st.integers(0, 9000), more=st.integers(0, 9000), silent=st.floats(0.0, 100.0))
def test_more_work_never_makes_an_endpoint_cheaper(count: int, tokens: int, more: int, silent: float) -> None:
    taught = busy(learned(step=0.02, sequence=1e-4, output_tokens=100.0), arrivals=1.0, load=0.3)
    made = pool(a={"kv_capacity": 50_000})

    def book(tokens: int, at: float) -> None:
        made.book(0, tokens=tokens, context=tokens, pinned=tokens, work=tokens * NS_PER_TOKEN, now=at)

    for _ in range(count):
        book(tokens, NOW)
    before = total(made, now=NOW + silent, learned=taught)
    book(more, NOW + silent)
    assert total(made, now=NOW + silent, learned=taught)[0] >= before[0] - 1e-9


def test_a_hanging_endpoint_soon_costs_more_than_a_busy_one_that_moves() -> None:
    made = pool(hangs=booked(1, 100), moves=booked(20, 500) | {"progress_at": NOW})
    hangs, moves = total(made)
    assert hangs < moves
    made.progress_at[1] = NOW + 60
    hangs, moves = total(made, now=NOW + 60)
    assert hangs > moves


@pytest.mark.parametrize("column", ["waiting", "kv_usage", "kv_capacity", "running"])
def test_an_endpoint_never_scraped_is_neither_shunned_nor_flooded(column: str) -> None:
    level = {"waiting": 2.0, "kv_usage": 0.5, "kv_capacity": 50_000.0, "running": 4.0}
    without = {name: value for name, value in level.items() if name != column}
    taught = busy(learned(step=0.02, output_tokens=100.0), arrivals=1.0, load=0.1)
    known, unknown = total(pool(known=level, unknown=without), learned=taught)
    assert known == pytest.approx(unknown)


def test_without_candidates_there_are_no_costs() -> None:
    assert all(seconds == [] for seconds in terms(pool()).values())


columns = st.fixed_dictionaries(
    {
        "prefilling": st.integers(0, 100),
        "decodes": st.integers(0, 500),
        "backlog": st.integers(0, 10**7),
        "work": st.integers(0, 10**13),
        "awaited": st.integers(0, 10**13),
        "pinned": st.integers(0, 10**8),
        "recent": st.just(0.0) | st.floats(0, 1e5),
        "recently": st.floats(0, 1e7),
        "decoding": st.integers(0, 10**8),
        "silent": st.floats(0, 1e7),
        "waiting": st.none() | st.floats(0, 1e6),
        "kv_capacity": st.none() | st.floats(1, 1e8),
        "cached": st.floats(0, 1),
        "shared": st.floats(0, 1),
        "speed": st.floats(1e-3, 1e3),
    }
)
BOOKED = ("prefilling", "backlog", "work", "awaited", "pinned", "decoding", "recent", "waiting", "kv_capacity")


def pool_of(states: list[dict[str, Any]]) -> Pool:
    made = Pool(rows=4)
    for number, state in enumerate(states):
        row = made.add(endpoint(f"e{number}"), NOW)
        for column in BOOKED:
            if state[column] is not None:
                getattr(made, column)[row] = state[column]
        made.inflight[row] = state["prefilling"] + state["decodes"]
        made.busy_since[row] = NOW - state["silent"]
        made.recent_at[row] = NOW - state["recently"]
    return made


@settings(max_examples=80, deadline=None)
@given(
    states=st.lists(columns, min_size=0, max_size=4),
    prompt=st.just(0.0) | st.floats(0, 1e6),
    coefficients=st.lists(st.just(0.0) | st.floats(0, 1.0), min_size=5, max_size=5),
    output_tokens=st.floats(0, 1e5),
    bookings=st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 100), st.booleans()), max_size=5),
)
def test_every_term_is_a_finite_number_of_seconds_and_none_is_negative(
    states: list[dict[str, Any]],
    prompt: float,
    coefficients: list[float],
    output_tokens: float,
    bookings: list[tuple[float, float, bool]],
) -> None:
    token, attention, step, sequence, context = coefficients
    made = pool_of(states)
    taught = learned(
        rows=made.rows,
        token=token,
        attention=attention,
        step=step,
        sequence=sequence,
        context=context,
        output_tokens=output_tokens,
    )
    for row, state in enumerate(states):
        taught.prefill_speed.add(row, expected=1.0, took=state["speed"])
        taught.decode_speed.add(row, expected=state["speed"], took=1.0)
    for seconds, before, tied in sorted(bookings, key=lambda each: -each[1]):
        taught.booked(seconds, tied=tied, now=NOW - before)
    uncached, shared = (prompt * np.array([state[of] for state in states], dtype=float) for of in ("cached", "shared"))
    known: dict[str, Any] = {"prompt_tokens": prompt, "uncached": uncached, "shared": shared, "learned": taught}
    seen = PoolView(made, np.arange(len(states)), NOW, **known)
    for name, term in CostModel().terms(seen, request()).items():
        assert term.shape == (len(states),), name
        assert np.isfinite(term).all(), name
        assert (term >= 0.0).all(), name
