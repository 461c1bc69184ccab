"""Requests to an API server as they are, for tests of what it answers: nothing is retried, no status is an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp

from kubernetes.manifests import Json
from picker.sources.kubernetes.credentials import Access

_MERGE = "application/merge-patch+json"
_STRATEGIC = "application/strategic-merge-patch+json"


@dataclass(frozen=True, slots=True)
class Answer:
    """value: the object, empty where the answer is none. text: the answer as it came."""

    status: int
    value: Json
    text: str

    @property
    def told(self) -> tuple[int, Any, Any]:
        """What a failure says: status, reason and message."""
        return self.status, self.value.get("reason"), self.value.get("message")


class Asking:
    """Use as `async with Asking() as asking`."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=16))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def ask(
        self,
        access: Access,
        method: str,
        path: str,
        value: Json | None = None,
        query: Mapping[str, str] | None = None,
        *,
        strategic: bool = False,
    ) -> Answer:
        """strategic: of two lists of containers, those of one name are merged."""
        assert self._session is not None
        token = await access.tokens.token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if value is not None:
            patch = _STRATEGIC if strategic else _MERGE
            headers["Content-Type"] = patch if method == "PATCH" else "application/json"
        async with self._session.request(
            method,
            access.url + path,
            params=query,
            data=None if value is None else json.dumps(value),
            headers=headers,
            ssl=access.tls,
            server_hostname=access.server_name,
        ) as response:
            return _answer(response.status, await response.text())

    async def events(self, access: Access, path: str, query: Mapping[str, str]) -> list[Json]:
        """All that a watch tells until its end. query: with a `timeoutSeconds`."""
        found = await self.ask(access, "GET", path, query={"watch": "1", **query})
        assert found.status == 200, found.text
        return [json.loads(line) for line in found.text.splitlines()]


def _answer(status: int, text: str) -> Answer:
    try:
        value = json.loads(text)
    except ValueError:
        value = {}
    return Answer(status, value if isinstance(value, dict) else {}, text)
