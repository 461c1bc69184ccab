"""When requests are meant to be sent: arrival processes, and rates that change in stages.

Pure: random generators are passed in. Times are seconds from the start of the run. Every process is drawn at one
arrival a second and then stretched by the rate of the moment, so another rate gives the same sequence, faster.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picker.errors import ConfigError

FloatArray = NDArray[np.float64]


class Process(enum.Enum):
    """How arrivals are spaced; the value is the flag's word."""

    POISSON = "poisson"
    CONSTANT = "constant"
    GAMMA = "gamma"
    MMPP = "mmpp"


@dataclass(frozen=True, slots=True)
class Bursts:
    """Of MMPP arrivals: `factor` times as many during bursts. on, off: mean seconds of a burst and of the calm.

    The defaults are the bursty chat of the simulator's scenarios.
    """

    factor: float = 6.0
    on: float = 8.0
    off: float = 32.0

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.on > 0 and self.off > 0):
            raise ConfigError("bursts: the factor and both lengths must be positive")

    @property
    def mean(self) -> float:
        """The mean rate, as a multiple of the calm's."""
        return (self.off + self.factor * self.on) / (self.on + self.off)

    def times(self, work: FloatArray, calm: float, rng: np.random.Generator) -> FloatArray:
        """Arrivals at one a second of `work`, as they come with the calm's rate `calm`."""
        edges, done = [0.0], [0.0]
        for bursting in itertools.cycle((False, True)):
            if done[-1] >= work[-1]:
                break
            lasts = float(rng.exponential(self.on if bursting else self.off))
            edges.append(edges[-1] + lasts)
            done.append(done[-1] + lasts * calm * (self.factor if bursting else 1.0))
        times: FloatArray = np.interp(work, done, edges)
        return times


@dataclass(frozen=True, slots=True)
class Arrivals:
    """`rate` arrivals a second. burstiness: shape of the gamma spacing; 1 is Poisson, below 1 comes in bursts.

    The parameter is the one of vLLM's `bench serve --burstiness`. bursts: of MMPP arrivals, whose mean rate is `rate`.
    """

    rate: float
    process: Process = Process.POISSON
    burstiness: float = 1.0
    bursts: Bursts = Bursts()

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ConfigError(f"the arrival rate must be positive, not {self.rate:g} a second")
        _check_burstiness(self.burstiness)

    def times(self, count: int, rng: np.random.Generator) -> FloatArray:
        """(count,) seconds, ascending; the first arrival is one gap after the start."""
        if count == 0:
            return np.empty(0)
        if self.process is Process.MMPP:
            states = rng.spawn(1)[0]
            return self.bursts.times(_work(Process.POISSON, 1.0, count, rng), self.rate / self.bursts.mean, states)
        return _work(self.process, self.burstiness, count, rng) / self.rate

    def count_within(self, seconds: float) -> int:
        """How many arrivals a run of `seconds` is given: the expected number, at least one."""
        return max(1, round(self.rate * seconds))


def _check_burstiness(burstiness: float) -> None:
    if not burstiness > 0:
        raise ConfigError(f"burstiness must be positive, not {burstiness:g}")


def _work(process: Process, burstiness: float, count: int, rng: np.random.Generator) -> FloatArray:
    """(count,) arrivals at one a second."""
    match process:
        case Process.CONSTANT:
            gaps = np.ones(count)
        case Process.GAMMA:
            gaps = rng.gamma(burstiness, 1.0 / burstiness, count)
        case _:
            gaps = rng.exponential(1.0, count)
    return np.cumsum(gaps)


# --- stages --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """`seconds` at `rate` arrivals a second, or on the way from there to the rate `to`. A rate of 0 is a pause."""

    rate: float
    seconds: float
    to: float | None = None

    @property
    def end_rate(self) -> float:
        return self.rate if self.to is None else self.to

    @property
    def mean_rate(self) -> float:
        return (self.rate + self.end_rate) / 2.0

    @property
    def expected(self) -> float:
        """Arrivals on average."""
        return self.seconds * self.mean_rate

    def when(self, work: FloatArray) -> FloatArray:
        """Seconds into the stage at which so many arrivals are due: r t + (s - r) t^2 / 2T = work, solved for t."""
        growth = (self.end_rate - self.rate) / self.seconds
        times: FloatArray = 2.0 * work / (self.rate + np.sqrt(np.maximum(0.0, self.rate**2 + 2.0 * growth * work)))
        return times


_STAGE = re.compile(r"(\d+(?:\.\d*)?)(?:-(\d+(?:\.\d*)?))?x(\d+(?:\.\d*)?)")


def parse_stages(words: str) -> tuple[Stage, ...]:
    """Stages as the flag words them: `10x60,10-50x30` is 60 s at 10 a second, then 30 s from 10 up to 50."""
    stages = []
    for word in words.split(","):
        found = _STAGE.fullmatch(word.strip())
        if found is None or not float(found[3]) > 0:
            raise ConfigError(f"--stages: {word!r} is not a stage; write RATExSECONDS or FROM-TOxSECONDS, as in 10x60")
        stages.append(Stage(float(found[1]), float(found[3]), None if found[2] is None else float(found[2])))
    if not sum(stage.expected for stage in stages) > 0:
        raise ConfigError("--stages: all rates are 0, nothing would be sent")
    return tuple(stages)


@dataclass(frozen=True, slots=True)
class Staged:
    """Rates that change. process: of the spacing within the rate of the moment; bursts of their own are not staged."""

    stages: Sequence[Stage]
    process: Process = Process.POISSON
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        _check_burstiness(self.burstiness)
        if self.process is Process.MMPP:
            raise ConfigError("--arrivals mmpp has bursts of its own: leave out --stages")

    @property
    def windows(self) -> tuple[tuple[float, float, float], ...]:
        """(start, end, mean rate) of each stage."""
        ends = list(itertools.accumulate(stage.seconds for stage in self.stages))
        return tuple((end - stage.seconds, end, stage.mean_rate) for end, stage in zip(ends, self.stages, strict=True))

    def times(self, rng: np.random.Generator) -> FloatArray:
        """Ascending arrival times within the stages."""
        expected = sum(stage.expected for stage in self.stages)
        # More than enough: six standard deviations of a Poisson number, and of a burstier one by its shape.
        spare = 6.0 * np.sqrt(expected / min(1.0, self.burstiness)) + 16
        work = _work(self.process, self.burstiness, int(expected + spare), rng)
        parts, done = [], 0.0
        for (start, _, _), stage in zip(self.windows, self.stages, strict=True):
            within = work[(work >= done) & (work < done + stage.expected)] - done
            parts.append(start + (stage.when(within) if within.size else within))
            done += stage.expected
        return np.concatenate(parts)
