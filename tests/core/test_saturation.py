from typing import Any

import pytest

from fakes import NOW, pool, request, view
from picker.core.plugin_filters import build_detector
from picker.core.saturation import Concurrency, Utilization
from picker.errors import ConfigError


@pytest.mark.parametrize(
    ("states", "saturation"),
    [
        # max(waiting / 5, usage / 0.8), then the mean
        ([{"waiting": 5, "kv_usage": 0.4}], 1.0),
        ([{"waiting": 1, "kv_usage": 0.6}], 0.75),
        ([{"waiting": 10, "kv_usage": 0.0}, {"waiting": 0, "kv_usage": 0.4}], (2.0 + 0.5) / 2),
        ([{"waiting": 0, "kv_usage": 0.0}], 0.0),
        ([{}], 0.0),
        ([], 1.0),
    ],
)
def test_utilization_is_the_mean_of_the_fuller_of_queue_and_cache(
    states: list[dict[str, float]], saturation: float
) -> None:
    made = pool(**{f"e{number}": state for number, state in enumerate(states)})
    assert Utilization().saturation(view(made)) == pytest.approx(saturation)


def test_what_is_stale_counts_as_saturated_if_age_counts() -> None:
    idle = {"waiting": 0, "kv_usage": 0.0}
    made = pool(fresh={**idle, "observed_at": NOW - 1}, old={**idle, "observed_at": NOW - 3}, never=idle)
    assert Utilization().saturation(view(made)) == 0.0
    assert Utilization(stale_s=2.0).saturation(view(made)) == pytest.approx(2 / 3)
    assert Utilization(stale_s=2.0)(view(made), request()).tolist() == [True, False, False]


@pytest.mark.parametrize(("headroom", "kept"), [(0.0, [True, False, False, False]), (0.25, [True, True, False, True])])
def test_as_a_filter_it_keeps_who_is_below_both_bounds(headroom: float, kept: list[bool]) -> None:
    made = pool(
        a={"waiting": 4, "kv_usage": 0.79},
        b={"waiting": 5, "kv_usage": 0.1},
        c={"waiting": 7, "kv_usage": 0.1},
        d={"waiting": 0, "kv_usage": 0.9},
    )
    assert Utilization(headroom=headroom)(view(made), request()).tolist() == kept


def test_as_a_filter_it_keeps_everybody_rather_than_nobody() -> None:
    made = pool(a={"waiting": 50, "kv_usage": 1.0}, b={"waiting": 60, "kv_usage": 1.0})
    assert Utilization()(view(made), request()).tolist() == [True, True]


@pytest.mark.parametrize(
    ("mode", "saturation", "kept"),
    [
        ("requests", (2 + 12) / 20, [True, False]),
        ("tokens", (900 + 100) / 1000, [False, True]),
        ("hybrid", (900 / 500 + 12 / 10) / 2, [False, False]),
    ],
)
def test_concurrency_is_what_is_in_flight_of_what_may_be(mode: str, saturation: float, kept: list[bool]) -> None:
    made = pool(a={"inflight": 2, "backlog": 900}, b={"inflight": 12, "backlog": 100})
    detector = Concurrency(mode=mode, requests=10, tokens=500)
    assert detector.saturation(view(made)) == pytest.approx(saturation)
    assert detector(view(made), request()).tolist() == kept
    assert detector.saturation(view(pool())) == 1.0


def test_headroom_lets_a_burst_through_the_filter() -> None:
    made = pool(a=10, b=11)
    assert Concurrency(requests=10)(view(made), request()).tolist() == [False, False]
    assert Concurrency(requests=10, headroom=0.1)(view(made), request()).tolist() == [True, False]


@pytest.mark.parametrize(
    ("name", "parameters", "complaint"),
    [
        ("decode-filter", {}, "no saturation detector 'decode-filter'"),
        ("utilization-detector", {"queue_depth": 0}, "queue_depth must be greater than 0"),
        ("utilization-detector", {"kv_usage": 1.5}, "kv_usage must be"),
        ("utilization-detector", {"stale_s": 0}, "stale_s must be"),
        ("utilization-detector", {"headroom": -0.1}, "headroom must not be negative"),
        ("concurrency-detector", {"mode": "x"}, "mode must be one of requests, tokens, hybrid"),
        ("concurrency-detector", {"requests": 0}, "must be greater than 0, got 0"),
        ("concurrency-detector", {"headroom": -1}, "headroom must not be negative"),
        ("concurrency-detector", {"x": 1}, "saturation detector 'concurrency-detector': .*'x'"),
    ],
)
def test_a_detector_that_makes_no_sense_is_refused(name: str, parameters: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build_detector(name, parameters)
