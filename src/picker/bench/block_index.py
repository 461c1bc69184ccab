"""What the index of exact prefixes takes in memory and for a match, beside a plain dict of sets in the same run.

Blocks and prompts are numbers here: texts, tokens and events are `exact_match`'s and `ingestion`'s.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from picker.bench.engine_events import BLOCK, PROMPT, TOKEN
from picker.prefix.precise import PreciseIndex
from picker.types import Int64Array, Reading, UInt64Array

SECRET = b"a fixed key: figures compare runs"
BUDGET = 1 << 32
CHAIN = ((None, None), BLOCK)  # neither adapter nor salt
HOLDERS = 16  # endpoints that hold more of a prompt than its beginning, an eighth, which all do

_CHUNK = 32  # blocks told of at once
_MATCHED = 512, 6250  # blocks of a prompt of 32 KB and of 400 KB
_PROMPTS = 4


class DictIndex:
    """The baseline: by the engine's hash, the set of rows that hold a block."""

    def __init__(self) -> None:
        self.rows: dict[int, set[int]] = {}

    def stored(self, row: int, hashes: Sequence[int]) -> None:
        for number in hashes:
            self.rows.setdefault(number, set()).add(row)

    def removed(self, row: int, hashes: Sequence[int]) -> None:
        for number in hashes:
            holders = self.rows.get(number)
            if holders is not None:
                holders.discard(row)
                if not holders:
                    del self.rows[number]

    def match(self, hashes: Sequence[int]) -> dict[int, int]:
        """Leading blocks by row."""
        found: dict[int, int] = {}
        active: set[int] | None = None
        for depth, number in enumerate(hashes, 1):
            holders = self.rows.get(number, set())
            active = holders if active is None else active & holders
            if not active:
                break
            found.update(dict.fromkeys(active, depth))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A chain of blocks as an index is told of it."""

    hashes: list[int]
    ends: Int64Array
    keys: UInt64Array

    @classmethod
    def random(cls, blocks: int, rng: np.random.Generator) -> Prompt:
        hashes, keys = rng.integers(0, 2**63, size=(2, blocks)).astype(np.uint64)
        return cls(hashes.tolist(), np.arange(1, blocks + 1) * (BLOCK * TOKEN), keys)

    def store(self, index: PreciseIndex, row: int, blocks: int) -> None:
        for start in range(0, blocks, _CHUNK):
            part = slice(start, min(start + _CHUNK, blocks))
            parent = self.hashes[start - 1] if start else None
            index.stored(row, CHAIN, self.hashes[part], parent, self.ends[part], self.keys[part], BLOCK)


def memory(endpoints: int, blocks: int, rng: np.random.Generator) -> dict[str, Any]:
    """Bytes for a block of an endpoint: no block anywhere twice, and every block everywhere."""
    return {
        "bytes_per_block": round(filled(endpoints, blocks, rng)[1], 1),
        "shared_bytes_per_block": round(filled(endpoints, blocks, rng, shared=True)[1], 1),
        "dict_bytes_per_block": round(_dict_bytes(endpoints, min(blocks, 100_000), rng), 1),
    }


def filled(
    endpoints: int, blocks: int, rng: np.random.Generator, *, shared: bool = False
) -> tuple[PreciseIndex, float]:
    """An index in which all endpoints together hold so many blocks, and what each of these takes."""
    index = PreciseIndex(BUDGET, endpoints)
    length = min(PROMPT, max(blocks // endpoints, 1))
    for _ in range(max(blocks // endpoints // length, 1)):
        prompt = Prompt.random(length, rng)
        for row in range(endpoints):
            (prompt if shared else Prompt.random(length, rng)).store(index, row, length)
    return index, index.nbytes / sum(index.resident(row) for row in range(endpoints))


def _dict_bytes(endpoints: int, blocks: int, rng: np.random.Generator) -> float:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = DictIndex()
    each = max(blocks // endpoints, 1)
    for row in range(endpoints):
        index.stored(row, rng.integers(0, 2**63, size=each).tolist())
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return taken / len(index.rows)


def matching(endpoints: int, blocks: int, repeats: int, rng: np.random.Generator) -> dict[str, Any]:
    """Walk and count, with the prompt hashed before; in an index that is as full as for the memory figures."""
    index, _ = filled(endpoints, blocks, rng)
    plain = DictIndex()
    found: dict[str, Any] = {}
    for length, suffix in zip(_MATCHED, ("", "_400k"), strict=True):
        prompts = [Prompt.random(length, rng) for _ in range(_PROMPTS)]
        for prompt in prompts:
            _spread(prompt, length, endpoints, index, plain, rng)
        readings = [_reading(prompt) for prompt in prompts]
        precise = _p50(index.match, [(reading, CHAIN[0]) for reading in readings], repeats)
        with_sets = _p50(plain.match, [(prompt.hashes,) for prompt in prompts], repeats // 4 + 1)
        found |= {f"match{suffix}_p50_us": precise, f"dict_match{suffix}_p50_us": with_sets}
    return found


def _spread(
    prompt: Prompt, length: int, endpoints: int, index: PreciseIndex, plain: DictIndex, rng: np.random.Generator
) -> None:
    """Let everybody hold the beginning of a prompt, some more of it and one all."""
    for row in range(endpoints):
        held = length // 8 if row >= HOLDERS else int(rng.integers(length // 8, length)) if row else length
        prompt.store(index, row, held)
        plain.stored(row, prompt.hashes[:held])


def _reading(prompt: Prompt) -> Reading:
    hashes = np.zeros(int(prompt.ends[-1]) + 1, dtype=np.uint64)
    hashes[prompt.ends] = prompt.keys
    return Reading(hashes)


def _p50(action: Callable[..., object], arguments: Sequence[tuple[Any, ...]], repeats: int) -> float:
    """Microseconds of CPU time."""
    taken = np.zeros(repeats)
    for number in range(repeats):
        started = time.process_time()
        action(*arguments[number % len(arguments)])
        taken[number] = time.process_time() - started
    return round(float(np.median(taken)) * 1e6, 1)
