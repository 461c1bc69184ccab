"""How fast KV events become an index of exact prefixes, on one core: from the bytes of a batch to blocks.

Decoding, tokens to text, keys, blocks. Nothing of the wire before that, and no judging of generated blocks, which a
thread does (`exact_match`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from picker.bench.block_index import BUDGET, CHAIN, SECRET, DictIndex
from picker.bench.engine_events import BLOCK, GENERATED, MIXED, PREFILL, Step, steps, vocabulary
from picker.prefix.exact import Exact
from picker.prefix.precise import PreciseIndex
from picker.prefix.spellers import ByBytes, Place
from picker.prefix.spelling import PrefixHasher, Vocabulary
from picker.types import BlocksRemoved, BlocksStored, EventsChanged, EventState
from picker.wire.kv_events import decode_batch, tell

_SPEAKING = 100  # endpoints whose events are timed, at most: more are no other work
_PASSES = 5


def ingestion(endpoints: int, events: int, rng: np.random.Generator) -> dict[str, Any]:
    """Block events in a second of CPU time by load, the best of a few passes, and what each of `MIXED` costs.

    The best, because whatever else runs on a machine makes a pass slower and never faster.
    """
    table, hasher = vocabulary(), PrefixHasher(SECRET)
    figures: dict[str, Any] = {}
    for name, load in (("", MIXED), ("prefill_", PREFILL), ("generated_", GENERATED)):
        filling, timed = steps(min(endpoints, _SPEAKING), events, load, rng)
        rates = [_rate(filling, timed, endpoints, table, hasher) for _ in range(_PASSES)]
        figures[f"{name}events_per_s"] = round(max(rates))
        if load is MIXED:
            shares = _shares(filling, timed, endpoints, table, hasher)
    return figures | {f"{name}_us": round(each, 3) for name, each in shares.items()}


def _rate(
    filling: Sequence[Step], timed: Sequence[Step], endpoints: int, table: Vocabulary, hasher: PrefixHasher
) -> float:
    """Blocks stored or removed in a second, from the bytes of a batch on."""
    known = Exact(PreciseIndex(BUDGET, endpoints), ByBytes(hasher, lambda name: table), endpoints)
    for row in range(endpoints):
        known.apply(row, EventsChanged("pod", EventState.WHOLE))
    _learn(known, filling)
    started = time.process_time()
    blocks = _learn(known, timed)
    return blocks / (time.process_time() - started)


def _learn(known: Exact, steps: Sequence[Step]) -> int:
    blocks = 0
    for step in steps:
        told = tell(decode_batch(step.payload).events, "pod")
        for fact in told.facts:
            known.apply(step.row, fact)
        blocks += told.stored + told.removed
    return blocks


def _shares(
    filling: Sequence[Step], timed: Sequence[Step], endpoints: int, table: Vocabulary, hasher: PrefixHasher
) -> dict[str, float]:
    """Microseconds a block of decoding, of spelling and of the index, each alone; of a dict of sets in its place."""
    parts = _Parts(endpoints, table, hasher)
    for step in filling:
        parts.take(step)
    parts.seconds, parts.blocks = dict.fromkeys(parts.seconds, 0.0), 0
    for step in timed:
        parts.take(step)
    return {name: seconds / parts.blocks * 1e6 for name, seconds in parts.seconds.items()}


class _Parts:
    """What `Exact` does, with a clock between its parts, which adds some tenths of a microsecond a block to them."""

    def __init__(self, endpoints: int, table: Vocabulary, hasher: PrefixHasher) -> None:
        self.blocks = 0
        self.seconds = dict.fromkeys(("decode", "spell", "index", "dict"), 0.0)
        self._speller = ByBytes(hasher, lambda name: table)
        self._index, self._plain = PreciseIndex(BUDGET, endpoints), DictIndex()

    def take(self, step: Step) -> None:
        begun = time.process_time()
        told = tell(decode_batch(step.payload).events, "pod")
        self.seconds["decode"] += time.process_time() - begun
        self.blocks += told.stored + told.removed
        for fact in told.facts:
            match fact:
                case BlocksStored():
                    self._store(step.row, fact)
                case BlocksRemoved(hashes=hashes):
                    times = _times(
                        lambda: self._index.removed(step.row, hashes), lambda: self._plain.removed(step.row, hashes)
                    )
                    self._add(("index", "dict"), times)
                case _:
                    pass

    def _store(self, row: int, fact: BlocksStored) -> None:
        begun = time.process_time()
        start = self._speller.origin if fact.parent is None else self._index.parent_of(row, fact.parent)
        assert start is not None, "an engine continues only blocks that it has"
        spelled = self._speller.spell(fact, Place(*start))
        assert spelled is not None, "every token is in the vocabulary"
        self.seconds["spell"] += time.process_time() - begun
        arguments = CHAIN, fact.hashes, fact.parent, spelled.ends, spelled.keys, BLOCK
        times = _times(lambda: self._index.stored(row, *arguments), lambda: self._plain.stored(row, fact.hashes))
        self._add(("index", "dict"), times)

    def _add(self, names: Sequence[str], seconds: Sequence[float]) -> None:
        for name, each in zip(names, seconds, strict=True):
            self.seconds[name] += each


def _times(*actions: Callable[[], object]) -> list[float]:
    """CPU seconds that each takes, one after the other."""
    marks = [time.process_time()]
    for action in actions:
        action()
        marks.append(time.process_time())
    return [after - before for before, after in itertools.pairwise(marks)]
