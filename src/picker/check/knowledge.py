"""Tier T3: runs the checks of engines and of a picker's admin port, whichever are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import zmq.asyncio

from picker.check import admin_port, runner, sources
from picker.check.admin_port import AdminPort
from picker.check.engine import Engine
from picker.check.verdict import Trace, Verdict


@dataclass(frozen=True, slots=True)
class Asked:
    """engines, admin: URLs. events, replay: where engines publish, if they do not tell. tokenizer: picker's folder."""

    engines: tuple[str, ...] = ()
    admin: str | None = None
    events: str | None = None
    replay: str | None = None
    tokenizer: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.engines) or self.admin is not None


async def run(
    asked: Asked, only: Sequence[str], seed: int, patience: float, tell: Callable[[Verdict], None]
) -> list[Verdict]:
    """The verdicts, for each engine by itself."""
    verdicts: list[Verdict] = []
    trace, context = Trace(), zmq.asyncio.Context()
    try:
        async with aiohttp.ClientSession(headers={"user-agent": "picker-check"}) as session:
            if asked.admin is not None:
                admin = AdminPort(asked.admin.rstrip("/"), session, trace, patience)
                verdicts += await runner.run(runner.chosen(admin_port.CHECKS, only), admin, trace, tell=tell)
            for url in asked.engines:
                engine = Engine(url.rstrip("/"), session, context, trace, seed=seed, patience=patience)
                engine.events, engine.replay, engine.tokenizer = asked.events, asked.replay, asked.tokenizer
                chosen = runner.chosen(sources.CHECKS, only)
                verdicts += await runner.run(chosen, engine, trace, variant=_short(url), tell=tell)
    finally:
        context.destroy(linger=0)
    return verdicts


def _short(url: str) -> str:
    return url.partition("://")[2].rstrip("/") or url
