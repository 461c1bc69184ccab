"""Forms with files: what is found in them, wherever it stands, and that nothing in them is an error."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.types import CallKind
from picker.wire.multipart import fields_of
from picker.wire.openai import parse_call

SOUND = bytes(range(256)) * 2000


def form(fields: dict[str, str], sound: bytes = SOUND) -> bytes:
    """As a real client writes it: fields first, then the file."""
    request = httpx.Request("POST", "http://x", data=fields, files={"file": ("a.wav", sound, "audio/wav")})
    return request.read()


def test_a_transcription_is_routed_by_its_model_and_size() -> None:
    body = form({"model": "whisper", "stream": "true", "language": "en"})
    call = parse_call("/v1/audio/transcriptions", body)
    assert (call.kind, call.model, call.stream, call.prompt) == (CallKind.OTHER, "whisper", True, b"")
    assert call.extra_bytes == len(body) // 160


def test_fields_behind_the_file_are_found_too() -> None:
    file = b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + SOUND
    body = b"--b\r\n" + file + b"\r\n--b\r\ncontent-disposition: form-data; name=model\r\n\r\nm\r\n--b--\r\n"
    assert fields_of(body) == {"model": "m"}


def test_a_file_that_looks_like_a_form_is_none() -> None:
    sound = b'\r\n--c\r\ncontent-disposition: form-data; name="model"\r\n\r\nother\r\n--c--'
    assert fields_of(form({"model": "m"}, sound)) == {"model": "m"}
    assert fields_of(form({}, b"model")) == {}


def test_a_part_with_further_headers_is_read() -> None:
    head = b'Content-Type: text/plain\r\nContent-Disposition: form-data; name="model"\r\n\r\nm'
    assert fields_of(b"--b\r\n" + head + b"\r\n--b--\r\n") == {"model": "m"}


@pytest.mark.parametrize("body", [b"", b"--", b"{}", b"\r\n", b"x\r\n--x", b"-" * 200 + b"\r\n", b"\x00\xff not json"])
def test_what_is_no_form_is_none(body: bytes) -> None:
    assert fields_of(body) is None
    assert parse_call("/v1/audio/transcriptions", body).extra_bytes == 0


@given(st.binary(max_size=200), st.integers(0, 400))
def test_no_bytes_whatsoever_raise(noise: bytes, cut: int) -> None:
    fields_of(noise)
    fields_of(b"--" + noise)
    parse_call("/v1/audio/transcriptions", form({"model": "m"}, noise)[:cut] + noise)
