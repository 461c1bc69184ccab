"""Service-level objectives and goodput: which answers were good enough, and how many of them a second.

Pure: reads `Requests`. An answer is good when it came and met every objective (vLLM's and inference-perf's goodput);
a failed request is never good.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from picker.errors import ConfigError
from picker.load.measured import Bools, Requests

# Of the requests, for a rate to count as held (GuideLLM's and inference-perf's capacity goes by 90, 95 or 99 %).
ATTAINMENT = 0.95

_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3}
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}


@dataclass(frozen=True, slots=True)
class Slo:
    """The longest that is good enough, in seconds of the pods; None: any length. tpot: of a request's own mean."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """`ttft=0.5,tpot=50ms,e2e=10`. Raises ConfigError with what is wrong with it."""
        limits: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in _NAMES:
                raise ConfigError(f"--slo: {name!r} is not one of {', '.join(_NAMES)}")
            limits[name] = _seconds(name, value)
        if not limits:
            raise ConfigError("--slo names no objective; write for example ttft=0.5,tpot=0.05,e2e=10")
        return cls(**limits)

    def objectives(self) -> Iterator[tuple[str, float]]:
        for field in fields(self):
            limit = getattr(self, field.name)
            if limit is not None:
                yield field.name, limit

    def __str__(self) -> str:
        return ", ".join(f"{_NAMES[name]} ≤ {limit:g} s" for name, limit in self.objectives())


def _seconds(name: str, value: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(s|ms|)", value.strip())
    if not found or float(found[1]) == 0:
        raise ConfigError(f"--slo: {name}={value} is no time; write for example {name}=0.5 or {name}=500ms")
    return float(found[1]) * _UNITS[found[2]]


@dataclass(frozen=True, slots=True)
class Goodput:
    """Good answers. share: of all requests. by_objective: share that met each. Rates are per second of the run."""

    requests_per_s: float
    output_tokens_per_s: float
    share: float
    by_objective: dict[str, float]


def met(requests: Requests, name: str, limit: float) -> Bools:
    """Which requests met one objective. An answer of one token has no TPOT to miss."""
    times = getattr(requests, name)
    within = times <= limit
    return np.asarray(requests.ok & (within | (np.isnan(times) if name == "tpot" else False)), dtype=bool)


def good(requests: Requests, slo: Slo) -> Bools:
    """Which requests met every objective."""
    result = requests.ok
    for name, limit in slo.objectives():
        result = result & met(requests, name, limit)
    return result


def goodput(requests: Requests, slo: Slo, duration: float) -> Goodput | None:
    """None where nothing was sent. duration: seconds that the requests took altogether."""
    if not len(requests) or duration <= 0:
        return None
    chosen = good(requests, slo)
    return Goodput(
        requests_per_s=float(chosen.sum()) / duration,
        output_tokens_per_s=float(requests.output_tokens[chosen].sum()) / duration,
        share=float(chosen.mean()),
        by_objective={name: float(met(requests, name, limit).mean()) for name, limit in slo.objectives()},
    )


# --- the knee ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Knee:
    """Between which rates a server stops keeping the objectives. held, missed: arrivals a second, None: none did."""

    held: float | None
    missed: float | None

    def __str__(self) -> str:
        goal = f"{ATTAINMENT:.0%} of requests"
        if self.held is None:
            return f"no rate kept the objectives for {goal}; {self.missed:g}/s is the lowest that was tried"
        if self.missed is None:
            return f"every rate kept the objectives for {goal}; {self.held:g}/s is the highest that was tried"
        return f"kept for {goal} at {self.held:g}/s, missed at {self.missed:g}/s"


def knee(shares: Sequence[tuple[float, float]]) -> Knee | None:
    """shares: (rate, share of good requests). The first rate that misses counts, whatever happens above it."""
    held: float | None = None
    for rate, share in sorted(shares):
        if share < ATTAINMENT:
            return Knee(held, rate)
        held = rate
    return None if held is None else Knee(held, None)
