"""Which model a request is to get instead of the one it names: rules with weighted targets, whoever has made them.

Chooses and counts; nobody here changes a request. Pure: numbers are drawn by who has a generator. As in llm-d a target
that a gateway has named in a header wins over every rule, a rule that names the model over one for all models, and
among equals the first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

# By its new and old name: the new one counts.
HEADERS = ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")

MAX_WEIGHT = 1_000_000
_OTHER = "other"
# Of models that are shown by name where a rule is for all: clients can make up any number, of any length.
_NAMES = 1000
_LONGEST = 256


@dataclass(frozen=True, slots=True)
class Rule:
    """name: of what it is a part of, for people. models: those it is for, None for all. until: cumulated weights."""

    name: str
    models: frozenset[str] | None
    targets: tuple[str, ...]
    until: tuple[int, ...]

    def at(self, point: float) -> str:
        """The target at a point from 0 up to 1; each has a part as large as its weight."""
        return self.targets[min(bisect_right(self.until, point * self.until[-1]), len(self.targets) - 1)]


@dataclass(frozen=True, slots=True)
class Choice:
    """The model to ask for, and by whose word: the name of a rewrite, or of the header that said it."""

    model: str
    by: str


def build_rule(name: str, matches: Sequence[str | None], targets: Sequence[tuple[str, int | None]]) -> Rule:
    """A rule that has no fault. matches: models, None for any; none at all is for any, too. targets: with weights."""
    models = None if not matches or None in matches else frozenset(each for each in matches if each is not None)
    until = tuple(accumulate(1 if weight is None else weight for _, weight in targets))
    return Rule(name, models, tuple(model for model, _ in targets), until)


def match_fault(kind: str, value: str) -> str | None:
    """What is wrong with what a rule matches a model by, in plain words."""
    if kind != "Exact":
        return f"a rule matches models by {kind!r}, and only Exact is known"
    return None if value else "a rule matches a model without a name"


def targets_fault(targets: Sequence[tuple[str, int | None]]) -> str | None:
    """The first thing that is wrong with a rule's targets, in plain words."""
    if not targets:
        return "a rule has no targets"
    for model, weight in targets:
        if not model:
            return "a target names no model"
        if not model.isprintable():
            return f"the target {model!r} is no model's name"
        if weight is not None and not 1 <= weight <= MAX_WEIGHT:
            return f"the weight {weight} of {model!r} is not from 1 to {MAX_WEIGHT:,}"
    weighted = sum(weight is not None for _, weight in targets)
    return "some targets of a rule have a weight and others have none" if 0 < weighted < len(targets) else None


class Rewriting:
    """The rules in force, live: what is put applies to the next request.

    draw: a number from 0 up to 1, uniformly random. origins: who makes rules; those of the first come first.
    heeds_header: whether a header of the request may name its target. counts: of choices that were followed, by
    rewrite, model asked for and target. on_put: told who has put which rules, for others who apply them. aliases: the
    models that rules name, in order, each with the different targets of its rule.
    """

    def __init__(self, draw: Callable[[], float], origins: tuple[str, ...], *, heeds_header: bool = False) -> None:
        self.heeds_header = heeds_header
        self.counts: dict[tuple[str, str, str], int] = {}
        self.on_put: Callable[[str, Sequence[Rule]], None] = lambda origin, rules: None
        self.aliases: Mapping[str, tuple[str, ...]] = {}
        self._draw = draw
        self._rules: dict[str, tuple[Rule, ...]] = dict.fromkeys(origins, ())
        self._exact: dict[str, Rule] = {}
        self._general: Rule | None = None
        self._shown: set[str] = set()

    def put(self, origin: str, rules: Sequence[Rule]) -> None:
        """All that an origin has now, in its own order."""
        self._rules[origin] = tuple(rules)
        ordered = [rule for each in self._rules.values() for rule in each]
        self._exact = {model: rule for rule in reversed(ordered) for model in rule.models or ()}
        self._general = next((rule for rule in ordered if rule.models is None), None)
        self.aliases = {model: tuple(dict.fromkeys(rule.targets)) for model, rule in sorted(self._exact.items())}
        self.on_put(origin, self._rules[origin])

    def choose(self, model: str | None, headers: Mapping[str, str]) -> Choice | None:
        """What to ask for instead; None where nobody speaks of this model. headers: in lower case.

        A request that names no model is for rules of all models.
        """
        if self.heeds_header and (said := headers.get(HEADERS[0]) or headers.get(HEADERS[1])):
            return Choice(said, HEADERS[0]) if said.isprintable() else None
        rule = self._general if model is None else self._exact.get(model, self._general)
        return None if rule is None else Choice(rule.at(self._draw()), rule.name)

    def count(self, model: str | None, choice: Choice) -> None:
        """A choice has been followed. model: that was asked for."""
        key = (choice.by, self._shown_name(model or ""), self._shown_name(choice.model))
        self.counts[key] = self.counts.get(key, 0) + 1

    def _shown_name(self, model: str) -> str:
        if model not in self._shown:
            if (len(self._shown) >= _NAMES or len(model) > _LONGEST) and model not in self._exact:
                return _OTHER
            self._shown.add(model)
        return model
