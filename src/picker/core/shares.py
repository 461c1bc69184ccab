"""Where requests that are tied to no endpoint are expected to go: to the fast more often than to the slow."""

from __future__ import annotations

import numpy as np

from picker.types import FloatArray


def shares(speed: FloatArray, recent: FloatArray, habit: float) -> FloatArray:
    """What comes to each endpoint, relative to the mean one: a power of its speed.

    speed: (n,), above zero. recent: (n,) requests that went there lately. habit: how far the power is the one seen, and
    not 1, at which all are equally busy.

    The power seen is what tilts equal shares to the mean log of the speeds where requests went, to first order, with
    one request's worth of belief in 1. It is one number for the pool: shares of single endpoints would follow chance,
    which then upholds itself.
    """
    if not np.count_nonzero(speed != 1.0):
        return np.ones(speed.size)
    logs = np.log(speed)
    logs -= logs.mean()
    spread = float(logs @ logs) / logs.size
    seen = (float(recent @ logs) + 1.0) / (float(recent.sum()) * spread + 1.0)
    # From the fastest down: nothing overflows when thousands are slow and all went to one that is fast.
    tilted: FloatArray = np.exp((logs - logs.max()) * (1.0 - habit + habit * max(seen, 0.0)))
    tilted *= tilted.size / float(tilted.sum())
    return tilted
