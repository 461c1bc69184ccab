from __future__ import annotations

import math

import pytest

from picker.sim.compare import Interval
from picker.sim.report import words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.inf, "∞"),
        (0.0, "0"),
        (0.0123456, "0.0123"),
        (1.0, "1.00"),
        (45.678, "45.7"),
        (8401.2, "8,401"),
        (-0.5, "-0.500"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert words.number(value) == text


def test_a_ratio_has_bounds_when_there_are_seeds_to_tell() -> None:
    assert words.ratio(Interval(0.5, 0.4, 0.6)) == "0.500 [0.400, 0.600]"
    assert words.ratio(Interval(0.5, 0.5, 0.5)) == "0.500"
    assert words.ratio(Interval(math.inf, math.inf, math.inf)) == "∞"
    assert words.ratio(None) == "–"


def test_seeds_in_a_row_are_a_range() -> None:
    assert words.seeds([3, 1, 2, 7, 7]) == "1-3, 7"
    assert words.seeds([]) == ""
