"""labelSelector and fieldSelector of requests, as an API server takes them; what it refuses is a ValueError."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Json = dict[str, Any]
Test = Callable[[dict[str, str]], bool]

_KEY = r"(?P<key>(?:[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?)"
_VALUE = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
_SET = re.compile(rf"{_KEY}\s+(?P<how>in|notin)\s*\((?P<values>\s*{_VALUE}\s*(?:,\s*{_VALUE}\s*)*)\)")
_EQUAL = re.compile(rf"{_KEY}\s*(?P<how>==|=|!=)\s*(?P<value>{_VALUE})")
_THAN = re.compile(rf"{_KEY}\s*(?P<how>[<>])\s*(?P<value>-?\d+)")
_EXISTS = re.compile(rf"(?P<not>!?)\s*{_KEY}")
_FIELD = re.compile(r"(?P<key>[\w./-]+)(?P<how>==|=|!=)(?P<value>[^,=!]*)")

_OF_ALL = ("metadata.name", "metadata.namespace")
_OF_PODS = (
    *_OF_ALL,
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "spec.hostNetwork",
    "status.phase",
    "status.podIP",
    "status.nominatedNodeName",
)


def selection(query: Mapping[str, str], kind: str) -> Callable[[Json], bool]:
    """Whether a request means an object. Raises ValueError with what the API server says of a selector."""
    labels = [_label(part) for part in _parts(query.get("labelSelector", ""))]
    fields = [_field(part, kind) for part in _parts(query.get("fieldSelector", ""))]

    def matches(value: Json) -> bool:
        own = value["metadata"].get("labels") or {}
        return all(each(own) for each in labels) and all(each(value) for each in fields)

    return matches


def _parts(text: str) -> Iterator[str]:
    if text.strip():
        yield from map(str.strip, re.split(r",(?![^(]*\))", text))


def _label(part: str) -> Test:
    if found := _SET.fullmatch(part):
        values = {value.strip() for value in found["values"].split(",")}
        return _in(found["key"], values, found["how"] == "in")
    if found := _EQUAL.fullmatch(part):
        return _in(found["key"], {found["value"]}, found["how"] != "!=")
    if found := _THAN.fullmatch(part):
        return _than(found["key"], found["how"] == ">", int(found["value"]))
    if found := _EXISTS.fullmatch(part):
        return _exists(found["key"], not found["not"])
    raise ValueError(f"unable to parse requirement: found {part!r}")


def _in(key: str, values: set[str], wanted: bool) -> Test:
    # As Kubernetes has it, an object without the label is not equal to any value.
    return lambda own: (own.get(key) in values) == wanted


def _than(key: str, greater: bool, bound: int) -> Test:
    def matches(own: dict[str, str]) -> bool:
        value = own.get(key, "")
        return value.isdecimal() and (int(value) > bound if greater else int(value) < bound)

    return matches


def _exists(key: str, wanted: bool) -> Test:
    return lambda own: (key in own) == wanted


def _field(part: str, kind: str) -> Callable[[Json], bool]:
    found = _FIELD.fullmatch(part)
    if found is None:
        raise ValueError(f"invalid selector: '{part}'; can't understand '{part}'")
    if found["key"] not in (_OF_PODS if kind == "Pod" else _OF_ALL):
        raise ValueError(f"field label not supported: {found['key']}")
    of, _, name = found["key"].partition(".")
    return lambda value: (str(value.get(of, {}).get(name, "")) == found["value"]) == (found["how"] != "!=")
