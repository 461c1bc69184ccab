from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.sim.cluster import Arrival
from picker.sim.sessions import Documents, Fixed, LogNormal, Sessions
from picker.sim.workload import Adapters, Bursts, Context, Replay, SharedPrefix, Workload, mix, poisson

BLOCK = 16
PIECES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), max_size=6)


def text(pieces: list[tuple[int, int]], block_tokens: int = BLOCK) -> Context:
    context = Context(block_tokens)
    for key, tokens in pieces:
        context = context.extended(key, tokens)
    return context


def common(a: Arrival | Context, b: Arrival | Context) -> int:
    """How many blocks two prompts share from the beginning."""
    left, right = (x.hashes if isinstance(x, Context) else x.block_hashes for x in (a, b))
    size = min(len(left), len(right))
    differ = np.flatnonzero(left[:size] != right[:size])
    return int(differ[0]) if differ.size else size


def draw(workload: Workload, rate: float = 1.0, seed: int = 1, limit: int | None = None) -> list[Arrival]:
    return list(workload.arrivals(rate, BLOCK, np.random.default_rng(seed), limit))


def whole(first: Arrival, answer_s: float = 1.0) -> list[Arrival]:
    """A session's requests, each answered in `answer_s`."""
    turns = [first]
    while turns[-1].then is not None and (following := turns[-1].then(turns[-1].at + answer_s)) is not None:
        turns.append(following)
    return turns


# --- prompts ---


@given(PIECES, PIECES, PIECES)
def test_texts_share_exactly_the_blocks_of_their_common_pieces(
    head: list[tuple[int, int]], left: list[tuple[int, int]], right: list[tuple[int, int]]
) -> None:
    same = len(text(head).hashes)
    assert common(text(head + left), text(head + right)) >= same
    if left and right and left[0][0] != right[0][0]:
        assert common(text(head + left), text(head + right)) == same


@given(PIECES)
def test_a_text_has_one_hash_for_each_full_block_and_no_two_alike(pieces: list[tuple[int, int]]) -> None:
    context = text(pieces)
    assert context.tokens == sum(tokens for _, tokens in pieces)
    assert len(set(context.hashes.tolist())) == len(context.hashes) == context.tokens // BLOCK


@given(PIECES, st.integers(1, 80))
def test_blocks_of_an_answer_are_those_of_the_prompt_that_quotes_it(pieces: list[tuple[int, int]], answer: int) -> None:
    prompt = text(pieces)
    hash_of, quoting = prompt.hash_of(9), prompt.extended(9, answer)
    written = [hash_of(i) for i in range(len(prompt.hashes), len(quoting.hashes))]
    assert written == quoting.hashes[len(prompt.hashes) :].tolist()


def test_mixing_two_numbers_depends_on_their_order_and_stays_in_64_bits() -> None:
    assert mix(1, 2) != mix(2, 1)
    assert 0 <= mix(-1, 2**70) < 2**64


# --- times ---


def test_poisson_arrivals_have_the_rate_and_are_stretched_by_another() -> None:
    slow, fast = (poisson(rate, 1000.0 / rate, np.random.default_rng(3)) for rate in (1.0, 4.0))
    assert len(slow) == pytest.approx(1000, abs=100)
    np.testing.assert_allclose(slow / 4.0, fast)


def test_bursts_have_their_mean_rate_and_are_burstier_than_poisson() -> None:
    bursts = Bursts(factor=6, on=8, off=32)
    times = bursts.times(1.0, 20_000.0, np.random.default_rng(4))
    counts = np.bincount((times // 10).astype(int))
    assert len(times) / 20_000 == pytest.approx(bursts.mean, rel=0.1)
    assert bursts.mean == 2.0
    assert counts.var() / counts.mean() > 4.0


def test_bursts_come_at_the_same_times_at_another_rate() -> None:
    bursts = Bursts(factor=50, on=5, off=50)
    busiest = [
        int(np.argmax(np.bincount((bursts.times(rate, 500.0, np.random.default_rng(5)) // 5).astype(int))))
        for rate in (2.0, 4.0)
    ]
    assert busiest[0] == busiest[1]


# --- shared prefixes ---

B2B = SharedPrefix(groups=3, prompts=2, system_tokens=64, question_tokens=32, output_tokens=4)


def test_a_prompt_recurs_whole_after_all_the_others() -> None:
    arrivals = draw(replace(B2B, seconds=20.0), rate=2.0)
    assert len(arrivals) > 12
    for n in range(6, len(arrivals)):
        assert common(arrivals[n], arrivals[n - 6]) == 6
    assert all(common(arrivals[0], other) in (0, 4) for other in arrivals[1:6])


def test_every_stage_starts_the_walk_again() -> None:
    staged = replace(B2B, stages=((2.0, 10.0), (5.0, 10.0)), gap=7.0)
    arrivals = draw(staged)
    assert staged.windows(1.0) == [(0.0, 10.0, 2.0), (17.0, 27.0, 5.0)]
    second = [a for a in arrivals if a.at >= 17.0]
    assert common(arrivals[0], second[0]) == 6
    assert not [a for a in arrivals if 10.0 <= a.at < 17.0]


def test_a_warm_up_comes_before_a_single_stage() -> None:
    assert replace(B2B, warmup=(15.0, 50.0), seconds=60.0).windows(9.0) == [(0.0, 50.0, 15.0), (50.0, 110.0, 9.0)]


# --- sessions ---

CHAT = Sessions(
    turns=Fixed(3),
    context=Fixed(40),
    question=Fixed(8),
    output=Fixed(20),
    pause=Fixed(5.0),
    system_tokens=32,
    think=2.0,
)


def test_a_turn_is_the_prompt_before_it_the_answer_and_a_question() -> None:
    turns = whole(draw(CHAT)[0])
    assert [turn.prompt_tokens for turn in turns] == [32 + 40 + 8, 80 + 20 + 8, 108 + 20 + 8]
    assert common(turns[0], turns[1]) == 80 // BLOCK
    assert turns[0].hash_of is not None
    assert turns[0].hash_of(5) == turns[1].block_hashes[5]  # of the answer


def test_a_turn_comes_a_pause_after_the_actual_end_of_the_answer() -> None:
    first = draw(CHAT)[0]
    assert [turn.at for turn in whole(first, answer_s=1.0)] == pytest.approx([first.at + 6 * n for n in range(3)])
    assert whole(first, answer_s=10.0)[1].at == pytest.approx(first.at + 15.0)


def test_no_pause_is_shorter_than_the_bound_that_engines_rely_on() -> None:
    assert whole(draw(replace(CHAT, pause=Fixed(0.5)))[0])[1].at - draw(CHAT)[0].at == pytest.approx(1.0 + CHAT.think)


def test_sessions_share_exactly_the_system_prompt() -> None:
    a, b = draw(CHAT)[:2]
    assert common(a, b) == 32 // BLOCK
    assert a.session != b.session


def test_what_a_session_asks_does_not_depend_on_when_it_is_answered() -> None:
    varied = replace(CHAT, question=LogNormal(30, 20), output=LogNormal(30, 20), pause=LogNormal(9, 5))
    quick, slow = ([whole(a, answer_s) for a in draw(varied)] for answer_s in (0.1, 7.0))
    for a, b in zip(quick, slow, strict=True):
        both = list(zip(a, b, strict=False))
        assert [x.prompt_tokens for x, _ in both] == [y.prompt_tokens for _, y in both]
        assert all(np.array_equal(x.block_hashes, y.block_hashes) for x, y in both)


def test_the_same_seed_gives_the_same_sessions_and_another_rate_the_same_scripts() -> None:
    varied = replace(CHAT, context=LogNormal(100, 80))
    assert [a.at for a in draw(varied)] == [a.at for a in draw(varied)]
    ones, twos = draw(varied, rate=1.0), draw(varied, rate=2.0)
    assert [a.prompt_tokens for a in ones] == [a.prompt_tokens for a in twos[: len(ones)]]


def test_nothing_is_asked_after_the_end_or_beyond_the_limits() -> None:
    first = draw(replace(CHAT, seconds=100.0))[0]
    assert len(whole(first, answer_s=99.0)) == 1
    assert len(whole(draw(replace(CHAT, max_prompt=130))[0])) == 2
    assert sum(len(whole(a)) for a in draw(CHAT, limit=7)) == 7


# --- documents ---

DOCUMENTS = Documents(
    documents=4, document_tokens=64, questions=2, question_tokens=8, output_tokens=8, users=3, requests=20
)


def serve(workload: Documents, rate: float = 1.0) -> list[Arrival]:
    """All requests of a closed loop, each answered in a second."""
    waiting, served = draw(workload, rate), []
    while waiting:
        waiting.sort(key=lambda arrival: arrival.at)
        served.append(waiting.pop(0))
        assert served[-1].then is not None
        following = served[-1].then(served[-1].at + 1.0)
        waiting += [] if following is None else [following]
    return served


def test_a_closed_loop_has_as_many_requests_in_flight_as_users() -> None:
    assert len(draw(DOCUMENTS)) == 3
    assert len(draw(DOCUMENTS, rate=2.0)) == 6
    assert len(serve(DOCUMENTS)) == 20


def test_questions_of_a_visit_build_on_the_answers_about_one_document() -> None:
    served = serve(replace(DOCUMENTS, users=1))
    assert [request.prompt_tokens for request in served[:4]] == [72, 88, 72, 88]
    assert common(served[0], served[1]) == 72 // BLOCK
    assert common(served[1], served[2]) == 0
    assert common(served[0], served[8]) == 64 // BLOCK  # the round begins again


# --- adapters ---


def test_adapters_are_asked_for_by_their_weights_and_share_no_prompt() -> None:
    arrivals = draw(Adapters(weights=(3, 1), system_tokens=32, question_tokens=16, seconds=2000.0))
    first = [a for a in arrivals if a.lora == "adapter-0"]
    other = next(a for a in arrivals if a.lora == "adapter-1")
    assert len(first) / len(arrivals) == pytest.approx(0.75, abs=0.05)
    assert common(first[0], first[1]) == 2
    assert common(first[0], other) == 0


# --- traces ---


@dataclass(frozen=True)
class Line:
    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] | None = None


def test_a_trace_is_replayed_at_its_rate_with_its_prefixes() -> None:
    lines = [Line(0.5, 40, 7, (1, 2, 3)), Line(10.5, 48, 0, (1, 2, 4))]
    a, b = draw(Replay(lines, trace_block_tokens=16), rate=2.0)
    assert (a.at, b.at) == (0.0, 5.0)
    assert (a.prompt_tokens, a.output_tokens, b.output_tokens) == (40, 7, 1)
    assert common(a, b) == 2


@pytest.mark.parametrize("block_tokens", [8, 16, 32])
def test_blocks_of_another_size_keep_what_prompts_share(block_tokens: int) -> None:
    lines = [Line(0.0, 64, 1, (1, 2, 3, 4)), Line(1.0, 64, 1, (1, 2, 5, 6))]
    workload = Replay(lines, trace_block_tokens=16)
    a, b = workload.arrivals(1.0, block_tokens, np.random.default_rng(0))
    assert len(a.block_hashes) == 64 // block_tokens
    assert common(a, b) == 32 // block_tokens


def test_time_stamps_on_the_three_second_grid_are_spread_in_the_order_of_the_file() -> None:
    lines = [Line(3.0 * (n // 10), 10 + n, 1) for n in range(40)]
    arrivals = draw(Replay(lines))
    assert [a.prompt_tokens for a in arrivals] == list(range(10, 50))
    assert len({a.at for a in arrivals}) == 40


def test_a_trace_without_blocks_shares_nothing() -> None:
    a, b = draw(Replay([Line(0.0, 64, 1), Line(1.0, 64, 1)]))
    assert common(a, b) == 0
    assert len(a.block_hashes) == 4
