from __future__ import annotations

import numpy as np

from picker.core.pool import Pool
from picker.core.slow_start import SlowStart
from picker.types import BoolArray, Endpoint


def pool_of(inflight: dict[str, int], *, added: float = 0.0) -> Pool:
    pool = Pool()
    for name, count in inflight.items():
        pool.inflight[pool.add(Endpoint(name, f"{name}:1"), added)] = count
    return pool


def names(pool: Pool, mask: BoolArray) -> set[str]:
    return {endpoint.name for row, endpoint in pool if mask[row]}


def newcomer(pool: Pool, start: SlowStart, name: str, now: float) -> int:
    row = pool.add(Endpoint(name, f"{name}:1"), now)
    start.begin(row, now)
    return row


def test_at_the_start_nobody_waits_for_anybody() -> None:
    pool = Pool()
    start = SlowStart(pool, 10.0)
    for name in "abc":
        newcomer(pool, start, name, 1.0)
    assert not start


def test_a_newcomer_gets_one_request_and_then_a_growing_share() -> None:
    pool = pool_of({"a": 10, "b": 10})
    start = SlowStart(pool, 10.0)
    row = newcomer(pool, start, "new", 100.0)
    assert names(pool, start.admit(pool.present.copy(), 100.0)) == {"a", "b", "new"}
    pool.inflight[row] = 1
    assert names(pool, start.admit(pool.present.copy(), 100.0)) == {"a", "b"}
    pool.inflight[row] = 5
    assert names(pool, start.admit(pool.present.copy(), 104.0)) == {"a", "b"}
    assert names(pool, start.admit(pool.present.copy(), 106.0)) == {"a", "b", "new"}


def test_after_its_time_it_is_one_of_all() -> None:
    pool = pool_of({"a": 1})
    start = SlowStart(pool, 10.0)
    row = newcomer(pool, start, "new", 100.0)
    pool.inflight[row] = 50
    assert names(pool, start.admit(pool.present.copy(), 110.0)) == {"a", "new"}
    assert not start


def test_one_that_is_the_only_candidate_is_taken() -> None:
    pool = pool_of({"a": 5})
    start = SlowStart(pool, 10.0)
    row = newcomer(pool, start, "new", 100.0)
    pool.inflight[row] = 30
    only = np.zeros(pool.rows, dtype=bool)
    only[row] = True
    assert names(pool, start.admit(only, 101.0)) == {"new"}


def test_a_row_that_is_somebody_elses_now_is_forgotten() -> None:
    pool = pool_of({"a": 5})
    start = SlowStart(pool, 10.0)
    row = newcomer(pool, start, "new", 100.0)
    pool.remove(row)
    start.admit(pool.present.copy(), 101.0)
    assert not start


def test_without_a_time_it_is_off() -> None:
    pool = pool_of({"a": 5})
    start = SlowStart(pool, 0.0)
    newcomer(pool, start, "new", 100.0)
    assert not start
