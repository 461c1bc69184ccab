"""Envoy's gRPC access log: what became of requests whose responses were not followed.

Reads the messages of `envoy.service.accesslog.v3`, one entry for each HTTP request that has ended; keeps of an entry
what picker asks for, and nothing that a client has said beside the request's own id.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from picker.errors import WireError
from picker.types import FailureReason, Usage
from picker.wire.addresses import plain_address
from picker.wire.told_usage import NAMESPACE, usage_told

Entry: TypeAlias = accesslog_pb2.HTTPAccessLogEntry
Common: TypeAlias = accesslog_pb2.AccessLogCommon
LogMessage: TypeAlias = als_pb2.StreamAccessLogsMessage

SERVICE = "envoy.service.accesslog.v3.AccessLogService"
REPLY = bytes(als_pb2.StreamAccessLogsResponse().SerializeToString())

# Entries of a request that has ended; before Envoy 1.26 they said nothing of their kind.
_ENDS = frozenset((accesslog_pb2.NotSet, accesslog_pb2.DownstreamEnd))

# First match wins: a client that leaves ends the upstream's stream, too, and not the other way round.
_FAILURES: tuple[tuple[FailureReason, tuple[str, ...]], ...] = (
    (
        FailureReason.CLIENT_GONE,
        ("downstream_connection_termination", "downstream_remote_reset", "downstream_protocol_error"),
    ),
    (FailureReason.CONNECT, ("upstream_connection_failure",)),
    (FailureReason.TIMEOUT, ("upstream_request_timeout", "stream_idle_timeout", "duration_timeout")),
    (
        FailureReason.RESET,
        ("upstream_remote_reset", "upstream_connection_termination", "upstream_protocol_error"),
    ),
)


class Ended(msgspec.Struct, frozen=True, gc=False):
    """How one request ended. mark: what picker sent it on with; None when it came without picker, or left before.

    request_id: of `x-request-id`, "" without one. status: 0 when there was no response. upstream: "ip:port" of the last
    endpoint tried. failure: None for a response that was complete. first_byte: seconds from the last byte sent to the
    endpoint until the first byte of its response, which may be a head that comes long before the first token.
    duration: seconds from the request's beginning to its end. attempts: endpoints tried, None where it is not said.
    """

    mark: str | None
    request_id: str
    status: int
    upstream: str | None
    failure: FailureReason | None
    first_byte: float | None
    duration: float | None
    attempts: int | None = None


class Counted(Ended, frozen=True, gc=False):
    """An entry with the tokens that the engine has counted, of a data plane that reads answers."""

    usage: Usage | None = None


def decode(message: bytes, header: str) -> list[Ended]:
    """What a message says of requests that have ended, in order; header: which holds the mark.

    Raises WireError for bytes that are no message of this service.
    """
    try:
        logs = LogMessage.FromString(message).http_logs.log_entry
    except DecodeError:
        raise WireError("The data plane sent bytes that are no access log.") from None
    return [_ended(entry, header) for entry in logs if _is_end(entry.common_properties)]


def _is_end(common: Common) -> bool:
    return common.access_log_type in _ENDS and not common.intermediate_log_entry


def _ended(entry: Entry, header: str) -> Ended:
    common, request = entry.common_properties, entry.request
    sent, came = common.time_to_last_upstream_tx_byte, common.time_to_first_upstream_rx_byte
    heard = common.HasField("time_to_last_upstream_tx_byte") and common.HasField("time_to_first_upstream_rx_byte")
    ended = Ended(
        mark=request.request_headers.get(header),
        request_id=request.request_id,
        status=entry.response.response_code.value,
        upstream=_address(common),
        failure=_failure(common),
        first_byte=_seconds(came) - _seconds(sent) if heard else None,
        duration=_seconds(common.duration) if common.HasField("duration") else None,
        attempts=common.upstream_request_attempt_count or None,
    )
    metadata = common.metadata.filter_metadata
    if NAMESPACE not in metadata:
        return ended
    return Counted(**msgspec.structs.asdict(ended), usage=usage_told(metadata[NAMESPACE].fields))


def _failure(common: Common) -> FailureReason | None:
    if not common.HasField("response_flags"):
        return None
    raised = {field.name for field, _ in common.response_flags.ListFields()}
    return next((reason for reason, flags in _FAILURES if not raised.isdisjoint(flags)), None)


def _address(common: Common) -> str | None:
    address = common.upstream_remote_address.socket_address
    if not address.address:
        return None
    host = f"[{address.address}]" if ":" in address.address else address.address
    return plain_address(f"{host}:{address.port_value}")


def _seconds(duration: object) -> float:
    return duration.seconds + duration.nanos * 1e-9  # type: ignore[attr-defined, no-any-return]
