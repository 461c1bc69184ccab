"""The words tests speak in: endpoints, pools, prompts, requests and schedulers with plain defaults, and a clock that
moves only when told. Builds domain objects and decides nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from picker.core.estimate import Ratio
from picker.core.learned import Factors, Learned
from picker.core.pick import Picker, max_score
from picker.core.pool import Pool
from picker.core.profile import Profile
from picker.core.scheduler import Scheduler, Settings
from picker.core.view import PoolView
from picker.prefix.approximate import ApproximateIndex
from picker.prefix.exact import Exact
from picker.runtime import Runtime
from picker.types import Endpoint, EndpointAdded, Fact, Outcome, Request, Role, UInt64Array

NOW = 1000.0
BLOCK_BYTES = 256

Columns = Mapping[str, float]


class ManualClock:
    """Seconds that pass only by `advance`. Called, it tells the time, as `time.monotonic` does."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Ear:
    """Hands every fact that a runtime is told to a listener, those of requests too."""

    def __init__(self, runtime: Runtime, listener: Callable[[Fact], object]) -> None:
        self._listener = listener
        runtime.telemetry.watch(self)

    def fact(self, fact: Fact) -> None:
        self._listener(fact)

    def decision(self, outcome: Outcome, seconds: float, request: Request | None) -> None:
        pass


def endpoint(
    name: str,
    *,
    address: str | None = None,
    models: Iterable[str] = (),
    role: Role = Role.BOTH,
    rank: int | None = None,
) -> Endpoint:
    """An endpoint at "name:8000" unless told otherwise."""
    return Endpoint(name, address or f"{name}:8000", frozenset(models), role, rank=rank)


def pool(*described: Endpoint, **states: int | Columns) -> Pool:
    """A pool of endpoints, as in `pool(a=2, b={"waiting": 1})`: a number is requests in flight, a mapping columns."""
    made = Pool(rows=4)
    for each in described:
        made.add(each, NOW)
    for name, state in states.items():
        row = made.add(endpoint(name), NOW)
        for column, value in ({"inflight": state} if isinstance(state, int) else state).items():
            getattr(made, column)[row] = value
    return made


def view(of: Pool, **known: Any) -> PoolView:
    """A view of everything in the pool, in the order of joining, at `NOW`."""
    rows = np.array([row for row, _ in of], dtype=np.int64)
    return PoolView(of, rows, known.pop("now", NOW), **known)


def learned(
    *,
    rows: int = 64,
    token: float = 1e-3,
    attention: float = 0.0,
    step: float = 0.0,
    sequence: float = 0.0,
    context: float = 0.0,
    output_tokens: float = 0.0,
) -> Learned:
    """Knowledge of a pool that computes 1,000 tokens a second, at once whatever else is said to take time."""
    made = Learned(rows)
    made.prefill.coefficients = np.array([0.0, token, attention, 0.0])
    made.decode.coefficients = np.array([step, sequence, context])
    made.output_tokens = Ratio(output_tokens, prior_weight=1.0, keep=1.0)
    return made


def speeds(of: Factors, factors: Iterable[float]) -> None:
    """Teach rows 0, 1, ... their speeds, of which 1 should be the geometric mean."""
    for row, factor in enumerate(factors):
        for _ in range(400):
            of.add(row, expected=1000.0, took=1000.0 / factor)


def blocks(**segments: int) -> UInt64Array:
    """Chained block hashes of a prompt made of named segments: `blocks(system=40, alice=3)`.

    Two prompts share the hashes of the blocks up to where their segments differ.
    """
    hashes, chain = [], b""
    for name, count in segments.items():
        for number in range(count):
            chain = hashlib.blake2b(chain + f"{name}/{number}".encode(), digest_size=8).digest()
            hashes.append(int.from_bytes(chain))
    return np.array(hashes, dtype=np.uint64)


def request(request_id: int = 1, prompt: UInt64Array | None = None, **changes: Any) -> Request:
    """A streaming request; its prompt is as long as its blocks, or 4,000 bytes (1,000 tokens) without any."""
    hashes = blocks() if prompt is None else prompt
    fields = {
        "model": None,
        "arrived_at": NOW,
        "block_hashes": hashes,
        "prompt_bytes": hashes.size * BLOCK_BYTES or 4000,
    }
    return Request(request_id, **(fields | changes))


def scheduler(
    *endpoints: str | Endpoint,
    profile: Profile | None = None,
    picker: Picker = max_score,
    exact: Exact | None = None,
    **settings: Any,
) -> Scheduler:
    """A scheduler that knows these endpoints since `NOW`."""
    chosen = Settings(**({"block_bytes": BLOCK_BYTES, "index_budget": 1 << 20} | settings))
    made = Scheduler(chosen, ApproximateIndex(chosen.index_budget), profile, picker, exact)
    for each in endpoints:
        made.apply(EndpointAdded(endpoint(each) if isinstance(each, str) else each), NOW)
    return made
