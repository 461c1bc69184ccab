"""A copy of one collection of the API server's, kept by list and watch.

The protocol is that of client-go's reflector: list, then watch from the list's version on; a broken watch goes on from
the last version seen (bookmarks keep that one young), and only one that the server has forgotten costs a new list.

| what happens | what follows |
|---|---|
| the watch ends, as it does every few minutes | it goes on where it was, at once |
| it breaks | the same, after a pause; the second time it is told |
| nothing comes for longer than bookmarks take | the same, once the server has said that it has that version |
| 410: the version is too old | a list from etcd, of which only the differences are told |
| the server is away, refuses, or is overloaded | what is known stays; pauses grow, with jitter |
| `resync` seconds have gone by | a list from the server's cache, for whatever was missed |

Refuses to know what objects mean: they are handed to a `Follower`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from picker.errors import WireError
from picker.sources.kubernetes.client import ApiError, refused
from picker.sources.kubernetes.objects import (
    Collection,
    Page,
    read_event,
    read_metadata,
    read_page,
    read_status,
    read_version,
)

log = logging.getLogger("picker.kubernetes")

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

PAGE_SIZE = 500  # client-go's
FIRST_PAUSE, MAX_PAUSE = 0.5, 10.0
# A kind that is not installed, a right that is missing: people mend these, not time.
LONG_PAUSE = 30.0
WATCH_AT_LEAST, WATCH_AT_MOST = 300.0, 600.0  # seconds, client-go's
# A watch that has lived so long has done its work: what comes next is a new trouble.
_PROVEN = 5.0


class Api(Protocol):
    """What is asked of a `Client`."""

    async def get(self, path: str, query: Mapping[str, str]) -> bytes: ...

    def watch(self, path: str, query: Mapping[str, str]) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...


class Follower(Protocol[T_contra]):
    """Who is told. Every call is a change; an object that cannot be read stays as it was."""

    def put(self, found: T_contra) -> None: ...

    def drop(self, name: str) -> None: ...

    def unread(self, name: str, problem: str | None) -> None:
        """An object cannot be read, and why; or can again."""
        ...

    def listed(self) -> None:
        """All that is there has been told."""
        ...


@dataclass(slots=True)
class Freshness:
    """How well a collection is known. heard_at: when the server last said anything; lost_at: when that broke off."""

    synced: bool = False
    watching: bool = False
    heard_at: float | None = None
    lost_at: float | None = None
    problem: str | None = None
    status: int | None = None

    def age(self, now: float) -> float | None:
        """Seconds for which nothing can have been heard; 0 while a watch is open, None before the first list."""
        if not self.synced or self.watching:
            return 0.0 if self.watching else None
        return now - (now if self.lost_at is None else self.lost_at)


class Reflector(Generic[T]):
    """Follows one collection until cancelled.

    known: names of objects that the follower has from before; what is not listed of them is dropped. changed: called
    when freshness has: the server went away, came back, or says something else. clock: seconds, monotonic.
    """

    def __init__(
        self,
        api: Api,
        collection: Collection[T],
        follower: Follower[T],
        *,
        clock: Callable[[], float],
        rng: random.Random,
        known: Iterable[str] = (),
        resync: float = 900.0,
        changed: Callable[[], None] = lambda: None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.collection = collection
        self.freshness = Freshness()
        self._api = api
        self._follower = follower
        self._clock = clock
        self._rng = rng
        self._resync = resync
        self._changed = changed
        self._sleep = sleep
        self._versions: dict[str, str] = dict.fromkeys(known, "")  # of each object, by name
        self._unread: set[str] = set()
        self._version: str | None = None  # of the collection; None: list before watching
        self._forgotten = False  # by the server's cache: ask etcd
        self._doubtful = False  # whether the server has the version
        self._listed_at = 0.0
        self._failures = 0

    @property
    def count(self) -> int:
        return len(self._versions)

    async def run(self) -> None:
        while True:
            pause = await self._round()
            if pause > 0:
                await self._sleep(pause)

    async def _round(self) -> float:
        """List if need be, and watch until that ends. Returns how long to wait before the next."""
        try:
            if self._version is None or self._clock() - self._listed_at >= self._resync:
                await self._list()
            elif self._doubtful:
                await self._check()
            proven = await self._watch()
        except ApiError as error:
            return self._after(error)
        except WireError as error:
            self._version = None
            return self._after(ApiError(error.message))
        except Exception:  # a bug must not end what all routing depends on
            log.exception("following %s failed unexpectedly", self.collection.kind)
            self._version = None
            return self._after(ApiError("following it failed unexpectedly"))
        self._lose()
        # Servers that close watches at once are in trouble, whatever they say.
        self._failures = 0 if proven else self._failures + 1
        return 0.0 if proven else self._pause()

    # --- listing ---

    async def _list(self) -> None:
        found: dict[str, msgspec.Raw] = {}
        query = self._query() | {"limit": str(PAGE_SIZE)}
        if not self._forgotten:
            query |= {"resourceVersion": self._version or "0", "resourceVersionMatch": "NotOlderThan"}
        while True:
            page = await self._page(query)
            for item in page.items or ():
                self._name(item, found)
            if not page.metadata.continue_token:
                break
            query = self._query() | {"limit": str(PAGE_SIZE), "continue": page.metadata.continue_token}
        self._adopt(found)
        self._version, self._forgotten, self._doubtful = page.metadata.resource_version, False, False
        self._listed_at = self._clock()
        self._hear(synced=True)
        self._follower.listed()

    async def _check(self) -> None:
        """A server that was set back, as by a restore, says nothing of versions that it has yet to reach, for days.

        Mostly it is the way that was broken: then this costs one object, and no list.
        """
        newer = {"resourceVersion": self._version or "0", "resourceVersionMatch": "NotOlderThan"}
        await self._page(self._query() | newer | {"limit": "1"})
        self._doubtful = False

    async def _page(self, query: Mapping[str, str]) -> Page:
        try:
            return read_page(await self._api.get(self.collection.path, query))
        except ApiError as error:
            if "resourceVersion" in query and error.status in (410, 504):  # 504: it does not have that version yet
                self._version, self._forgotten = None, True
            raise

    def _name(self, item: msgspec.Raw, found: dict[str, msgspec.Raw]) -> None:
        try:
            found[read_metadata(item).name] = item
        except WireError as error:
            log.warning("an object among %s is left out: %s", self.collection.kind, error)

    def _adopt(self, found: Mapping[str, msgspec.Raw]) -> None:
        # Those that are there first: a pool whose every pod is replaced must not be empty in between.
        for item in found.values():
            self._put(item)
        for name in [name for name in self._versions if name not in found]:
            self._drop(name)

    # --- watching ---

    async def _watch(self) -> bool:
        """Follow the changes. Returns whether it was worth the while when the server ends it."""
        length = min(self._rng.uniform(WATCH_AT_LEAST, WATCH_AT_MOST), self._until_resync())
        query = self._query() | {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version or "",
            "timeoutSeconds": str(max(1, round(length))),
        }
        proven, began_at = False, self._clock()
        try:
            async with self._api.watch(self.collection.path, query) as lines:
                self._hear(watching=True)
                async for line in lines:
                    self._take(line)
                    proven = True
        finally:
            proven = proven or self._clock() - began_at >= _PROVEN
            if proven:
                self._failures = 0
        return proven

    def _until_resync(self) -> float:
        return self._resync - (self._clock() - self._listed_at)

    def _take(self, line: bytes) -> None:
        event = read_event(line)
        match event.type:
            case "ADDED" | "MODIFIED":
                self._version = self._put(event.object) or self._version
            case "DELETED":
                metadata = read_metadata(event.object)
                self._drop(metadata.name)
                self._version = metadata.resource_version or self._version
            case "BOOKMARK":
                self._version = read_version(event.object) or self._version
            case "ERROR":
                raise refused(read_status(event.object), 500)
            case _:
                log.debug("a watch of %s has an event of an unknown type", self.collection.kind)
        self.freshness.heard_at = self._clock()

    # --- objects ---

    def _put(self, item: msgspec.Raw) -> str | None:
        """Hand an object on unless it is known as it is. Returns its version."""
        metadata = read_metadata(item)
        name, version = metadata.name, metadata.resource_version
        if version and self._versions.get(name) == version:
            return version
        self._versions[name] = version
        try:
            found = self.collection.read(item)
            self._readable(name)
            self._follower.put(found)
        except WireError as error:
            self._cannot_read(name, error.message)
        except Exception:  # a bug met on one object must not keep all others from being followed
            log.exception("taking up %s of %s failed unexpectedly", name, self.collection.kind)
            self._cannot_read(name, "it cannot be taken up, which is a bug of picker's")
        return version

    def _cannot_read(self, name: str, problem: str) -> None:
        self._unread.add(name)
        self._follower.unread(name, problem)

    def _drop(self, name: str) -> None:
        if self._versions.pop(name, None) is not None:
            self._readable(name)
            self._follower.drop(name)

    def _readable(self, name: str) -> None:
        if name in self._unread:
            self._unread.remove(name)
            self._follower.unread(name, None)

    def _query(self) -> dict[str, str]:
        return {"labelSelector": self.collection.labels} if self.collection.labels else {}

    # --- freshness ---

    def _hear(self, *, synced: bool = False, watching: bool = False) -> None:
        known = self.freshness
        news = known.problem is not None or (watching and not known.watching) or (synced and not known.synced)
        known.synced, known.watching = known.synced or synced, watching
        known.heard_at, known.problem, known.status = self._clock(), None, None
        if watching:
            known.lost_at = None
        if news:
            self._changed()

    def _lose(self) -> None:
        if self.freshness.watching:
            self.freshness.watching, self.freshness.lost_at = False, self._clock()

    def _after(self, error: ApiError) -> float:
        """Note what has gone wrong. Returns how long to wait."""
        at_once = error.expired and not self._forgotten and self._clock() - self._listed_at >= _PROVEN
        if error.expired:
            self._version, self._forgotten = None, True
        self._doubtful = self._doubtful or error.silent
        self._failures += 1
        if at_once:  # its way of saying: list again; after an outage it is the first thing that it says
            self._lose()
            return 0.0
        if self._failures > 1:  # once may be a server that restarts
            self._note(error)
        self._lose()
        return self._pause() if error.retry_after is None else error.retry_after * self._rng.uniform(1.0, 1.2)

    def _note(self, error: ApiError) -> None:
        known = self.freshness
        known.lost_at = self._clock() if known.lost_at is None else known.lost_at
        if (known.problem, known.status) != (str(error), error.status):
            known.problem, known.status = str(error), error.status
            self._changed()

    def _pause(self) -> float:
        longest = min(MAX_PAUSE, FIRST_PAUSE * (1 << min(self._failures - 1, 10)))
        if self.freshness.status in (401, 403, 404):
            longest = max(longest, min(LONG_PAUSE, longest * 3))
        return longest * self._rng.uniform(0.5, 1.0)
