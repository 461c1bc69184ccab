"""How much a decision cost against the best one that could have been made, and which part of the price was wrong.

Owns what is compared and how it is summed up; `sim.forks` tries the alternatives. Pure arithmetic over outcomes.

    cost         sum over requests of TTFT; or of TTFT + 0.35 * (E2E - TTFT), the weight that picker's own cost gives
                 to a second of answer. Of the requests not ended at the decision, itself included, and of those that
                 arrive within the horizon, as far as they do so whichever endpoint is forced
    regret       cost of the chosen endpoint less cost of the best. Whoever picks the smallest of several noisy sums
                 finds one that was lucky, so the best is chosen by some continuations and measured on another, in
                 turns: 0 on average where nothing can be gained, negative as often as positive
    noise        standard error of the mean difference between two endpoints, from its spread over continuations
    hit kept     the chosen had at least half of what the request could find cached beyond what every endpoint has
    hit left     another had at least twice as much; none: there was less than a twentieth of the prompt to be found
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from picker.sim.cluster import Arrival, Outcome, Router
from picker.types import (
    Decision,
    EndpointAdded,
    EndpointRemoved,
    Fact,
    FloatArray,
    Queued,
    Rejection,
    Request,
)

# What a second of an answer's duration is worth in seconds of first-token delay, as in `core.cost`.
LATENCY_WEIGHT = 0.35
_HIT_SHARE = 0.05
_HARDLY = 0.002  # of the differences of all terms together
# What the terms of picker's cost foretell of each of the four parts of the true one; see `Case.parts_of`.
OWN_TTFT = ("queue", "prefill", "stall")
OWN_DECODE = ("decoding",)
OTHERS = ("followers", "neighbours", "memory")

Key = tuple[int, int, int]
"""Which request, whatever is decided: its last block's hash, its prompt's tokens, how often that has occurred."""


class Metric(enum.Enum):
    """What a decision is to keep small."""

    TTFT = "ttft"
    TOTAL = "e2e"


class HitClass(enum.Enum):
    KEPT = "hit kept"
    LEFT = "hit left"
    NONE = "no hit anywhere"


@dataclass(frozen=True, slots=True)
class Plan:
    """numbers: of the decisions to look at, by arrival from 1. horizon: seconds of arrivals that follow each.

    continuations: how many futures to follow each endpoint into; honest regret needs two. alternatives: how many
    endpoints to try, those the policy likes best, its choice among them; None: all.
    """

    numbers: Collection[int]
    horizon: float = 60.0
    continuations: int = 2
    alternatives: int | None = None


# --- trying one ------------------------------------------------------------------------------------------------


class Gate:
    """Lets a workload through, the turns that follow answers included, until it is closed."""

    def __init__(self) -> None:
        self.until = math.inf
        self._closed_at = math.inf
        self._skip = 0.0

    def close(self, now: float, horizon: float, *, skip: float = 0.0) -> None:
        """Let through `horizon` seconds more: of the workload as it is `skip` seconds later, for another future."""
        self.until, self._closed_at, self._skip = now + horizon, now, skip

    def source(self, arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
        for arrival in arrivals:
            at = arrival.at - self._skip
            if at > self.until:
                return
            if at >= self._closed_at or not self._skip:
                yield self._gated(replace(arrival, at=at) if self._skip else arrival)

    def _gated(self, arrival: Arrival) -> Arrival:
        then = arrival.then
        return arrival if then is None else replace(arrival, then=lambda ended: self._following(then, ended))

    def _following(self, then: Callable[[float], Arrival | None], ended: float) -> Arrival | None:
        arrival = then(ended)
        return None if arrival is None or arrival.at > self.until else self._gated(arrival)


class Crossroads:
    """A router that stops before some decisions: `ask` says which endpoint to force, or None for the policy's choice.

    tell: given what the policy decided where it was asked and nothing was forced. An endpoint is forced by excluding
    all others, which every policy understands, as a retry does.
    """

    def __init__(
        self,
        policy: Router,
        numbers: Collection[int],
        *,
        ask: Callable[[Request, float], str | None],
        tell: Callable[[Request, Decision | Rejection, float], None],
    ) -> None:
        self.wants_events = bool(getattr(policy, "wants_events", False))
        self.endpoints: list[str] = []
        self.keys: dict[int, Key] = {}
        self._policy = policy
        self._numbers = frozenset(numbers)
        self._ask, self._tell = ask, tell
        self._seen: Counter[tuple[int, int]] = Counter()

    def submit(self, request: Request, now: float) -> Decision | Rejection | Queued:
        if request.id in self.keys or request.id not in self._numbers:
            self._note(request)
            return self._policy.submit(request, now)
        self._note(request)
        forced = self._ask(request, now)
        if forced is not None:
            self._numbers = frozenset()
            others = frozenset(name for name in self.endpoints if name != forced)
            return self._policy.submit(msgspec.structs.replace(request, exclude=request.exclude | others), now)
        outcome = self._policy.submit(request, now)
        if isinstance(outcome, Queued):
            raise ValueError("regret is of decisions made at once, and this policy lets requests wait")
        self._tell(request, outcome, now)
        return outcome

    def apply(self, fact: Fact, now: float) -> None:
        match fact:
            case EndpointAdded(endpoint):
                self.endpoints.append(endpoint.name)
            case EndpointRemoved(name):
                self.endpoints.remove(name)
            case _:
                pass
        self._policy.apply(fact, now)

    def poll(self, now: float) -> list[Decision | Rejection]:
        return self._policy.poll(now)

    def next_wakeup(self) -> float | None:
        return self._policy.next_wakeup()

    def _note(self, request: Request) -> None:
        if request.id not in self.keys:
            last = int(request.block_hashes[-1]) if request.block_hashes.size else 0
            what = last, request.prompt_bytes
            self._seen[what] += 1
            self.keys[request.id] = (*what, self._seen[what])


def alternatives(decision: Decision | Rejection, endpoints: Sequence[str], count: int | None) -> list[str]:
    """The endpoints to try: all, or the `count` that the policy ranks best, with the chosen."""
    if isinstance(decision, Rejection):
        return []
    ranking = decision.ranking
    if count is None or ranking is None:
        return list(endpoints)
    chosen = decision.endpoint.name
    ranked = [chosen, *(candidate.endpoint for candidate in ranking.candidates() if candidate.endpoint != chosen)]
    return ranked[:count]


@dataclass(frozen=True, slots=True)
class Branch:
    """What came of one forced choice. times: request -> (TTFT, E2E), those that failed left out.

    own: of the forced request. cached_tokens: what it found.
    """

    own: Key
    times: Mapping[Key, tuple[float, float]]
    cached_tokens: int


def branch(outcomes: Sequence[Outcome], keys: Mapping[int, Key], number: int, *, since: float, until: float) -> Branch:
    """Of the decision about request `number`. What had ended before `since`, or came after `until`, is left out."""
    times = {
        keys[n]: (outcome.ttft, outcome.e2e)
        for n, outcome in enumerate(outcomes, 1)
        if outcome.at <= until and outcome.ended_at > since and not outcome.failed
    }
    return Branch(keys[number], times, outcomes[number - 1].cached_tokens)


# --- one decision ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pod:
    """How an endpoint really was at the decision: requests running and waiting, share of the KV cache held."""

    name: str
    running: int
    waiting: int
    kv_usage: float


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One decision with all its alternatives: n endpoints, k continuations.

    pods: (n,) as they were. chosen: index. terms: name -> (n,) what the policy thought, empty if it does not say.
    costs: (n, k, 4) seconds: own TTFT, own E2E - TTFT, the same two summed over all others.
    cached: (n,) tokens that the request found on each. believed: those the policy expected on the chosen.
    """

    number: int
    at: float
    prompt_tokens: int
    pods: tuple[Pod, ...]
    chosen: int
    cached: FloatArray
    believed: float
    costs: FloatArray
    terms: Mapping[str, FloatArray] = field(default_factory=dict)

    def cost(self, metric: Metric) -> FloatArray:
        """(n, k) seconds."""
        weights = np.array([1.0, 0.0, 1.0, 0.0] if metric is Metric.TTFT else [1.0, LATENCY_WEIGHT] * 2)
        cost: FloatArray = self.costs @ weights
        return cost

    def best(self, metric: Metric) -> int:
        """The endpoint whose cost is smallest on average."""
        return int(self.cost(metric).mean(axis=1).argmin())

    def naive_regret(self, metric: Metric) -> float:
        """Against the smallest mean: never negative, and larger the noisier it is."""
        mean = self.cost(metric).mean(axis=1)
        return float(mean[self.chosen] - mean.min())

    def regret(self, metric: Metric) -> float:
        """Against the best, chosen without the continuation that it is measured on. With a single one: naive."""
        cost = self.cost(metric)
        k = cost.shape[1]
        if k == 1:
            return self.naive_regret(metric)
        measured = []
        for held_out in range(k):
            best = int(np.delete(cost, held_out, axis=1).mean(axis=1).argmin())
            measured.append(float(cost[self.chosen, held_out] - cost[best, held_out]))
        return math.fsum(measured) / len(measured)

    def noise(self, metric: Metric) -> float:
        """Standard error of a mean difference to the chosen; NaN where one continuation cannot tell."""
        cost = self.cost(metric)
        n, k = len(cost), cost.shape[1]
        if k == 1 or n == 1:
            return math.nan
        differences = np.delete(cost - cost[self.chosen], self.chosen, axis=0)
        variance: float = differences.var(axis=1, ddof=1).mean() / k
        return math.sqrt(variance)

    @property
    def hit_class(self) -> HitClass:
        beyond = self.cached - self.cached.min()
        if beyond.max() < _HIT_SHARE * self.prompt_tokens:
            return HitClass.NONE
        return HitClass.KEPT if beyond[self.chosen] >= 0.5 * beyond.max() else HitClass.LEFT

    def parts(self, other: int, metric: Metric) -> dict[str, tuple[float, float]]:
        """How much more the chosen costs than `other`, part by part: (as the policy thought, in truth)."""
        weight = 0.0 if metric is Metric.TTFT else LATENCY_WEIGHT
        true = (self.costs[self.chosen] - self.costs[other]).mean(axis=0)
        return {
            "own first token": (self._thought(OWN_TTFT, other), float(true[0])),
            "own answer": (self._thought(OWN_DECODE, other), weight * float(true[1])),
            "others": (self._thought(OTHERS, other), float(true[2]) + weight * float(true[3])),
        }

    def term_differences(self, other: int) -> dict[str, float]:
        """What the policy charged the chosen more than `other`, by term."""
        return {name: float(values[self.chosen] - values[other]) for name, values in self.terms.items()}

    def _thought(self, names: Sequence[str], other: int) -> float:
        differences = self.term_differences(other)
        return sum(differences.get(name, 0.0) for name in names)


def case(
    request: Request,
    decision: Decision | Rejection,
    now: float,
    pods: Sequence[Pod],
    branches: Mapping[tuple[str, int], Branch],
    plan: Plan,
) -> Case | None:
    """The decision with what came of each endpoint; None where the policy or all but one of them refused it."""
    if isinstance(decision, Rejection):
        return None
    rounds = range(plan.continuations)
    served = [pod for pod in pods if all(_served(branches.get((pod.name, i))) for i in rounds)]
    names = [pod.name for pod in served]
    if decision.endpoint.name not in names or len(names) < 2:
        return None
    first = [branches[name, 0] for name in names]
    costs = [_costs([branches[name, i] for name in names]) for i in rounds]
    return Case(
        number=request.id,
        at=now,
        prompt_tokens=round(decision.prompt_tokens) or request.prompt_tokens or 0,
        pods=tuple(served),
        chosen=names.index(decision.endpoint.name),
        cached=np.array([float(branch.cached_tokens) for branch in first]),
        believed=decision.matched_tokens,
        costs=np.stack(costs, axis=1),
        terms=_terms(decision, names),
    )


def _served(branch: Branch | None) -> bool:
    return branch is not None and branch.own in branch.times


def _costs(branches: Sequence[Branch]) -> FloatArray:
    """(n, 4) of one continuation, over the requests that all branches served."""
    common = set.intersection(*(set(branch.times) for branch in branches)) - {branches[0].own}
    rows = []
    for branch in branches:
        ttft, e2e = branch.times[branch.own]
        others = [branch.times[key] for key in common]
        begun = math.fsum(t for t, _ in others)
        rows.append((ttft, e2e - ttft, begun, math.fsum(e for _, e in others) - begun))
    return np.array(rows)


def _terms(decision: Decision, names: Sequence[str]) -> dict[str, FloatArray]:
    ranking = decision.ranking
    if ranking is None:
        return {}
    place = {str(ranking.names[row]): i for i, row in enumerate(ranking.rows)}
    if not all(name in place for name in names):
        return {}
    order = [place[name] for name in names]
    return {part: np.asarray(values, dtype=np.float64)[order] for part, values in ranking.parts.items()}


# --- many of them --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Summary:
    """Of several decisions, in seconds each: mean regret, its standard error, and naive regret, which noise inflates.

    wrong: share of those whose best alternative is better by more than twice the noise, measured honestly.
    """

    decisions: int
    regret: float
    error: float
    naive: float
    noise: float
    wrong: float


def summary(cases: Sequence[Case], metric: Metric) -> Summary:
    regrets = np.array([case.regret(metric) for case in cases])
    noises = np.array([case.noise(metric) for case in cases])
    naive = math.fsum(case.naive_regret(metric) for case in cases) / max(len(cases), 1)
    if not cases:
        return Summary(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    error = float(regrets.std(ddof=1) / math.sqrt(len(cases))) if len(cases) > 1 else math.nan
    wrong = float((regrets > 2.0 * np.nan_to_num(noises)).mean())
    return Summary(len(cases), float(regrets.mean()), error, naive, float(np.median(noises)), wrong)


@dataclass(frozen=True, slots=True)
class Weight:
    """What a second of a term turned out to cost, in seconds, with its 95 % interval: above 1 it is charged too low.

    share: part of the differences between endpoints that the term makes up, by absolute value.
    """

    value: float
    low: float
    high: float
    share: float


def weights(cases: Sequence[Case], metric: Metric, rng: np.random.Generator, resamples: int = 400) -> dict[str, Weight]:
    """The factors on the terms that best foretell the true differences to the chosen: weighted least squares.

    Each alternative is a sample and counts the less the noisier its decision is; intervals by bootstrap over decisions.
    Terms that hardly differ are left out; so is everything where the policy names no terms, or where there are less
    than twice as many decisions as terms.
    """
    told = [case for case in cases if case.terms]
    spans = {name: math.fsum(float(np.ptp(c.terms[name])) for c in told) for name in (told[0].terms if told else ())}
    names = [name for name, span in spans.items() if span > _HARDLY * math.fsum(spans.values())]
    if not names or len(told) < 2 * len(names):
        return {}
    samples = [_samples(case, names, metric) for case in told]
    typical = float(np.nanmedian([case.noise(metric) for case in told]))
    typical = typical if typical > 0 else 1.0  # one continuation, or no chance in it
    scales = [1.0 / math.hypot(_known(case.noise(metric), 0.0), typical) for case in told]
    # Sums of squares by decision, so that a resample is a sum of small matrices.
    squares = np.array([(x.T @ x) * scale**2 for (x, _), scale in zip(samples, scales, strict=True)])
    products = np.array([(x.T @ y) * scale**2 for (x, y), scale in zip(samples, scales, strict=True)])
    drawn = rng.integers(0, len(told), (resamples, len(told)))
    fits = np.array([_solve(squares[d].sum(axis=0), products[d].sum(axis=0)) for d in drawn])
    value = _solve(squares.sum(axis=0), products.sum(axis=0))
    low, high = np.quantile(fits, [0.025, 0.975], axis=0)
    sizes = np.abs(np.concatenate([x for x, _ in samples])).sum(axis=0)
    return {
        name: Weight(float(value[i]), float(low[i]), float(high[i]), float(sizes[i] / sizes.sum()))
        for i, name in enumerate(names)
    }


def _samples(case: Case, names: Sequence[str], metric: Metric) -> tuple[FloatArray, FloatArray]:
    """((n - 1, terms), (n - 1,)): what each other endpoint was charged more than the chosen, and cost more."""
    terms = np.stack([case.terms[name] for name in names], axis=1)
    mean = case.cost(metric).mean(axis=1)
    charged, cost = terms - terms[case.chosen], mean - mean[case.chosen]
    return np.delete(charged, case.chosen, axis=0), np.delete(cost, case.chosen)


def _solve(squares: FloatArray, products: FloatArray) -> FloatArray:
    # A trace of ridge: in a small resample two terms may be proportional.
    ridge = 1e-6 * np.diag(np.diag(squares) + 1e-12)
    solved: FloatArray = np.linalg.solve(squares + ridge, products).astype(np.float64)
    return solved


def _known(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value


def as_rows(cases: Iterable[Case], metric: Metric) -> list[dict[str, object]]:
    """Each decision for JSON, all its alternatives included."""
    return [_row(case, metric) for case in cases]


def _row(case: Case, metric: Metric) -> dict[str, object]:
    noise = case.noise(metric)
    return {
        "number": case.number,
        "at": case.at,
        "prompt_tokens": case.prompt_tokens,
        "class": case.hit_class.value,
        "chosen": case.pods[case.chosen].name,
        "best": case.pods[case.best(metric)].name,
        "regret_s": case.regret(metric),
        "naive_regret_s": case.naive_regret(metric),
        "noise_s": None if math.isnan(noise) else noise,
        "believed_tokens": case.believed,
        "endpoints": [_alternative(case, i) for i in range(len(case.pods))],
    }


def _alternative(case: Case, index: int) -> dict[str, object]:
    pod, names = case.pods[index], ("own_ttft_s", "own_answer_s", "others_ttft_s", "others_answer_s")
    return {
        "name": pod.name,
        "running": pod.running,
        "waiting": pod.waiting,
        "kv_usage": pod.kv_usage,
        "cached_tokens": float(case.cached[index]),
        "terms": {name: float(values[index]) for name, values in case.terms.items()},
        **{name: case.costs[index, :, i].tolist() for i, name in enumerate(names)},
    }
