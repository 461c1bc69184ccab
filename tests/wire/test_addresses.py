"""One spelling for every address."""

from __future__ import annotations

import pytest

from picker.sources.static import parse_endpoint
from picker.wire.addresses import plain_address


@pytest.mark.parametrize("written", ["[::1]:8000", "[0:0:0:0:0:0:0:1]:8000", "[0::1]:8000", "[::0001]:8000"])
def test_an_endpoint_is_named_alike_by_those_who_list_it_and_those_who_went_there(written: str) -> None:
    assert parse_endpoint(written).address == plain_address(written) == "[::1]:8000"


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("10.0.0.1:8000", "10.0.0.1:8000"),
        ("10.0.0.1", "10.0.0.1"),
        ("FD00:0::A", "fd00::a"),
        ("[fd00:0:0:0::a]", "fd00::a"),
        ("pod-0.vllm:8000", "pod-0.vllm:8000"),
        ("a:b:c", "a:b:c"),
        ("", ""),
    ],
)
def test_hosts_with_and_without_a_port_and_what_is_no_address(written: str, plain: str) -> None:
    assert plain_address(written) == plain
