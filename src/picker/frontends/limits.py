"""What a server asks of those who connect to it: how large a request's head may be, how long things may take.

A `Door` is shared by the connections of one server and may be changed while it serves; what is open keeps to what it
reads next. Knows nothing of keys, bodies and endpoints.
"""

from __future__ import annotations

import resource
import ssl
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

RawHeaders = Sequence[tuple[bytes, bytes]]

_SPARE_FILES = 256  # for listeners, logs, scrapes and what else is no client's connection


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """max_connections: at once; None: as many as the process may have files for. max_head_bytes: of a request's head.

    max_target_bytes: of its path and query. max_headers: fields. head_timeout: seconds from a head's first byte to its
    last. idle_timeout: seconds without a request until a connection is closed, which is longer than the pools of common
    clients keep one (httpx 5, aiohttp 15, Go 90): the side that sends requests should be the one that closes, else a
    request meets the closing.
    """

    max_connections: int | None = None
    max_head_bytes: int = 64 * 1024  # as h11 has it
    max_target_bytes: int = 8 * 1024  # RFC 9112 section 3 wants 8,000 at least
    max_headers: int = 100
    head_timeout: float = 30.0
    idle_timeout: float = 120.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that ends a connection. reason: for the metric's label."""

    status: int
    message: str
    reason: str


NOT_HTTP = Refusal(400, "This is not a well-formed HTTP/1.1 request.", "malformed")
TWO_LENGTHS = Refusal(400, "Say how long the body is once: content-length or transfer-encoding.", "framing")
NO_HOST = Refusal(400, "An HTTP/1.1 request has one host field.", "host")
OTHER_CODING = Refusal(501, "Of transfer codings this gateway knows `chunked` alone.", "coding")
OTHER_VERSION = Refusal(505, "This gateway speaks HTTP/1.1 and HTTP/1.0.", "version")
NO_TUNNEL = Refusal(501, "This gateway makes no tunnels, sends no echo and knows the methods of HTTP alone.", "method")
LONG_HEAD = Refusal(431, "The request head is too large.", "head")
MANY_HEADERS = Refusal(431, "The request has too many header fields.", "headers")
LONG_TARGET = Refusal(414, "The request's path and query are too long.", "target")
SLOW_HEAD = Refusal(408, "The request head took too long to arrive.", "slow-head")
CROWDED = Refusal(503, "The gateway has as many connections as it can take.", "connections")

# The parser knows them, the latter as those of RTSP, ICE and HTTP/2.
_NOT_FOR_US = frozenset(
    b"CONNECT TRACE PRI SOURCE DESCRIBE ANNOUNCE SETUP PLAY PAUSE TEARDOWN GET_PARAMETER SET_PARAMETER REDIRECT RECORD"
    b" FLUSH".split()
)
_VERSIONS = frozenset(("1.1", "1.0"))


@dataclass(slots=True)
class Door:
    """limits: may be replaced at any time. tls: None for plain text. refused: connections ended here, by reason."""

    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    tls: ssl.SSLContext | None = None
    refused: Counter[str] = field(default_factory=Counter)
    open: int = 0

    @property
    def most(self) -> int:
        """Connections at once; half of the files, as each may need another one to an endpoint."""
        if self.limits.max_connections is not None:
            return self.limits.max_connections
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return max(16, (soft - _SPARE_FILES) // 2)

    def judge(self, method: bytes, version: str, target: bytes, headers: RawHeaders) -> Refusal | None:
        """Why a request whose head the parser took is not taken all the same, or None.

        Here are the rules that the parser does not have or that are ours: what another server on the way might read
        in another way than we do is refused, not repaired (RFC 9112 sections 3.2, 6.1, 6.3).
        """
        if len(headers) > self.limits.max_headers:
            return MANY_HEADERS
        if len(target) > self.limits.max_target_bytes:
            return LONG_TARGET
        if version not in _VERSIONS:
            return OTHER_VERSION
        if method in _NOT_FOR_US:
            return NO_TUNNEL
        names = [name for name, _ in headers]
        if names.count(b"host") != 1 and (version == "1.1" or b"host" in names):
            return NO_HOST
        return _framing(names, version, headers) if b"transfer-encoding" in names else None

    def weigh(self, target: bytes, headers: RawHeaders) -> Refusal | None:
        """`LONG_HEAD`, if it is."""
        size = len(target) + sum(len(name) + len(value) + 4 for name, value in headers)
        return LONG_HEAD if size > self.limits.max_head_bytes else None


def _framing(names: Sequence[bytes], version: str, headers: RawHeaders) -> Refusal | None:
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if len(codings) > 1 or codings[0].strip(b" \t").lower() != b"chunked":
        return OTHER_CODING
    return TWO_LENGTHS if b"content-length" in names or version == "1.0" else None


def allow_many_files() -> int:
    """Raise the number of files that this process may have open as far as it may by itself; returns the number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class DoorMetrics(Collector):
    """How many connections there are, and how many were ended for what."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("picker_connections", "Connections of clients.", value=self._door.open)
        refused = CounterMetricFamily(
            "picker_refused_connections", "Connections that were ended for what came on them.", labels=["reason"]
        )
        for reason, count in self._door.refused.items():
            refused.add_metric([reason], count)
        yield refused
