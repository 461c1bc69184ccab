"""Adapters: what runs and what waits, by row, against a plain count."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.core.adapters import Adapters


def test_a_model_is_an_adapter_when_an_engine_said_so() -> None:
    adapters = Adapters(4)
    adapters.known |= {"a"}
    assert (adapters.of("a"), adapters.of("base"), adapters.of(None)) == ("a", None, None)


def test_an_adapter_is_awaited_until_its_first_token_and_here_until_its_last_request_ends() -> None:
    adapters = Adapters(2)
    adapters.book("a", 1)
    assert adapters.awaited("a").tolist() == [False, True]
    assert (adapters.queued.tolist(), adapters.taken.tolist()) == ([0, 1], [0, 0])
    adapters.begin("a", 1)
    adapters.book("a", 1)
    assert adapters.here("a").tolist() == [False, True]
    assert not adapters.awaited("a").any()
    assert (adapters.queued.tolist(), adapters.taken.tolist()) == ([0, 0], [0, 1])
    adapters.end("a", 1, begun=True)
    assert adapters.awaited("a").tolist() == [False, True]
    adapters.end("a", 1, begun=False)
    assert not adapters.awaited("a").any()
    assert (adapters.queued.tolist(), adapters.taken.tolist()) == ([0, 0], [0, 0])


def test_rows_that_join_or_leave_keep_the_others() -> None:
    adapters = Adapters(1)
    adapters.book("a", 0)
    adapters.begin("a", 0)
    adapters.grow(3)
    adapters.book("a", 2)
    adapters.clear(0)
    assert not adapters.here("a").any()
    assert adapters.queued.tolist() == [0, 0, 1]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.booleans(), st.integers(0, 99))))
def test_the_columns_are_what_counting_requests_gives(steps: list[tuple[str, int, bool, int]]) -> None:
    adapters = Adapters(3)
    live: list[tuple[str, int, bool]] = []
    for adapter, row, start, choice in steps:
        if start or not live:
            adapters.book(adapter, row)
            live.append((adapter, row, False))
            continue
        name, at, begun = live.pop(choice % len(live))
        if begun or choice % 3 == 0:
            adapters.end(name, at, begun=begun)
        else:
            adapters.begin(name, at)
            live.append((name, at, True))
    runs = {(name, at) for name, at, begun in live if begun}
    waits = {(name, at) for name, at, begun in live if not begun} - runs
    assert adapters.taken.tolist() == [sum(at == row for _, at in runs) for row in range(3)]
    assert adapters.queued.tolist() == [sum(at == row for _, at in waits) for row in range(3)]
    for name in "abc":
        assert np.flatnonzero(adapters.here(name)).tolist() == sorted(at for n, at in runs if n == name)
