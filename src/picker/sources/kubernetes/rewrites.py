"""Which model a request is to get instead of the one it names: the InferenceModelRewrites of a pool.

Reads, checks and chooses; nobody here changes a request. Pure: whoever chooses brings a number. As in llm-d an exact
match wins over a rule for all models, then the oldest object, then the order of its rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from picker.sources.kubernetes.objectives import ours
from picker.sources.kubernetes.objects import POLICY_GROUPS, Rewrite, Rule

MAX_WEIGHT = 1_000_000


@dataclass(frozen=True, slots=True)
class _Choice:
    """One rule as it is applied. models: those it is for, None for all. until: cumulated weights by target."""

    models: frozenset[str] | None
    targets: tuple[str, ...]
    until: tuple[int, ...]

    def at(self, point: float) -> str:
        reached = point * self.until[-1]
        return next(target for target, until in zip(self.targets, self.until, strict=True) if reached < until)


class Rewrites:
    """The rules of all rewrites that are valid. pools: those whose rewrites count."""

    def __init__(self, pools: frozenset[str], groups: tuple[str, ...] = POLICY_GROUPS) -> None:
        self._pools = pools
        self._by_group: dict[str, dict[str, Rewrite]] = {group: {} for group in groups}
        self._choices: tuple[_Choice, ...] = ()

    def __len__(self) -> int:
        return len(self._choices)

    def put(self, group: str, rewrite: Rewrite) -> str | None:
        """It is there, or has changed. Returns what is wrong with it, in plain words; then all of it is left out."""
        self._by_group[group].pop(rewrite.metadata.name, None)
        problem = None
        if ours(rewrite.spec.pool_ref, self._pools):
            problem = fault(rewrite)
            if problem is None:
                self._by_group[group][rewrite.metadata.name] = rewrite
        self._choices = tuple(_ordered(self._effective()))
        return problem

    def drop(self, group: str, name: str) -> None:
        if self._by_group[group].pop(name, None) is not None:
            self._choices = tuple(_ordered(self._effective()))

    def model(self, model: str, point: float) -> str | None:
        """The model to ask for instead; None where no rule speaks of this one. point: 0 up to 1, uniformly random."""
        exact = next((each for each in self._choices if each.models is not None and model in each.models), None)
        found = exact or next((each for each in self._choices if each.models is None), None)
        return None if found is None else found.at(point)

    def _effective(self) -> list[Rewrite]:
        merged = {name: each for group in reversed(self._by_group.values()) for name, each in group.items()}
        return sorted(merged.values(), key=lambda each: (each.metadata.creation_timestamp or "", each.metadata.name))


def fault(rewrite: Rewrite) -> str | None:
    """The first thing that is wrong with a rewrite; None when it is valid."""
    return next((problem for rule in rewrite.spec.rules or () for problem in _faults(rule)), None)


def _faults(rule: Rule) -> Iterator[str]:
    for match in rule.matches or ():
        if match.model is not None and match.model.type != "Exact":
            yield f"a rule matches models by {match.model.type!r}, and only Exact is known"
        if match.model is not None and not match.model.value:
            yield "a rule matches a model without a name"
    targets = rule.targets or []
    if not targets:
        yield "a rule has no targets"
    for target in targets:
        if not target.model_rewrite:
            yield "a target names no model"
        if target.weight is not None and not 1 <= target.weight <= MAX_WEIGHT:
            yield f"the weight {target.weight} of {target.model_rewrite!r} is not from 1 to {MAX_WEIGHT:,}"
    weighted = sum(target.weight is not None for target in targets)
    if 0 < weighted < len(targets):
        yield "some targets of a rule have a weight and others have none"


def _ordered(rewrites: Sequence[Rewrite]) -> Iterator[_Choice]:
    for rewrite in rewrites:
        for rule in rewrite.spec.rules or ():
            named = [match.model.value for match in rule.matches or () if match.model is not None]
            general = not rule.matches or len(named) < len(rule.matches)
            targets = rule.targets or []
            until, total = [], 0
            for target in targets:
                total += 1 if target.weight is None else target.weight
                until.append(total)
            models = None if general else frozenset(named)
            yield _Choice(models, tuple(each.model_rewrite for each in targets), tuple(until))
