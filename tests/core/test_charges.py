from typing import Any

import pytest

from fakes import NOW, endpoint, pool, request
from picker.core.charges import Charge, Charges
from picker.core.pins import NOTHING, Hold
from picker.core.pool import Pool


def charge(
    of: Pool, request_id: int = 1, *, tokens: int = 100, context: int = 300, held: Hold = NOTHING, **changes: Any
) -> Charge:
    return Charge(
        request=request(request_id, **changes),
        row=0,
        generation=int(of.generation[0]),
        tokens=tokens,
        context=context,
        predicted=0,
        work=1000 * tokens,
        booked_at=NOW,
        held=held,
    )


def booked(of: Pool) -> tuple[int, int, int, int]:
    return int(of.inflight[0]), int(of.prefilling[0]), int(of.backlog[0]), int(of.context[0])


def test_booking_counts_a_request_its_prefill_and_its_context() -> None:
    made = pool(a=0)
    charges = Charges(made)
    charges.book(charge(made), expected_s=1.0)
    assert booked(made) == (1, 1, 100, 300)
    assert (len(charges), 1 in charges, 2 in charges) == (1, True, False)


def test_a_first_token_releases_the_prefill_and_only_once() -> None:
    made = pool(a=0)
    charges = Charges(made)
    charges.book(charge(made), expected_s=1.0)
    assert charges.first_token(1, NOW + 2) is charges.get(1)
    assert booked(made) == (1, 0, 0, 300)
    assert made.progress_at[0] == NOW + 2
    assert charges.first_token(1, NOW + 3) is None
    assert (booked(made), made.progress_at[0]) == ((1, 0, 0, 300), NOW + 2)


def test_closing_releases_all_that_is_left_once() -> None:
    made = pool(a=0)
    charges = Charges(made)
    charges.book(charge(made, 1), expected_s=1.0)
    charges.book(charge(made, 2, tokens=7, context=9), expected_s=1.0)
    charges.first_token(1, NOW)
    assert charges.close(1, NOW) is not None
    assert booked(made) == (1, 1, 7, 9)
    assert charges.close(1, NOW) is None
    assert charges.close(2, NOW) is not None
    assert booked(made) == (0, 0, 0, 0)
    assert len(charges) == 0


def test_a_request_that_leaves_before_its_first_token_is_no_sign_of_life() -> None:
    made = pool(a=0)
    charges = Charges(made)
    charges.book(charge(made, 1), expected_s=1.0)
    charges.book(charge(made, 2), expected_s=1.0)
    charges.close(1, NOW)
    assert made.progress_at[0] < NOW
    assert made.busy_since[0] == NOW


def test_nothing_is_released_for_an_endpoint_that_has_left_or_given_its_row_away() -> None:
    made = pool(a=0)
    charges = Charges(made)
    for request_id in (1, 2, 3):
        charges.book(charge(made, request_id), expected_s=1.0)
    made.remove(0)
    left = charges.close(1, NOW)
    assert left is not None
    assert not charges.stands(left)
    assert made.add(endpoint("b"), NOW) == 0
    assert charges.first_token(2, NOW) is None
    closed = charges.close(2, NOW)
    assert closed is not None
    assert not charges.stands(closed)
    charges.book(charge(made, 4), expected_s=1.0)
    charges.close(3, NOW)
    assert booked(made) == (1, 1, 100, 300)


def test_a_request_cannot_be_booked_twice() -> None:
    made = pool(a=0)
    charges = Charges(made)
    charges.book(charge(made), expected_s=1.0)
    with pytest.raises(AssertionError, match="booked twice"):
        charges.book(charge(made), expected_s=1.0)


def test_a_silent_prefill_is_over_when_its_time_is() -> None:
    made = pool(a=0)
    charges = Charges(made)
    charges.book(charge(made, 1, streaming=False), expected_s=2.0)
    charges.book(charge(made, 2, streaming=True), expected_s=1.0)
    charges.expire_silent(NOW + 1.9)
    assert booked(made) == (2, 2, 200, 600)
    charges.expire_silent(NOW + 2)
    assert booked(made) == (2, 1, 100, 600)
    charges.close(1, NOW)
    charges.close(2, NOW)
    charges.expire_silent(NOW + 99)
    assert booked(made) == (0, 0, 0, 0)


def test_the_time_of_a_first_attempt_does_not_end_the_prefill_of_the_second() -> None:
    made = pool(a=0)
    charges = Charges(made)
    charges.book(charge(made, streaming=False), expected_s=1.0)
    charges.close(1, NOW)
    charges.book(charge(made, streaming=False), expected_s=5.0)
    charges.expire_silent(NOW + 4)
    assert booked(made) == (1, 1, 100, 300)
    charges.expire_silent(NOW + 5)
    assert booked(made) == (1, 0, 0, 300)


def test_work_pins_and_decoding_are_released_as_exactly_as_they_are_booked() -> None:
    made = pool(a=0)
    charges = Charges(made)

    def columns() -> list[int]:
        return [int(column[0]) for column in (made.work, made.pinned, made.decoding)]

    charges.book(charge(made, 1, held=Hold((11, 12), (4, 5), 50.0, 300.0)), expected_s=1.0)
    charges.book(charge(made, 2, tokens=7, context=209, held=Hold((11,), (4,), 50.0, 209.0)), expected_s=1.0)
    assert columns() == [107_000, 309, 0]
    charges.first_token(1, NOW)
    assert columns() == [7_000, 309, 300]
    charges.close(1, NOW)
    assert columns() == [7_000, 209, 0]
    charges.close(2, NOW)
    assert columns() == [0, 0, 0]
    assert len(charges.pins) == 0


def test_what_an_endpoint_that_left_held_is_not_given_back_to_who_has_its_row() -> None:
    made = pool(a=0)
    charges = Charges(made)
    both = Hold((11, 12), (4, 5), 50.0, 300.0)
    charges.book(charge(made, 1, held=both), expected_s=1.0)
    made.remove(0)
    charges.pins.clear(0)
    made.add(endpoint("b"), NOW)
    charges.book(charge(made, 2, held=both), expected_s=1.0)
    charges.close(1, NOW)
    assert (made.pinned[0], len(charges.pins)) == (300, 2)
    charges.close(2, NOW)
    assert (made.pinned[0], len(charges.pins)) == (0, 0)


def test_a_charge_keeps_when_its_first_token_came_and_the_integrals_of_its_row_then() -> None:
    made = pool(a=0)
    charges = Charges(made)
    for request_id in (1, 2):
        charges.book(charge(made, request_id), expected_s=1.0)
    charges.first_token(1, NOW + 1)
    second = charges.first_token(2, NOW + 3)
    assert second is not None
    assert second.first_at == NOW + 3
    assert second.areas == pytest.approx((2.0, 600.0, 200e-6))
