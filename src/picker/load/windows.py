"""A run cut into windows of equal length: what was sent, hit, failed and in flight in each.

Pure. A request belongs to the window of its intended time, except where requests in flight are counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from picker.load.measured import Bools, Floats, Ints, Requests

_WANTED = 40  # windows: enough to see a burst, few enough for each to hold some requests
_STEPS = (1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class Windows:
    """`count` windows of `width` seconds from the start of the run."""

    width: float
    count: int

    @classmethod
    def over(cls, requests: Requests) -> Windows:
        """Windows of a round length that hold all requests until the last answer."""
        end = float(np.max(requests.ended, initial=0.0))
        least = max(end / _WANTED, 1e-3)
        power = 10.0 ** math.floor(math.log10(least))
        width = next((step * power for step in _STEPS if step * power >= least), 10.0 * power)
        return cls(width, max(1, math.ceil(end / width)))

    @property
    def middles(self) -> Floats:
        return np.asarray((np.arange(self.count) + 0.5) * self.width, dtype=float)

    def number(self, times: Floats) -> Ints:
        return np.clip((times / self.width).astype(np.int64), 0, self.count - 1)

    def sums(self, times: Floats, values: Floats) -> Floats:
        return np.asarray(np.bincount(self.number(times), weights=values, minlength=self.count), dtype=float)

    def rates(self, times: Floats) -> Floats:
        """Events a second in each window."""
        return self.sums(times, np.ones(len(times))) / self.width

    def means(self, times: Floats, values: Floats) -> Floats:
        """nan where a window holds no known value."""
        known = np.isfinite(values)
        return _over(self.sums(times[known], values[known]), self.sums(times[known], np.ones(int(known.sum()))))

    def quantiles(self, times: Floats, values: Floats, fraction: float) -> Floats:
        """Nearest rank of the known values of each window; nan where it holds none."""
        known = np.isfinite(values)
        numbers, values = self.number(times[known]), values[known]
        result = np.full(self.count, np.nan)
        for number in np.unique(numbers):
            inside = np.sort(values[numbers == number])
            result[number] = inside[max(0, math.ceil(fraction * len(inside)) - 1)]
        return result

    def hit_ratio(self, requests: Requests) -> Floats:
        """Cached prompt tokens over prompt tokens, of the answers that say."""
        told = requests.ok & np.isfinite(requests.cached_tokens)
        times = requests.intended[told]
        return _over(
            self.sums(times, requests.cached_tokens[told]), self.sums(times, requests.prompt_tokens[told].astype(float))
        )

    def in_flight(self, requests: Requests, chosen: Bools) -> Floats:
        """Mean number of the chosen requests between sending and the end of their answers."""
        edges = np.asarray(np.arange(self.count + 1) * self.width, dtype=float)
        begun, ended = np.sort(requests.sent[chosen]), np.sort(requests.ended[chosen])
        # Requests in flight integrated up to t: time since each began, less time since each ended.
        area = _elapsed(begun, edges) - _elapsed(ended, edges)
        return np.asarray(np.diff(area) / self.width)


def _elapsed(moments: Floats, edges: Floats) -> Floats:
    """For each edge: seconds since every moment before it, summed. moments: ascending."""
    count = np.searchsorted(moments, edges)
    total = np.concatenate([[0.0], np.cumsum(moments)])
    return np.asarray(count * edges - total[count])


def _over(above: Floats, below: Floats) -> Floats:
    result = np.full(len(above), np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result
