"""The access log as an independent implementation of the same protobuf API writes it (`envoy-data-plane`)."""

import datetime
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.errors import WireError
from picker.types import FailureReason, Usage
from picker.wire.als import Counted, Ended, decode

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of pydantic, for how the package declares validators
    from envoy_data_plane.envoy.config.core import v3 as core
    from envoy_data_plane.envoy.data.accesslog import v3 as data
    from envoy_data_plane.envoy.service.accesslog import v3
    from envoy_data_plane.google.protobuf import Struct, Value

HEADER = "x-picker-request-id"


def message(*entries: data.HttpAccessLogEntry) -> bytes:
    logs = v3.StreamAccessLogsMessageHttpAccessLogEntries(log_entry=list(entries))
    return bytes(v3.StreamAccessLogsMessage(http_logs=logs))


def entry(*, mark: str | None = None, request_id: str = "", status: int = 0, **common: Any) -> data.HttpAccessLogEntry:
    headers = {} if mark is None else {HEADER: mark}
    response = data.HttpResponseProperties(response_code=status or None)
    return data.HttpAccessLogEntry(
        common_properties=data.AccessLogCommon(**common),
        request=data.HttpRequestProperties(request_id=request_id, request_headers=headers),
        response=response,
    )


def address(host: str, port: int) -> core.Address:
    return core.Address(socket_address=core.SocketAddress(address=host, port_value=port))


def seconds(value: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=value)


def test_an_entry_tells_who_served_how_long_and_how_it_ended() -> None:
    told = entry(
        mark="7-secret",
        request_id="theirs",
        status=200,
        upstream_remote_address=address("10.0.0.1", 8000),
        time_to_last_upstream_tx_byte=seconds(0.25),
        time_to_first_upstream_rx_byte=seconds(1.5),
        duration=seconds(2.75),
    )
    (ended,) = decode(message(told), HEADER)
    assert ended == Ended("7-secret", "theirs", 200, "10.0.0.1:8000", None, 1.25, 2.75)


def test_what_an_entry_does_not_say_is_absent() -> None:
    assert decode(message(entry()), HEADER) == [Ended(None, "", 0, None, None, None, None)]


def test_what_a_data_plane_has_read_of_an_answer_is_told_with_its_end() -> None:
    counts = Struct(
        {name: Value(number_value=count) for name, count in (("prompt_tokens", 9), ("completion_tokens", 3))}
    )
    metadata = core.Metadata(filter_metadata={"picker.usage": counts})
    (told,) = decode(message(entry(mark="7", status=200, metadata=metadata)), HEADER)
    assert told == Counted("7", "", 200, None, None, None, None, usage=Usage(9, 3))
    elsewhere = core.Metadata(filter_metadata={"envoy.lb": counts})
    assert decode(message(entry(metadata=elsewhere)), HEADER) == [Ended(None, "", 0, None, None, None, None)]


@pytest.mark.parametrize("host", ["fd00::1", "FD00:0:0::1"])
def test_ipv6_addresses_are_in_brackets_and_as_short_as_can_be(host: str) -> None:
    (ended,) = decode(message(entry(upstream_remote_address=address(host, 8000))), HEADER)
    assert ended.upstream == "[fd00::1]:8000"


@pytest.mark.parametrize(
    ("flags", "failure"),
    [
        ({}, None),
        ({"downstream_connection_termination": True}, FailureReason.CLIENT_GONE),
        ({"downstream_remote_reset": True, "upstream_remote_reset": True}, FailureReason.CLIENT_GONE),
        ({"upstream_connection_failure": True}, FailureReason.CONNECT),
        ({"upstream_connection_termination": True}, FailureReason.RESET),
        ({"upstream_request_timeout": True}, FailureReason.TIMEOUT),
        ({"stream_idle_timeout": True}, FailureReason.TIMEOUT),
        ({"no_healthy_upstream": True}, None),
        ({"rate_limited": True}, None),
    ],
)
def test_flags_tell_who_broke_off(flags: dict[str, bool], failure: FailureReason | None) -> None:
    (ended,) = decode(message(entry(status=503, response_flags=data.ResponseFlags(**flags))), HEADER)
    assert (ended.status, ended.failure) == (503, failure)


@pytest.mark.filterwarnings("ignore:AccessLogCommon.intermediate_log_entry is deprecated")
def test_entries_of_requests_that_go_on_are_left_out() -> None:
    # DownstreamStart, UpstreamEnd and DownstreamEnd; versions of the package differ in how they spell them.
    begun = entry(mark="1", access_log_type=data.AccessLogType(4))
    going_on = entry(mark="2", intermediate_log_entry=True)
    attempt = entry(mark="3", access_log_type=data.AccessLogType(9))
    done = entry(mark="4", access_log_type=data.AccessLogType(6))
    assert [ended.mark for ended in decode(message(begun, going_on, attempt, done, entry(mark="5")), HEADER)] == [
        *("4", "5")
    ]


def test_logs_of_other_protocols_tell_nothing() -> None:
    logs = v3.StreamAccessLogsMessageTcpAccessLogEntries(log_entry=[data.TcpAccessLogEntry()])
    assert decode(bytes(v3.StreamAccessLogsMessage(tcp_logs=logs)), HEADER) == []


@given(st.binary(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        assert all(isinstance(ended, Ended) for ended in decode(data, HEADER))
    except WireError:
        pass
