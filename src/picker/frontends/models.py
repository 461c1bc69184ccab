"""`GET /v1/models` of the whole pool: what its endpoints serve, as one list, and the other names for it.

Asks every endpoint that answers, with what the client has shown of itself, and keeps the list for a moment; the other
names are those of the rules in force at the time. Knows nothing of requests that are routed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from urllib.parse import unquote

import msgspec

from picker.exchange import Respond
from picker.frontends.headers import upstream_headers
from picker.frontends.loops import Via
from picker.frontends.trust import Trust
from picker.frontends.upstream import Upstream
from picker.frontends.upstream_connection import Reply
from picker.runtime import Runtime
from picker.types import Endpoint
from picker.wire import openai

PATH = "/v1/models"
_MOST_BYTES = 1024 * 1024  # of one endpoint's list
_MOST_KEPT = 64  # lists, by who asks: endpoints may show each key something else

Headers = tuple[tuple[bytes, bytes], ...]
Dress = Callable[[Endpoint, Headers], Iterable[tuple[bytes, bytes]]]
Entry = dict[str, object]
Aliases = Mapping[str, Sequence[str]]  # a name, and the models that it may stand for


class _List(msgspec.Struct):
    data: list[Entry]


_lists = msgspec.json.Decoder(_List)
_anything = msgspec.json.Decoder(dict[str, msgspec.Raw])


def asks_for_models(path: str) -> bool:
    """Whether a path without its query is the list's, or that of an entry."""
    return path.startswith(PATH) and (path == PATH or path[len(PATH)] == "/")


def dressed(trust: Trust, via: Via) -> Dress:
    """As every request goes to an endpoint: with its key, and marked to be known if it comes back."""

    def dress(endpoint: Endpoint, headers: Headers) -> list[tuple[bytes, bytes]]:
        return [*upstream_headers(*trust.dress(endpoint.name, headers, ()), client=None, scheme="http"), via.mark]

    return dress


def pool_page(runtime: Runtime, upstream: Upstream, trust: Trust, via: Via) -> ModelsPage:
    """The page of all that a runtime routes to, and of the names that it rewrites."""

    def aliases() -> Aliases:
        rewriting = runtime.limits.rewriting  # another one after a reload
        return {} if rewriting is None else rewriting.aliases

    return ModelsPage(
        upstream,
        endpoints=runtime.answering,
        known=runtime.scheduler.pool.models,
        aliases=aliases,
        clock=runtime.clock,
        dress=dressed(trust, via),
    )


class ModelsPage:
    """endpoints: those to be asked. known: names of models that the pool has heard of, where nobody answers.

    aliases: other names that clients can ask by. dress: a client's header fields as they are towards an endpoint, which
    may want a key of its own. timeout: seconds for an endpoint to answer. keep: seconds that what endpoints have
    answered is served again.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        endpoints: Callable[[], Sequence[Endpoint]],
        known: Callable[[], Sequence[str]],
        clock: Callable[[], float],
        aliases: Callable[[], Aliases] = dict,
        dress: Dress = lambda endpoint, headers: headers,
        timeout: float = 2.0,
        keep: float = 2.0,
    ) -> None:
        self._upstream = upstream
        self._endpoints = endpoints
        self._known = known
        self._clock = clock
        self._aliases = aliases
        self._dress = dress
        self._timeout = timeout
        self._keep = keep
        self._kept: dict[Headers, tuple[float, Respond | list[Entry]]] = {}

    async def answer(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Respond:
        """The list, or one entry of it (`/v1/models/NAME`). headers: of the client, names in lower case."""
        found = await self._entries(headers)
        if isinstance(found, Respond):
            return found
        found = with_aliases(found, self._aliases())
        name = unquote(path.removeprefix(PATH).lstrip("/"))
        if not name:
            return _json(200, msgspec.json.encode({"object": "list", "data": found}))
        for entry in found:
            if entry["id"] == name:
                return _json(200, msgspec.json.encode(entry))
        known = ", ".join(str(entry["id"]) for entry in found)
        message = f"The model `{name}` does not exist. Valid aliases: {known}."
        return _json(404, openai.error_body(404, message, param="model"))

    async def _entries(self, headers: Iterable[tuple[bytes, bytes]]) -> Respond | list[Entry]:
        asks = tuple(pair for pair in headers if pair[0] in (b"authorization", b"x-api-key"))
        now = self._clock()
        kept = self._kept.get(asks)
        if kept is not None and now - kept[0] < self._keep:
            return kept[1]
        found = await self._ask_all(asks)
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        self._kept[asks] = now, found
        return found

    async def _ask_all(self, headers: Headers) -> Respond | list[Entry]:
        places = {(endpoint.scheme, endpoint.address): endpoint for endpoint in self._endpoints()}
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._ask(endpoint, headers)) for endpoint in places.values()]
        answers = [task.result() for task in asked]
        if good := [answer for answer in answers if isinstance(answer, list)]:
            return merged(good)
        refused = next((answer for answer in answers if isinstance(answer, Respond)), None)
        if refused is not None:
            return refused
        if known := self._known():
            return [_told(name) for name in known]
        return _json(503, openai.error_body(503, "No endpoint tells which models it serves."))

    async def _ask(self, endpoint: Endpoint, headers: Headers) -> Respond | list[Entry] | None:
        """Its entries, its refusal, or None where it does not answer."""
        try:
            async with asyncio.timeout(self._timeout):
                reply = await self._upstream.send(endpoint, "GET", PATH.encode(), self._dress(endpoint, headers), None)
                if not isinstance(reply, Reply):
                    return None
                return await _read(reply)
        except TimeoutError:
            return None


async def _read(reply: Reply) -> Respond | list[Entry] | None:
    pieces: list[bytes] = []

    def take(data: bytes, ended: bool) -> bool:
        pieces.append(data)
        return not ended and sum(map(len, pieces)) <= _MOST_BYTES

    try:
        while not reply.ended:
            if await reply.pour(take) is not None or sum(map(len, pieces)) > _MOST_BYTES:
                return None
    finally:
        reply.close()
    body = b"".join(pieces)
    if 400 <= reply.status < 500:
        return _refusal(reply.status, body)
    found = openai.attempt(_lists, body) if reply.status == 200 else None
    return None if found is None else [entry for entry in found.data if isinstance(entry.get("id"), str)]


def _refusal(status: int, body: bytes) -> Respond | None:
    """An engine's own words; a web page is something else's, and tells no more than whether the key is refused."""
    if openai.attempt(_anything, body) is not None:
        return _json(status, body)
    return _json(status, openai.error_body(status, "The endpoints refuse this key.")) if status in (401, 403) else None


def merged(lists: Sequence[list[Entry]]) -> list[Entry]:
    """One entry for each name, base models before the adapters on them; the shortest context counts."""
    found: dict[object, Entry] = {}
    for entry in (entry for each in lists for entry in each):
        known = found.setdefault(entry["id"], dict(entry))
        lengths = [each for each in (known.get("max_model_len"), entry.get("max_model_len")) if isinstance(each, int)]
        if lengths:
            known["max_model_len"] = min(lengths)
    return sorted(found.values(), key=lambda entry: entry.get("parent") is not None)


def with_aliases(entries: Sequence[Entry], aliases: Aliases) -> list[Entry]:
    """The entries, and behind them one for each alias of a listed model; what is listed under its own name stays."""
    listed = {entry["id"]: entry for entry in entries}
    others = {name: targets for name, targets in aliases.items() if name not in listed}
    return [*entries, *(_alias(name, targets, listed) for name, targets in others.items() if listed.keys() & targets)]


def _alias(name: str, targets: Sequence[str], listed: Mapping[object, Entry]) -> Entry:
    """Of one target, all that is told of it; of several, the context that every one of them has."""
    if len(targets) == 1:
        return {**listed[targets[0]], "id": name, "root": targets[0]}
    lengths = [listed[each].get("max_model_len") for each in targets if each in listed]
    known = [each for each in lengths if isinstance(each, int)]
    return _told(name) | ({"max_model_len": min(known)} if known else {})


def _told(name: str) -> Entry:
    """An entry of which no more is known."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "vllm", "root": name, "parent": None}


def _json(status: int, body: bytes) -> Respond:
    return Respond(status, (("content-type", "application/json"),), body)
