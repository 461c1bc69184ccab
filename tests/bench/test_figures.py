"""From repeats to a row."""

import numpy as np
import pytest

from picker.bench.client import Latency
from picker.bench.figures import added, row_figures


def test_a_figure_is_the_median_of_the_repeats_beside_their_extremes() -> None:
    row = row_figures([{"requests_per_s": 10.0}, {"requests_per_s": 30.0}, {"requests_per_s": 11.0}])
    assert row == {"requests_per_s": 11.0, "requests_per_s_min": 10.0, "requests_per_s_max": 30.0}


def test_what_does_not_apply_stays_unknown() -> None:
    assert row_figures([{"rss_mb": None}]) == {"rss_mb": None, "rss_mb_min": None, "rss_mb_max": None}


def test_added_latency_is_the_difference_of_percentiles_in_milliseconds() -> None:
    seconds = np.linspace(0, 1, 101)
    figures = added(Latency(seconds + 0.002, seconds * 2), Latency(seconds, seconds))
    assert figures == {
        "added_p50_ms": pytest.approx(2.0),
        "added_p99_ms": pytest.approx(2.0),
        "added_chunk_p50_ms": pytest.approx(500.0),
        "added_chunk_p99_ms": pytest.approx(990.0),
    }
