from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from picker.errors import ConfigError
from picker.load.workload import Arrivals, Plan, Process, Sessions, SharedPrefix


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("process", list(Process))
def test_every_arrival_process_keeps_its_rate(process: Process) -> None:
    times = Arrivals(rate=5.0, process=process, burstiness=0.5).times(20_000, rng())
    assert np.all(np.diff(times) >= 0)
    assert times[-1] == pytest.approx(20_000 / 5.0, rel=0.05)


def test_constant_arrivals_are_evenly_spaced() -> None:
    assert Arrivals(rate=4.0, process=Process.CONSTANT).times(3, rng()).tolist() == [0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("process", "burstiness", "expected"),
    [(Process.POISSON, 1.0, 1.0), (Process.GAMMA, 0.25, 2.0), (Process.GAMMA, 4.0, 0.5)],
)
def test_spacing_varies_as_much_as_its_process_says(process: Process, burstiness: float, expected: float) -> None:
    gaps = np.diff(Arrivals(rate=1.0, process=process, burstiness=burstiness).times(50_000, rng()))
    assert gaps.std() / gaps.mean() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)])
def test_senseless_arrivals_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ConfigError):
        Arrivals(rate=rate, burstiness=burstiness)


def test_prompts_of_a_group_share_the_system_prompt_and_nothing_else() -> None:
    workload = SharedPrefix(groups=3, prompts=4, system_tokens=100, question_tokens=10, max_tokens=5)
    plan = workload.plan(range(12), rng(), seed=0)
    systems = Counter(conversation.system for conversation in plan.conversations)
    questions = {conversation.turns[0].text for conversation in plan.conversations}
    assert sorted(systems.values()) == [4, 4, 4]
    assert len(questions) == 12
    assert {conversation.system[0].tokens for conversation in plan.conversations} == {100}


def test_a_prompt_recurs_only_after_all_others() -> None:
    plan = SharedPrefix(groups=2, prompts=3).plan(range(15), rng(), seed=0)
    asked = [conversation.turns[0].text for conversation in plan.conversations]
    assert len(set(asked[:6])) == 6
    assert asked[6:12] == asked[:6]
    assert asked[12:] == asked[:3]


def test_a_session_is_a_chain_of_turns_on_one_context() -> None:
    plan = Sessions(turns=6, system_tokens=10, context_tokens=100).plan([0.0, 1.0, 2.0], rng(), seed=0)
    shared = {conversation.system[0] for conversation in plan.conversations}
    own = {conversation.system[1] for conversation in plan.conversations}
    assert (len(shared), len(own)) == (1, 3)
    assert len({turn.text for conversation in plan.conversations for turn in conversation.turns}) == plan.requests


def test_sessions_have_the_lengths_they_are_asked_for() -> None:
    workload = Sessions(turns=4, context_tokens=4000, think=10.0)
    plan = workload.plan([0.0] * 4000, rng(), seed=0)
    contexts = [conversation.system[1].tokens for conversation in plan.conversations]
    thinks = [turn.think for conversation in plan.conversations for turn in conversation.turns]
    turns = [len(conversation.turns) for conversation in plan.conversations]
    assert np.mean(contexts) == pytest.approx(4000, rel=0.05)
    assert np.median(thinks) == pytest.approx(10.0, rel=0.05)
    assert np.mean(turns) == pytest.approx(4, rel=0.1)
    assert (min(turns), max(turns)) == (1, 12)


def test_prompt_tokens_count_what_each_turn_carries_along() -> None:
    plan = Sessions(turns=3, system_tokens=100, context_tokens=0, question_tokens=10).plan([0.0], rng(5), seed=0)
    turns = len(plan.conversations[0].turns)
    assert plan.prompt_tokens == sum(100 + 10 * turn for turn in range(1, turns + 1))


def both(seed: int) -> tuple[Plan, Plan]:
    times = Arrivals(rate=2.0).times(20, rng(seed)).tolist()
    return SharedPrefix().plan(times, rng(seed), seed=seed), Sessions().plan(times, rng(seed), seed=seed)


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    assert both(3) == both(3)
    assert both(3)[0] != both(4)[0]
    assert both(3)[1] != both(4)[1]


def test_a_run_of_some_seconds_has_the_expected_number_of_arrivals() -> None:
    assert Arrivals(rate=2.5).count_within(60) == 150
    assert Arrivals(rate=0.001).count_within(1) == 1
