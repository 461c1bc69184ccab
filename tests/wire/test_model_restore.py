"""The model's name in an answer, wherever the answer is cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.wire.model_restore import Restorer, restorable

EVENTS = (
    b'data: {"id":"1","object":"chat.completion.chunk","model":"v2","choices":[{"delta":{"content":"a"}}]}\n\n'
    b'data: {"type":"response.created","response":{"model":"v2","output":[]}}\n\n'
    b'data: {"model": "v2", "choices": [{"delta": {"content": "\\"model\\":\\"v2\\" \\"model\\": \\"v2\\""}}]}\n\n'
    b'data: {"model":"v","x":"model","y":["model"]}\n\n'
    b"data: [DONE]\n\n"
)


def fed(restorer: Restorer, pieces: list[bytes]) -> bytes:
    out = [restorer.feed(piece, end=False) for piece in pieces]
    return b"".join([*out, restorer.feed(b"", end=True)])


def test_every_event_names_the_model_that_was_asked_for_and_text_stays() -> None:
    expected = EVENTS.replace(b'"model":"v2"', b'"model":"chat"').replace(b'{"model": "v2"', b'{"model": "chat"')
    assert fed(Restorer("v2", "chat"), [EVENTS]) == expected
    assert expected.count(b"chat") == 3 + 1  # one is the object's kind


@given(st.lists(st.integers(0, len(EVENTS)), max_size=12))
def test_cuts_at_any_place_change_nothing(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(EVENTS)]
    pieces = [EVENTS[start:end] for start, end in itertools.pairwise(edges)]
    assert fed(Restorer("v2", "chat"), pieces) == fed(Restorer("v2", "chat"), [EVENTS])


def test_byte_by_byte_is_the_same_too() -> None:
    pieces = [EVENTS[at : at + 1] for at in range(len(EVENTS))]
    assert fed(Restorer("v2", "chat"), pieces) == fed(Restorer("v2", "chat"), [EVENTS])


@given(st.text(max_size=10), st.text(max_size=10), st.booleans(), st.integers(0, 60))
def test_any_name_is_found_as_python_and_others_write_it(target: str, asked: str, ascii_only: bool, cut: int) -> None:
    answer = {"id": "x", "model": target, "choices": [target, "model"]}
    written = json.dumps(answer, ensure_ascii=ascii_only, separators=(",", ":")).encode()
    after = fed(Restorer(target, asked), [written[:cut], written[cut:]])
    assert json.loads(after) == answer | {"model": asked}


def test_a_whole_event_waits_for_nothing() -> None:
    restorer = Restorer("v2", "chat")
    for event in EVENTS.split(b"\n\n")[:-1]:
        assert restorer.feed(event + b"\n\n", end=False).endswith(b"\n\n")


def test_no_more_than_a_name_is_held_back() -> None:
    assert Restorer("v2", "chat").feed(b'xxxx "model":"v', end=False) == b"xxxx "


@pytest.mark.parametrize(
    ("headers", "whether"),
    [
        ({"content-type": "application/json"}, True),
        ({"content-type": "text/event-stream; charset=utf-8"}, True),
        ({"content-type": "application/json", "content-encoding": "gzip"}, False),
        ({"content-type": "text/plain"}, False),
        ({"content-type": "audio/mpeg"}, False),
        ({}, False),
    ],
)
def test_only_json_in_clear_text_can_be_changed(headers: dict[str, str], whether: bool) -> None:
    assert restorable(headers) is whether
