"""Spreads prompts that nobody has cached: to the endpoint that got such a prompt longest ago."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from picker.core.profile import names
from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class NoHitLru:
    """llm-d's `no-hit-lru-scorer`: 0.5 for all where anybody has a match, else by when each last got such a prompt.

    Of n candidates those never given one come first, the i-th of them (from 0) at 1 - i / (n - 1); the others follow,
    the one given longest ago first. lru_size: endpoints remembered.
    """

    lru_size: int = 1024
    name: str = "no-hit-lru-scorer"
    _given: OrderedDict[str, None] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        if view.matched_blocks.any():
            return np.full(view.n, 0.5, dtype=np.float32)
        if view.n == 1:
            return np.ones(1, dtype=np.float32)
        last = {name: place for place, name in enumerate(self._given)}
        given = np.array([last.get(name, -1) for name in names(view)])
        never = given < 0
        rank = np.where(never, np.cumsum(never) - 1, np.count_nonzero(never) + given)
        return np.clip(1.0 - rank / (view.n - 1), 0.0, 1.0).astype(np.float32)

    def picked(self, view: PoolView, request: Request, name: str) -> None:
        """Remember where a prompt went that nobody had cached."""
        if view.matched_blocks.any():
            return
        self._given[name] = None
        self._given.move_to_end(name)
        if len(self._given) > self.lru_size:
            self._given.popitem(last=False)
