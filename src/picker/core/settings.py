"""What a scheduler is told by whoever runs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What a scheduler is told once.

    block_bytes: bytes per block of `Request.block_hashes`. index_budget: bytes the prefix index may take.
    fallbacks: endpoints named behind the first. max_inflight: requests per endpoint before others must wait (None: no
    limit, the engines queue). queue_size: requests that may wait here then. hold_s: how long one waits when there is no
    endpoint at all, for one to come.
    eject_after: consecutive faults after which an endpoint rests for eject_s, twice as long each further time, at most
    eject_max_s. sessions: how many session ids are remembered.
    retry_ratio: requests sent a second time per request, beside retry_floor of them in ten seconds; None: no limit.
    hang_floor_s: an endpoint that is silent for so long, and a request that has waited hang_factor times as long as
    predicted beyond that, are given up; 0: never. slow_start_s: a newcomer's share of the work grows for so long.
    """

    block_bytes: int = 256
    index_budget: int = 512 * 1024 * 1024
    fallbacks: int = 2
    max_inflight: int | None = None
    queue_size: int = 1000
    hold_s: float = 0.0
    eject_after: int = 3
    eject_s: float = 1.0
    eject_max_s: float = 30.0
    retry_ratio: float | None = None
    retry_floor: float = 10.0
    hang_factor: float = 4.0
    hang_floor_s: float = 0.0
    slow_start_s: float = 0.0
    sessions: int = 100_000
    seed: int = 0
