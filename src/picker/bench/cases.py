"""What the gateways are asked in a benchmark: one case for each prompt size and length of answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from picker.bench.client import Traffic
from picker.bench.prompts import Prompts
from picker.bench.upstream import Response, Upstream, streamed, whole

PROMPT_BYTES = (1024, 32_768, 220_000)
CHUNKS = (1, 100, 1000)
# A few, so that a decision is one; how it grows with their number is `picker bench pick`'s business.
ENDPOINTS = 4

# Requests a second while latency is measured: far below what saturates anybody, and enough of them for a percentile.
_MODEST = 200.0
_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt size and answer. chunks: of a streamed answer; 0 is a JSON answer that is not streamed."""

    prompt_bytes: int
    chunks: int
    prompts: Prompts
    response: Response

    def traffic(self, upstream: Upstream, ports: Sequence[int]) -> Traffic:
        return Traffic(upstream, ports, self.prompts, self.response)

    def __str__(self) -> str:
        return f"{self.prompt_bytes} bytes · {self.chunks} chunks"


def cases(prompt_bytes: Sequence[int], chunks: Sequence[int]) -> Iterator[Case]:
    for size in prompt_bytes:
        prompts = Prompts(size)
        for count in chunks:
            tokens = size // 4
            response = streamed(count, prompt_tokens=tokens) if count else whole(prompt_tokens=tokens)
            yield Case(size, count, prompts, response)


def modest_rate(requests_per_s: float) -> float:
    """The rate of an open loop for gateways of which the slowest does `requests_per_s`."""
    return min(_MODEST, _SHARE * requests_per_s)
