"""Rows of `picker simulate --json` in the fewest words."""

from __future__ import annotations

from typing import Any


def row(policy: str, seed: int = 1, ttft: float | None = 1.0, **more: Any) -> dict[str, Any]:
    """A run in which every time is `ttft` unless said otherwise."""
    return {
        "policy": policy,
        "scenario": "agentic",
        "model": "m",
        "pods": 2,
        "load": 0.5,
        "rate": 1.0,
        "seed": seed,
        "requests": 100,
        "failed": 0,
        "ttft_mean_s": ttft,
        "ttft_p90_s": ttft,
        "ttft_p95_s": ttft,
        "ttft_p99_s": ttft,
        "ttft_growth": 0.0,
        "e2e_mean_s": ttft,
        "tpot_mean_s": 0.01,
        "hit_ratio": 0.5,
        "output_tokens_per_s": 100.0,
        **more,
    }


def rows(**ttfts: list[float]) -> list[dict[str, Any]]:
    """Policy (with _ for -) -> mean TTFT by seed 1, 2, ..."""
    return [
        row(policy.replace("_", "-"), seed, ttft)
        for policy, values in ttfts.items()
        for seed, ttft in enumerate(values, start=1)
    ]
