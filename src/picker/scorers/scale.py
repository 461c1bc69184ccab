"""From a load to a score: the least loaded candidate gets 1, the most loaded 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from picker.types import ScoreArray


def less_is_better(load: NDArray[np.floating]) -> ScoreArray:
    """(max - load) / (max - min) over the candidates; all 1 when equal (llm-d's formula).

    A load nobody observed (NaN) is taken to be the mean of the others: unknown is neither idle nor busy.
    """
    known = ~np.isnan(load)
    if not known.any():
        return np.ones(load.size, dtype=np.float32)
    load = np.where(known, load, load[known].mean())
    low, high = load.min(), load.max()
    if high == low:
        return np.ones(load.size, dtype=np.float32)
    score: ScoreArray = ((high - load) / (high - low)).astype(np.float32)
    return score
