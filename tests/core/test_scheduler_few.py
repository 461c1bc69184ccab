"""Among a handful of endpoints decisions are made in plain numbers: the same ones, to the last bit."""

from typing import Any

import numpy as np
import pytest

from fakes import endpoint
from picker.core import cost_few, scout
from picker.core.scheduler import Scheduler, Settings
from picker.prefix.approximate import ApproximateIndex
from picker.types import (
    Decision,
    EndpointAdded,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    LoadObserved,
    Request,
    Usage,
)

STEPS = 300


def story(seed: int, endpoints: int) -> list[Any]:
    """Every decision and ranking of some hundred requests of all sizes, some of them prefixes of others."""
    rng = np.random.default_rng(seed)
    subject = Scheduler(Settings(seed=seed), ApproximateIndex(1 << 24))
    for number in range(endpoints):
        subject.apply(EndpointAdded(endpoint(f"e{number}")), 0.0)
    prompts = [rng.integers(1, 2**63, size=400, dtype=np.uint64) for _ in range(5)]
    told: list[Any] = []
    now = 0.0
    for number in range(STEPS):
        now += float(rng.exponential(0.05))
        chosen, size = prompts[rng.integers(5)], int(rng.integers(0, 400))
        subset = frozenset({"e1:8000", f"e{endpoints - 1}:8000"}) if rng.random() < 0.1 else None
        asked = Request(number, "m", now, block_hashes=chosen[:size], prompt_bytes=size * 256 + 100, subset=subset)
        decision = subject.submit(asked, now)
        assert isinstance(decision, Decision)
        ranking = decision.ranking
        assert ranking is not None
        parts = {name: part.tolist() for name, part in ranking.parts.items()}
        told.append((decision, ranking.rows.tolist(), ranking.total.tolist(), parts))
        for earlier in rng.integers(0, number + 1, size=3).tolist():
            happen(subject, earlier, float(rng.random()), now)
    return told


def happen(subject: Scheduler, number: int, chance: float, now: float) -> None:
    if chance < 0.4:
        subject.apply(FirstToken(number), now)
    elif chance < 0.8:
        subject.apply(Finished(number, 200, Usage(1000, 60, int(chance * 1000))), now)
    elif chance < 0.9:
        subject.apply(Failed(number, FailureReason.CLIENT_GONE), now)
    else:
        name = f"e{number % 3}"
        load = LoadObserved(name, now, waiting=chance * 4, running=1.0, kv_usage=0.5, kv_capacity_tokens=200_000)
        subject.apply(load, now)


@pytest.mark.parametrize("endpoints", [2, 5, 20])
def test_few_endpoints_are_chosen_among_as_many_are(endpoints: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        in_numbers = story(seed, endpoints)
        with monkeypatch.context() as patch:
            patch.setattr(cost_few, "FEW", 0)
            patch.setattr(scout, "FEW", 0)
            assert story(seed, endpoints) == in_numbers
