"""Endpoints as a Kubernetes API server knows them: pools, the pods they select, objectives and rewrites.

Owns the reflectors; what they see is the `Catalogue`'s. When the API server is away nothing is forgotten: routing goes
on with what was known, and `report`, the log and a gauge say how old that is.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from picker.sources.kubernetes import objects
from picker.sources.kubernetes.catalogue import Catalogue
from picker.sources.kubernetes.client import Client
from picker.sources.kubernetes.credentials import Access
from picker.sources.kubernetes.objects import OLD_POOL_GROUP, POLICY_GROUPS, POOL_GROUP, Collection
from picker.sources.kubernetes.reflector import Api, Freshness, Reflector
from picker.sources.kubernetes.scope import Scope, of_service
from picker.types import Fact

log = logging.getLogger("picker.kubernetes")

T = TypeVar("T")

_REMIND_EVERY = 60.0  # seconds between two lines about an API server that stays away
_NOT_THERE = 404


@dataclass(frozen=True, slots=True)
class _Told:
    """A follower made of functions."""

    put: Callable[[Any], None]
    drop: Callable[[str], None]
    unread: Callable[[str, str | None], None]
    listed: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Following:
    """A reflector at work. needed: no endpoint can be known without it."""

    reflector: Reflector[Any]
    task: asyncio.Task[None]
    needed: bool


class KubernetesSource:
    """Follows what `scope` names. access: the way to the API server. clock: the scheduler's.

    objectives: priorities that are known anyway. synced: set once everything that endpoints depend on has been listed.
    catalogue: what is known. resync: seconds between two lists of the same; silence: seconds without a byte after which
    a watch counts as broken.
    """

    provides = ("endpoints", "objectives")

    def __init__(
        self,
        access: Access,
        scope: Scope,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        objectives: Mapping[str, int] | None = None,
        resync: float = 900.0,
        silence: float = 75.0,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        scope.check()
        self.scope = scope
        self.catalogue = Catalogue(scope, lambda fact: self._emit(fact), objectives)
        self.synced = asyncio.Event()
        self._access = access
        self._clock = clock
        self._rng = rng
        self._resync = resync
        self._silence = silence
        self._sleep = sleep
        self._emit: Callable[[Fact], None] = _nowhere
        self._following: dict[str, _Following] = {}
        self._queries: dict[str, str] = {}
        self._api: Api | None = None
        self._group: asyncio.TaskGroup | None = None
        self._away = False

    @property
    def objectives(self) -> Mapping[str, int]:
        """Priorities by name, as they are at any time."""
        return self.catalogue.objectives

    def age(self, now: float) -> float | None:
        """Seconds since the API server was lost sight of; 0 while it is watched, None before all is known."""
        if not self.synced.is_set():
            return None
        return max((each.age(now) or 0.0 for each in self._needed()), default=None)

    def report(self) -> dict[str, Any]:
        """What is known and how well, for people."""
        now = self._clock()
        return {
            "api_server": self._access.url,
            "namespace": self.scope.namespace,
            "synced": self.synced.is_set(),
            "age_s": self.age(now),
            "endpoints": self.catalogue.roster.endpoints,
            "conditions": dict(self.catalogue.conditions),
            "watches": {key: _watch(each.reflector, now) for key, each in self._following.items()},
        }

    async def run(self, emit: Callable[[Fact], None]) -> None:
        """Emit the endpoints that are there, then every change, until cancelled."""
        self._emit = emit
        try:
            async with Client(self._access, silence=self._silence) as self._api, asyncio.TaskGroup() as self._group:
                self._begin()
                while True:
                    await self._sleep(_REMIND_EVERY)
                    self._remind()
        finally:
            self._api = self._group = None
            self._following.clear()
            self._queries.clear()
            self._emit = _nowhere

    # --- reflectors ---

    def _begin(self) -> None:
        known, scope = self.catalogue, self.scope
        if scope.pools:
            pools = _Told(self._put_pool, self._drop_pool, partial(self._unread, "pool"), self._pools_listed)
            self._follow("pools", objects.pools(scope.namespace, scope.group), pools)
            for group in POLICY_GROUPS:
                self._follow_policies(group)
        for service in scope.services:
            key = of_service(service)
            unread, listed = partial(self._unread, "slice"), partial(self._listed, key)
            told = _Told(partial(known.put_slice, service), partial(known.drop_slice, service), unread, listed)
            self._follow(key, objects.slices(scope.namespace, service), told)
        self._follow_pods()

    def _follow_policies(self, group: str) -> None:
        known, namespace = self.catalogue, self.scope.namespace
        objectives = _Told(
            partial(known.objectives.put, group),
            partial(known.objectives.drop, group),
            partial(self._unread, "objective"),
            _nothing,
        )
        rewrites = _Told(
            partial(known.put_rewrite, group),
            partial(known.drop_rewrite, group),
            partial(self._unread, "rewrite"),
            _nothing,
        )
        self._follow(f"objectives/{group}", objects.objectives(namespace, group), objectives, needed=False)
        self._follow(f"rewrites/{group}", objects.rewrites(namespace, group), rewrites, needed=False)

    def _follow_pods(self) -> None:
        """One reflector for each query; of another query the reflector goes on from the pods of the one before."""
        wanted = dict(self.catalogue.queries)
        for origin in self._queries.keys() - wanted.keys():
            self._following.pop(origin).task.cancel()
            self.catalogue.conditions.forget(f"watch/{origin}")
        for origin, query in wanted.items():
            if self._queries.get(origin) == query:
                continue
            put, drop = partial(self.catalogue.put_pod, origin), partial(self.catalogue.drop_pod, origin)
            told = _Told(put, drop, partial(self._unread, "pod"), partial(self._listed, origin))
            self._follow(origin, objects.pods(self.scope.namespace, query), told)
        self._queries = wanted

    def _follow(self, key: str, collection: Collection[T], told: _Told, *, needed: bool = True) -> None:
        assert self._api is not None
        assert self._group is not None
        if key in self._following:
            self._following[key].task.cancel()
        reflector = Reflector(
            self._api,
            collection,
            told,
            clock=self._clock,
            rng=self._rng,
            known=self.catalogue.names(key),
            resync=self._resync,
            changed=self._freshness_changed,
            sleep=self._sleep,
        )
        task = self._group.create_task(reflector.run(), name=f"follow {key}")
        self._following[key] = _Following(reflector, task, needed)

    # --- what they see ---

    def _put_pool(self, pool: objects.Pool) -> None:
        self.catalogue.put_pool(pool)
        self._follow_pods()

    def _drop_pool(self, name: str) -> None:
        self.catalogue.drop_pool(name)
        self._follow_pods()

    def _pools_listed(self) -> None:
        self._listed("pools")

    def _listed(self, origin: str) -> None:
        self.catalogue.listed(origin)
        if not self.synced.is_set() and all(each.synced for each in self._needed()):
            self.synced.set()
            log.info("%d endpoints are known to Kubernetes", self.catalogue.roster.endpoints)

    def _unread(self, kind: str, name: str, problem: str | None) -> None:
        words = None if problem is None else f"{problem}; it stays as it was"
        self.catalogue.conditions.note(f"{kind}/{name}", words)

    def _needed(self) -> list[Freshness]:
        return [each.reflector.freshness for each in self._following.values() if each.needed]

    # --- how well ---

    def _freshness_changed(self) -> None:
        conditions = self.catalogue.conditions
        for key, each in self._following.items():
            freshness = each.reflector.freshness
            problem = None if freshness.status is None else freshness.problem  # nobody answers: said once of all
            if freshness.status == _NOT_THERE:
                problem = self._not_installed(each)
            conditions.note(f"watch/{key}", problem)
        self._note_away()

    def _not_installed(self, following: _Following) -> str | None:
        """Why the API server does not know a kind; None where it need not."""
        if not following.needed:
            return None
        other = OLD_POOL_GROUP if self.scope.group == POOL_GROUP else POOL_GROUP
        kind = following.reflector.collection.kind
        return f"the API server does not know {kind}: install its CRD, or name the other group: --pool-group {other}"

    def _note_away(self) -> None:
        unreachable = [each.problem for each in self._needed() if each.problem is not None and each.status is None]
        problem = f"{unreachable[0]}; routing goes on with what is known" if unreachable else None
        self.catalogue.conditions.note("api-server", problem)

    def _remind(self) -> None:
        lost = [each for each in self._needed() if each.problem is not None]
        if lost:
            known, age = self.catalogue.roster.endpoints, self.age(self._clock())
            since = "the start" if age is None else f"{age:.0f} s"
            log.warning("%s; %d endpoints are known, nothing new since %s", lost[0].problem, known, since)


def _watch(reflector: Reflector[Any], now: float) -> dict[str, Any]:
    known = reflector.freshness
    return {
        "kind": reflector.collection.kind,
        "objects": reflector.count,
        "synced": known.synced,
        "watching": known.watching,
        "heard_s": None if known.heard_at is None else now - known.heard_at,
        "lost_s": None if known.lost_at is None else now - known.lost_at,
        "problem": known.problem,
    }


def _nowhere(fact: Fact) -> None:
    """Where facts go while nobody runs the source."""


def _nothing() -> None:
    """What follows from having listed a policy."""
