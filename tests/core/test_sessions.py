from picker.core.pool import Pool
from picker.core.sessions import Sessions
from picker.types import Endpoint


def pool_of(*names: str) -> Pool:
    pool = Pool()
    for name in names:
        pool.add(Endpoint(name, f"{name}:8000", frozenset()), 0.0)
    return pool


def test_a_session_is_where_it_was_last() -> None:
    pool = pool_of("a", "b")
    sessions = Sessions(pool, 10)
    sessions.note("s", 0)
    sessions.note("s", 1)
    assert sessions.row("s") == pool.row("b")


def test_who_names_no_session_has_none() -> None:
    sessions = Sessions(pool_of("a"), 10)
    sessions.note(None, 0)
    sessions.note("", 0)
    assert (sessions.row(None), sessions.row(""), sessions.row("unheard of")) == (None, None, None)


def test_the_one_that_was_longest_silent_is_forgotten() -> None:
    sessions = Sessions(pool_of("a"), 2)
    for name in ("one", "two", "one", "three"):
        sessions.note(name, 0)
    assert [sessions.row(name) for name in ("one", "two", "three")] == [0, None, 0]


def test_a_session_whose_endpoint_is_gone_is_nowhere_and_is_not_at_who_took_the_row() -> None:
    pool = pool_of("a")
    sessions = Sessions(pool, 10)
    sessions.note("s", 0)
    pool.remove(0)
    assert sessions.row("s") is None
    assert pool.add(Endpoint("b", "b:8000", frozenset()), 0.0) == 0
    assert sessions.row("s") is None
