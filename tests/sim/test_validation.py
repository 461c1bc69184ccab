"""The comparisons themselves: they agree where they must, and disagree with what is wrong."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.load.trace import load
from picker.sim import latency, validation
from picker.sim.validation import FreeQueue, Line, Row
from picker.sim.workload import Recorded
from picker.types import FloatArray

SIZE = validation.TRACE_BLOCK_TOKENS
SHORT = Line(requests=500, skip=50, tick=0.01)


# --- rows ---


def test_a_figure_is_within_while_its_ratio_is_no_further_from_one_than_allowed() -> None:
    row = Row("case", "figure", 100.0, 114.9, 114.9, 114.9, 0.15)
    assert row.ok
    assert not replace(row, modelled=115.1).ok
    assert not replace(row, modelled=84.9).ok
    assert not replace(row, modelled=math.inf).ok


def test_a_figure_with_an_interval_is_within_while_the_published_value_lies_in_it() -> None:
    row = Row("case", "figure", 100.0, 110.0, 99.0, 121.0, None)
    assert row.ok
    assert not replace(row, low=100.5).ok


# --- decoding ---


def test_decoding_takes_what_was_measured() -> None:
    rows = validation.compare_decoding()
    assert len(rows) == 4
    assert all(row.ok for row in rows)


def test_a_pod_that_is_a_twentieth_slower_does_not_decode_as_measured() -> None:
    slow = replace(latency.profile("llama-3.1-8b-h100"), noise_sd=0.0).scaled(1 / 1.05)
    itl_ms = 1e3 * validation.inter_token_latency(slow, 47, 203, 64)
    assert abs(itl_ms / 8.95 - 1.0) > validation.DECODING_ALLOWED


# --- queueing ---


def constant(rng: np.random.Generator, count: int) -> FloatArray:
    return np.ones(count)


def test_erlang_with_one_server_is_the_mm1_queue() -> None:
    assert Line(servers=1, load=0.5).expected_wait == pytest.approx(1.0)
    assert Line(servers=2, load=0.5).expected_wait == pytest.approx(1 / 3)


def test_an_engine_with_c_slots_makes_everybody_wait_as_first_come_first_served_does() -> None:
    expected = validation.wait_by_recursion(SHORT, 1)
    assert validation.wait_in_engine(SHORT, 1) == pytest.approx(expected, abs=SHORT.tick)


def test_a_central_queue_over_c_engines_does_too() -> None:
    line = Line(requests=400, skip=0, tick=0.02)
    assert validation.wait_at_router(line, 1) == pytest.approx(validation.wait_by_recursion(line, 1), rel=1e-6)


def test_the_mean_wait_is_erlangs_and_that_of_constant_service_is_not() -> None:
    line = Line(servers=2, load=0.5, requests=800, skip=50, tick=0.05)
    waits = [validation.wait_at_router(line, seed) for seed in range(1, 7)]
    assert validation.compare_wait("queue", line, waits).ok
    even = [validation.wait_at_router(line, seed, constant) for seed in range(1, 7)]
    assert not validation.compare_wait("queue", line, even).ok


# --- hits ---


@dataclass(frozen=True)
class Asked:
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] | None
    at: float = 0.0


def chained(prompt: Sequence[int], extra: int, output: int) -> Asked:
    """A prompt of these block contents; a block's id is all contents up to it, as in the trace."""
    ids = tuple(hash(tuple(prompt[: i + 1])) % (1 << 40) for i in range(len(prompt)))
    return Asked(len(prompt) * SIZE + extra, output, ids)


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=5)
REQUESTS = st.lists(st.builds(chained, PROMPTS, st.integers(0, SIZE - 1), st.integers(1, 900)), min_size=1, max_size=40)


def test_the_queue_of_free_blocks_forgets_the_tail_first_and_never_serves_the_last_token() -> None:
    queue = FreeQueue(5)  # four that can be used
    assert queue.serve(3 * SIZE, 1, [1, 2, 3]) == 0
    assert queue.serve(3 * SIZE, 1, [1, 2, 3]) == 2 * SIZE  # the third block is computed again, for its last token
    assert queue.serve(2 * SIZE, 1, [7, 8]) == 0  # takes the copy of 3, and 3
    assert queue.serve(3 * SIZE + 1, 1, [1, 2, 3]) == 2 * SIZE


@given(REQUESTS, st.integers(9, 24))
@settings(max_examples=60, deadline=None)
def test_an_engine_that_serves_one_at_a_time_hits_what_the_queue_of_free_blocks_does(
    requests: list[Asked], blocks: int
) -> None:
    assert all(row.ok for row in validation.compare_engine_hits(requests, blocks))


@given(REQUESTS, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_hit_ratios_of_the_bounds_are_those_of_a_recount(requests: list[Asked], blocks: int) -> None:
    assert all(row.ok for row in validation.compare_bounds(requests, [blocks]))


def test_a_cache_of_another_size_does_not_agree() -> None:
    requests = [chained([n % 7, 0, 1], 5, 10) for n in range(50)]
    expected = validation.cached_tokens(requests, 12)
    assert expected != validation.cached_tokens(requests, 40)


@pytest.fixture(scope="module")
def conversation() -> list[Recorded]:
    path = Path(os.environ.get("PICKER_TRACES", "")) / "mooncake_conversation.jsonl"
    if "PICKER_TRACES" not in os.environ or not path.exists():
        pytest.skip("PICKER_TRACES names no folder with the conversation trace")
    return list(load(path))


@pytest.mark.parametrize("blocks", [600, 2400])
def test_hits_of_the_conversation_trace_are_the_same_request_by_request(
    conversation: list[Recorded], blocks: int
) -> None:
    rows = validation.compare_engine_hits(conversation[:1500], blocks)
    assert all(row.ok for row in rows)
    assert rows[1].modelled > 0


def test_hit_ratios_of_the_conversation_trace_are_recounted_from_its_ids(conversation: list[Recorded]) -> None:
    assert all(row.ok for row in validation.compare_bounds(conversation[:800], [600]))
