"""Filters by what endpoints are labelled with and by what requests say in their headers; a frozen dataclass each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from picker.core.candidates import context_range, endpoints, header, labels, session_candidate
from picker.core.view import PoolView
from picker.types import BoolArray, Endpoint, Request, Role

ROLE_LABEL = "llm-d.ai/role"
_DECODE = frozenset(("decode", "prefill-decode", "both", "encode-prefill-decode"))
_PREFILL = frozenset(("prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode"))
_ENCODE = frozenset(("encode", "encode-prefill", "encode-prefill-decode"))

OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")


def _mask(answers: Sequence[bool]) -> BoolArray:
    return np.array(answers, dtype=bool)


@dataclass(frozen=True, slots=True)
class ByLabel:
    """Keeps endpoints whose `label` has one of these values (llm-d's `by-label`). allows_no_label: those without it."""

    label: str = ""
    valid_values: Sequence[str] = ()
    allows_no_label: bool = False
    name: str = "by-label"

    def __post_init__(self) -> None:
        if not self.valid_values and not self.allows_no_label:
            raise ValueError("give valid_values, or allows_no_label: true")

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        return _mask([_passes(value, self.valid_values, self.allows_no_label) for value in labels(view, self.label)])


def _passes(value: str | None, valid: Sequence[str] | frozenset[str], without: bool) -> bool:
    return without if value is None else value in valid


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """Keeps endpoints that a Kubernetes label selector selects (llm-d's `label-selector-filter`).

    match_labels: all of these. match_expressions: all of {key, operator, values}; NotIn also keeps who lacks the key.
    """

    match_labels: Mapping[str, str] = field(default_factory=dict)
    match_expressions: Sequence[Mapping[str, object]] = ()
    name: str = "label-selector-filter"

    def __post_init__(self) -> None:
        for expression in self.match_expressions:
            operator, values = expression.get("operator"), expression.get("values") or ()
            if not expression.get("key"):
                raise ValueError("an expression of match_expressions has no key")
            if operator not in OPERATORS:
                raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, got {operator!r}")
            if (operator in ("In", "NotIn")) != bool(values):
                raise ValueError(f"operator {operator} {'has no' if not values else 'takes no'} values")

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        return _mask([self._selects(endpoint.labels) for endpoint in endpoints(view)])

    def _selects(self, labels: Mapping[str, str]) -> bool:
        exact = all(labels.get(key) == value for key, value in self.match_labels.items())
        return exact and all(_meets(labels, expression) for expression in self.match_expressions)


def _meets(labels: Mapping[str, str], expression: Mapping[str, object]) -> bool:
    value, values = labels.get(str(expression["key"])), expression.get("values") or ()
    assert isinstance(values, Sequence)
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case _:
            return value is None


@dataclass(frozen=True, slots=True)
class DecodeRole:
    """Keeps endpoints that may decode: by the label `llm-d.ai/role`, else the endpoint's role; without either, too."""

    name: str = "decode-filter"

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        return _mask([_passes(_role(endpoint), _DECODE, True) for endpoint in endpoints(view)])


@dataclass(frozen=True, slots=True)
class PrefillRole:
    """Keeps endpoints that are there to prefill: by the label `llm-d.ai/role`, else by the endpoint's role."""

    name: str = "prefill-filter"

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        return _mask([_passes(_role(endpoint), _PREFILL, False) for endpoint in endpoints(view)])


@dataclass(frozen=True, slots=True)
class EncodeRole:
    """Keeps endpoints that are there to encode images and sound: by the label `llm-d.ai/role`."""

    name: str = "encode-filter"

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        return _mask([_passes(_role(endpoint), _ENCODE, False) for endpoint in endpoints(view)])


def _role(endpoint: Endpoint) -> str | None:
    label = endpoint.labels.get(ROLE_LABEL)
    return label if label is not None or endpoint.role is Role.BOTH else endpoint.role.value


@dataclass(frozen=True, slots=True)
class ContextLengthRange:
    """Keeps endpoints whose `label` is a range "min-max" around the prompt's tokens, and those without the label."""

    label: str = "llm-d.ai/context-length-range"
    name: str = "context-length-aware"

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        return _mask([self._meant_for(text, view.prompt_tokens) for text in labels(view, self.label)])

    def _meant_for(self, text: str | None, length: float) -> bool:
        if text is None:
            return True
        meant = context_range(text)
        return meant is not None and meant[0] <= length <= meant[1]


@dataclass(frozen=True, slots=True)
class SessionEndpoint:
    """Keeps the endpoint that served this session last, everybody where that is not known or not a candidate.

    token_header: as of the session scorer (llm-d's `session-affinity-filter`).
    """

    token_header: str = ""
    name: str = "session-affinity-filter"

    @property
    def headers(self) -> tuple[str, ...]:
        """The request headers it looks at."""
        return (self.token_header.lower(),) if self.token_header else ()

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        served = session_candidate(view, request, self.token_header)
        return served if served.any() else np.ones(view.n, dtype=bool)


@dataclass(frozen=True, slots=True)
class HeaderSelection:
    """Keeps the endpoints that a header names, a comma list of IP or IP:port; nobody without the header.

    For conformance suites (llm-d's `header-based-testing-filter`): clients get to choose pods.
    """

    header_name: str = "test-epp-endpoint-selection"
    name: str = "header-based-testing-filter"

    @property
    def headers(self) -> tuple[str, ...]:
        """The request headers it looks at."""
        return (self.header_name.lower(),)

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        given = header(request, self.header_name) or ""
        wanted = {item.strip().removeprefix("[").removesuffix("]") for item in given.split(",")} - {""}
        return _mask([_is_named(endpoint.address, wanted) for endpoint in endpoints(view)])


def _is_named(address: str, wanted: set[str]) -> bool:
    return address in wanted or address.removeprefix("[") in wanted or address.rpartition(":")[0].strip("[]") in wanted
