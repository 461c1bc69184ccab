"""What one replica decides and sees, the others know; and what a replica leaves behind is released."""

import pytest

from fakes import ManualClock, blocks
from picker.replicas import words
from picker.replicas.circle import LEASE
from picker.types import EndpointRemoved, Failed, FailureReason, FirstToken, ResponseStarted, Usage
from replicas.company import ENDPOINTS, Replica, joined, taught

PROMPT = blocks(system=40)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def two(clock: ManualClock) -> tuple[Replica, Replica]:
    made = Replica("one", clock), Replica("two", clock)
    joined(*made)
    return made


def test_what_one_books_the_other_has_booked(two: tuple[Replica, Replica]) -> None:
    one, other = two
    where = one.route(1, PROMPT)
    assert other.inflight(where) == 1
    mine, theirs = (each.scheduler.pool for each in two)
    row = mine.row(where)
    for column in ("inflight", "prefilling", "backlog", "work", "context", "pinned"):
        assert getattr(mine, column)[row] == getattr(theirs, column)[row], column


def test_requests_of_the_same_number_are_different_requests(two: tuple[Replica, Replica]) -> None:
    one, other = two
    one.route(1, PROMPT)
    other.route(1, blocks(other=10))
    assert one.all_inflight == other.all_inflight == 2
    one.finish(1)
    assert one.all_inflight == other.all_inflight == 1
    assert len(other.scheduler.charges) == 1


def test_what_one_sent_somewhere_the_other_knows_to_be_cached_there(two: tuple[Replica, Replica]) -> None:
    one, other = two
    where = one.route(1, PROMPT)
    assert other.believes(where, PROMPT) == 40
    one.finish(1)
    assert other.route(2, PROMPT) == where


def test_a_session_is_followed_by_all(two: tuple[Replica, Replica]) -> None:
    one, other = two
    where = one.route(1, session="s")
    session = other.runtime.scheduler.charges.get(-1).request.session  # type: ignore[union-attr]
    row = other.scheduler.sessions.row(session)
    assert row is not None
    assert other.scheduler.pool.endpoint(row).name == where


def test_both_learn_the_same_of_an_answer(two: tuple[Replica, Replica], clock: ManualClock) -> None:
    one, other = two
    for number in range(1, 40):
        one.route(number, blocks(**{f"p{number}": 20}))
        clock.advance(0.5)
        one.runtime.emit(ResponseStarted(number, 200))
        one.runtime.emit(FirstToken(number))
        clock.advance(1.0)
        one.finish(number, Usage(prompt_tokens=1000, completion_tokens=50, cached_tokens=0))
    mine, theirs = one.scheduler.learned, other.scheduler.learned
    assert mine.prefill.costs == theirs.prefill.costs
    assert mine.decode.costs == theirs.decode.costs
    assert mine.output_tokens.value == theirs.output_tokens.value
    assert one.scheduler.bytes_per_token.value == other.scheduler.bytes_per_token.value


def test_a_fault_seen_by_one_keeps_all_away(two: tuple[Replica, Replica]) -> None:
    one, other = two
    where = one.route(1, PROMPT)
    one.runtime.emit(Failed(1, FailureReason.CONNECT))
    row = other.scheduler.pool.row(where)
    assert other.scheduler.pool.failures[row] == 1
    assert other.believes(where, PROMPT) == 0


def test_nothing_of_others_is_counted_as_ones_own_or_told_on(two: tuple[Replica, Replica]) -> None:
    one, other = two
    told: list[bytes] = []
    other.circle.tell = told.append
    one.route(1, PROMPT)
    one.finish(1)
    assert told == []
    assert other.metric("picker_picks_total") is None
    assert other.metric("picker_decision_seconds_count") == 0
    assert other.runtime.telemetry.registry.get_sample_value("picker_requests_ended_total", {"how": "finished"}) == 0


def test_a_prompt_never_leaves(two: tuple[Replica, Replica]) -> None:
    one, _ = two
    told: list[bytes] = []
    one.circle.tell = told.append
    one.route(1, PROMPT)
    assert {field for field in words.Routed.__struct_fields__ if "prompt" in field} == {"prompt_bytes", "prompt_tokens"}
    assert "prompt" not in repr(words.unbatch(words.batch(told))[0])


def test_an_endpoint_that_only_one_knows_harms_nobody(two: tuple[Replica, Replica]) -> None:
    one, other = two
    for name in ENDPOINTS:
        other.runtime.emit(EndpointRemoved(name))
    one.route(1, PROMPT)
    one.finish(1)
    assert len(other.scheduler.charges) == 0


def test_a_replica_that_is_silent_for_its_lease_leaves_nothing_behind(
    two: tuple[Replica, Replica], clock: ManualClock
) -> None:
    one, other = two
    for number in range(1, 6):
        one.route(number, blocks(**{f"p{number}": 20}))
    clock.advance(LEASE * 0.9)
    other.circle.sweep()
    assert other.all_inflight == 5
    clock.advance(LEASE * 0.2)
    other.circle.sweep()
    assert other.all_inflight == 0
    assert other.scheduler.pool.backlog.sum() == other.scheduler.pool.pinned.sum() == 0
    assert other.scheduler.pool.failures.sum() == 0
    assert other.circle.report()["connected"] == 0
    assert other.metric("picker_replicas_lost_total") == 1


def test_a_replica_that_is_heard_keeps_its_lease(two: tuple[Replica, Replica], clock: ManualClock) -> None:
    one, other = two
    one.route(1, PROMPT)
    for _ in range(10):
        clock.advance(LEASE * 0.9)
        other.circle.hear("one", [words.Alive()])
        other.circle.sweep()
    assert other.all_inflight == 1


def test_who_comes_late_is_told_all(two: tuple[Replica, Replica], clock: ManualClock) -> None:
    one, _ = two
    prompts = [blocks(system=10, **{f"user{number}": 5 + number % 7}) for number in range(60)]
    where = [one.route(number, prompt) for number, prompt in enumerate(prompts, 1)]
    for number in range(1, 50):
        one.finish(number)
    late = Replica("late", clock)
    late.circle.greeted("one", one.circle.greeting())
    assert late.circle.wants("one")
    taught(late, one)
    assert late.circle.settled.is_set()
    assert [late.believes(name, prompt) for name, prompt in zip(where, prompts, strict=True)] == [
        prompt.size for prompt in prompts
    ]
    assert late.all_inflight == one.all_inflight == 11
    assert not late.circle.wants("one")


def test_who_comes_late_is_told_what_was_learned(two: tuple[Replica, Replica], clock: ManualClock) -> None:
    one, _ = two
    worked(one, clock)
    late = Replica("late", clock)
    late.circle.greeted("one", one.circle.greeting())
    assert late.circle.wants("one")
    taught(late, one)
    mine, theirs = one.scheduler.learned, late.scheduler.learned
    assert theirs.prefill.count == mine.prefill.count > 0
    assert theirs.output_tokens.value == mine.output_tokens.value
    assert late.scheduler.bytes_per_token.value == one.scheduler.bytes_per_token.value


def test_who_does_not_ask_for_lessons_is_told_none(two: tuple[Replica, Replica], clock: ManualClock) -> None:
    """A replica of the version before understands none."""
    one, _ = two
    worked(one, clock)
    said = list(one.circle.knowledge(words.Wanted()))
    assert said
    assert not any(isinstance(word, words.Taught) for word in said)


def test_lessons_that_nobody_has_asked_for_are_not_heard(two: tuple[Replica, Replica], clock: ManualClock) -> None:
    one, other = two
    for name in ENDPOINTS:
        one.scheduler.learned.prefill_speed.add(one.scheduler.pool.row(name) or 0, expected=9.0, took=1.0)
    other.circle.hear("one", list(one.circle.knowledge(words.Wanted(lessons=True))))
    assert other.scheduler.learned.prefill_speed.sums(0) == (0.0, 0.0)


def worked(replica: Replica, clock: ManualClock) -> None:
    for number in range(1, 60):
        replica.route(number, blocks(**{f"p{number}": 20 + number % 3}))
        clock.advance(0.5)
        replica.runtime.emit(FirstToken(number))
        clock.advance(1.0)
        replica.finish(number, Usage(prompt_tokens=1000, completion_tokens=50, cached_tokens=0))


def test_who_knows_nothing_is_not_asked(clock: ManualClock) -> None:
    late, fresh = Replica("late", clock), Replica("fresh", clock)
    late.circle.greeted("fresh", fresh.circle.greeting())
    assert not late.circle.wants("fresh")


def test_another_is_asked_when_the_first_goes(two: tuple[Replica, Replica], clock: ManualClock) -> None:
    one, other = two
    one.route(1, PROMPT)
    late = Replica("late", clock)
    for each in (one, other):
        late.circle.greeted(each.circle.name, each.circle.greeting())
    assert late.circle.wants("one")
    assert not late.circle.wants("two")
    late.circle.lost("one")
    assert late.circle.wants("two")


def test_what_was_missed_is_asked_for(two: tuple[Replica, Replica], clock: ManualClock) -> None:
    one, other = two
    clock.advance(LEASE * 2)
    other.circle.sweep()
    other.circle.greeted("one", one.circle.greeting())
    assert other.circle.wants("one")


def test_who_is_alone_is_soon_settled(clock: ManualClock) -> None:
    alone = Replica("alone", clock)
    alone.circle.sweep()
    assert not alone.circle.settled.is_set()
    clock.advance(3.0)
    alone.circle.sweep()
    assert alone.circle.settled.is_set()


def test_who_hashes_other_blocks_is_refused(clock: ManualClock) -> None:
    one, other = Replica("one", clock), Replica("other", clock, block_bytes=512)
    with pytest.raises(ValueError, match=r"index\.block_bytes must be the same"):
        one.circle.greeted("other", other.circle.greeting())


def test_what_is_wrong_is_reported(two: tuple[Replica, Replica]) -> None:
    one, _ = two
    one.circle.note("nobody answers")
    assert one.circle.report()["problem"] == "nobody answers"
    assert one.metric("picker_replicas_bus_broken") == 1
    one.circle.note(None)
    assert one.metric("picker_replicas_bus_broken") == 0


def test_retries_are_allowed_by_ones_own_decisions(two: tuple[Replica, Replica]) -> None:
    one, other = two
    for number in range(1, 4):
        one.route(number, blocks(**{f"p{number}": 20}))
    assert (one.scheduler.decided, other.scheduler.decided) == (3, 0)
