"""Where requests that are tied to no endpoint are expected to go: to the fast more often than to the slow."""

from __future__ import annotations

import math

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
    n = speed.size
    (apart,) = (speed != 1.0).nonzero()  # a few, as a rule: everything but the sum of requests is about them
    rest = n - apart.size
    if rest == n:
        return np.ones(n)
    logs = np.log(speed[apart])
    mean = np.add.reduce(logs).item() / n
    spread = np.dot(logs, logs).item() / n - mean * mean
    requests = np.add.reduce(recent).item()
    seen = (np.dot(recent[apart], logs).item() - mean * requests + 1.0) / (requests * spread + 1.0)
    power = 1.0 - habit + habit * max(seen, 0.0)
    # From the fastest down: nothing overflows when thousands are slow and all went to one that is fast.
    top = np.maximum.reduce(logs).item()
    top = max(top, 0.0) if rest else top
    tilted, even = np.exp((logs - top) * power), math.exp(-top * power) if rest else 0.0
    scale = n / (np.add.reduce(tilted).item() + rest * even)
    found: FloatArray = np.empty(n)
    found.fill(even * scale)
    found[apart] = tilted * scale
    return found
