from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from picker.errors import ConfigError
from picker.load.scenario import level, planned
from picker.load.text import Piece, render
from picker.load.workload import Planned
from picker.sim.cluster import Arrival
from picker.sim.scenario import Scenario, scenario
from picker.sim.sessions import Documents
from picker.sim.trial import Trial


def short(name: str) -> Scenario:
    return scenario(name, short=True)


def arrivals(chosen: Scenario, seed: int) -> list[Arrival]:
    """What `picker simulate` asks first in each session."""
    return list(Trial(chosen, "any", level(chosen).rate, seed=seed).arrivals())


def pieces(conversation: Planned) -> Iterator[Piece]:
    return (piece for piece in conversation.turns[0].text if isinstance(piece, Piece))


@pytest.mark.parametrize("name", ["S1", "S2", "S3", "S6"])
def test_the_same_seed_gives_the_arrivals_and_lengths_of_the_simulator(name: str) -> None:
    chosen = short(name)
    plan, _ = planned(level(chosen), seed=7)
    expected = arrivals(chosen, 7)
    assert [each.at for each in plan.conversations] == [arrival.at for arrival in expected]
    firsts = [(sum(piece.tokens for piece in pieces(each)), each.turns[0].max_tokens) for each in plan.conversations]
    assert firsts == [(arrival.prompt_tokens, arrival.output_tokens) for arrival in expected]
    assert planned(level(chosen), seed=8)[0] != plan


def test_prompts_share_as_many_blocks_as_in_the_simulator() -> None:
    chosen = short("S1")
    size = chosen.pods.block_tokens
    plan, _ = planned(level(chosen), seed=1)
    sample = list(zip(plan.conversations, arrivals(chosen, 1), strict=True))[:12]
    for (a, first), (b, second) in itertools.combinations(sample, 2):
        texts = [render(each.turns[0].text) for each in (a, b)]
        shared = int(np.argmin([*np.equal(*(each.block_hashes[:100] for each in (first, second))), False]))
        same = next((i for i, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1]), len(texts[0]))
        assert same // (4 * size) == shared


def test_turns_have_the_questions_answers_and_pauses_of_the_session() -> None:
    chosen = short("S2")
    plan, pace = planned(level(chosen), seed=3)
    first = next(each for each in arrivals(chosen, 3) if each.then is not None and each.then(each.at) is not None)
    conversation = next(each for each in plan.conversations if each.at == first.at)
    assert first.then is not None
    second = first.then(first.at)
    assert second is not None
    turn = conversation.turns[1]
    question = second.prompt_tokens - first.prompt_tokens - first.output_tokens
    assert (sum(piece.tokens for piece in turn.text), turn.max_tokens) == (question, second.output_tokens)
    assert turn.think == pytest.approx(second.at - first.at)
    assert pace.until == 60.0
    assert pace.warmup == pytest.approx(0.2 * 60.0)


def test_a_closed_scenario_keeps_its_users_and_the_order_of_its_documents() -> None:
    chosen = short("S9")
    assert isinstance(chosen.workload, Documents)
    plan, pace = planned(level(chosen), seed=1)
    starts = [arrival.at for arrival in arrivals(chosen, 1)]
    assert (pace.closed, list(pace.starts)) == (len(starts), starts)
    assert plan.requests == chosen.workload.requests
    assert {len(each.turns) for each in plan.conversations} == {chosen.workload.questions}
    # The simulator's first users take the first conversations.
    firsts = [arrival.block_hashes[0] for arrival in arrivals(chosen, 1)]
    documents = [next(pieces(each)).key for each in plan.conversations[: len(firsts)]]
    assert len(set(documents)) == len({int(each) for each in firsts})
    assert pace.warmup_share == chosen.warmup


def test_adapters_are_asked_for_by_their_names() -> None:
    chosen = short("S6")
    plan, _ = planned(level(chosen), seed=1)
    assert [each.model for each in plan.conversations] == [arrival.lora for arrival in arrivals(chosen, 1)]


def test_a_ladder_has_windows_and_a_level_has_none() -> None:
    chosen = short("S1")
    assert planned(level(chosen), seed=1)[0].stages[0] == (0.0, 10.0, 2.0)
    assert planned(level(chosen, load=0.5), seed=1)[0].stages == ()


def test_loads_are_shares_of_the_stable_rate() -> None:
    chosen = scenario("S3")
    assert chosen.stable_rate is not None
    assert level(chosen, load=0.5).rate == pytest.approx(0.5 * chosen.stable_rate)
    assert level(chosen).load == chosen.load
    assert level(chosen.with_pods(count=2), load=0.5).rate == pytest.approx(0.5 * chosen.stable_rate / 4)
    assert level(chosen, rate_scale=2.0).rate == pytest.approx(2.0 * chosen.rate)
    with pytest.raises(ConfigError, match="both say how much"):
        level(chosen, load=0.5, rate_scale=2.0)


def test_a_limit_counts_later_turns() -> None:
    plan, _ = planned(level(short("S2")), seed=1, limit=7)
    assert plan.requests == 7
