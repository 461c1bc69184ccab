"""Peers' policies in states made by hand: so many endpoints, so much in flight there, so much of a prompt cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from picker.prefix.approximate import ApproximateIndex
from picker.sim.policies.knowledge import Approximate, Knowledge
from picker.sim.policies.peer import Asked, Peer
from picker.types import Decision, Endpoint, EndpointAdded, Request, UInt64Array

BLOCK = 16

P = TypeVar("P", bound=Peer)


def names(count: int) -> list[str]:
    return [f"pod-{i}" for i in range(count)]


def router(kind: type[P], endpoints: int, *, knowledge: Knowledge | None = None, seed: int = 0, **settings: Any) -> P:
    """A policy that knows so many endpoints, called pod-0, pod-1, ..., and nothing else."""
    knowledge = knowledge or Approximate(ApproximateIndex(1 << 20))
    peer = kind(knowledge, np.random.default_rng(seed), block_tokens=BLOCK, **settings)
    for name in names(endpoints):
        peer.apply(EndpointAdded(Endpoint(name, name)), 0.0)
    return peer


def hashes(*values: int) -> UInt64Array:
    return np.array(values, dtype=np.uint64)


def request(
    number: int, blocks: Sequence[int] = (), *, tokens: int | None = None, exclude: Sequence[str] = ()
) -> Request:
    """A prompt of these blocks, or of `tokens` that begin with them."""
    tokens = len(blocks) * BLOCK if tokens is None else tokens
    return Request(
        id=number,
        model=None,
        arrived_at=0.0,
        block_hashes=hashes(*blocks),
        prompt_tokens=tokens,
        prompt_bytes=4 * tokens,
        exclude=frozenset(exclude),
    )


def asked(blocks: Sequence[int], matched: Sequence[int], *, number: int = 1) -> Asked:
    """A prompt of these blocks, of which each endpoint has so many leading ones cached."""
    tokens = float(len(blocks) * BLOCK)
    cached = np.minimum(np.array(matched, dtype=np.float64) * BLOCK, tokens - 1.0)
    return Asked(
        request=request(number, blocks),
        now=0.0,
        rows=np.arange(len(matched), dtype=np.int64),
        tokens=tokens,
        total_blocks=len(blocks),
        matched_blocks=np.array(matched, dtype=np.float64),
        uncached=tokens - cached,
    )


def sent(peer: Peer, what: Request, now: float = 0.0) -> str:
    """Where it went."""
    decision = peer.submit(what, now)
    assert isinstance(decision, Decision), decision
    return decision.endpoint.name
