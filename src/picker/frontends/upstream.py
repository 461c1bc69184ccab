"""The proxy's side towards the endpoints: pooled connections, one reply at a time, failures named.

Owns the aiohttp session. Sends bodies as they are and hands replies on as they come: nothing is decoded, followed,
remembered (cookies) or buffered. Decides nothing about retries between endpoints; `Exchange` does.
"""

from __future__ import annotations

import io
import weakref
from contextvars import ContextVar
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from multidict import CIMultiDict
from yarl import URL

from picker.types import Endpoint, FailureReason

# Below the 5 s after which vLLM's server closes an idle connection: a connection that both sides may close at the same
# moment loses requests.
KEEPALIVE_SECONDS = 4.0
_ONE_PIECE_BYTES = 1024 * 1024

_reused: ContextVar[bool] = ContextVar("reused", default=False)


class Reply:
    """One endpoint's response. Read it to its end, or close it: closing aborts the request at the endpoint."""

    __slots__ = ("_content", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._content = response.content
        self.status = response.status
        self.headers = response.headers

    @property
    def raw_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        return self._response.raw_headers

    @property
    def ended(self) -> bool:
        """Everything has been read, and all of it was there."""
        return self._content.at_eof()

    async def read(self) -> bytes | FailureReason:
        """The bytes that have come since the last read, or the next ones; b"" at the end."""
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError):
            return FailureReason.RESET

    def close(self) -> None:
        """Harmless after the end; before it, the connection is closed, which an engine takes as an abort."""
        if not self.ended:
            self._response.close()


class Upstream:
    """Connections to every endpoint, kept alive between requests; no limit on their number, the scheduler has one.

    connect_timeout: seconds for name, TCP and TLS together. Build it inside the loop that uses it; `close` it there.
    """

    def __init__(self, *, connect_timeout: float) -> None:
        # One connector pools by address, and four idle seconds forget an endpoint that is gone.
        self._session = aiohttp.ClientSession(
            connector=_Connector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Says what the client said and no more.
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            auto_decompress=False,
        )

    async def send(
        self, endpoint: Endpoint, method: str, target: str, headers: CIMultiDict[str], body: bytes | None
    ) -> Reply | FailureReason:
        """Send a request and wait for the response head; there is no time limit on that wait.

        target: path and query as the client wrote them. body: None when the request has none.
        A connection that turns out to be closed after it was idle is replaced by another once: no endpoint is to
        blame for a keep-alive that ran out on its side.
        """
        url = URL(f"{endpoint.scheme}://{endpoint.address}{target}", encoded=True)
        again = True
        while True:
            _reused.set(False)
            try:
                response = await self._session.request(
                    method, url, headers=headers, data=_payload(body), allow_redirects=False
                )
                return Reply(response)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                return FailureReason.CONNECT
            except (aiohttp.ClientError, OSError):
                if not (again and _reused.get()):
                    return FailureReason.RESET
                again = False

    async def close(self) -> None:
        await self._session.close()


def _payload(body: bytes | None) -> bytes | io.BytesIO | None:
    # aiohttp writes bytes in one go, and warns above 1 MiB that this holds the loop up; a file it writes in pieces.
    return io.BytesIO(body) if body is not None and len(body) > _ONE_PIECE_BYTES else body


class _Connector(aiohttp.TCPConnector):
    """Notes for each request whether its connection has carried one before."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._seen: weakref.WeakSet[ResponseHandler] = weakref.WeakSet()

    async def connect(self, *args: Any, **options: Any) -> Connection:
        connection = await super().connect(*args, **options)
        protocol = connection.protocol
        assert protocol is not None
        _reused.set(protocol in self._seen)
        self._seen.add(protocol)
        return connection
