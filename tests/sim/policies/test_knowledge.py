"""Both kinds of prefix knowledge, and that the told one knows what the engines really hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_states import hashes
from picker.prefix.approximate import ApproximateIndex
from picker.sim.cluster import Arrival, Cluster, Incident, Timing, Trouble
from picker.sim.engine import Engine
from picker.sim.latency import profile
from picker.sim.policies.knowledge import Approximate, Exact, Holdings, leading
from picker.sim.policies.lmetric import LMetric
from picker.types import BlocksRemoved, BlocksStored, Fact

ROWS = st.integers(0, 2)
BLOCKS = st.lists(st.integers(0, 8), max_size=6, unique=True)


# --- holdings ---


@given(st.lists(st.tuples(st.booleans(), ROWS, BLOCKS), max_size=30))
@settings(max_examples=100)
def test_a_row_holds_what_was_added_more_often_than_removed(changes: list[tuple[bool, int, list[int]]]) -> None:
    holdings, balance = Holdings(), Counter[tuple[int, int]]()
    for added, row, blocks in changes:
        (holdings.add if added else holdings.discard)(row, blocks)
        balance.update({(row, block): 1 if added else -1 for block in blocks})
    held = {(row, block) for block, rows in holdings.rows_of.items() for row in range(3) if rows >> row & 1}
    assert held == {key for key, count in balance.items() if count > 0}


def test_a_cleared_row_starts_anew() -> None:
    holdings = Holdings()
    holdings.add(0, [1, 2])
    holdings.add(0, [1])
    holdings.add(1, [1])
    holdings.clear(0)
    assert holdings.rows_of == {1: 0b10}
    holdings.add(0, [1])
    holdings.discard(0, [1])
    assert holdings.rows_of == {1: 0b10}


@given(st.lists(st.tuples(ROWS, BLOCKS), max_size=6), st.lists(st.tuples(ROWS, BLOCKS), max_size=6), BLOCKS)
@settings(max_examples=100)
def test_leading_counts_only_unbroken_beginnings(
    told: list[tuple[int, list[int]]], expected: list[tuple[int, list[int]]], prompt: list[int]
) -> None:
    tables = (Holdings(), Holdings())
    of_row: dict[int, set[int]] = {row: set() for row in range(3)}
    for table, entries in zip(tables, (told, expected), strict=True):
        for row, blocks in entries:
            table.add(row, blocks)
            of_row[row].update(blocks)
    plain = [next((i for i, b in enumerate(prompt) if b not in of_row[row]), len(prompt)) for row in range(3)]
    assert leading(hashes(*prompt), tables, 3).tolist() == plain


def test_more_rows_than_a_machine_word_are_counted() -> None:
    table = Holdings()
    for row in (0, 63, 64, 999):
        table.add(row, range(row % 7 + 1))
    counts = leading(hashes(*range(9)), (table,), 1000)
    assert {row: int(counts[row]) for row in np.flatnonzero(counts)} == {0: 1, 63: 1, 64: 2, 999: 6}


# --- exact ---


def test_what_was_just_sent_counts_as_held_until_a_while_after_its_first_token() -> None:
    knowledge, prompt = Exact(4, linger=0.1), hashes(1, 2, 3)
    knowledge.book(7, 2, prompt, 0.0)
    assert knowledge.match(prompt, 1e6).tolist() == [0, 0, 3, 0]
    knowledge.prefilled(7, 1e6)
    knowledge.prefilled(7, 1e6 + 5)
    assert knowledge.match(prompt, 1e6 + 0.09)[2] == 3
    assert knowledge.match(prompt, 1e6 + 0.1)[2] == 0


def test_what_was_told_outlives_the_expectation() -> None:
    knowledge, prompt = Exact(4), hashes(1, 2, 3)
    knowledge.book(7, 2, prompt, 0.0)
    knowledge.learn(2, BlocksStored("x", (1, 2)))
    knowledge.prefilled(7, 1.0)
    assert knowledge.match(prompt, 9.0)[2] == 2
    knowledge.learn(2, BlocksRemoved("x", (2,)))
    assert knowledge.match(prompt, 9.0)[2] == 1
    knowledge.clear(2)
    assert knowledge.match(prompt, 9.0)[2] == 0


def test_a_retried_request_moves_its_expectation() -> None:
    knowledge, prompt = Exact(4, linger=0.0), hashes(1)
    knowledge.book(7, 0, prompt, 0.0)
    knowledge.book(7, 1, prompt, 1.0)
    assert knowledge.match(prompt, 1.0).tolist() == [0, 1, 0, 0]


def test_approximate_knowledge_learns_at_booking_and_asks_for_no_events() -> None:
    knowledge, prompt = Approximate(ApproximateIndex(1 << 20)), hashes(1, 2)
    knowledge.book(1, 3, prompt, 0.0)
    knowledge.learn(3, BlocksRemoved("x", (1, 2)))
    assert knowledge.match(prompt, 0.0)[3] == 2
    assert not knowledge.wants_events


# --- in a cluster ---

PROFILE = replace(profile("llama-3.1-8b-h100"), block_size=16, kv_tokens=16 * 200, max_num_seqs=16)


def conversations(count: int) -> list[Arrival]:
    """More than the caches hold, with shared beginnings, and answers that are cached."""
    rng = np.random.default_rng(5)
    arrivals = []
    for number in range(count):
        group, own = int(rng.integers(12)), 1000 * (number + 1)
        blocks = [*range(group * 100, group * 100 + 20), *range(own, own + int(rng.integers(1, 20)))]
        arrivals.append(
            Arrival(
                0.02 * number,
                16 * len(blocks) + 5,
                int(rng.integers(1, 60)),
                np.array(blocks, dtype=np.uint64),
                hash_of=lambda index, own=own: own + 500 + index,  # type: ignore[misc]
            )
        )
    return arrivals


class Recorder(LMetric):
    """Keeps the facts it was told."""

    facts: list[tuple[float, Fact]]

    def apply(self, fact: Fact, now: float) -> None:
        self.__dict__.setdefault("facts", []).append((now, fact))
        super().apply(fact, now)


def run(
    knowledge: Exact | Approximate, incidents: Sequence[Incident] = (), delay: float = 0.005
) -> tuple[Recorder, list[Engine]]:
    router = Recorder(knowledge, np.random.default_rng(1), block_tokens=16)
    engines = [Engine(PROFILE, name=f"pod-{i}") for i in range(3)]
    alive = {engine.name: engine for engine in engines}

    def engine_of(name: str, started_at: float) -> Engine:
        alive[name] = Engine(PROFILE, name=name, started_at=started_at)
        return alive[name]

    timing = Timing(event_delay=delay, think=float("inf"))
    cluster = Cluster(router, engines, timing=timing, incidents=incidents, engine_of=engine_of)
    outcomes = cluster.run(conversations(300))
    assert incidents or not any(outcome.failed for outcome in outcomes)
    return router, list(alive.values())


@pytest.mark.parametrize(
    "incidents", [(), (Incident(2.0, Trouble.KILL, "pod-1"), Incident(3.0, Trouble.REVIVE, "pod-1"))]
)
def test_events_tell_exactly_what_the_engines_hold(incidents: Sequence[Incident]) -> None:
    knowledge = Exact()
    _, engines = run(knowledge, incidents)
    assert sum(engine.counters.hits for engine in engines) > 0
    held = knowledge._held.rows_of
    for row, engine in enumerate(engines):
        assert {block for block, rows in held.items() if rows >> row & 1} == set(engine.pool._by_hash)
    assert not knowledge._booked


def test_events_come_after_their_delay_and_only_to_those_who_want_them() -> None:
    def first_stored(delay: float) -> float:
        router, _ = run(Exact(), delay=delay)
        return next(now for now, fact in router.facts if isinstance(fact, BlocksStored))

    assert first_stored(0.505) == pytest.approx(first_stored(0.005) + 0.5)
    router, _ = run(Approximate(ApproximateIndex(1 << 20)))
    assert not any(isinstance(fact, BlocksStored | BlocksRemoved) for _, fact in router.facts)
