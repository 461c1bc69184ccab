"""Questions to engines by POST, for what only they can tell: how they cut a text, what an id of theirs spells."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import aiohttp

from picker.sources.scrape import KEEP_ALIVE, MAX_BODY_BYTES, Manners, plainly
from picker.types import Endpoint, EndpointAdded, EndpointRemoved, Fact


class EnginePost:
    """Asks the endpoints that it was told of. Use as `async with`. timeout: seconds for a whole answer.

    manners: how each is asked, its key and its certificate; may be set until the first question.
    """

    def __init__(self, *, timeout: float = 2.0, manners: Manners = plainly) -> None:
        self.manners = manners
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._headers = {"User-Agent": "picker", "Content-Type": "application/json"}
        self._urls: dict[str, str] = {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None

    def observe(self, fact: Fact) -> None:
        """Follow the pool."""
        match fact:
            case EndpointAdded(endpoint):
                self._urls[endpoint.name] = _url(endpoint)
            case EndpointRemoved(name):
                self._urls.pop(name, None)
            case _:
                pass

    async def any(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Ask whichever endpoint was told of first. Raises OSError where it cannot be reached or there is none."""
        return await self.of(next(iter(self._urls), ""), path, body)

    async def of(self, name: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Ask this endpoint: (status, body). Raises OSError where it cannot be reached."""
        url = self._urls.get(name)
        if url is None or self._session is None:
            raise OSError("there is no such endpoint to ask")
        try:
            manner = self.manners(url).arguments(url)
            async with self._session.post(url + path, data=body, allow_redirects=False, **manner) as response:
                return response.status, await response.content.read(MAX_BODY_BYTES)
        except aiohttp.ClientError as error:
            raise OSError(type(error).__name__) from None


def _url(endpoint: Endpoint) -> str:
    return f"{endpoint.scheme}://{endpoint.address}"
