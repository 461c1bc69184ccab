"""How long scoring endpoints takes, and a whole decision from block hashes to booking, with the prompt hashed already.

    pytest bench/micro -o python_files='bench_*.py' --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name -s

Prompts are 32 KB (128 blocks), half of each known to an endpoint; every decision is reported finished before the next.
"""

import itertools

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fakes import learned, pool, request, view
from picker.core.cost import CostModel
from picker.core.pick import max_score
from picker.core.profile import Cost, Profile, Weighted
from picker.core.scheduler import Scheduler, Settings
from picker.prefix.approximate import ApproximateIndex
from picker.scorers.kv_usage import KvUsage
from picker.scorers.queue_depth import QueueDepth
from picker.scorers.running import Running
from picker.types import Decision, Endpoint, EndpointAdded, Finished, FirstToken, LoadObserved, Request, Usage

ENDPOINTS = [4, 10, 100, 1000]
BLOCKS = 128
HEADS = 64
ROUNDS = 1000

pytestmark = pytest.mark.benchmark(disable_gc=True)

PROFILES: dict[str, Profile] = {
    "cost": Cost(CostModel()),
    "weighted": Weighted([(QueueDepth(), 2.0), (KvUsage(), 2.0), (Running(), 1.0)]),
}


@pytest.mark.parametrize("endpoints", ENDPOINTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_scoring(benchmark: BenchmarkFixture, profile: str, endpoints: int) -> None:
    made = pool(**{f"e{n}": {"inflight": n % 7, "waiting": n % 3, "kv_usage": n % 10 / 10} for n in range(endpoints)})
    seen, wanted = view(made, learned=learned(rows=max(64, endpoints)), prompt_tokens=8192), request()
    benchmark.pedantic(PROFILES[profile].rank, (seen, wanted), rounds=ROUNDS, warmup_rounds=50)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("endpoints", ENDPOINTS)
def test_picking_the_best(benchmark: BenchmarkFixture, endpoints: int) -> None:
    rng = np.random.default_rng(0)
    benchmark.pedantic(max_score, (rng.random(endpoints), 1, rng), rounds=ROUNDS, warmup_rounds=50)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("endpoints", ENDPOINTS)
def test_submitting(benchmark: BenchmarkFixture, endpoints: int) -> None:
    scheduler = _scheduler(endpoints)
    rng = np.random.default_rng(0)
    heads = [rng.integers(0, 2**64, BLOCKS // 2, dtype=np.uint64) for _ in range(HEADS)]
    numbers = itertools.count(1)

    def setup() -> tuple[tuple[Request, float], dict[str, object]]:
        number = next(numbers)
        now = number / 100
        scheduler.apply(FirstToken(number - 1), now)
        scheduler.apply(Finished(number - 1, 200, Usage(8192, 100, 4096)), now)
        tail = rng.integers(0, 2**64, BLOCKS - BLOCKS // 2, dtype=np.uint64)
        hashes = np.concatenate([heads[number % HEADS], tail])
        return (Request(number, "model", now, block_hashes=hashes, prompt_bytes=32_768, max_tokens=100), now), {}

    decision = benchmark.pedantic(scheduler.submit, setup=setup, rounds=ROUNDS, warmup_rounds=2 * HEADS)  # type: ignore[no-untyped-call]
    assert isinstance(decision, Decision)


def _scheduler(endpoints: int) -> Scheduler:
    made = Scheduler(Settings(seed=0), ApproximateIndex(512 << 20))
    for number in range(endpoints):
        name = f"10.0.{number // 250}.{number % 250}:8000"
        made.apply(EndpointAdded(Endpoint(name, name, frozenset({"model"}))), 0.0)
        made.apply(LoadObserved(name, 0.0, waiting=0.0, running=0.0, kv_usage=0.1, kv_capacity_tokens=400_000), 0.0)
    return made
