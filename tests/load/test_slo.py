from __future__ import annotations

import pytest

from load.runs import failed, measured_of, record
from picker.errors import ConfigError
from picker.load.slo import Goodput, Knee, Slo, goodput, knee


def test_objectives_are_read_in_seconds_and_milliseconds() -> None:
    assert Slo.parse("ttft=0.5, tpot=50ms,e2e=10s") == Slo(0.5, 0.05, 10.0)
    assert Slo.parse("e2e=.5") == Slo(e2e=0.5)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=", "ttft=0", "ttft=-1", "itl=3", "ttft=1h", "ttft=1,tpot=x"])
def test_what_is_no_objective_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        Slo.parse(text)


def test_good_answers_meet_every_objective_and_failures_none() -> None:
    requests = measured_of(record(1.0, 0.1), record(2.0, 0.6), failed(3.0), record(4.0, 0.1)).requests
    found = goodput(requests, Slo(ttft=0.5, e2e=1.5), duration=2.0)
    assert found == Goodput(1.0, 11.0, 0.5, {"ttft": 0.5, "e2e": 0.5})


def test_an_answer_of_one_token_has_no_time_per_token_to_miss() -> None:
    requests = measured_of(record(1.0, output_tokens=1), record(2.0)).requests
    found = goodput(requests, Slo(tpot=0.05), duration=1.0)
    assert found is not None
    assert found.share == 0.5


def test_nothing_sent_has_no_goodput() -> None:
    assert goodput(measured_of().requests, Slo(ttft=1.0), duration=1.0) is None


def test_the_knee_is_where_the_first_rate_misses() -> None:
    assert knee([(8.0, 0.5), (2.0, 1.0), (4.0, 0.95), (16.0, 0.99)]) == Knee(4.0, 8.0)
    assert knee([(2.0, 0.9)]) == Knee(None, 2.0)
    assert knee([(2.0, 1.0)]) == Knee(2.0, None)
    assert knee([]) is None
    assert "at 4/s, missed at 8/s" in str(Knee(4.0, 8.0))
