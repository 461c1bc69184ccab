"""LeaderWorkerSet groups: several pods that are one engine, whose leader answers, and which serves only as a whole.

Pure. Of workers nothing is known where the pool selects leaders only; then the leader's own readiness counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from picker.sources.kubernetes.members import Member, Standing, is_worker, member_of_pod
from picker.sources.kubernetes.objects import Pod

_SET, _GROUP = "leaderworkerset.sigs.k8s.io/name", "leaderworkerset.sigs.k8s.io/group-index"
_SIZE = "leaderworkerset.sigs.k8s.io/size"

Key = tuple[str, str]


@dataclass(slots=True)
class _Group:
    """leader: as it is by itself, None where it is not known. size: pods that the group should have.

    selected: whether its workers are among the pods that are followed.
    """

    leader: Member | None = None
    workers: dict[str, Standing] = field(default_factory=dict)
    size: int | None = None
    selected: bool = False


class Groups:
    """Of one origin's pods. `put` and `drop` return the leader whose standing may have changed by that."""

    def __init__(self) -> None:
        self._groups: dict[Key, _Group] = {}
        self._where: dict[str, Key] = {}

    def put(self, pod: Pod) -> Member | None:
        """A pod is there or has changed: the member to go by, itself or its leader; None where there is none yet."""
        key = _key(pod)
        if key is None:
            return None if is_worker(pod) else member_of_pod(pod)
        name, group = pod.metadata.name, self._groups.setdefault(key, _Group())
        self._where[name] = key
        group.size = _size(pod) or group.size
        if is_worker(pod):
            group.workers[name], group.selected = member_of_pod(pod).standing, True
        else:
            group.leader = member_of_pod(pod)
        return _whole(group)

    @property
    def workers(self) -> list[str]:
        """All that are known."""
        return [name for group in self._groups.values() for name in group.workers]

    def drop(self, name: str) -> Member | None:
        """A pod is gone: the leader of its group, where that is another pod."""
        key = self._where.pop(name, None)
        if key is None:
            return None
        group = self._groups[key]
        group.workers.pop(name, None)
        if group.leader is not None and group.leader.name == name:
            group.leader = None
        if group.leader is None and not group.workers:
            del self._groups[key]
        return _whole(group)


def _key(pod: Pod) -> Key | None:
    labels = pod.metadata.labels or {}
    found, number = labels.get(_SET), labels.get(_GROUP)
    return None if found is None or number is None else (found, number)


def _size(pod: Pod) -> int | None:
    text = (pod.metadata.annotations or {}).get(_SIZE, "")
    return int(text) if text.isdecimal() and len(text) < 6 else None


def _whole(group: _Group) -> Member | None:
    """The leader; not ready while one of its workers is not, or is missing."""
    leader = group.leader
    if leader is None or leader.standing is not Standing.READY or not (lacks := _lacks(group)):
        return leader
    return replace(leader, standing=Standing.NOT_READY, notes=(*leader.notes, lacks))


def _lacks(group: _Group) -> str | None:
    if not group.selected:
        return None
    unready = sorted(name for name, standing in group.workers.items() if standing is not Standing.READY)
    if unready:
        return f"is ready and waits for its workers: {', '.join(unready)}"
    missing = (group.size or 0) - 1 - len(group.workers)
    return f"is ready and waits for {missing} more workers" if missing > 0 else None
