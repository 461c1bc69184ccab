"""Requests to the API server: whole answers, lines of watches, and errors in plain words.

Knows HTTP and who we are, not what is asked for. Three clients were looked at first; why none of them is used is in
`docs/decisions/0011-kubernetes-client.md`.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Self

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from picker.sources.kubernetes.credentials import Access
from picker.sources.kubernetes.objects import Status, read_status

MAX_LIST_BYTES = 512 << 20  # ten thousand pods are about 50 MB
MAX_LINE_BYTES = 16 << 20  # etcd keeps no object above 1.5 MB
_READ_SIZE = 1 << 18
_CONNECT_TIMEOUT = 5.0
_SHOWN = 300  # characters of what somebody else said


class ApiError(Exception):
    """The API server, or the way to it, did not do what it was asked to. The message is for people.

    status: of HTTP or of a Status object, None where nobody answered. retry_after: seconds it asked us to wait. silent:
    a watch stayed open and told nothing.
    """

    def __init__(
        self, message: str, *, status: int | None = None, retry_after: float | None = None, silent: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.silent = silent

    @property
    def expired(self) -> bool:
        """The version that was named is forgotten there: only a new list helps."""
        return self.status == 410


def refused(status: Status, code: int, retry_after: float | None = None) -> ApiError:
    """An error as the API server words it."""
    words = status.message or status.reason or f"status {code}"
    return ApiError(f"the API server says: {words[:_SHOWN]}", status=status.code or code, retry_after=retry_after)


class Client:
    """Use as `async with Client(access) as client`.

    timeout: seconds for a whole list. silence: seconds without a byte after which a watch counts as broken; longer than
    the minute that API servers let pass between two bookmarks.
    """

    def __init__(self, access: Access, *, timeout: float = 30.0, silence: float = 75.0) -> None:
        self._access = access
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=_CONNECT_TIMEOUT)
        self._silence = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=silence)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._access.tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "picker", "Accept": "application/json", "Accept-Encoding": "identity"},
            read_bufsize=_READ_SIZE,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None

    async def get(self, path: str, query: Mapping[str, str]) -> bytes:
        """The body of a good answer; raises ApiError."""
        async with self._answer(path, query, self._timeout) as response:
            if (response.content_length or 0) > MAX_LIST_BYTES:
                raise ApiError(f"the API server's answer is larger than {MAX_LIST_BYTES} bytes")
            return await response.read()

    async def review(self, path: str, body: bytes, *, user: Mapping[str, Sequence[str]] | None = None) -> bytes:
        """Have a question answered that is asked as an object, which nobody keeps; raises ApiError.

        user: headers in whose name to ask, for who may impersonate.
        """
        headers = [(name, value) for name, values in (user or {}).items() for value in values]
        async with self._answer(path, {}, self._timeout, method="POST", body=body, headers=headers) as response:
            return await response.read()

    async def write(self, method: str, path: str, body: bytes) -> bytes:
        """The object as it is kept once it was created (POST) or replaced (PUT). Raises ApiError, 409: a conflict."""
        async with self._answer(path, {}, self._timeout, method=method, body=body) as response:
            return await response.read()

    @asynccontextmanager
    async def watch(self, path: str, query: Mapping[str, str]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines of an answer that goes on, entered when it has begun; raises ApiError, also between lines.

        They end when the API server ends them.
        """
        async with self._answer(path, query, self._silence) as response:
            yield _lines(response)

    @asynccontextmanager
    async def _answer(
        self,
        path: str,
        query: Mapping[str, str],
        timeout: aiohttp.ClientTimeout,
        *,
        method: str = "GET",
        body: bytes | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        ask = partial(self._ask, method, path, query, timeout, body, headers)
        try:
            response = await ask(renew=False)
            if response.status == 401:  # a token may have been replaced a moment ago
                response.close()
                response = await ask(renew=True)
            async with response:
                if response.status not in (200, 201):
                    raise refused(read_status(await response.read()), response.status, _retry_after(response))
                yield response
        except aiohttp.SocketTimeoutError:  # between two bytes; on connecting it is another one
            raise ApiError("the API server has gone silent", silent=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ApiError(_words(error)) from None

    async def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        timeout: aiohttp.ClientTimeout,
        body: bytes | None,
        more: Sequence[tuple[str, str]],
        *,
        renew: bool,
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            raise RuntimeError("Client is used outside of its 'async with'")
        token = await self._access.tokens.token(renew=renew)
        headers = CIMultiDict(more)
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        return await self._session.request(
            method,
            URL(self._access.url + path).with_query(dict(query)),
            data=body,
            headers=headers,
            timeout=timeout,
            allow_redirects=False,
            server_hostname=self._access.server_name,
        )


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """An object may be longer than what aiohttp takes for a line."""
    parts: list[bytes] = []
    held = 0
    async for chunk in response.content.iter_any():
        *ended, rest = chunk.split(b"\n")
        for end in ended:
            line = b"".join([*parts, end])
            parts, held = [], 0
            if line:
                yield line
        parts.append(rest)
        held += len(rest)
        if held > MAX_LINE_BYTES:
            raise ApiError(f"a line of the watch is longer than {MAX_LINE_BYTES} bytes")


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else None


def _words(error: Exception) -> str:
    match error:
        case TimeoutError():
            return "the API server does not answer in time"
        case aiohttp.ClientConnectorCertificateError():
            return "the API server's certificate is not signed by the authority that we were given"
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return "no TLS connection to the API server could be made"
        case aiohttp.ClientConnectorError():
            why = error.os_error.strerror or str(error.os_error) or "it breaks connections off"
            return f"the API server cannot be reached: {why}"
        case aiohttp.ClientError():
            return "the API server has broken the connection off"
        case _:
            return f"the API server cannot be asked: {getattr(error, 'strerror', None) or error}"
