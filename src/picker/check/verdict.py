"""What a check is and what comes of it. Owns the words; runs nothing and knows no protocol.

A check never judges by what the component under test says of itself: evidence is the frames on the wire, what reached
the endpoints, and what the client got.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S")


class Tier(enum.Enum):
    """What a check needs: files; an endpoint picker's gRPC port; a real Envoy around it; engines, or an admin port; a
    cluster.
    """

    T0 = "T0"
    T1 = "T1"
    T2 = "T2"
    T3 = "T3"
    T4 = "T4"


class Level(enum.Enum):
    """MUST: the endpoint-picker protocol, Envoy's API or safety demands it. SHOULD: a good picker does it."""

    MUST = "must"
    SHOULD = "should"


class Outcome(enum.Enum):
    """SKIP and ERROR never count as passed: the requirement was not exercised, or the check itself broke."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check concludes. why: of a pass it may be empty."""

    outcome: Outcome
    why: str = ""


def passed(why: str = "") -> Finding:
    return Finding(Outcome.PASS, why)


def failed(why: str) -> Finding:
    return Finding(Outcome.FAIL, why)


def skipped(why: str) -> Finding:
    return Finding(Outcome.SKIP, why)


def held(violation: str | None) -> Finding:
    """Passed, unless there is something to complain about."""
    return passed() if violation is None else failed(violation)


@dataclass(frozen=True, slots=True)
class Trace:
    """Evidence in words: what was sent and what came back, in order. Never more than `keep` lines of each."""

    sent: list[str] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
    keep: int = 12

    def send(self, line: str) -> None:
        _note(self.sent, line, self.keep)

    def clear(self) -> None:
        self.sent.clear()
        self.received.clear()

    def receive(self, line: str) -> None:
        _note(self.received, line, self.keep)


def _note(lines: list[str], line: str, keep: int) -> None:
    """Append; beyond `keep` the first half and the latest lines stay."""
    lines.append(line)
    if len(lines) > keep:
        del lines[keep // 2]


@dataclass(frozen=True, slots=True)
class Check(Generic[S]):
    """One requirement and how to try it on a subject S.

    id: family and aspect, "EPP-3.list". source: where the requirement comes from. variants: setups it runs in, each a
    result of its own; empty for one. limit: seconds after which the check itself is broken.
    """

    id: str
    tier: Tier
    requirement: str
    source: str
    run: Callable[[S], Awaitable[Finding]]
    level: Level = Level.MUST
    variants: tuple[str, ...] = ()
    limit: float = 60.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """A check's result on one subject. variant: the setup, empty where there is one only. seconds: it took."""

    id: str
    tier: Tier
    level: Level
    requirement: str
    source: str
    variant: str
    outcome: Outcome
    why: str
    sent: tuple[str, ...]
    received: tuple[str, ...]
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.id}[{self.variant}]" if self.variant else self.id
