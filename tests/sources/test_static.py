from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.errors import ConfigError
from picker.sources.static import StaticSource, join_address, leads_to, parse_endpoint
from picker.types import Endpoint, EndpointAdded, Fact


@pytest.mark.parametrize(
    ("text", "scheme", "address"),
    [
        ("http://10.0.0.1:8000", "http", "10.0.0.1:8000"),
        ("https://10.0.0.1:8000/", "https", "10.0.0.1:8000"),
        ("HTTP://GPU-1.example:8000", "http", "gpu-1.example:8000"),
        ("localhost:8000", "http", "localhost:8000"),
        ("vllm_0.svc.cluster.local.:80", "http", "vllm_0.svc.cluster.local.:80"),
        (" [::1]:8000 ", "http", "[::1]:8000"),
        ("http://[2001:DB8:0:0::7]:08000/", "http", "[2001:db8::7]:8000"),
    ],
)
def test_an_endpoint_is_read_and_named_by_its_address(text: str, scheme: str, address: str) -> None:
    assert parse_endpoint(text) == Endpoint(name=address, address=address, scheme=scheme)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("10.0.0.1", "port is missing"),
        ("http://10.0.0.1", "port is missing"),
        ("http://10.0.0.1:", "port is missing"),
        ("[::1]", "port is missing"),
        ("http://[::1]/", "port is missing"),
        ("::1:8000", "IPv6 address goes in brackets"),
        ("[zz::1]:8000", "'zz::1' is no host name"),
        ("http://:8000", "host or the port is missing"),
        ("http://", "port is missing"),
        ("h:0", "port '0'"),
        ("h:65536", "port '65536'"),
        ("h:" + "9" * 5000, "not a number from 1 to 65535"),
        ("h:http", "port 'http'"),
        ("h:٣", "port"),
        ("http://h:8000/v1", "goes on with '/v1'"),
        ("h:8000?x=1", r"goes on with '\?x=1'"),
        ("grpc://h:8000", "unknown scheme 'grpc'"),
        ("://h:8000", "unknown scheme ''"),
        ("http://user:secret@h:8000", "credentials"),
        ("two words:8000", "'two words' is no host name"),
        ("-h:8000", "'-h' is no host name"),
    ],
)
def test_a_bad_endpoint_is_refused_with_what_is_wrong(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        parse_endpoint(text)


def test_an_error_never_shows_credentials() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_endpoint("http://user:secret@h:8000")
    assert "secret" not in str(refused.value)


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="htps:/[]@.?#0189ab -", max_size=24) | st.text(max_size=24))
def test_what_is_accepted_reads_back_as_itself(text: str) -> None:
    try:
        endpoint = parse_endpoint(text)
    except ConfigError:
        return
    assert parse_endpoint(f"{endpoint.scheme}://{endpoint.address}") == endpoint


def test_host_and_port_apart_need_no_brackets() -> None:
    assert join_address("fe80::1", "8000") == "[fe80::1]:8000"


async def test_static_source_announces_each_endpoint_and_ends() -> None:
    endpoints = [parse_endpoint("a:1"), parse_endpoint("b:2")]
    facts: list[Fact] = []
    await StaticSource(endpoints).run(facts.append)
    assert facts == [EndpointAdded(endpoint) for endpoint in endpoints]


def test_an_endpoint_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="'a:1' is listed 2 times"):
        StaticSource([parse_endpoint("a:1"), parse_endpoint("http://a:1/")])


@pytest.mark.parametrize(
    ("address", "host", "port", "same"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080, True),
        ("localhost:8080", "127.0.0.1", 8080, True),
        ("127.0.0.1:8080", "localhost", 8080, True),
        ("127.0.0.1:8080", "0.0.0.0", 8080, True),
        ("[::1]:8080", "::", 8080, True),
        ("[::1]:8080", "::1", 8080, True),
        ("localhost:8080", "", 8080, True),
        ("10.0.0.9:8080", "10.0.0.9", 8080, True),
        ("127.0.0.1:8000", "127.0.0.1", 8080, False),
        ("127.0.0.2:8080", "127.0.0.1", 8080, False),
        ("10.0.0.9:8080", "0.0.0.0", 8080, False),
        ("gpu-1:8080", "127.0.0.1", 8080, False),
    ],
)
def test_an_endpoint_that_is_who_listens_is_recognised(address: str, host: str, port: int, same: bool) -> None:
    assert leads_to(parse_endpoint(address), host, port) is same
