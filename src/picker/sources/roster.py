"""Which endpoints there are when several have a say: the configuration, a watched file, and whoever operates picker.

Each owner lists its own; a name that two list is the first's. What the operator does (drain, remove, weigh) lies over
the lists and outlives their changes: a file that is read again neither brings a removed endpoint back nor takes one
away that was added by hand. One writer, the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from picker.errors import ConfigError
from picker.sources.static import require_unique_names
from picker.types import Endpoint, EndpointAdded, EndpointDraining, EndpointRemoved, Fact

OPERATOR = "operator"  # the owner of what was added at run time
_LIGHTEST, _HEAVIEST = 0.01, 100.0


class Source(Protocol):
    """How facts arrive."""

    async def run(self, emit: Callable[[Fact], None]) -> None: ...


class UnknownEndpointError(Exception):
    """Nobody lists an endpoint of this name."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of one endpoint here. owners: who list it, the one that counts first."""

    endpoint: Endpoint
    owners: tuple[str, ...]
    draining: bool
    removed: bool
    weight: float


class Roster:
    """The endpoints of all owners. As a source it runs those of its owners that change by themselves.

    owners: in the order of precedence; whoever else lists comes after them, and the operator last.
    """

    provides = ("endpoints",)

    def __init__(self, *owners: str) -> None:
        self.weights: dict[str, float] = {}  # by name, as the operator has said
        self.listed_weights: dict[str, float] = {}  # as the configuration has
        self._lists: dict[str, dict[str, Endpoint]] = {owner: {} for owner in (*owners, OPERATOR)}
        self._shown: dict[str, Endpoint] = {}
        self._removed: set[str] = set()
        self._draining: set[str] = set()
        self._sources: list[tuple[str, Source]] = []
        self._elsewhere: set[str] = set()
        self._emit: Callable[[Fact], None] | None = None
        self._emitting = False

    # a source

    def follow(self, owner: str, source: Source) -> None:
        """Have a source list what it emits, as this owner."""
        self._sources.append((owner, source))

    async def run(self, emit: Callable[[Fact], None]) -> None:
        """Announce what is listed, then every change, until cancelled."""
        self._emit = emit
        self._settle({name for listed in self._lists.values() for name in listed})
        async with asyncio.TaskGroup() as group:
            for owner, source in self._sources:
                group.create_task(source.run(lambda fact, owner=owner: self._hear(owner, fact)))  # type: ignore[misc]
            await asyncio.Event().wait()

    def observe(self, fact: Fact) -> None:
        """Told every fact: endpoints that others than the owners here announce (Kubernetes) can be drained, too."""
        if self._emitting:
            return
        match fact:
            case EndpointAdded(endpoint):
                self._elsewhere.add(endpoint.name)
                if endpoint.name in self._draining:
                    self._tell(EndpointDraining(endpoint.name))
            case EndpointRemoved(name):
                self._elsewhere.discard(name)
                self._draining.discard(name)
                self.weights.pop(name, None)
            case _:
                pass

    # owners

    def assign(self, owner: str, endpoints: Iterable[Endpoint]) -> None:
        """All that an owner lists from here on. Raises ConfigError when a name comes twice."""
        listed = tuple(endpoints)
        require_unique_names(listed)
        before = self._lists[owner]
        self._lists[owner] = {endpoint.name: endpoint for endpoint in listed}
        self._settle(set(before) | set(self._lists[owner]))

    def _hear(self, owner: str, fact: Fact) -> None:
        match fact:
            case EndpointAdded(endpoint):
                self._lists[owner][endpoint.name] = endpoint
                self._settle({endpoint.name})
            case EndpointRemoved(name):
                self._lists[owner].pop(name, None)
                self._settle({name})
            case _:
                self._tell(fact)

    # the operator

    def add(self, endpoint: Endpoint) -> Standing:
        """One more endpoint, or one that was removed by hand, back. Raises ConfigError where the name is another's."""
        name = endpoint.name
        owners = self._owners(name)
        if name in self._elsewhere:
            raise ConfigError(f"endpoint {name!r} is known already, from discovery")
        if owners and owners[0] != OPERATOR and name not in self._removed:
            raise ConfigError(f"endpoint {name!r} is listed already, by {owners[0]}")
        self._removed.discard(name)
        if not owners or owners == (OPERATOR,):
            self._lists[OPERATOR][name] = endpoint
        self._settle({name})
        return self.standing(name)

    def remove(self, name: str) -> Standing:
        """Take an endpoint away: what runs there goes on, nothing new goes there.

        One that somebody else lists stays away until that list has let it go and names it again, it is added by hand,
        or picker starts again. Raises UnknownEndpointError, and ConfigError for what discovery found.
        """
        if name in self._elsewhere:
            raise ConfigError(f"endpoint {name!r} comes from discovery: remove it there, or drain it here")
        before = self.standing(name)
        self._lists[OPERATOR].pop(name, None)
        if self._owners(name):
            self._removed.add(name)
        self._draining.discard(name)
        self.weights.pop(name, None)
        self._settle({name})
        return before

    def drain(self, name: str, *, draining: bool = True) -> None:
        """Send nothing new there, or do again. Raises UnknownEndpointError."""
        self._require(name)
        (self._draining.add if draining else self._draining.discard)(name)
        self._tell(EndpointDraining(name, draining))

    def weigh(self, name: str, weight: float) -> None:
        """Take an endpoint as so many times as fast as it is found. Raises UnknownEndpointError and ConfigError."""
        self._require(name)
        check_weight(weight)
        self.weights[name] = weight

    def standing(self, name: str) -> Standing:
        """Raises UnknownEndpointError."""
        owners = self._owners(name)
        if not owners:
            raise UnknownEndpointError(name)
        return Standing(
            self._lists[owners[0]][name],
            owners,
            name in self._draining,
            name in self._removed,
            self.weights.get(name, self.listed_weights.get(name, 1.0)),
        )

    def all(self) -> Mapping[str, Standing]:
        """Everything that is listed here, by name; those that were removed by hand, too."""
        names = dict.fromkeys(name for listed in self._lists.values() for name in listed)
        return {name: self.standing(name) for name in names}

    # what follows

    def _owners(self, name: str) -> tuple[str, ...]:
        return tuple(owner for owner, listed in self._lists.items() if name in listed)

    def _require(self, name: str) -> None:
        if name not in self._shown and name not in self._elsewhere:
            raise UnknownEndpointError(name)

    def _settle(self, names: Iterable[str]) -> None:
        """Tell what has come of these names; who comes is told before who goes, so that the pool is never empty."""
        gone: list[str] = []
        for name in sorted(names):
            owners = self._owners(name)
            if not owners:
                self._removed.discard(name)
            wanted = None if not owners or name in self._removed else self._lists[owners[0]][name]
            if wanted is None:
                gone.append(name)
            elif self._emit is not None and self._shown.get(name) != wanted:
                self._shown[name] = wanted
                self._tell(EndpointAdded(wanted))
                if name in self._draining:
                    self._tell(EndpointDraining(name))
        for name in gone:
            if self._shown.pop(name, None) is not None:
                self._tell(EndpointRemoved(name))

    def _tell(self, fact: Fact) -> None:
        if self._emit is None:
            return
        self._emitting = True
        try:
            self._emit(fact)
        finally:
            self._emitting = False


def check_weight(weight: float) -> None:
    """Raises ConfigError for what is no weight."""
    with suppress(TypeError):
        if _LIGHTEST <= weight <= _HEAVIEST:
            return
    raise ConfigError(f"a weight is a number from {_LIGHTEST} to {_HEAVIEST:g}; to send nothing there, drain it")
