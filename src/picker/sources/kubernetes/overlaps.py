"""Which pools select the same pods, in words. Pure."""

from __future__ import annotations

from collections.abc import Iterable


class Overlaps:
    """Pods that two pools select, by the pair: the first is the one that they count to here."""

    def __init__(self) -> None:
        self._pods: dict[tuple[str, str], dict[str, None]] = {}
        self._pairs: dict[str, frozenset[tuple[str, str]]] = {}

    def set(self, pod: str, pairs: Iterable[tuple[str, str]]) -> None:
        """All that is true of a pod; nothing for one that is gone."""
        now, before = frozenset(pairs), self._pairs.pop(pod, frozenset())
        for pair in before - now:
            del self._pods[pair][pod]
        for pair in now:
            self._pods.setdefault(pair, {})[pod] = None
        if now:
            self._pairs[pod] = now

    def words(self) -> dict[tuple[str, str], str | None]:
        """What to say of each pair that ever shared a pod; None where they do not any more."""
        return {pair: _words(*pair, pods) for pair, pods in self._pods.items()}


def _words(ours: str, theirs: str, pods: dict[str, None]) -> str | None:
    if not pods:
        return None
    # One example that stays while it holds, and no count: words that change with every pod are noise.
    example = next(iter(pods))
    return f"{theirs} selects pods of {ours}, too (such as {example}): what it sends there shows in their metrics only"
