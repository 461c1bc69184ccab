from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picker.frontends.headers import client_headers, upstream_headers

Raw = list[tuple[bytes, bytes]]


def to_upstream(raw: Raw, *added: tuple[str, str]) -> Raw:
    return upstream_headers(raw, added, client=None, scheme="http")


def test_fields_keep_their_order_and_their_repetitions() -> None:
    raw = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]
    assert to_upstream(raw)[:3] == [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]


def test_fields_named_by_any_connection_field_stay_behind() -> None:
    raw = [(b"x-a", b"1"), (b"connection", b"X-A , close"), (b"connection", b"x-b"), (b"x-b", b"1"), (b"x-c", b"1")]
    assert [name for name, _ in to_upstream(raw)] == [b"x-c", b"x-forwarded-proto"]


def test_what_belongs_to_the_clients_connection_is_not_said_again() -> None:
    raw = [(b"host", b"llm.example"), (b"content-length", b"5"), (b"expect", b"100-continue"), (b"x", b"1")]
    assert [name for name, _ in to_upstream(raw)] == [b"x", b"x-forwarded-proto", b"x-forwarded-host"]


def test_a_client_cannot_drop_what_the_gateway_adds() -> None:
    raw = [(b"connection", b"x-data-parallel-rank, x-forwarded-for")]
    headers = upstream_headers(raw, [("x-data-parallel-rank", "1")], client="10.0.0.7", scheme="http")
    assert (b"x-data-parallel-rank", b"1") in headers
    assert (b"x-forwarded-for", b"10.0.0.7") in headers


def test_a_client_cannot_pin_a_rank_beside_ours() -> None:
    headers = to_upstream([(b"x-data-parallel-rank", b"7")], ("x-data-parallel-rank", "0"))
    assert [value for name, value in headers if name == b"x-data-parallel-rank"] == [b"0"]


@pytest.mark.parametrize(
    ("client", "node"), [("4.4.4.4", b"4.4.4.4"), ("2001:db8::1", b'"[2001:db8::1]"'), (None, b"unknown")]
)
def test_a_forwarded_field_grows_where_there_is_one(client: str | None, node: bytes) -> None:
    raw = [(b"forwarded", b"for=1.1.1.1;host=a"), (b"forwarded", b'for="[::1]"')]
    headers = upstream_headers(raw, (), client=client, scheme="https")
    expected = b'for=1.1.1.1;host=a, for="[::1]", for=' + node + b";proto=https"
    assert [value for name, value in headers if name == b"forwarded"] == [expected]


def test_forwarded_addresses_of_several_fields_are_joined_in_order() -> None:
    raw = [(b"x-forwarded-for", b"1.1.1.1"), (b"x-forwarded-for", b"2.2.2.2, 3.3.3.3")]
    headers = upstream_headers(raw, (), client="4.4.4.4", scheme="https")
    assert headers == [
        (b"x-forwarded-for", b"1.1.1.1, 2.2.2.2, 3.3.3.3, 4.4.4.4"),
        (b"x-forwarded-proto", b"https"),
    ]


def test_what_the_outermost_proxy_said_is_kept_once() -> None:
    raw = [
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-proto", b"http"),
        (b"x-forwarded-host", b"llm"),
        (b"host", b"h"),
    ]
    assert to_upstream(raw) == [(b"x-forwarded-proto", b"https"), (b"x-forwarded-host", b"llm")]


@given(st.binary())
def test_the_bytes_of_a_value_survive_whatever_their_encoding(value: bytes) -> None:
    assert to_upstream([(b"x", value)])[0] == (b"x", value)


def test_a_length_beside_a_transfer_coding_is_dropped() -> None:
    raw = [(b"content-length", b"5"), (b"transfer-encoding", b"chunked"), (b"content-type", b"t")]
    assert client_headers(raw, (), status=200) == [(b"content-type", b"t")]


def test_fields_named_by_the_endpoints_connection_field_stay_behind() -> None:
    raw = [(b"connection", b"close, X-Hop"), (b"x-hop", b"1"), (b"x-end", b"1")]
    assert client_headers(raw, (), status=200) == [(b"x-end", b"1")]


def test_added_fields_replace_the_endpoints() -> None:
    raw = [(b"x-picker-endpoint", b"forged"), (b"x", b"1")]
    assert client_headers(raw, [("x-picker-endpoint", "a")], status=200) == [(b"x", b"1"), (b"x-picker-endpoint", b"a")]


def test_a_304_does_not_tell_the_length_of_a_body_that_does_not_follow() -> None:
    assert client_headers([(b"content-length", b"9"), (b"etag", b"x")], (), status=304) == [(b"etag", b"x")]
    assert client_headers([(b"content-length", b"9")], (), status=200) == [(b"content-length", b"9")]
