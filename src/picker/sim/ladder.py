"""Published ladders of rates, and how inference-perf climbs them: the stages of llm-d's studies in virtual time.

The studies are in `validation.toml`. What makes their figures what they are is here: how many requests a stage has,
that it waits for the answers of the one before, how many are under way at once, what is counted over which time.
"""

from __future__ import annotations

import functools
import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

import numpy as np

from picker.sim.cluster import Arrival, Outcome, Router
from picker.sim.policies import PoolDescription, peer, policy
from picker.sim.policies.llm_d_legacy import LlmdLegacy
from picker.sim.result import figures, percentile
from picker.sim.scenario import Pods, Scenario
from picker.sim.trial import Trial
from picker.sim.workload import Context, SharedPrefix
from picker.types import FloatArray

# inference-perf sleeps a second between stages and starts each a second after it has begun to hand out requests.
_PAUSE_S = 2.0


@functools.cache
def measurements() -> Mapping[str, Any]:
    """The data file: ladders, and what else the simulator is held against."""
    text = resources.files("picker.sim").joinpath("validation.toml").read_text(encoding="utf-8")
    return MappingProxyType(tomllib.loads(text))


@dataclass(frozen=True, slots=True)
class Measured:
    """One published run of a ladder; sequences go by stage, nan where nothing is published.

    output: tokens/s as the client counts them. sent: requests/s that really went out. ttft_p90: seconds.
    """

    policy: str
    output: tuple[float, ...]
    exact: bool = False
    weights: Mapping[str, float] | None = None
    sent: tuple[float, ...] = ()
    ttft_p90: tuple[float, ...] = ()
    output_mean: float = math.nan


@dataclass(frozen=True, slots=True)
class Ladder:
    """A study: pods, prompts, and stages of (rate, seconds). counted: tokens the client counts of each that is emitted.

    poisson: else the stage takes exactly its seconds. in_flight: requests the client has under way at most.
    """

    source: str
    profile: str
    pods: int
    groups: int
    prompts: int
    system_tokens: int
    question_tokens: int
    output_tokens: int
    counted: float
    poisson: bool
    warmup: tuple[float, float]
    rates: tuple[float, ...]
    seconds: tuple[float, ...]
    runs: Mapping[str, Measured]
    kv_tokens: int | None = None
    in_flight: int | None = None

    def scenario(self) -> Scenario:
        """Its pods. A client that waits for answers asks as soon as one has come, so engines must not run ahead."""
        think = math.inf if self.in_flight is None else 0.0
        return Scenario(
            number="",
            name="ladder",
            title="",
            pods=Pods(self.pods, self.profile, kv_tokens=self.kv_tokens, max_num_seqs=1024),
            workload=SharedPrefix(think=think),
        )


@dataclass(frozen=True, slots=True)
class Stage:
    output: float
    ttft_p90: float


@functools.cache
def ladders() -> Mapping[str, Ladder]:
    """The published ladders by name."""
    return MappingProxyType({name: _ladder(table) for name, table in measurements()["ladders"].items()})


def _ladder(table: Mapping[str, Any]) -> Ladder:
    runs = {name: Measured(**_frozen(run)) for name, run in table["runs"].items()}
    return Ladder(**{**_frozen(table), "runs": runs})


def _frozen(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def climb(ladder: Ladder, run: Measured, seed: int) -> list[Stage]:
    """The ladder's stages after the warm-up, as inference-perf runs them, under one run's policy."""
    rng = np.random.default_rng([seed, 4])
    cluster = Trial(ladder.scenario(), run.policy, 1.0, seed=seed).cluster(_router(ladder, run, seed))
    prompts = _prompts(ladder, rng)
    sent = [math.nan, *(run.sent or itertools.repeat(math.nan, len(ladder.rates)))]
    stages, served = [], 0
    for (rate, seconds), really in zip(
        [ladder.warmup, *zip(ladder.rates, ladder.seconds, strict=True)], sent, strict=True
    ):
        times = send_times(rate, seconds, rng, poisson=ladder.poisson)
        if not math.isnan(really):
            times *= times.size / really / times[-1]
        # The harness starts a stage when all of the one before has been answered: `run` returns then.
        times += cluster.kernel.now + _PAUSE_S
        outcomes = cluster.run(_asked(ladder, prompts, times.tolist()))
        stages.append(_stage(ladder, outcomes[served:]))
        served = len(outcomes)
    return stages[1:]


def _router(ladder: Ladder, run: Measured, seed: int) -> Router:
    pods = ladder.scenario().pods
    pool = PoolDescription(pods.count, pods.block_tokens, pods.published, exact=run.exact)
    factory = policy(run.policy) if run.weights is None else peer(LlmdLegacy, **run.weights)
    return factory(pool, seed)


def send_times(rate: float, seconds: float, rng: np.random.Generator, *, poisson: bool) -> FloatArray:
    """When inference-perf sends the int(rate * seconds) requests of a stage, in seconds from its start.

    Its constant rate spreads random gaps over the whole stage; its Poisson rate draws a number for every second and
    spreads that over the second, so that the stage takes as long as it takes.
    """
    count = int(rate * seconds)
    if not poisson:
        return _spread(count, rng) * seconds
    times: FloatArray = np.empty(0)
    for second in itertools.count():
        if times.size >= count:
            break
        times = np.concatenate([times, second + _spread(int(rng.poisson(rate)), rng)])
    return times[:count]


def _spread(count: int, rng: np.random.Generator) -> FloatArray:
    """Exponential gaps, stretched to end at 1."""
    ends: FloatArray = np.cumsum(rng.exponential(1.0, count))
    return ends / ends[-1] if count else ends


def _prompts(ladder: Ladder, rng: np.random.Generator) -> list[Context]:
    """All prompts in the order of the walk: shuffled once."""
    contexts = []
    for number in rng.permutation(ladder.groups * ladder.prompts).tolist():
        system = Context(Pods().block_tokens).extended(number % ladder.groups, ladder.system_tokens)
        contexts.append(system.extended(ladder.groups + number, ladder.question_tokens))
    return contexts


def _asked(ladder: Ladder, prompts: Sequence[Context], times: Sequence[float]) -> Iterator[Arrival]:
    """A stage's requests, the walk through the prompts starting anew.

    With a limit on requests in flight, each beyond it goes out when its time has come and an answer has ended.
    """
    limit = ladder.in_flight
    left = zip(itertools.cycle(prompts), times, strict=False)

    def following(ended_at: float) -> Arrival | None:
        asked = next(left, None)
        if asked is None:
            return None
        prompt, at = asked
        then = None if limit is None else following
        return Arrival(max(at, ended_at), prompt.tokens, ladder.output_tokens, prompt.hashes, then=then)

    # `left` is consumed here and by answers, in the order of the walk.
    first = [following(0.0) for _ in range(len(times) if limit is None else min(limit, len(times)))]
    return iter([arrival for arrival in first if arrival is not None])


def _stage(ladder: Ladder, outcomes: Sequence[Outcome]) -> Stage:
    """Tokens over the time from the first request to the last answer, the drain included, as inference-perf has it."""
    output = figures(outcomes, pods=ladder.pods)["output_tokens_per_s"]
    p90 = percentile([math.inf if outcome.failed else outcome.ttft for outcome in outcomes], 0.90)
    return Stage((output or 0.0) * ladder.counted, math.inf if p90 is None else p90)
