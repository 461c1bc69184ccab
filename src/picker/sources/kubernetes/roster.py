"""Which endpoints the scheduler has been told of, and what to tell it when a pod, a pool or a slice has changed.

Pure: what is known goes in, facts come out. An origin is what brings members: a pool, a selector, a slice. A member
that several of them bring counts to the first in order, and to the next when that one lets go of it.

| the member is | its endpoints |
|---|---|
| ready | are there |
| not ready | take nothing new; what is known of them stays, for most come back as they were |
| terminating | take nothing new |
| over, or gone | are gone |
| somebody else by the same name | are gone, and new ones are there |
| in another container, with the same resources | have an empty cache |
| in another container, with other resources | are new: its speed is not what it was either |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from picker.sources.kubernetes.members import Engine, Member, Standing
from picker.types import CacheCleared, Endpoint, EndpointAdded, EndpointDraining, EndpointRemoved, Fact


@dataclass(slots=True)
class _Origin:
    """ports: of its pool, empty where members have their own. order: the least one wins a member."""

    order: tuple[object, ...]
    ports: tuple[int, ...]
    members: dict[str, Member] = field(default_factory=dict)


@dataclass(slots=True)
class _Told:
    """What the scheduler knows of a member."""

    member: Member
    endpoints: dict[str, Endpoint]
    draining: bool = False


class Roster:
    """All members of all origins. Every change returns the facts that follow from it, in the order to tell them."""

    def __init__(self) -> None:
        self._origins: dict[str, _Origin] = {}
        self._claims: dict[str, list[str]] = {}
        self._told: dict[str, _Told] = {}
        self._routable = 0

    @property
    def endpoints(self) -> int:
        """How many the scheduler has been told of."""
        return sum(len(told.endpoints) for told in self._told.values())

    @property
    def routable(self) -> int:
        """How many members may be given requests."""
        return self._routable

    def members(self, origin: str) -> Iterable[Member]:
        found = self._origins.get(origin)
        return () if found is None else found.members.values()

    def serves(self, origin: str) -> bool:
        """Whether a member of it may be given requests."""
        return any(self._serves(member.name) for member in self.members(origin))

    def open(self, origin: str, ports: tuple[int, ...] = (), *, order: tuple[object, ...] = ()) -> list[Fact]:
        """Begin with an origin, or change its ports."""
        known = self._origins.get(origin)
        if known is None:
            self._origins[origin] = _Origin(order, ports)
            return []
        changed, known.ports = known.ports != ports, ports
        return [fact for name in known.members for fact in self._settled(name)] if changed else []

    def close(self, origin: str) -> list[Fact]:
        """Forget an origin and all that only it has brought."""
        known = self._origins.get(origin)
        facts = [] if known is None else [fact for name in list(known.members) for fact in self.drop(origin, name)]
        self._origins.pop(origin, None)
        return facts

    def put(self, origin: str, member: Member) -> list[Fact]:
        """A member is there, or has changed."""
        known = self._origins[origin]
        if member.name not in known.members:
            claims = self._claims.setdefault(member.name, [])
            claims.append(origin)
            claims.sort(key=lambda name: (self._origins[name].order, name))
        known.members[member.name] = member
        return list(self._settled(member.name))

    def drop(self, origin: str, name: str) -> list[Fact]:
        """A member is there no more, as far as this origin is concerned."""
        known = self._origins.get(origin)
        if known is None or known.members.pop(name, None) is None:
            return []
        self._claims[name].remove(origin)
        if not self._claims[name]:
            del self._claims[name]
        return list(self._settled(name))

    # --- what follows ---

    def _settled(self, name: str) -> Iterator[Fact]:
        """Bring what was told into line with what is, a fact at a time."""
        before = self._serves(name)
        yield from self._follow(name, self._owned(name))
        self._routable += self._serves(name) - before

    def _serves(self, name: str) -> bool:
        told = self._told.get(name)
        return told is not None and bool(told.endpoints) and not told.draining

    def _owned(self, name: str) -> tuple[Member, tuple[Endpoint, ...]] | None:
        claims = self._claims.get(name)
        if not claims:
            return None
        origin = self._origins[claims[0]]
        member = origin.members[name]
        return member, member.endpoints(origin.ports)

    def _follow(self, name: str, owned: tuple[Member, tuple[Endpoint, ...]] | None) -> Iterator[Fact]:
        told = self._told.get(name)
        if owned is None or owned[0].standing is Standing.OVER:
            yield from self._gone(name)
            return
        member, endpoints = owned
        if told is not None and _is_new(told.member, member):
            yield from self._gone(name)
            told = None
        elif told is not None and _restarted(told.member, member):
            yield from (CacheCleared(each) for each in told.endpoints)
        if told is not None:
            told.member = _latest(told.member, member)
        if member.standing is Standing.READY:
            yield from self._here(name, member, endpoints)
        elif told is not None and not told.draining:
            told.draining = True
            yield from (EndpointDraining(each) for each in told.endpoints)

    def _gone(self, name: str) -> Iterator[Fact]:
        told = self._told.pop(name, None)
        if told is not None:
            yield from (EndpointRemoved(each) for each in told.endpoints)

    def _here(self, name: str, member: Member, endpoints: tuple[Endpoint, ...]) -> Iterator[Fact]:
        if not endpoints:  # it has no address, or no port that may be used
            yield from self._gone(name)
            return
        told = self._told.setdefault(name, _Told(member, {}))
        before, told.endpoints = told.endpoints, {each.name: each for each in endpoints}
        for each in endpoints:
            if before.get(each.name) != each:
                yield EndpointAdded(each)
            if told.draining and each.name in before:
                yield EndpointDraining(each.name, draining=False)
        told.draining = False
        yield from (EndpointRemoved(each) for each in before if each not in told.endpoints)


def _is_new(before: Member, now: Member) -> bool:
    """Whether nothing that was learned holds any more."""
    if before.uid != now.uid:
        return True
    resized = [each.resources for each in before.engines] != [each.resources for each in now.engines]
    return resized and _restarted(before, now)


def _restarted(before: Member, now: Member) -> bool:
    return bool(now.engines) and _ids(before.engines) != _ids(now.engines)


def _ids(engines: tuple[Engine, ...]) -> dict[str, str]:
    return {each.container: each.id for each in engines}


def _latest(before: Member, now: Member) -> Member:
    """What to compare the next change with: a container and the resources that it began with."""
    return now if _restarted(before, now) else replace(now, engines=before.engines)
