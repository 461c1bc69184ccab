"""EPP-4, EPP-5, EPP-8, EPP-11: no endpoints, too many requests, requests that are given up, bodies too large.

A refusal is an immediate response. A gRPC error in its place is no verdict: a gateway that fails open serves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

from picker.check import frames
from picker.check.framing import PIECE, PROTOCOL
from picker.check.gateway import Ask, Heard, Talk
from picker.check.pods import Metrics
from picker.check.subject import Subject, Try, unrouted
from picker.check.verdict import Check, Finding, Level, Tier, failed, held, passed, skipped

_NOT_OURS = "needs endpoints that the checker serves itself"
_NO_OVERLOAD = "how much is too much is not known; name it with --overload"
_REASON_HEADERS = ("retry-after", "x-llm-d-request-dropped-reason")
# Hung up at each point of a request's life.
_GIVEN_UP = 24


async def none_ready(subject: Subject) -> Finding:
    if subject.pods is None:
        return skipped(_NOT_OURS)
    await subject.pods.stop()
    try:
        heard = await subject.until(lambda heard: not heard.named, answer=503)
        if heard.immediate != 503:
            return failed(f"{subject.settle:g} s after the last endpoint was gone: {heard.said()}")
        return passed()
    finally:
        await _restore(subject)


async def recovers(subject: Subject) -> Finding:
    if subject.pods is None:
        return skipped(_NOT_OURS)
    try:
        await subject.pods.stop()
        await subject.until(lambda heard: not heard.named, answer=503)
    finally:
        await subject.pods.start()
    heard = await subject.ready()
    return held(None if heard.named else f"{subject.settle:g} s after the endpoints were back: {heard.said()}")


async def _restore(subject: Subject) -> None:
    assert subject.pods is not None
    await subject.pods.start()
    await subject.ready()


# --- overload ----------------------------------------------------------------------------------------------


async def _crowd(subject: Subject, count: int) -> list[Heard]:
    """Verdicts on `count` requests, none of which ends before all have been asked about."""
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        talks = [await stack.enter_async_context(subject.gateway.talk()) for _ in range(count)]
        asked = [group.create_task(talk.verdict(subject.completion())) for talk in talks]
        await asyncio.wait(asked)
        return [one.result() for one in asked]


async def _refused(subject: Subject) -> list[Heard] | Finding:
    """What was not given an endpoint under overload."""
    if subject.overload is None:
        return skipped(_NO_OVERLOAD)
    if subject.pods is not None:
        subject.pods.set_metrics(Metrics.SATURATED)
    try:
        heard = await _crowd(subject, subject.overload)
    finally:
        if subject.pods is not None:
            subject.pods.set_metrics(Metrics.IDLE)
        await subject.ready()
    refused = [one for one in heard if not one.named]
    return refused or failed(f"none of {subject.overload} requests at once was shed")


async def shed_by_429(subject: Subject) -> Finding:
    refused = await _refused(subject)
    if isinstance(refused, Finding):
        return refused
    wrong = [one for one in refused if one.immediate != 429]
    if wrong:
        return failed(f"{len(wrong)} of {len(refused)} were not shed by an immediate 429: {wrong[0].said()}")
    return passed(f"{len(refused)} of {subject.overload} requests were shed")


async def shed_with_reason(subject: Subject) -> Finding:
    refused = await _refused(subject)
    if isinstance(refused, Finding):
        return refused
    mute = [one for one in refused if one.immediate is not None and not _says_why(one)]
    return held(f"{len(mute)} of {len(refused)} say neither {' nor '.join(_REASON_HEADERS)}" if mute else None)


def _says_why(heard: Heard) -> bool:
    return any(name in heard.immediate_headers for name in _REASON_HEADERS)


async def given_up(subject: Subject) -> Finding:
    """Requests whose client goes away must leave nothing behind: no charge, no place in a queue."""
    # Half of them get as far as being charged: more than all that the pool takes.
    for number in range(2 * (subject.overload or _GIVEN_UP)):
        async with subject.gateway.talk() as talk:
            await _go_as_far(talk, subject, number % 4)
    heard = await subject.until(lambda heard: bool(heard.named), seconds=subject.bound)
    return held(unrouted(heard))


async def _go_as_far(talk: Talk, subject: Subject, stage: int) -> None:
    """Hang up after the headers, within the body, after the verdict or within the response."""
    ask = Ask(body=subject.prompts.body_of(40_000), piece=PIECE)
    if stage < 2:
        await talk.send(*ask.messages()[: stage + 1])
        return
    await talk.verdict(ask)
    if stage == 3:
        await talk.send(frames.response_headers(), frames.response_body(b"{", end=False))
        await talk.reply()


# --- bodies ------------------------------------------------------------------------------------------------


async def body_within(subject: Subject) -> Finding:
    if subject.max_body is None:
        return skipped("the largest body is not known; name it with --max-body")
    heard = await subject.decide(Ask(body=subject.prompts.body_of(subject.max_body), piece=PIECE))
    return held(None if heard.named else f"a body of just {subject.max_body} bytes: {heard.said()}")


async def body_beyond(subject: Subject) -> Finding:
    if subject.max_body is None:
        return skipped("the largest body is not known; name it with --max-body")
    heard = await subject.decide(Ask(body=subject.prompts.body_of(subject.max_body + 1), piece=PIECE))
    return held(None if heard.immediate == 413 else f"a body of {subject.max_body + 1} bytes: {heard.said()}")


def _check(
    name: str, requirement: str, run: Try, *, source: str = PROTOCOL, level: Level = Level.MUST
) -> Check[Subject]:
    return Check(name, Tier.T1, requirement, source, run, level)


_PRACTICE = "practice"

CHECKS: Sequence[Check[Subject]] = (
    _check("EPP-5.shed", "What is too much is shed by an immediate response 429.", shed_by_429),
    _check(
        "EPP-5.reason",
        "A request that is shed is told why or when to come back.",
        shed_with_reason,
        source=_PRACTICE,
        level=Level.SHOULD,
    ),
    _check("EPP-8.given-up", "Requests that are given up leave no charge behind.", given_up, source=_PRACTICE),
    _check("EPP-11.within", "A body of the largest size is taken.", body_within, source=_PRACTICE),
    _check("EPP-11.beyond", "A larger body is answered 413, by an immediate response.", body_beyond, source=_PRACTICE),
    # Last: a picker may rest endpoints that have failed.
    _check("EPP-4.none", "With no endpoint ready the answer is 503, by an immediate response.", none_ready),
    _check("EPP-4.recovers", "Requests are routed again soon after endpoints are back.", recovers, source=_PRACTICE),
)
