from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.kv_story import play


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=50, max_size=2000))
def test_whatever_an_engine_sends_harms_nobody(data: bytes) -> None:
    play(data)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([b"\x00\x05", b"\x00\x06\x01\x03", bytes(range(40)), b"\x01\xff"]), max_size=200))
def test_whatever_an_engine_repeats_harms_nobody(parts: list[bytes]) -> None:
    play(b"".join(parts))
