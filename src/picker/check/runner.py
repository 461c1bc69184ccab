"""Runs checks one after another, each in bounded time. Knows no protocol and prints nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import grpc.aio

from picker.check.verdict import Check, Finding, Outcome, Trace, Verdict

S = TypeVar("S")


async def run(
    checks: Iterable[Check[S]],
    subject: S,
    trace: Trace,
    *,
    variant: str = "",
    tell: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """The verdicts, in order; `tell` hears of each at once. A check that breaks is an ERROR and ends nobody else's."""
    verdicts = []
    for check in checks:
        verdicts.append(await _one(check, subject, trace, variant))
        tell(verdicts[-1])
    return verdicts


async def _one(check: Check[S], subject: S, trace: Trace, variant: str) -> Verdict:
    trace.clear()
    started = time.monotonic()
    try:
        async with asyncio.timeout(check.limit):
            finding = await check.run(subject)
    except TimeoutError:
        finding = Finding(Outcome.ERROR, f"the check was not over after {check.limit:g} s")
    except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
        finding = Finding(Outcome.ERROR, f"gRPC: {error}")
    except OSError as error:
        # Those of checks have words; the system's own have a number, and say little without their kind.
        finding = Finding(Outcome.ERROR, str(error) if error.errno is None else f"{type(error).__name__}: {error}")
    except Exception as error:
        # Supervision: one check that breaks must not take the others' verdicts along.
        finding = Finding(Outcome.ERROR, f"{type(error).__name__}: {error}")
    return verdict_of(check, finding, trace, variant, time.monotonic() - started)


def verdict_of(check: Check[S], finding: Finding, trace: Trace, variant: str, seconds: float) -> Verdict:
    return Verdict(
        id=check.id,
        tier=check.tier,
        level=check.level,
        requirement=check.requirement,
        source=check.source,
        variant=variant,
        outcome=finding.outcome,
        why=finding.why,
        sent=tuple(trace.sent),
        received=tuple(trace.received),
        seconds=round(seconds, 4),
    )


def chosen(checks: Sequence[Check[S]], only: Sequence[str]) -> list[Check[S]]:
    """Those whose id is asked for, by itself or as a family ("EPP-3"); all when nothing is."""
    wanted = [word.lower() for word in only]
    return [check for check in checks if not wanted or any(_is_or_within(check.id.lower(), word) for word in wanted)]


def _is_or_within(name: str, word: str) -> bool:
    return name == word or name.startswith((f"{word}.", f"{word}-"))
