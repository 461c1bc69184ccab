"""Plays for an `Exchange`, after mitmproxy's: events go in with `>>`, actions must come out with `<<`.

    assert (
        Playbook(exchange)
        >> RequestHead("GET", "/v1/models", {}, end=True)
        << Submit
        >> Decided(decision)
        << Like(Forward, bodyless=True)
    )

All actions count, in their order: one too many fails the play as one missing does, with a diff. A class stands for any
action of its kind, `Like` for one with some of its fields. `unasserted` finds plays written and never asserted.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Self, TypeVar

import msgspec

from picker.exchange import Action, Event, Exchange

T = TypeVar("T")


class Like:
    """Any value of this kind in which the named fields are equal to these, or like them."""

    def __init__(self, kind: type[Any], /, **fields: Any) -> None:
        self.kind = kind
        self.fields = fields

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={_text(value)}" for name, value in self.fields.items())
        return f"{self.kind.__name__}({inside}, ...)" if inside else f"{self.kind.__name__}(...)"


# Held here and not noticed in `__del__`: an error raised there comes at any time and stops nothing.
_written: dict[int, Playbook] = {}


def unasserted() -> list[Playbook]:
    """The plays written since the last call and not asserted; call it after every test."""
    forgotten = list(_written.values())
    _written.clear()
    return forgotten


class Playbook:
    """A play with one exchange. Asserting it plays what was written since the last time."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.actions: list[Action] = []
        self._lines: list[tuple[str, Any]] = []

    def __rshift__(self, event: Event) -> Self:
        return self._write(">>", event)

    def __lshift__(self, action: Action | type[Any] | Like) -> Self:
        return self._write("<<", Like(action) if isinstance(action, type) else action)

    def _write(self, sign: str, value: Any) -> Self:
        self._lines.append((sign, value))
        _written[id(self)] = self
        return self

    def __bool__(self) -> bool:
        _written.pop(id(self), None)
        expected, self._lines = self._lines, []
        actual = self._play(expected)
        if len(actual) != len(expected) or not all(map(_agree, expected, actual)):
            raise AssertionError("the play went otherwise:\n" + _difference(expected, actual))
        return True

    def last(self, kind: type[T]) -> T:
        """The latest action of this kind."""
        return next(action for action in reversed(self.actions) if isinstance(action, kind))

    def _play(self, expected: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        actual: list[tuple[str, Any]] = []
        for sign, event in expected:
            if sign == ">>":
                actions = self.exchange.receive(event)
                self.actions += actions
                actual += [(">>", event), *(("<<", action) for action in actions)]
        return actual


def _agree(expected: tuple[str, Any], actual: tuple[str, Any]) -> bool:
    return expected[0] == actual[0] and _alike(expected[1], actual[1])


def _alike(expected: Any, actual: Any) -> bool:
    if not isinstance(expected, Like):
        return bool(expected == actual)
    return isinstance(actual, expected.kind) and all(
        _alike(value, getattr(actual, name)) for name, value in expected.fields.items()
    )


def _difference(expected: list[tuple[str, Any]], actual: list[tuple[str, Any]]) -> str:
    """A line for every event and action; what agrees with a placeholder is shown as it came."""
    wanted = []
    for line in expected:
        met = next((each for each in actual if _agree(line, each)), line)
        wanted.append(f"{met[0]} {_text(met[1])}")
    return "\n".join(difflib.ndiff(wanted, [f"{sign} {_text(value)}" for sign, value in actual]))


def _text(value: Any) -> str:
    """Like repr, with the bytes that a repr keeps to itself: a test must show in what two bodies differ."""
    if isinstance(value, msgspec.Struct):
        names = value.__struct_fields__
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(field.name for field in dataclasses.fields(value))
    else:
        return repr(value)
    return f"{type(value).__name__}({', '.join(f'{name}={_text(getattr(value, name))}' for name in names)})"
