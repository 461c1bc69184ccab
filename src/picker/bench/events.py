"""KV events into the index of exact prefixes and prompts matched with it, beside a plain dict of sets in the same run.

From the bytes of a batch to the index: decoding, tokens to text, keys, blocks. Nothing of the wire before that.
"""

from __future__ import annotations

import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from picker.prefix.exact import Exact
from picker.prefix.precise import PreciseIndex
from picker.prefix.spellers import ByBytes, Place
from picker.prefix.spelling import PrefixHasher, Vocabulary
from picker.types import BlocksRemoved, BlocksStored, EventsChanged, EventState, Int64Array, Reading, UInt64Array
from picker.wire.kv_events import Removed, Stored, decode_batch, encode_batch, tell

ENDPOINTS = (10, 100, 1000)
BLOCKS = 1_000_000
COLUMNS = (
    *("endpoints", "events_per_s", "decode_us", "spell_us", "index_us", "dict_us"),
    *(
        "bytes_per_block",
        "shared_bytes_per_block",
        "dict_bytes_per_block",
        "match_p50_us",
        "dict_match_p50_us",
        "match_400k_p50_us",
        "dict_match_400k_p50_us",
    ),
)

_SECRET = b"a fixed key: figures compare runs"
_BUDGET = 1 << 32
_BLOCK = 16  # tokens
_TOKEN = 4  # bytes of text, on average
_CHUNK = 32  # blocks of a step's prefill: 512 tokens
_DECODING = 4  # requests whose next block of generated tokens fills up in the same step
_PROMPT = 250  # blocks that a request adds to the cache
_CACHE = 1000  # blocks of requests that have ended
_SPEAKING = 100  # endpoints whose events are timed, at most: more are no other work
_CHAIN = ("model", _BLOCK)
_MATCHED = 512, 6250  # blocks of a prompt of 32 KB and of 400 KB
_PROMPTS = 4
_HOLDERS = 16  # endpoints that hold more of a prompt than its beginning, an eighth, which all do


def rows(
    *,
    endpoints: Sequence[int] = ENDPOINTS,
    blocks: int = BLOCKS,
    events: int = 200_000,
    repeats: int = 200,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """One row for each number of endpoints; blocks: in all, of the memory figures. events: blocks of the timed ones.

    Steps store 32 blocks of a prompt and 4 of generated tokens, one each, and remove as many. The dict of sets knows
    blocks by the engines' hashes, as indexes do that tokenise and hash each prompt before: that is not counted.
    """
    for count in endpoints:
        progress(f"{count} endpoints")
        rng = np.random.default_rng(seed)
        yield {
            "endpoints": count,
            **_ingestion(_steps(count, events, rng), count),
            **_memory(count, blocks, rng),
            **_matching(count, blocks, repeats, rng),
            "repeats": repeats,
        }


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


# --- ingestion ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One batch of one engine."""

    row: int
    payload: bytes


class Engine:
    """Says what a full cache says: each block that comes in puts one out, the oldest request's first, from its tail."""

    def __init__(self, row: int, capacity: int, rng: np.random.Generator) -> None:
        self._row = row
        self._capacity = capacity
        self._rng = rng
        self._held: deque[int] = deque()
        self._prompt: list[int] = []
        self._answers: list[list[int]] = [[] for _ in range(_DECODING)]

    def step(self) -> Step:
        stores = [self._extend(self._prompt, _CHUNK)]
        if len(self._prompt) >= _PROMPT:
            self._finish(self._prompt)
        for answer in self._answers:
            stores.append(self._extend(answer, 1))
            if len(answer) >= _CHUNK:
                self._finish(answer)
        excess = min(len(self._held) - self._capacity, _CHUNK + _DECODING)
        removes = [Removed((self._held.popleft(),), "GPU", 0) for _ in range(excess)]
        return Step(self._row, encode_batch(0.0, [*removes, *stores], 0))

    def _extend(self, chain: list[int], blocks: int) -> Stored:
        hashes = self._rng.integers(0, 2**63, size=blocks).tolist()
        tokens = self._rng.integers(0, 32_000, size=blocks * _BLOCK).tolist()
        parent = chain[-1] if chain else None
        chain += hashes
        return Stored(
            tuple(hashes), parent, tuple(tokens), _BLOCK, medium="GPU", group=0, kind="full_attention",
            extra_keys=[None] * blocks,
        )  # fmt: skip

    def _finish(self, chain: list[int]) -> None:
        self._held += reversed(chain)
        chain.clear()


def _steps(endpoints: int, events: int, rng: np.random.Generator) -> list[Step]:
    """As many steps as store and remove so many blocks, after those that fill the caches."""
    engines = [Engine(row, capacity=_CACHE, rng=rng) for row in range(min(endpoints, _SPEAKING))]
    each = max(events // (2 * (_CHUNK + _DECODING) * len(engines)), 1)
    filling = _CACHE // (_CHUNK + _DECODING)
    return [engine.step() for _ in range(filling + each) for engine in engines]


def _ingestion(steps: Sequence[Step], endpoints: int) -> dict[str, Any]:
    """CPU time: of everything, and of the index alone on what it was given."""
    vocabulary = _vocabulary()
    hasher = PrefixHasher(_SECRET)
    known = Exact(PreciseIndex(_BUDGET, endpoints), ByBytes(hasher, lambda name: vocabulary), endpoints)
    for row in range(endpoints):
        known.apply(row, EventsChanged("pod", EventState.WHOLE))
    blocks, started = 0, time.process_time()
    for step in steps:
        told = tell(decode_batch(step.payload).events, "pod")
        for fact in told.facts:
            known.apply(step.row, fact)
        blocks += told.stored + told.removed
    whole = time.process_time() - started
    shares = _shares(steps, endpoints, vocabulary, hasher)
    return {"events_per_s": round(blocks / whole)} | {
        f"{name}_us": round(seconds / blocks * 1e6, 3) for name, seconds in shares.items()
    }


def _shares(steps: Sequence[Step], endpoints: int, vocabulary: Vocabulary, hasher: PrefixHasher) -> dict[str, float]:
    """Seconds of decoding, of spelling and of the index, each alone; of a dict of sets in its place."""
    speller, index, plain = ByBytes(hasher, lambda name: vocabulary), PreciseIndex(_BUDGET, endpoints), DictIndex()
    decoding = spelling = placing = in_dict = 0.0
    for step in steps:
        begun = time.process_time()
        told = tell(decode_batch(step.payload).events, "pod")
        decoding += time.process_time() - begun
        for fact in told.facts:
            begun = time.process_time()
            match fact:
                case BlocksStored(hashes=hashes, parent=parent):
                    start = speller.origin if parent is None else index.parent_of(step.row, parent)
                    assert start is not None, "an engine continues only blocks that it has"
                    spelled = speller.spell(fact, Place(*start))
                    assert spelled is not None, "every token is in the vocabulary"
                    spelling += (between := time.process_time()) - begun
                    index.stored(step.row, _CHAIN, hashes, parent, spelled.ends, spelled.keys, _BLOCK)
                    begun, after = between, time.process_time()
                    plain.stored(step.row, hashes)
                case BlocksRemoved(hashes=hashes):
                    index.removed(step.row, hashes)
                    after = time.process_time()
                    plain.removed(step.row, hashes)
                case _:
                    continue
            placing += after - begun
            in_dict += time.process_time() - after
    return {"decode": decoding, "spell": spelling, "index": placing, "dict": in_dict}


def _vocabulary() -> Vocabulary:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2 * _TOKEN, size=32_000)
    text = rng.integers(97, 123, size=int(lengths.sum()), dtype=np.uint8).tobytes()
    ends = np.cumsum(lengths)
    return Vocabulary([text[end - length : end] for end, length in zip(ends, lengths, strict=True)])


# --- memory and matching -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A chain of blocks as an index is told of it."""

    hashes: list[int]
    ends: Int64Array
    keys: UInt64Array

    @classmethod
    def random(cls, blocks: int, rng: np.random.Generator) -> Prompt:
        hashes, keys = rng.integers(0, 2**63, size=(2, blocks)).astype(np.uint64)
        return cls(hashes.tolist(), np.arange(1, blocks + 1) * (_BLOCK * _TOKEN), keys)

    def store(self, index: PreciseIndex, row: int, blocks: int) -> None:
        for start in range(0, blocks, _CHUNK):
            part = slice(start, min(start + _CHUNK, blocks))
            parent = self.hashes[start - 1] if start else None
            index.stored(row, _CHAIN, self.hashes[part], parent, self.ends[part], self.keys[part], _BLOCK)


def _memory(endpoints: int, blocks: int, rng: np.random.Generator) -> dict[str, Any]:
    """Bytes for a block of an endpoint: no block anywhere twice, and every block everywhere."""
    return {
        "bytes_per_block": round(_filled(endpoints, blocks, rng)[1], 1),
        "shared_bytes_per_block": round(_filled(endpoints, blocks, rng, shared=True)[1], 1),
        "dict_bytes_per_block": round(_dict_bytes(endpoints, min(blocks, 100_000), rng), 1),
    }


def _filled(
    endpoints: int, blocks: int, rng: np.random.Generator, *, shared: bool = False
) -> tuple[PreciseIndex, float]:
    index = PreciseIndex(_BUDGET, endpoints)
    length = min(_PROMPT, max(blocks // endpoints, 1))
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


def _matching(endpoints: int, blocks: int, repeats: int, rng: np.random.Generator) -> dict[str, Any]:
    """Walk and count, with the prompt hashed before; in an index that is as full as for the memory figures."""
    index, _ = _filled(endpoints, blocks, rng)
    plain = DictIndex()
    found: dict[str, Any] = {}
    for length, suffix in zip(_MATCHED, ("", "_400k"), strict=True):
        prompts = [Prompt.random(length, rng) for _ in range(_PROMPTS)]
        for prompt in prompts:
            _spread(prompt, length, endpoints, index, plain, rng)
        readings = [_reading(prompt) for prompt in prompts]
        precise = _p50(index.match, [(reading, "model") for reading in readings], repeats)
        with_sets = _p50(plain.match, [(prompt.hashes,) for prompt in prompts], repeats // 4 + 1)
        found |= {f"match{suffix}_p50_us": precise, f"dict_match{suffix}_p50_us": with_sets}
    return found


def _spread(
    prompt: Prompt, length: int, endpoints: int, index: PreciseIndex, plain: DictIndex, rng: np.random.Generator
) -> None:
    """Let everybody hold the beginning of a prompt, some more of it and one all."""
    for row in range(endpoints):
        held = length // 8 if row >= _HOLDERS else int(rng.integers(length // 8, length)) if row else length
        prompt.store(index, row, held)
        plain.stored(row, prompt.hashes[:held])


def _reading(prompt: Prompt) -> Reading:
    hashes = np.zeros(int(prompt.ends[-1]) + 1, dtype=np.uint64)
    hashes[prompt.ends] = prompt.keys
    return Reading(hashes)


def _p50(action: Callable[..., object], arguments: Sequence[tuple[Any, ...]], repeats: int) -> float:
    """Microseconds."""
    taken = np.zeros(repeats)
    for number in range(repeats):
        started = time.perf_counter()
        action(*arguments[number % len(arguments)])
        taken[number] = time.perf_counter() - started
    return round(float(np.median(taken)) * 1e6, 1)
