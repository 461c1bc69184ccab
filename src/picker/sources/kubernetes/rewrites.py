"""The InferenceModelRewrites of a pool, and the rules that follow from them.

Reads and checks; which rule counts for a request is `picker.rewrites`' business. Pure. As in llm-d the oldest object
comes first, then the order of its rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from picker.rewrites import Rule, build_rule, match_fault, targets_fault
from picker.sources.kubernetes.objectives import ours
from picker.sources.kubernetes.objects import POLICY_GROUPS, Rewrite
from picker.sources.kubernetes.objects import Rule as Written


class Rewrites:
    """The rules of all rewrites that are valid. pools: those whose rewrites count; a name that two groups have is that
    of the first. on_change: told all rules whenever they may have changed.
    """

    def __init__(self, pools: frozenset[str], groups: tuple[str, ...] = POLICY_GROUPS) -> None:
        self.rules: tuple[Rule, ...] = ()
        self.on_change: Callable[[Sequence[Rule]], None] = _nobody_asks
        self._pools = pools
        self._by_group: dict[str, dict[str, Rewrite]] = {group: {} for group in groups}

    def put(self, group: str, rewrite: Rewrite) -> str | None:
        """It is there, or has changed. Returns what is wrong with it, in plain words; then all of it is left out."""
        self._by_group[group].pop(rewrite.metadata.name, None)
        problem = None
        if ours(rewrite.spec.pool_ref, self._pools):
            problem = fault(rewrite)
            if problem is None:
                self._by_group[group][rewrite.metadata.name] = rewrite
        self._changed()
        return problem

    def drop(self, group: str, name: str) -> None:
        if self._by_group[group].pop(name, None) is not None:
            self._changed()

    def _changed(self) -> None:
        self.rules = tuple(rule for rewrite in self._effective() for rule in _rules(rewrite))
        self.on_change(self.rules)

    def _effective(self) -> list[Rewrite]:
        merged = {name: each for group in reversed(self._by_group.values()) for name, each in group.items()}
        return sorted(merged.values(), key=lambda each: (each.metadata.creation_timestamp or "", each.metadata.name))


def fault(rewrite: Rewrite) -> str | None:
    """The first thing that is wrong with a rewrite; None when it is valid."""
    return next((problem for rule in rewrite.spec.rules or () for problem in _faults(rule)), None)


def _faults(rule: Written) -> Iterator[str]:
    models = [match.model for match in rule.matches or () if match.model is not None]
    problems = [*(match_fault(model.type, model.value) for model in models), targets_fault(_targets(rule))]
    yield from (problem for problem in problems if problem is not None)


def _rules(rewrite: Rewrite) -> Iterator[Rule]:
    for rule in rewrite.spec.rules or ():
        matches = [None if match.model is None else match.model.value for match in rule.matches or ()]
        yield build_rule(rewrite.metadata.name, matches, _targets(rule))


def _targets(rule: Written) -> list[tuple[str, int | None]]:
    return [(target.model_rewrite, target.weight) for target in rule.targets or ()]


def _nobody_asks(rules: Sequence[Rule]) -> None:
    """While the rules are read and checked only."""
