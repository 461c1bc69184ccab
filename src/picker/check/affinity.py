"""KV-1, KV-3, EPP-9: whether choices follow what the endpoints cache, as far as one can see from outside.

Statistical: each check says how many tries it makes and how often a picker passes by luck.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from picker.check.gateway import ANSWER
from picker.check.subject import Subject, Try, unrouted
from picker.check.verdict import Check, Finding, Level, Tier, failed, passed, skipped

_KAR = "KAR-0011, K/V cache-aware routing"
_PROMPT = 8_000
_PROMPTS = 8
_REPEATS = 4
_NO_POOL = "needs a pool of two endpoints"
# Of 32 repeats; two endpoints drawn by lot pass once in 5,000 runs.
_FAITHFUL = 0.8
_CROWD = 12
# Under three quarters of them may meet; two endpoints drawn by lot fail once in 300 runs.
_SALTS = 24
# One may fail; two endpoints drawn by lot pass once in 300 runs.
_MOVES = 12


async def repeats(subject: Subject) -> Finding:
    if len(subject.pool) < 2:
        return skipped(_NO_POOL)
    faithful = 0
    for _ in range(_PROMPTS):
        prompt = subject.prompts.fresh(_PROMPT)
        holder = (await subject.decide(subject.completion(prompt))).first
        for _ in range(_REPEATS):
            faithful += (await subject.decide(subject.completion(prompt))).first == holder
    share = faithful / (_PROMPTS * _REPEATS)
    said = f"{faithful} of {_PROMPTS * _REPEATS} repeated prompts went to the endpoint that had them"
    return passed(said) if share >= _FAITHFUL else failed(said)


async def spread(subject: Subject) -> Finding:
    """Held open together, so that a picker that counts what it has sent knows where the load is."""
    if len(subject.pool) < 2:
        return skipped(_NO_POOL)
    chosen: Counter[str | None] = Counter()
    async with AsyncExitStack() as stack:
        for _ in range(_CROWD):
            talk = await stack.enter_async_context(subject.gateway.talk())
            heard = await talk.verdict(subject.completion(subject.prompts.fresh(_PROMPT)))
            if violation := unrouted(heard):
                return failed(violation)
            chosen[heard.first] += 1
    most, even = max(chosen.values()), _CROWD / len(subject.pool)
    said = f"{len(chosen)} of {len(subject.pool)} endpoints got {_CROWD} new prompts at once, one of them {most}"
    return passed(said) if len(chosen) > 1 and most <= 2 * even else failed(said)


async def salted(subject: Subject) -> Finding:
    """The holder is kept busy: without affinity nothing speaks for it, with a leak its cache does."""
    if len(subject.pool) < 2:
        return skipped(_NO_POOL)
    prompt = subject.prompts.fresh(_PROMPT)
    owner = subject.prompts.fresh(24)
    async with subject.gateway.talk() as talk:
        holder = (await talk.verdict(subject.completion(prompt, cache_salt=owner))).first
        others = [
            (await subject.decide(subject.completion(prompt, cache_salt=subject.prompts.fresh(24)))).first
            for _ in range(_SALTS)
        ]
        await talk.respond(ANSWER)
    leaked = others.count(holder)
    said = f"{leaked} of {_SALTS} requests of other tenants went to the endpoint that one tenant's prompt is cached on"
    return failed(said) if leaked > _SALTS * 3 // 4 else passed(said)


async def _all_well(subject: Subject) -> None:
    """Have every endpoint serve something: one that is named and never serves is soon taken for broken, and rightly."""
    for address in subject.pool:
        await subject.decide(replace(subject.completion(), subset=[address]))


async def served_elsewhere(subject: Subject) -> Finding:
    """Served by another than was named, then asked again with the one named out of bounds: who has the prompt now?"""
    if len(subject.pool) < 3:
        return skipped("needs a pool of three endpoints")
    known = 0
    for number in range(_MOVES):
        await _all_well(subject)
        ask = subject.completion(subject.prompts.fresh(_PROMPT))
        async with subject.gateway.talk() as talk:
            named = (await talk.verdict(ask)).first
            others = [one for one in subject.pool if one != named]
            # In turn, for a picker that has a favourite among those that are alike.
            server = others.pop(number % 2)
            heard = await talk.respond(ANSWER, served=server)
        if not heard.of("response_headers"):
            return failed(f"told that another endpoint served: {heard.said()}")
        again = await subject.decide(replace(ask, subset=[others[0], server]))
        known += again.first == server
    said = f"{known} of {_MOVES} prompts went back to the endpoint that served them though another was named"
    return passed(said) if known >= _MOVES - 1 else failed(said)


def _check(name: str, requirement: str, run: Try, source: str = _KAR) -> Check[Subject]:
    return Check(name, Tier.T1, requirement, source, run, Level.SHOULD)


CHECKS: Sequence[Check[Subject]] = (
    _check("KV-1.repeats", "A prompt goes back to the endpoint that has it cached.", repeats),
    _check("KV-1.spread", "New prompts spread over the pool.", spread),
    _check("KV-3.salt", "The same prompt under another cache_salt is another prompt.", salted, "cache isolation"),
    _check(
        "EPP-9.served",
        "What was served elsewhere than it was sent counts where it was served.",
        served_elsewhere,
        "endpoint-picker protocol, clause D3",
    ),
)
