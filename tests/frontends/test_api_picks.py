"""Whatever is told, or not told, every pick ends exactly once."""

from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fakes
from fakes import ManualClock
from picker.frontends.api_picks import FullError, Picks
from picker.types import Decision, Fact, Failed, FailureReason, Finished
from picker.wire.api import Ended, FirstOutput, Started


class Gate:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.facts: list[Fact] = []

    def emit(self, fact: Fact) -> None:
        self.facts.append(fact)

    def ends(self) -> Counter[int]:
        return Counter(fact.request_id for fact in self.facts if isinstance(fact, Finished | Failed))


def made(predicted: float = 10.0, most: int = 100) -> tuple[Gate, Picks]:
    gate = Gate()
    return gate, Picks(cast(Any, gate), lambda _: predicted, most=most)


def decision(number: int) -> Decision:
    return Decision(number, fakes.endpoint("a"), (fakes.endpoint("b"),))


def test_there_is_room_for_so_many() -> None:
    _, picks = made(most=1)
    picks.check_room()
    picks.add(decision(1), "", 0.0)
    with pytest.raises(FullError):
        picks.check_room()


def test_a_long_request_is_waited_for_longer() -> None:
    gate, picks = made(predicted=200.0)
    picks.joined("me")
    picks.add(decision(1), "me", gate.clock())
    picks.sweep(gate.clock() + 799.0)
    assert not gate.ends()
    picks.sweep(gate.clock() + 800.0)
    assert gate.facts == [Failed(1, FailureReason.UNHEARD)]


def test_a_pick_made_while_its_reporter_is_away_waits_for_it() -> None:
    gate, picks = made(predicted=0.0)
    picks.joined("me")
    picks.add(decision(1), "me", gate.clock())
    picks.left("me")
    gate.clock.advance(4.0)
    picks.add(decision(2), "me", gate.clock())
    picks.sweep(gate.clock() + 2.0)
    assert gate.facts == [Failed(1, FailureReason.CLIENT_GONE)]
    picks.sweep(gate.clock() + 5.0)
    assert gate.ends() == {1: 1, 2: 1}


def test_one_of_two_streams_that_ends_takes_nothing_along() -> None:
    gate, picks = made()
    picks.joined("me")
    picks.joined("me")
    picks.add(decision(1), "me", gate.clock())
    picks.left("me")
    picks.sweep(gate.clock() + 100.0)
    assert not gate.facts


REPORTERS = st.sampled_from(["x", "y", ""])
STEPS = st.one_of(
    st.tuples(st.just("add"), REPORTERS),
    st.tuples(st.just("join"), REPORTERS),
    st.tuples(st.just("leave"), st.integers(0, 3)),
    st.tuples(
        st.just("tell"),
        st.integers(0, 9),
        st.integers(0, 3),
        st.sampled_from(
            [Started(200, "b"), Started(500, None), FirstOutput(), Ended(), Ended(failure=FailureReason.RESET)]
        ),
    ),
    st.tuples(st.just("wait"), st.floats(0.0, 200.0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_every_pick_ends_once_and_nothing_is_left(steps: list[tuple[Any, ...]]) -> None:
    gate, picks = made()
    ids: list[str] = []
    streams: list[str] = []
    for step in steps:
        match step:
            case "add", reporter:
                ids.append(picks.add(decision(len(ids) + 1), reporter, gate.clock()))
            case "join", reporter:
                streams.append(reporter or picks.nameless())
                picks.joined(streams[-1])
            case "leave", at if at < len(streams):
                picks.left(streams.pop(at))
            case "tell", pick, at, told if pick < len(ids) and at < len(streams):
                picks.hear(ids[pick], told, streams[at])
            case "wait", seconds:
                gate.clock.advance(seconds)
                picks.sweep(gate.clock())
            case _:
                pass
    for stream in streams:
        picks.left(stream)
    picks.sweep(gate.clock() + 1000.0)
    assert gate.ends() == dict.fromkeys(range(1, len(ids) + 1), 1)
    assert len(picks) == 0
    assert not picks._reporters


def test_those_left_at_the_end_are_told() -> None:
    gate, picks = made()
    picks.joined("me")
    picks.add(decision(1), "me", gate.clock())
    picks.close(FailureReason.SHUTDOWN)
    assert gate.facts == [Failed(1, FailureReason.SHUTDOWN)]
