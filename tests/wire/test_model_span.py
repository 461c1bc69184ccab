"""The model's name in a body, replaced: whatever JSON there is around it stays byte for byte."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.wire.model_span import model_edit
from picker.wire.multipart import fields_of

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "x", '"model":']), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ('"model"', '"mod\\u0065l"', '"\\u006dodel"')
BLANKS = st.sampled_from(["", " ", "\n\t ", "\r\n"])


@st.composite
def objects(draw: st.DrawFn) -> tuple[bytes, tuple[str, int]]:
    """An object's text with the member `model`, and (what comes before its value, its value's length)."""
    text = draw(st.booleans())
    value = json.dumps(draw(NAMES), ensure_ascii=draw(st.booleans())) if text else "null"
    members = [
        (json.dumps(key), json.dumps(draw(VALUES), ensure_ascii=draw(st.booleans())))
        for key in draw(st.lists(st.sampled_from(["messages", "model2", "x", '"model"', "\\"]), max_size=4))
    ]
    at = draw(st.integers(0, len(members)))
    members.insert(at, (draw(st.sampled_from(KEYS)), value))
    written, begin = draw(BLANKS) + "{", ("", 0)
    for number, (key, each) in enumerate(members):
        written += ("," if number else "") + draw(BLANKS) + key + draw(BLANKS) + ":" + draw(BLANKS)
        if number == at:
            begin = (written, len(value.encode()))
        written += each + draw(BLANKS)
    return (written + "}" + draw(BLANKS)).encode(), begin


@given(objects(), NAMES)
def test_the_name_changes_and_not_another_byte(given_object: tuple[bytes, tuple[str, int]], name: str) -> None:
    body, (before, length) = given_object
    edit = model_edit(body, name, insert=False)
    assert edit is not None
    after = edit.applied(body)
    begin = len(before.encode())
    assert after[:begin] == body[:begin]
    assert after[len(after) - (len(body) - begin - length) :] == body[begin + length :]
    assert json.loads(after) == json.loads(body) | {"model": name}
    assert msgspec.json.decode(after) == msgspec.json.decode(body) | {"model": name}


@given(st.dictionaries(st.text(max_size=5).filter("model".__ne__), VALUES, max_size=4), NAMES, BLANKS)
def test_where_no_model_is_named_one_is_put_first_if_it_is_wanted(content: Any, name: str, blank: str) -> None:
    body = (blank + json.dumps(content, indent=1)).encode()
    assert model_edit(body, name, insert=False) is None
    edit = model_edit(body, name, insert=True)
    assert edit is not None
    assert edit.begin == edit.end
    after = edit.applied(body)
    assert json.loads(after) == content | {"model": name}
    assert next(iter(json.loads(after))) == "model"
    assert after.replace(edit.data, b"", 1) == body


def test_of_several_the_last_counts_as_json_readers_have_it() -> None:
    body = b'{"model":"a","messages":[],"model" : "b"}'
    assert json.loads(body)["model"] == "b"
    edit = model_edit(body, "c", insert=False)
    assert edit is not None
    assert edit.applied(body) == b'{"model":"a","messages":[],"model" : "c"}'


def test_a_model_within_something_else_is_not_meant() -> None:
    body = b'{"metadata":{"model":"a"},"tools":[{"model":"b"}],"text":"{\\"model\\":\\"c\\"}"}'
    assert model_edit(body, "x", insert=False) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'"model"', b"{", b'{"model":"a"', b"\xff", b"\xef\xbb\xbf{}"])
def test_what_is_no_object_cannot_be_changed(body: bytes) -> None:
    assert model_edit(body, "x", insert=True) is None


def test_a_long_prompt_on_either_side_stays() -> None:
    text = '\\"model\\":\\"a\\" ' * 20_000
    for body in (f'{{"model":"a","prompt":"{text}"}}', f'{{"prompt":"{text}","model":"a"}}'):
        edit = model_edit(body.encode(), "b", insert=False)
        assert edit is not None
        assert edit.applied(body.encode()) == body.replace('"model":"a"', '"model":"b"').encode()


# --- forms -------------------------------------------------------------------------------------------------

SOUND = bytes(range(256)) * 400


@pytest.mark.parametrize("sound", [b"", b"x" * 100, SOUND, b'\r\n--c\r\nname="model"\r\n\r\nm'])
def test_a_forms_field_changes_and_the_file_does_not(sound: bytes) -> None:
    files = {"file": ("a.wav", sound, "audio/wav")}
    made = httpx.Request("POST", "http://x", data={"model": "whisper", "language": "en"}, files=files)
    body = made.read()
    edit = model_edit(body, "whisper-v2", insert=True)
    assert edit is not None
    assert edit.applied(body) == body.replace(b"\r\n\r\nwhisper\r\n", b"\r\n\r\nwhisper-v2\r\n")


@given(st.integers(0, 70_000))
def test_a_field_behind_a_file_of_any_length_is_changed(size: int) -> None:
    file = b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"s" * size
    body = b"--b\r\n" + file + b"\r\n--b\r\ncontent-disposition: form-data; name=model\r\n\r\nm\r\n--b--\r\n"
    edit = model_edit(body, "other", insert=True)
    assert edit is not None
    after = edit.applied(body)
    assert fields_of(after) == {"model": "other"}
    assert after == body.replace(b"\r\n\r\nm\r\n--b--", b"\r\n\r\nother\r\n--b--")


def test_a_form_that_names_no_model_stays_as_it_is() -> None:
    body = httpx.Request("POST", "http://x", data={"n": "1"}, files={"file": ("a", b"x")}).read()
    assert model_edit(body, "x", insert=True) is None
