"""Measured runs made up for tests of whoever reads them: no server, no clock."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import numpy as np

from picker.load.client import Record
from picker.load.measured import Measured, Origin, measured
from picker.load.schedule import Pace, Run
from picker.load.workload import Plan, Planned, SharedPrefix

BEGAN = 1000.0
ORIGIN = Origin(
    command="picker load http://127.0.0.1:8000 --rate 20",
    url="http://127.0.0.1:8000",
    model="llama",
    started="2026-01-02T03:04:05.000+00:00",
    machine={
        "cpu": "Some CPU",
        "cores": 2,
        "system": "Linux 6",
        "python": "3.11.4",
        "picker": "0.1.0",
        "commit": "abc",
    },
    seed=1,
    shape={"workload": "shared-prefix", "rate": 20.0},
)


def record(at: float, ttft: float = 0.1, conversation: int = 0, turn: int = 0, **changes: Any) -> Record:
    """Sent on time, first token after `ttft`, ten more in a second."""
    good = Record(
        intended_at=BEGAN + at,
        sent_at=BEGAN + at,
        first_at=BEGAN + at + ttft,
        ended_at=BEGAN + at + ttft + 1.0,
        endpoint="a:8000",
        prompt_tokens=100,
        output_tokens=11,
        cached_tokens=40,
        gaps=array("f", [0.1] * 10),
        conversation=conversation,
        turn=turn,
    )
    return replace(good, **changes)


def failed(at: float, error: str = "http-503", **changes: Any) -> Record:
    return record(at, first_at=None, error=error, output_tokens=0, prompt_tokens=0, cached_tokens=None, **changes)


def run(*records: Record, time_scale: float = 1.0, plan: Plan | None = None) -> Run:
    end = max((each.ended_at for each in records), default=BEGAN)
    found = Run(plan or Plan("test", ()), Pace(time_scale=time_scale), started_at=BEGAN, ended_at=end)
    found.records = list(records)
    found.sent = len(records)
    return found


def measured_of(*records: Record, origin: Origin = ORIGIN, time_scale: float = 1.0, **changes: Any) -> Measured:
    return replace(measured(run(*records, time_scale=time_scale), origin), **changes)


def plan_of(times: list[float], **changes: Any) -> Plan:
    conversations: tuple[Planned, ...] = SharedPrefix().plan(times, np.random.default_rng(0), seed=0).conversations
    return Plan("test", conversations, **changes)


def noisy(seed: int, count: int = 300, slower: float = 1.0, origin: Origin = ORIGIN) -> Measured:
    """Twenty requests a second; the same plan each time, with noise of its own."""
    times = np.cumsum(np.random.default_rng(0).exponential(1 / 20, count))
    ttfts = slower * np.random.default_rng(seed).lognormal(np.log(0.2), 0.5, count)
    names = [f"{name}:8000" for name in "abc"]
    return measured_of(
        *(
            record(float(at), float(ttft), conversation=number, endpoint=names[number % 3])
            for number, (at, ttft) in enumerate(zip(times, ttfts, strict=True))
        ),
        origin=origin,
    )
