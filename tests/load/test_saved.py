from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from load.runs import failed, measured_of, record
from picker.errors import ConfigError
from picker.load.measured import Requests, Stage
from picker.load.saved import dump, load

RUN = measured_of(
    record(1.0, 0.123456, conversation=3, turn=1, endpoint="b:1"),
    failed(2.0, detail="no room"),
    record(3.0, cached_tokens=None),
    stages=(Stage(0.0, 2.0, 1.5),),
    notes=("ended early",),
    planned=7,
)


def written(folder: Path, text: str) -> Path:
    path = folder / "run.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    again = load(written(tmp_path, dump(RUN)))
    for field in fields(Requests):
        before, after = getattr(RUN.requests, field.name), getattr(again.requests, field.name)
        if isinstance(before, tuple):
            assert after == before
        else:
            np.testing.assert_allclose(after, before, atol=1e-6)
    empty = replace(RUN, requests=again.requests)
    assert again == empty
    assert again.plan == RUN.plan


def test_the_row_of_the_command_stands_at_the_top() -> None:
    payload = json.loads(dump(RUN))
    assert list(payload)[: len(RUN.figures)] == list(RUN.figures)
    assert payload["requests"] == 3


def test_a_request_takes_less_than_a_hundred_bytes() -> None:
    many = measured_of(*(record(float(at), conversation=at) for at in range(1000)))
    assert len(dump(many)) < 100_000


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "is no saved run"),
        ('{"format": "picker-load/9"}', "is no saved run"),
        (dump(RUN).replace('"turn":', '"turns":'), "is damaged"),
        (dump(RUN).replace('"turn":[1,', '"turn":[1,1,'), "is damaged"),
        (dump(RUN).replace('"error":[0,1,0]', '"error":[0,9,0]'), "is damaged"),
    ],
)
def test_a_file_that_is_no_run_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.json: {complaint}"):
        load(written(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: No such file"):
        load(tmp_path / "none.json")
