"""All objects that are known of a scope, the facts that follow from them, and what is wrong with them.

Knows no API server and waits for nothing: reflectors bring objects, the facts go to `emit` at once. Whoever runs the
reflectors asks `queries` which pods to follow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from picker.sources.kubernetes.conditions import Conditions
from picker.sources.kubernetes.groups import Groups
from picker.sources.kubernetes.members import Member, members_of_slice
from picker.sources.kubernetes.objectives import Objectives
from picker.sources.kubernetes.objects import H2C, EndpointSlice, Pod, Pool, Rewrite
from picker.sources.kubernetes.overlaps import Overlaps
from picker.sources.kubernetes.rewrites import Rewrites
from picker.sources.kubernetes.roster import Roster
from picker.sources.kubernetes.scope import PODS, Scope, of_pool, of_service
from picker.types import Fact


class Catalogue:
    """emit: where facts go. objectives: live priorities by name, with those given. rewrites: live rules."""

    def __init__(self, scope: Scope, emit: Callable[[Fact], None], objectives: Mapping[str, int] | None = None) -> None:
        self.scope = scope
        self.objectives = Objectives(frozenset(scope.pools), objectives)
        self.rewrites = Rewrites(frozenset(scope.pools))
        self.conditions = Conditions()
        self.roster = Roster()
        self._emit = emit
        self._pools: dict[str, Pool] = {}
        self._overlaps = Overlaps()
        self._complete: set[str] = set()
        self._groups: defaultdict[str, Groups] = defaultdict(Groups)  # by origin
        self._slices: dict[str, set[str]] = {of_service(name): set() for name in scope.services}
        if scope.selector:
            self.roster.open(PODS, scope.ports)

    @property
    def queries(self) -> Mapping[str, str]:
        """Origin -> the labels of the pods that it selects; without the pools that are not known."""
        pools = {of_pool(name): self._pools[name].query for name in self.scope.pools if name in self._pools}
        return pools | ({PODS: self.scope.selector} if self.scope.selector else {})

    def names(self, origin: str) -> Iterable[str]:
        """The pods known of an origin."""
        return [*(member.name for member in self.roster.members(origin)), *self._groups[origin].workers]

    def listed(self, origin: str) -> None:
        """All that it has to tell has been told; "pools" for the pools themselves."""
        self._complete.add(origin)
        for each in self.scope.origins if origin == "pools" else (origin,):
            self._look_at(each)

    def _tell(self, facts: Iterable[Fact]) -> None:
        for fact in facts:
            self._emit(fact)

    # --- pools ---

    def put_pool(self, pool: Pool) -> None:
        name = pool.metadata.name
        before, self._pools[name] = self._pools.get(name), pool
        if name in self.scope.pools:
            key = of_pool(name)
            self._tell(self.roster.open(key, pool.ports, order=(self.scope.pools.index(name),)))
            self.conditions.note(f"{key}/protocol", _spoken(pool))
            if before is None or before.selector != pool.selector:
                self._complete.discard(key)  # who is selected is not known yet
            self._look_at(key)
        if before is None or before.selector != pool.selector:
            self._compare_all()

    def drop_pool(self, name: str) -> None:
        if self._pools.pop(name, None) is None:
            return
        if name in self.scope.pools:
            key = of_pool(name)
            for pod in self.names(key):
                self.conditions.forget(f"pod/{pod}")
            self._tell(self.roster.close(key))
            self._groups.pop(key, None)
            self._complete.discard(key)
            self._look_at(key)
        self._compare_all()

    def _compare_all(self) -> None:
        for name in self.scope.pools:
            for member in self.roster.members(of_pool(name)):
                self._compare(member.name, member.labels)
        self._say_overlaps()

    def _compare(self, pod: str, labels: Mapping[str, str] | None) -> None:
        """Note which pools select a pod; labels None: it is gone."""
        selecting = [] if labels is None else [name for name, pool in self._pools.items() if pool.selects(labels)]
        first = next((name for name in self.scope.pools if name in selecting), None)
        self._overlaps.set(pod, [] if first is None else [(first, name) for name in selecting if name != first])

    def _say_overlaps(self) -> None:
        for (ours, theirs), problem in self._overlaps.words().items():
            self.conditions.note(f"pool/{ours}/also-in/{theirs}", problem)

    # --- pods ---

    def put_pod(self, origin: str, pod: Pod) -> None:
        member = self._groups[origin].put(pod)
        if member is None or member.name != pod.metadata.name:  # a worker: no server of its own
            self._forget_pod(origin, pod.metadata.name)
        if member is not None:
            self._put_member(origin, member)

    def drop_pod(self, origin: str, name: str) -> None:
        leader = self._groups[origin].drop(name)
        self._forget_pod(origin, name)
        if leader is not None and leader.name != name:
            self._put_member(origin, leader)

    def _put_member(self, origin: str, member: Member) -> None:
        self._tell(self.roster.put(origin, member))
        self.conditions.note(f"pod/{member.name}", "; ".join(member.notes) or None)
        self._after_pod(origin, member.name, member.labels)

    def _forget_pod(self, origin: str, name: str) -> None:
        self._tell(self.roster.drop(origin, name))
        self.conditions.forget(f"pod/{name}")
        self._after_pod(origin, name, None)

    def _after_pod(self, origin: str, name: str, labels: Mapping[str, str] | None) -> None:
        if len(self._pools) > 1:
            self._compare(name, labels)
            self._say_overlaps()
        self._look_at(origin)

    # --- slices ---

    def put_slice(self, service: str, found: EndpointSlice) -> None:
        key = self._slice(service, found.metadata.name)
        members = members_of_slice(found, self.scope.ports)
        # Of a server with an address of each family, the IPv4 one counts.
        self.roster.open(key, order=(found.address_type != "IPv4", found.metadata.name))
        self._slices[of_service(service)].add(key)
        for member in members:
            self._tell(self.roster.put(key, member))
        here = {member.name for member in members}
        for name in [name for name in self.names(key) if name not in here]:
            self._tell(self.roster.drop(key, name))
        self._look_at(of_service(service))

    def drop_slice(self, service: str, name: str) -> None:
        key = self._slice(service, name)
        self._slices[of_service(service)].discard(key)
        self._tell(self.roster.close(key))
        self._look_at(of_service(service))

    def _slice(self, service: str, name: str) -> str:
        return f"{of_service(service)}/{name}"

    # --- policies ---

    def put_rewrite(self, group: str, rewrite: Rewrite) -> None:
        problem = self.rewrites.put(group, rewrite)
        about = f"rewrite/{rewrite.metadata.name}"
        self.conditions.note(about, None if problem is None else f"{problem}: all of it is left out")

    def drop_rewrite(self, group: str, name: str) -> None:
        self.rewrites.drop(group, name)
        self.conditions.forget(f"rewrite/{name}")

    # --- what is wrong ---

    def _look_at(self, origin: str) -> None:
        """Say what is wrong with an origin as a whole, once all of it is known."""
        self.conditions.note(origin, self._trouble(origin))

    def _trouble(self, origin: str) -> str | None:
        kind, _, name = origin.partition("/")
        if kind == "pool" and name not in self._pools:
            missing = f"there is no InferencePool of this name ({self.scope.group}) in namespace {self.scope.namespace}"
            return missing if "pools" in self._complete else None
        if origin not in self._complete:
            return None
        keys = self._slices.get(origin, {origin})
        if not any(map(self._has_members, keys)):
            return f"it has no pods{self._asked(origin)}"
        return None if any(map(self.roster.serves, keys)) else "none of its pods is ready"

    def _has_members(self, origin: str) -> bool:
        return next(iter(self.roster.members(origin)), None) is not None

    def _asked(self, origin: str) -> str:
        query = self.queries.get(origin)
        return "" if query is None else f": none in namespace {self.scope.namespace} has the labels {query}"


def _spoken(pool: Pool) -> str | None:
    if pool.app_protocol != H2C:
        return None
    return f"its appProtocol is {H2C}: gRPC requests are not read, and routed by load alone"
