"""Priorities by the names that requests say: the InferenceObjectives of the pools that are served here.

Pure. The mapping is a live one: who holds it sees every change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from picker.sources.kubernetes.objects import POLICY_GROUPS, Objective, PoolRef


class Objectives(Mapping[str, int]):
    """Name -> priority. pools: those whose objectives count; a name that two groups have is that of the first.

    fixed: those of the configuration, which win over all others.
    """

    def __init__(
        self, pools: frozenset[str], fixed: Mapping[str, int] | None = None, groups: tuple[str, ...] = POLICY_GROUPS
    ) -> None:
        self._pools = pools
        self._fixed = dict(fixed or {})
        self._by_group: dict[str, dict[str, int]] = {group: {} for group in groups}
        self._merged = dict(self._fixed)

    def __getitem__(self, name: str) -> int:
        return self._merged[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged)

    def __len__(self) -> int:
        return len(self._merged)

    def put(self, group: str, objective: Objective) -> None:
        """It is there, or has changed; one of another pool does not count."""
        if not ours(objective.spec.pool_ref, self._pools):
            self.drop(group, objective.metadata.name)
            return
        self._by_group[group][objective.metadata.name] = objective.spec.priority or 0
        self._merge()

    def drop(self, group: str, name: str) -> None:
        if self._by_group[group].pop(name, None) is not None:
            self._merge()

    def _merge(self) -> None:
        groups = reversed(self._by_group.values())
        self._merged = {name: each for group in groups for name, each in group.items()} | self._fixed


def ours(ref: PoolRef, pools: frozenset[str]) -> bool:
    """Whether an object is about one of these pools, by their names; both groups of pools share them."""
    return ref.kind == "InferencePool" and ref.name in pools
