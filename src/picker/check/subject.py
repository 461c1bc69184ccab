"""What is checked at tier T1: an endpoint picker at an address, and what the checker knows and owns around it.

Owns connections and waiting; judges nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from picker.check.gateway import Ask, Gateway, Heard, Target
from picker.check.pods import Pods
from picker.check.prompts import Prompts
from picker.check.verdict import Finding, Trace


@dataclass(slots=True)
class Subject:
    """A picker under test.

    health: where its health service answers. pool: addresses it chooses from, as told or as seen. declared: they were
    told. pods: the endpoints, where the checker serves them itself. bound: seconds a decision may take. settle: seconds
    the picker has to notice that endpoints came or went. overload: requests at once that it must shed some of, None
    where it need not. max_body: bytes it must take and not exceed, None when unknown. secure: where it serves TLS.
    sinks: files it writes logs to.
    """

    gateway: Gateway
    health: Gateway
    prompts: Prompts
    trace: Trace
    pool: tuple[str, ...] = ()
    declared: bool = False
    pods: Pods | None = None
    bound: float = 1.0
    settle: float = 10.0
    overload: int | None = None
    max_body: int | None = None
    secure: Target | None = None
    sinks: tuple[Path, ...] = field(default=())

    @property
    def patience(self) -> float:
        return self.gateway.patience

    def completion(self, prompt: str | None = None, **more: object) -> Ask:
        """A completion request, with a prompt of its own when none is given."""
        return Ask(body=self.prompts.body(prompt, **more))

    async def decide(self, ask: Ask | None = None, *, answer: int = 200) -> Heard:
        """Ask, and have the chosen endpoint answer; a status of 503 is a gateway's that could not reach it."""
        return await self.gateway.ask(ask or self.completion(), status=answer)

    async def discover(self, asks: int = 16) -> None:
        """Learn the pool from the picker's own choices, where nobody has told it."""
        seen = {name for _ in range(asks) for name in (await self.decide()).named}
        self.pool = tuple(sorted(seen))

    async def until(self, wanted: Callable[[Heard], bool], *, seconds: float | None = None, answer: int = 200) -> Heard:
        """Ask again and again until the verdict is as wanted; the last one when `seconds` are over."""
        deadline = time.monotonic() + (self.settle if seconds is None else seconds)
        while True:
            heard = await self.decide(answer=answer)
            if wanted(heard) or time.monotonic() > deadline:
                return heard
            await asyncio.sleep(0.05)

    async def ready(self, seconds: float | None = None) -> Heard:
        """Wait until the picker names every endpoint known, or at least one where none is."""
        wanted = set(self.pool) if self.declared else set()
        seen: set[str] = set()

        def all_seen(heard: Heard) -> bool:
            seen.update(heard.named)
            return bool(seen) and wanted <= seen

        return await self.until(all_seen, seconds=seconds)

    def stranger(self, names: list[str]) -> str | None:
        """The first name that is no endpoint of the pool."""
        return next((name for name in names if name not in self.pool), None)


# How a check of tier T1 is tried.
Try = Callable[[Subject], Awaitable[Finding]]


def unrouted(heard: Heard) -> str | None:
    """Why an ordinary request was not given an endpoint; None when it was."""
    return None if heard.named else f"an ordinary request got no endpoint: {heard.said()}"
