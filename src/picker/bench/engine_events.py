"""What engines with full caches say of their blocks, step by step, as bytes of KV events: the load of `events`.

Tokens and hashes are random: what is stored is never what was stored before. Nothing here is timed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from picker.prefix.spelling import Vocabulary
from picker.wire.kv_events import Event, Removed, Stored, encode_batch

BLOCK = 16  # tokens
TOKEN = 4  # bytes of text, on average
PROMPT = 250  # blocks that a request adds to the cache
CACHE = 1000  # blocks of requests that have ended

_TOKENS = 32_000
_ANSWER = 32  # blocks


@dataclass(frozen=True, slots=True)
class Load:
    """What one step does. chunk: blocks of a prompt that it computes, told of together; 0: no prompt waits.

    answers: requests whose next block of generated tokens fills up in it, told of one by one.
    """

    chunk: int
    answers: int

    @property
    def blocks(self) -> int:
        """Stored in a step, and removed."""
        return self.chunk + self.answers


# A step of 512 tokens of a prompt, as when prompts are computed beside answers, and 64 answers of which a sixteenth
# fills a block; a step of 2,048 tokens of a prompt (vLLM's default); 256 answers and no prompt.
MIXED, PREFILL, GENERATED = Load(32, 4), Load(128, 0), Load(0, 16)


@dataclass(frozen=True, slots=True)
class Step:
    """One batch of one engine."""

    row: int
    payload: bytes


class Engine:
    """Says what an engine does: each block that comes in puts one out, the oldest request's first, from its tail."""

    def __init__(self, row: int, capacity: int, rng: np.random.Generator, load: Load = MIXED) -> None:
        self._row = row
        self._capacity = capacity
        self._rng = rng
        self._load = load
        self._held: deque[int] = deque()
        self._prompt: list[int] = []
        self._answers: list[list[int]] = [[] for _ in range(load.answers)]

    def step(self) -> Step:
        """The next batch. As in vLLM, room is made for a request's blocks before they are stored."""
        events: list[Event] = []
        if self._load.chunk:
            events += self._extend(self._prompt, self._load.chunk)
            if len(self._prompt) >= PROMPT:
                self._finish(self._prompt)
        for answer in self._answers:
            events += self._extend(answer, 1)
            if len(answer) >= _ANSWER:
                self._finish(answer)
        return Step(self._row, encode_batch(0.0, events, 0))

    def _extend(self, chain: list[int], blocks: int) -> Iterator[Event]:
        for _ in range(min(len(self._held) - self._capacity, blocks)):
            yield Removed((self._held.popleft(),), "GPU", 0)
        hashes = self._rng.integers(0, 2**63, size=blocks).tolist()
        tokens = self._rng.integers(0, _TOKENS, size=blocks * BLOCK).tolist()
        parent = chain[-1] if chain else None
        chain += hashes
        yield Stored(
            tuple(hashes), parent, tuple(tokens), BLOCK, medium="GPU", group=0, kind="full_attention",
            extra_keys=[None] * blocks,
        )  # fmt: skip

    def _finish(self, chain: list[int]) -> None:
        self._held += reversed(chain)
        chain.clear()


def steps(engines: int, events: int, load: Load, rng: np.random.Generator) -> tuple[list[Step], list[Step]]:
    """Batches of so many engines in turn: those that fill their caches, then as many as store and remove `events`."""
    speaking = [Engine(row, CACHE, rng, load) for row in range(engines)]
    filling = 2 * CACHE // load.blocks
    each = max(events // (2 * load.blocks * engines), 1)
    first = [engine.step() for _ in range(filling) for engine in speaking]
    return first, [engine.step() for _ in range(each) for engine in speaking]


def vocabulary() -> Vocabulary:
    """What the tokens spell: random letters, four on average."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2 * TOKEN, size=_TOKENS)
    text = rng.integers(97, 123, size=int(lengths.sum()), dtype=np.uint8).tobytes()
    ends = np.cumsum(lengths)
    return Vocabulary([text[end - length : end] for end, length in zip(ends, lengths, strict=True)])
