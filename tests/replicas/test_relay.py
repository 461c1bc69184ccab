"""Whoever gets the gateway's access log: each entry reaches the replica whose request it tells of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import fakes
from fakes import ManualClock
from picker.frontends.als import Feedback
from picker.replicas import words
from picker.replicas.circle import LEASE
from picker.replicas.relay import ended_of, fingerprint, logged
from picker.types import Failed, FailureReason, Finished, ResponseStarted
from picker.wire.als import Ended
from replicas.company import Replica, joined


def ended(mark: str | None, **more: Any) -> Ended:
    known: dict[str, Any] = {"request_id": "", "status": 200, "upstream": None, "failure": None}
    return Ended(mark=mark, **(known | {"first_byte": 0.1, "duration": 1.0} | more))


def gone(request_id: str) -> Ended:
    """Its client left before it was sent on."""
    return ended(None, request_id=request_id, status=0, failure=FailureReason.CLIENT_GONE)


@dataclass
class Lean:
    """A replica in lean mode. facts: that it reported itself."""

    replica: Replica
    feedback: Feedback
    facts: list[object]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def lean(clock: ManualClock) -> Callable[[str], Lean]:
    def made(name: str) -> Lean:
        replica, facts = Replica(name, clock), list[object]()
        fakes.Ear(replica.runtime, facts.append)
        return Lean(replica, replica.lean(), facts)

    return made


@pytest.fixture
def two(lean: Callable[[str], Lean]) -> tuple[Lean, Lean]:
    made = lean("one"), lean("two")
    joined(*(each.replica for each in made))
    return made


def test_an_entry_that_came_to_another_ends_the_request_everywhere(two: tuple[Lean, Lean]) -> None:
    one, other = two
    mark = one.replica.hand_on(one.feedback, 1)
    other.feedback.opened()
    assert other.replica.all_inflight == 1
    other.feedback.hear(ended(mark))
    assert one.facts == [Finished(1, 200)]
    assert other.facts == []
    assert one.replica.all_inflight == other.replica.all_inflight == 0
    assert (len(one.feedback), len(other.replica.scheduler.charges)) == (0, 0)
    assert other.replica.metric("picker_replicas_entries_passed_on_total") == 1
    assert one.replica.metric("picker_replicas_entries_taken_total") == 1


def test_ones_own_entries_are_told_to_nobody(two: tuple[Lean, Lean]) -> None:
    one, other = two
    mark = one.replica.hand_on(one.feedback, 1)
    one.feedback.hear(ended(mark))
    one.feedback.hear(ended(mark))  # a repetition is not somebody else's
    assert one.facts == [Finished(1, 200)]
    assert other.replica.metric("picker_replicas_entries_taken_total") == 0


def test_an_entry_is_told_to_its_owner_alone(lean: Callable[[str], Lean]) -> None:
    one, two, three = lean("one"), lean("two"), lean("three")
    joined(*(each.replica for each in (one, two, three)))
    mark = three.replica.hand_on(three.feedback, 1)
    told, send = list[str](), one.replica.circle.tell_one

    def noted(name: str, data: bytes) -> None:
        told.append(name)
        send(name, data)

    one.replica.circle.tell_one = noted
    one.feedback.hear(ended(mark))
    assert told == ["three"]
    assert three.facts == [Finished(1, 200)]
    assert two.replica.all_inflight == 0


def test_requests_of_the_same_number_are_told_apart_by_their_marks(two: tuple[Lean, Lean]) -> None:
    one, other = two
    mark, _ = one.replica.hand_on(one.feedback, 1), other.replica.hand_on(other.feedback, 1)
    other.feedback.hear(ended(mark))
    assert one.facts == [Finished(1, 200)]
    assert other.facts == []


def test_who_answered_and_what_failed_is_told_along(two: tuple[Lean, Lean]) -> None:
    one, other = two
    marks = [one.replica.hand_on(one.feedback, number) for number in (1, 2)]
    other.feedback.hear(ended(marks[0], upstream="b:8000"))
    other.feedback.hear(ended(marks[1], status=503, failure=FailureReason.CONNECT))
    assert one.facts == [ResponseStarted(1, 200, "b:8000"), Finished(1, 200), Failed(2, FailureReason.CONNECT)]


def test_how_long_requests_really_take_is_learned_by_their_owner(two: tuple[Lean, Lean]) -> None:
    one, other = two
    before = one.feedback._took / one.feedback._expected
    for number in range(1, 20):
        mark = one.replica.hand_on(one.feedback, number)
        other.feedback.hear(ended(mark, duration=20.0))
    assert one.feedback._took / one.feedback._expected > 3 * before
    assert other.feedback._took / other.feedback._expected == before


def test_a_client_that_left_early_is_known_to_whoever_decided(two: tuple[Lean, Lean]) -> None:
    one, other = two
    one.replica.hand_on(one.feedback, 1, "the-clients-id")
    other.feedback.hear(gone("somebody-elses"))
    assert one.facts == []
    other.feedback.hear(gone("the-clients-id"))
    assert one.facts == [Failed(1, FailureReason.CLIENT_GONE)]


@pytest.mark.parametrize("mark", ["", "-", "1", "1-0123456789abcdef", "x-y-z"])
def test_marks_of_nobody_are_counted_and_told_to_nobody(two: tuple[Lean, Lean], mark: str) -> None:
    one, other = two
    one.replica.hand_on(one.feedback, 1)
    other.feedback.hear(ended(mark))
    assert one.facts == []
    assert other.replica.metric("picker_replicas_entries_unclaimed_total") == 1
    assert other.replica.metric("picker_replicas_entries_passed_on_total") == 0


def test_what_did_not_come_through_picker_is_told_to_nobody(two: tuple[Lean, Lean]) -> None:
    _, other = two
    other.feedback.hear(ended(None))
    assert other.replica.metric("picker_replicas_entries_passed_on_total") == 0
    assert other.replica.metric("picker_replicas_entries_unclaimed_total") == 0


def test_a_log_that_is_open_elsewhere_is_waited_for(two: tuple[Lean, Lean], clock: ManualClock) -> None:
    one, other = two
    other.feedback.opened()
    one.replica.hand_on(one.feedback, 1)
    clock.advance(60.0)
    one.feedback.sweep(clock())
    assert one.facts == []
    other.feedback.lost()  # with whatever it had to say
    one.feedback.sweep(clock())
    assert one.facts == [Failed(1, FailureReason.UNHEARD)]


def test_a_log_that_was_open_before_is_known_to_who_comes(lean: Callable[[str], Lean], clock: ManualClock) -> None:
    one, other = lean("one"), lean("two")
    other.feedback.opened()
    joined(one.replica, other.replica)
    one.replica.hand_on(one.feedback, 1)
    clock.advance(60.0)
    one.feedback.sweep(clock())
    assert one.facts == []


def test_without_any_log_requests_end_when_they_should(two: tuple[Lean, Lean], clock: ManualClock) -> None:
    one, _ = two
    one.replica.hand_on(one.feedback, 1)
    clock.advance(6.0)
    one.feedback.sweep(clock())
    assert one.facts == [Failed(1, FailureReason.UNHEARD)]


@pytest.mark.parametrize("how", ["silent", "cut off", "there again"])
def test_what_a_replica_that_breaks_off_had_to_hand_on_is_lost(
    two: tuple[Lean, Lean], clock: ManualClock, how: str
) -> None:
    one, other = two
    other.feedback.opened()
    one.replica.hand_on(one.feedback, 1)
    clock.advance(60.0)
    match how:
        case "silent":
            one.replica.circle.sweep()
        case "cut off":
            one.replica.circle.lost("two")
        case "there again":
            one.replica.circle.greeted("two", other.replica.circle.greeting())
    one.feedback.sweep(clock())
    assert one.facts == [Failed(1, FailureReason.UNHEARD)]


def test_who_was_silent_and_is_heard_again_is_told_and_waited_for_again(
    two: tuple[Lean, Lean], clock: ManualClock
) -> None:
    one, other = two
    clock.advance(LEASE + 0.1)
    one.replica.circle.sweep()
    other.feedback.opened()
    one.replica.circle.hear("two", [other.replica.circle.alive()])
    mark = other.replica.hand_on(other.feedback, 1)
    one.feedback.hear(ended(mark))
    assert other.facts == [Finished(1, 200)]
    one.replica.hand_on(one.feedback, 1)
    clock.advance(60.0)
    one.feedback.sweep(clock())
    assert one.facts == []


def test_who_does_not_know_of_marks_is_told_nothing_of_them(two: tuple[Lean, Lean]) -> None:
    """A replica of the version before, or one in full mode."""
    one, _ = two
    one.replica.circle.greeted("old", words.Greeting(words.VERSION, "old", 256))
    told: list[str] = []
    one.replica.circle.tell_one = lambda name, data: told.append(name)
    one.feedback.hear(gone("somebodys"))
    assert told == ["two"]


def test_secrets_are_not_told() -> None:
    assert fingerprint("a secret") != fingerprint("another")
    assert "secret" not in fingerprint("a secret")


def test_an_entry_is_the_same_in_words() -> None:
    entry = ended("1-x", request_id="r", upstream="a:1", failure=FailureReason.RESET, attempts=2)
    (word,) = words.unbatch(words.batch([words.encode(logged(entry))]))
    assert isinstance(word, words.Logged)
    assert ended_of(word) == entry
