"""The proxy's side towards the endpoints: pooled connections, one reply at a time, failures named.

Sends bodies as they are and hands replies on as they come: nothing is decoded, followed, remembered (cookies) or
buffered beyond what back-pressure needs. Decides nothing about retries between endpoints; `Exchange` does. Why this is
not a client from a library: docs/decisions/0006-upstream-client.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from picker.frontends.trust import Trust
from picker.frontends.upstream_connection import Reply, UpstreamConnection
from picker.types import Endpoint, FailureReason

# Below the 5 s after which vLLM's server closes an idle connection: a connection that both sides may close at the same
# moment loses requests.
KEEPALIVE_SECONDS = 4.0
_JOINED_BYTES = 16 * 1024  # larger bodies are not copied to go out with their head
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_WITHOUT_LENGTH = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))  # where no body is the rule (RFC 9110 section 8.6)


class Upstream:
    """Connections to every endpoint, kept alive between requests; no limit on their number, the scheduler has one.

    connect_timeout: seconds for name, TCP and TLS together. trust: for TLS.

    Build it inside the loop that uses it; `close` it there.
    """

    def __init__(self, *, connect_timeout: float, trust: Trust | None = None) -> None:
        self.connect_timeout = connect_timeout
        self._trust = trust or Trust()
        self._loop = asyncio.get_running_loop()
        self._open: set[UpstreamConnection] = set()
        self._none_open = asyncio.Event()
        self._idle: dict[tuple[str, str], list[UpstreamConnection]] = {}  # longest idle first
        self._sweeper: asyncio.TimerHandle | None = None

    async def send(
        self,
        endpoint: Endpoint,
        method: str,
        target: bytes,
        headers: Iterable[tuple[bytes, bytes]],
        body: bytes | None,
    ) -> Reply | FailureReason:
        """Send a request and wait for the response head; there is no time limit on that wait.

        target: path and query as the client wrote them. headers: without host and content-length. body: None when the
        request has none. A connection that turns out to be closed after it was idle is replaced by a new one: no
        endpoint is to blame for a keep-alive that ran out on its side.
        """
        head, rest = _request(endpoint, method, target, headers, body)
        connection = self._reusable(endpoint)
        if connection is not None:
            reply = await connection.ask(head, rest, head_only=method == "HEAD")
            if reply is not None:
                return reply
            if not connection.silent:
                return FailureReason.RESET
        connection = await self._connect(endpoint)
        if connection is None:
            return FailureReason.CONNECT
        return await connection.ask(head, rest, head_only=method == "HEAD") or FailureReason.RESET

    async def close(self) -> None:
        """Close all connections, also those in use."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._open):
            connection.abort()
        if self._open:
            self._none_open.clear()
            await self._none_open.wait()

    # connections

    async def _connect(self, endpoint: Endpoint) -> UpstreamConnection | None:
        host, _, port = endpoint.address.rpartition(":")
        place = (endpoint.scheme, endpoint.address)
        try:
            async with asyncio.timeout(self.connect_timeout):
                _, connection = await self._loop.create_connection(
                    lambda: UpstreamConnection(self._loop, self, place),
                    host.strip("[]"),
                    int(port),
                    **self._tls(endpoint),
                )
        except (OSError, UnicodeError):  # TimeoutError is an OSError; a name that cannot be one is a UnicodeError
            return None
        return connection

    def _tls(self, endpoint: Endpoint) -> dict[str, Any]:
        """What a connection needs to know of TLS. Raises OSError where the system's certificates cannot be read."""
        if endpoint.scheme != "https":
            return {}
        return {"ssl": self._trust.context, "server_hostname": self._trust.server_name}

    def _reusable(self, endpoint: Endpoint) -> UpstreamConnection | None:
        """An idle connection, the latest used first: the others may then grow old enough to be closed."""
        idle = self._idle.get((endpoint.scheme, endpoint.address), [])
        while idle:
            connection = idle.pop()
            if connection.open:
                return connection
        return None

    def made(self, connection: UpstreamConnection) -> None:
        self._open.add(connection)

    def lost(self, connection: UpstreamConnection) -> None:
        self._open.discard(connection)
        if not self._open:
            self._none_open.set()

    def rested(self, connection: UpstreamConnection) -> None:
        """Keep a connection for the next request to its place."""
        connection.idle_since = self._loop.time()
        self._idle.setdefault(connection.place, []).append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(KEEPALIVE_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle for too long, and forget places that nobody goes to."""
        self._sweeper = None
        deadline = self._loop.time() - KEEPALIVE_SECONDS
        for place, idle in list(self._idle.items()):
            kept = [connection for connection in idle if connection.open and connection.idle_since > deadline]
            for connection in idle:
                if connection.open and connection.idle_since <= deadline:
                    connection.abort()
            if kept:
                self._idle[place] = kept
            else:
                del self._idle[place]
        oldest = min((idle[0].idle_since for idle in self._idle.values()), default=None)
        if oldest is not None:
            self._sweeper = self._loop.call_at(oldest + KEEPALIVE_SECONDS, self._sweep)


def _request(
    endpoint: Endpoint, method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes | None
) -> tuple[bytes, bytes]:
    """A request's head, with the body behind it when that is small, and what of the body goes out apart."""
    host = endpoint.address.removesuffix(_DEFAULT_PORTS[endpoint.scheme])
    fields = [b": ".join(pair) for pair in headers]
    start = f"{method} ".encode() + target + f" HTTP/1.1\r\nhost: {host}".encode()
    if body is None:
        length = b"\r\n\r\n" if method in _WITHOUT_LENGTH else b"\r\ncontent-length: 0\r\n\r\n"
        return b"\r\n".join((start, *fields)) + length, b""
    head = b"\r\n".join((start, *fields, b"content-length: %d\r\n\r\n" % len(body)))
    return (head, body) if len(body) > _JOINED_BYTES else (head + body, b"")
