from __future__ import annotations

import numpy as np
import pytest

from load.runs import failed, measured_of, record
from picker.load.windows import Windows


def test_windows_are_round_and_hold_the_last_answer() -> None:
    windows = Windows.over(measured_of(record(1.0), record(98.0)).requests)
    assert windows.width == 5.0
    assert windows.count * windows.width >= 99.1


def test_a_mean_needs_a_known_value() -> None:
    requests = measured_of(record(0.5, 0.2), record(0.6, 0.4), failed(1.5)).requests
    means = Windows(1.0, 3).means(requests.intended, requests.ttft)
    assert means == pytest.approx([0.3, np.nan, np.nan], nan_ok=True)


def test_a_quantile_is_a_nearest_rank() -> None:
    requests = measured_of(*(record(0.5, ttft) for ttft in (0.1, 0.2, 0.3, 0.4))).requests
    assert Windows(1.0, 1).quantiles(requests.intended, requests.ttft, 0.5).tolist() == pytest.approx([0.2])


def test_hits_are_weighted_by_tokens() -> None:
    requests = measured_of(record(0.5), record(0.6, prompt_tokens=300, cached_tokens=300), failed(0.7)).requests
    assert Windows(1.0, 1).hit_ratio(requests).tolist() == pytest.approx([340 / 400])


def test_requests_in_flight_are_counted_by_the_time_that_they_are() -> None:
    # From 0.5 to 1.6, and from 1.0 to 2.1.
    requests = measured_of(record(0.5), record(1.0)).requests
    in_flight = Windows(1.0, 3).in_flight(requests, np.array([True, True]))
    assert in_flight == pytest.approx([0.5, 1.6, 0.1])
    assert Windows(1.0, 3).in_flight(requests, np.array([True, False])) == pytest.approx([0.5, 0.6, 0.0])
