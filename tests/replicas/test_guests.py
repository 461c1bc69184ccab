"""Other replicas' requests get ids of ours, and every one of them ends."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import NOW, blocks, scheduler
from picker.replicas.guests import Guests
from picker.replicas.words import Broke, Ended, FromReplica, Routed, Standing, Token
from picker.types import Booked, Failed, FailureReason, Finished, FirstToken


def routed(number: int, name: str = "a", *, fresh: bool = True, begun: bool = False) -> Routed:
    hashes = blocks(p=4).tobytes()
    return Routed(number, name, None, hashes, 1024, 0, None, None, True, 256, 256, 0, [], fresh, begun)


def test_an_id_of_theirs_is_one_of_ours_until_it_ends() -> None:
    guests = Guests()
    (booked,) = guests.facts("r", routed(7))
    assert isinstance(booked, Booked)
    assert booked.request.id == -1
    assert guests.facts("r", Token(7)) == [FirstToken(-1)]
    assert guests.facts("r", Ended(7, 200, None)) == [Finished(-1, 200)]
    assert guests.facts("r", Ended(7, 200, None)) == []
    assert len(guests) == 0


def test_a_first_token_that_is_heard_late_releases_and_teaches_nothing_of_how_long_it_took() -> None:
    guests, subject = Guests(), scheduler("a", "b")
    learned: list[int] = []
    for late in (True, False):
        for number in range(1, 60):
            at = NOW + 3.0 * number + 1000.0 * (not late)
            for word, after in ((routed(number), 0.0), (Token(number), 1.0), (Ended(number, 200, None), 2.0)):
                for fact in guests.facts("r", word, late=late):
                    subject.apply(fact, at + after)
                if isinstance(word, Token):
                    assert not subject.pool.prefilling.any()
        learned.append(subject.learned.prefill.count)
    assert learned[0] == 0 < learned[1]


def test_words_about_requests_that_nobody_knows_are_nothing() -> None:
    assert Guests().facts("r", Token(7)) == []


def test_a_request_that_is_routed_again_has_left_its_first_place() -> None:
    guests = Guests()
    guests.facts("r", routed(7, "a"))
    freed, booked = guests.facts("r", routed(7, "b"))
    assert freed == Failed(-1, FailureReason.UNHEARD)
    assert isinstance(booked, Booked)
    assert booked.name == "b"


def test_what_a_replica_does_not_name_any_more_has_ended() -> None:
    guests = Guests()
    for number in (1, 2, 3):
        guests.facts("r", routed(number))
    facts = guests.facts("r", Standing([routed(3), routed(4, fresh=False, begun=True)]))
    assert [type(fact) for fact in facts] == [Failed, Failed, Booked, FirstToken]
    assert guests.open("r") == 2


def test_nothing_is_learned_from_how_long_it_takes_what_was_under_way() -> None:
    (booked,) = Guests().facts("r", routed(1, fresh=False))
    assert isinstance(booked, Booked)
    assert not booked.request.streaming


def test_there_is_a_bound_on_what_is_followed() -> None:
    guests = Guests(most=2)
    for number in range(5):
        guests.facts("r", routed(number))
    assert (len(guests), guests.ignored) == (2, 3)


WORDS = st.one_of(
    st.builds(routed, st.integers(0, 5), st.sampled_from(("a", "b", "gone"))),
    st.builds(Token, st.integers(0, 5)),
    st.builds(Ended, st.integers(0, 5), st.sampled_from((200, 500)), st.none()),
    st.builds(Broke, st.integers(0, 5), st.sampled_from(FailureReason)),
    st.builds(Standing, st.lists(st.builds(routed, st.integers(0, 5)), max_size=3, unique_by=lambda word: word.id)),
)


@given(st.lists(st.tuples(st.sampled_from(("r", "s")), WORDS), max_size=40))
@settings(max_examples=60, deadline=None)
def test_whatever_they_say_nothing_is_left_when_they_are_gone(said: list[tuple[str, FromReplica]]) -> None:
    guests, subject = Guests(), scheduler("a", "b")
    for replica, word in said:
        for fact in guests.facts(replica, word):  # type: ignore[arg-type]
            subject.apply(fact, 1000.0)
        assert len(subject.charges) <= len(guests)
    for replica in ("r", "s"):
        for fact in guests.gone(replica):
            subject.apply(fact, 1000.0)
    pool = subject.pool
    assert len(subject.charges) == 0
    for column in (pool.inflight, pool.prefilling, pool.backlog, pool.work, pool.context, pool.pinned, pool.decoding):
        assert not column.any()
