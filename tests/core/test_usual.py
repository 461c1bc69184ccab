import numpy as np
import pytest

from fakes import NOW, endpoint, pool, request
from picker.core import filters
from picker.core.pool import Pool
from picker.core.usual import Usual
from picker.types import BoolArray, Endpoint, Rejection, Request, Role


def candidates(of: Pool, asked: Request, now: float = NOW) -> BoolArray:
    found = filters.candidates(of, asked, now)
    assert not isinstance(found, Rejection)
    return found


def noted(of: Pool, asked: Request | None = None) -> Usual:
    """One that has been told what was found."""
    asked = asked or request()
    made = Usual()
    assert made.find(of, asked) is None
    made.note(of, asked, candidates(of, asked), NOW)
    return made


def test_what_was_found_for_a_plain_request_is_found_again() -> None:
    made = pool(a=0, b=0)
    found = noted(made).find(made, request(2))
    assert found is not None
    assert found[0].nonzero()[0].tolist() == found[1].tolist() == [0, 1]


def test_another_model_or_role_is_another_question() -> None:
    made = pool(a=0, b=0)
    usual = noted(made, request(model="one"))
    assert usual.find(made, request(model="one")) is not None
    assert usual.find(made, request(model="two")) is None
    assert usual.find(made, request(model="one", role=Role.PREFILL)) is None


def test_nothing_is_remembered_of_wishes_of_one_request() -> None:
    made = pool(a=0, b=0)
    for special in (request(subset=frozenset({"a:8000"})), request(exclude=frozenset({"b"}))):
        usual = noted(made)
        assert usual.find(made, special) is None
        usual.note(made, special, np.array([False]), NOW)
        found = usual.find(made, request())
        assert found is not None
        assert found[1].tolist() == [0, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made.healthy.__setitem__(0, False),
        lambda made: made.draining.__setitem__(0, True),
        lambda made: made.ejected_until.__setitem__(0, NOW + 1.0),
        lambda made: made.add(endpoint("c"), NOW),
        lambda made: made.remove(0),
        lambda made: made.set_models(0, frozenset({"other"})),
        lambda made: made.describe(0, Endpoint("a", "a:8000", role=Role.DECODE)),
        lambda made: [made.add(endpoint(f"more{number}"), NOW) for number in range(100)],
    ],
)
def test_whatever_may_change_the_answer_makes_it_forgotten(change) -> None:  # type: ignore[no-untyped-def]
    made = pool(a=0, b=0)
    usual = noted(made)
    change(made)
    assert usual.find(made, request()) is None


@pytest.mark.parametrize("column", [{"healthy": False}, {"ejected_until": NOW + 1.0}])
def test_nothing_is_remembered_while_somebody_is_ill(column: dict[str, float]) -> None:
    made = pool(a=0, b=column)
    assert noted(made).find(made, request()) is None


def test_an_ill_endpoint_that_has_left_is_no_reason_to_forget() -> None:
    made = pool(a=0, b={"healthy": False})
    made.remove(1)
    assert noted(made).find(made, request()) is not None


def test_an_ejection_that_is_over_stays_over() -> None:
    made = pool(a=0, b={"ejected_until": NOW - 1.0})
    assert noted(made).find(made, request()) is not None
