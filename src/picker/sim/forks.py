"""Processes that go on from this very point with a choice of their own, and the study of regret by means of them.

Owns children, pipes and who waits for whom. A simulation has no sockets and one thread, so a fork is an exact copy of
all of it, closures and generators included, without any copying code. What it means is worked out in `sim.regret`.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np

from picker.sim import regret
from picker.sim.cluster import Cluster, Outcome
from picker.sim.latency import StepNoise
from picker.sim.regret import Branch, Case, Crossroads, Gate, Plan, Pod
from picker.sim.sessions import Sessions
from picker.sim.trial import Trial, measured_from
from picker.sim.workload import Adapters, SharedPrefix
from picker.types import Decision, Rejection, Request

_CHUNK = 1 << 20
# Noise of further continuations: a stream apart from those of `sim.trial`.
_CONTINUATIONS = 17
_PEEK = "the policy's own choice"


class Forks:
    """Children of this process, at most `jobs` at a time; `with` leaves none behind.

        if forks.branch("left"):  # True in the child alone
            forks.report(result)
        results = forks.collect()

    A child never leaves the block: it ends with `report`, or at the end of the block, as failed. Raises RuntimeError
    where the system cannot fork, and for a child that ended without a report.
    """

    def __init__(self, jobs: int) -> None:
        if not hasattr(os, "fork"):
            raise RuntimeError("this system cannot fork a process, which regret needs: use Linux or macOS")
        self._jobs = jobs
        self._running: dict[Hashable, tuple[int, int]] = {}  # in order of birth: process, its pipe
        self._results: dict[Hashable, Any] = {}
        self._out: int | None = None

    @property
    def is_child(self) -> bool:
        return self._out is not None

    def branch(self, key: Hashable) -> bool:
        """Go on twice: in this process (False), and in a child known by `key` (True)."""
        while len(self._running) >= self._jobs:
            self._await_oldest()
        read, write = os.pipe()
        pid = _fork()
        if pid:
            os.close(write)
            self._running[key] = pid, read
            return False
        os.close(read)
        self._running.clear()
        self._out = write
        gc.disable()  # a collection would write to, and so copy, every page shared with the parent
        return True

    def report(self, result: object) -> NoReturn:
        """The child's last words, which must be picklable."""
        assert self._out is not None, "only a child reports"
        try:
            with os.fdopen(self._out, "wb") as pipe:
                pickle.dump(result, pipe)
        finally:
            os._exit(0)

    def collect(self) -> dict[Hashable, Any]:
        """What all children since the last time reported, by key; waits for them."""
        while self._running:
            self._await_oldest()
        results, self._results = self._results, {}
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.is_child:
            # Above this frame is the parent's work, done once by the parent itself.
            os._exit(1)
        for pid, pipe in self._running.values():
            os.close(pipe)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._running.clear()

    def _await_oldest(self) -> None:
        key, (pid, pipe) = next(iter(self._running.items()))
        # Read before waiting: a child cannot end while its pipe is full.
        written = b"".join(iter(lambda: os.read(pipe, _CHUNK), b""))
        del self._running[key]
        os.close(pipe)
        os.waitpid(pid, 0)
        if not written:
            raise RuntimeError(f"the process that tried {key} ended without a result")
        self._results[key] = pickle.loads(written)


def _fork() -> int:
    with warnings.catch_warnings():
        # Later Pythons warn of threads, which libraries start for matrices; a child of ours runs this thread alone.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


# --- a study -------------------------------------------------------------------------------------------------


def numbers(trial: Trial, samples: int, horizon: float) -> list[int]:
    """Which decisions to look at, in order: spread evenly over the measured time, one drawn from each of its parts.

    The last `horizon` seconds of arrivals are left out, or half of the measured time where that is shorter.
    """
    outcomes = trial.cluster(trial.router()).run(trial.arrivals())
    first = measured_from(trial, outcomes)
    last = max((outcome.at for outcome in outcomes), default=0.0)
    last -= min(horizon, (last - first) / 2.0)
    able = [number for number, outcome in enumerate(outcomes, 1) if first <= outcome.at <= last]
    rng = np.random.default_rng([trial.seed, _CONTINUATIONS])
    parts = np.array_split(np.array(able), min(samples, len(able)) or 1)
    return [int(rng.choice(part)) for part in parts if part.size]


def examine(trial: Trial, plan: Plan, *, jobs: int = 1, on_case: Callable[[Case], None] = lambda case: None) -> None:
    """Run the trial; before each decision of the plan, try every endpoint in a process of its own.

    Each child forces its endpoint, lets the policy decide on all that follows, takes arrivals for `plan.horizon`
    seconds more and serves them to their ends. Continuation 0 is the trial's own future. Each further one has other
    noise on step times and, as its new arrivals, a later stretch of the same workload, both common to all endpoints
    (noise as long as an engine takes the same steps). The turns that sessions under way will bring stay the same.
    """
    with Forks(jobs) as forks:
        _Study(_lengthened(trial, plan), plan, forks, on_case).run()


def _lengthened(trial: Trial, plan: Plan) -> Trial:
    """The trial with more arrivals behind the same, where its workload can be lengthened: later stretches to take."""
    scenario, workload = trial.scenario, trial.scenario.workload
    if not isinstance(workload, Sessions | SharedPrefix | Adapters):
        return trial
    seconds = workload.seconds + plan.horizon * plan.continuations
    return replace(trial, scenario=replace(scenario, workload=replace(workload, seconds=seconds)))


class _Study:
    """One run of a trial, in the parent and, from some decision on, in a child."""

    def __init__(self, trial: Trial, plan: Plan, forks: Forks, on_case: Callable[[Case], None]) -> None:
        self._trial, self._plan, self._forks, self._on_case = trial, plan, forks, on_case
        self._left = len(plan.numbers)
        self._gate = Gate()
        self._crossroads = Crossroads(trial.router(), plan.numbers, ask=self._ask, tell=self._tell)
        self._cluster: Cluster = trial.cluster(self._crossroads)
        self._pods: Sequence[Pod] = ()
        self._own = (0, 0.0)  # of a child: the decision it is about, and when that was

    def run(self) -> None:
        if self._left:
            outcomes = self._cluster.run(self._gate.source(self._trial.arrivals()))
            if self._forks.is_child:
                self._forks.report(self._branch(outcomes))

    def _ask(self, request: Request, now: float) -> str | None:
        self._pods = [
            Pod(pod.name, pod.engine.num_running, pod.engine.num_waiting, pod.engine.kv_usage)
            for pod in self._cluster._pods.values()
        ]
        if self._forks.branch(_PEEK):
            self._own = request.id, now
            return None
        endpoints: list[str] = self._forks.collect()[_PEEK]
        for continuation in range(self._plan.continuations):
            for name in endpoints:
                if self._forks.branch((name, continuation)):
                    self._own = request.id, now
                    self._gate.close(now, self._plan.horizon, skip=continuation * self._plan.horizon)
                    self._reseed(request.id, continuation)
                    return name
        return None

    def _reseed(self, decision: int, continuation: int) -> None:
        if not continuation:
            return
        for number, pod in enumerate(self._cluster._pods.values()):
            rng = np.random.default_rng([self._trial.seed, _CONTINUATIONS, decision, continuation, number])
            if pod.engine._noise is not None:
                pod.engine._noise = StepNoise(rng, pod.engine.profile.noise_sd)

    def _tell(self, request: Request, decision: Decision | Rejection, now: float) -> None:
        if self._forks.is_child:
            self._forks.report(regret.alternatives(decision, self._crossroads.endpoints, self._plan.alternatives))
        branches: dict[Any, Branch] = self._forks.collect()
        case = regret.case(request, decision, now, self._pods, branches, self._plan)
        if case is not None:
            self._on_case(case)
        self._left -= 1
        if not self._left:
            self._gate.close(now, 0.0)  # nothing that follows is looked at

    def _branch(self, outcomes: Sequence[Outcome]) -> Branch:
        number, now = self._own
        return regret.branch(outcomes, self._crossroads.keys, number, since=now, until=self._gate.until)
