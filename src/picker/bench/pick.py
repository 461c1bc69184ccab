"""One whole decision: hash the prompt, match it on every endpoint, score, choose, book. Nothing of the wire."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from picker.core.scheduler import Scheduler, Settings
from picker.prefix.approximate import ApproximateIndex
from picker.prefix.blocks import BlockHasher
from picker.types import Decision, Endpoint, EndpointAdded, Finished, FirstToken, LoadObserved, Request, Usage

ENDPOINTS = (10, 100, 1000)
PROMPT_BYTES = (1024, 32_768, 400_000)
_CONVERSATIONS = 64
_SECRET = b"a fixed key: figures compare runs"


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one operation over many repetitions."""

    p50_us: float
    p99_us: float


def rows(
    *, repeats: int = 400, seed: int = 0, progress: Callable[[str], None] = lambda line: None
) -> Iterator[dict[str, Any]]:
    """One row for each number of endpoints and prompt size; the hash alone stands beside the whole as its floor.

    Prompts are growing conversations: half of each is shared with what an endpoint has seen before.
    """
    for endpoints in ENDPOINTS:
        for prompt_bytes in PROMPT_BYTES:
            progress(f"{endpoints} endpoints, {prompt_bytes} bytes")
            bench = _Bench(endpoints, prompt_bytes, seed)
            whole, hashing = bench.run(repeats)
            yield {
                "endpoints": endpoints,
                "prompt_bytes": prompt_bytes,
                "p50_us": whole.p50_us,
                "p99_us": whole.p99_us,
                "hash_p50_us": hashing.p50_us,
                "repeats": repeats,
            }


class _Bench:
    def __init__(self, endpoints: int, prompt_bytes: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.prompt_bytes = prompt_bytes
        self.hasher = BlockHasher(_SECRET, 256)
        self.scheduler = Scheduler(Settings(seed=seed), ApproximateIndex(512 * 1024 * 1024))
        self.now = 0.0
        self.heads = [self._text(prompt_bytes // 2) for _ in range(_CONVERSATIONS)]
        for number in range(endpoints):
            name = f"10.0.{number // 250}.{number % 250}:8000"
            self.scheduler.apply(EndpointAdded(Endpoint(name, name, frozenset({"model"}))), self.now)
            load = LoadObserved(name, self.now, waiting=0.0, running=0.0, kv_usage=0.1, kv_capacity_tokens=400_000)
            self.scheduler.apply(load, self.now)

    def run(self, repeats: int) -> tuple[Timing, Timing]:
        """Warm up on every conversation, then measure; every request is ended before the next but two."""
        whole, hashing = np.zeros(repeats), np.zeros(repeats)
        for number in range(-2 * _CONVERSATIONS, repeats):
            prompt = self.heads[number % _CONVERSATIONS] + self._text(self.prompt_bytes - self.prompt_bytes // 2)
            self.now += 0.01
            started = time.perf_counter()
            hashes = self.hasher.hash(prompt, root=self.hasher.root("model", None))
            hashed = time.perf_counter()
            request = Request(number, "model", self.now, block_hashes=hashes, prompt_bytes=len(prompt), max_tokens=100)
            decision = self.scheduler.submit(request, self.now)
            ended = time.perf_counter()
            assert isinstance(decision, Decision)
            if number >= 0:
                whole[number], hashing[number] = ended - started, hashed - started
            self._end(number - 2)
        return _timing(whole), _timing(hashing)

    def _end(self, number: int) -> None:
        self.scheduler.apply(FirstToken(number), self.now)
        usage = Usage(self.prompt_bytes // 4, 100, self.prompt_bytes // 8)
        self.scheduler.apply(Finished(number, 200, usage), self.now)

    def _text(self, size: int) -> bytes:
        return self.rng.integers(97, 123, size=size, dtype=np.uint8).tobytes()


def _timing(seconds: np.ndarray) -> Timing:
    p50, p99 = np.percentile(seconds * 1e6, [50, 99])
    return Timing(round(float(p50), 1), round(float(p99), 1))
