"""ROUTE, EPP-12, BODY: a real Envoy goes where the picker says, and passes on what it is given.

Reproduces the traffic of the Gateway API Inference Extension's conformance tests without Kubernetes; ids in `source`.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import aiohttp

from picker.check import pods
from picker.check.rig import Got, Rig
from picker.check.verdict import Check, Finding, Level, Tier, failed, held, passed, skipped
from picker.envoy import Topology

Try = Callable[[Rig], Awaitable[Finding]]

BOTH = (Topology.OVERRIDE_HOST.value, Topology.ORIGINAL_DST.value)
MEMBERS = (Topology.OVERRIDE_HOST.value,)

_AT_ONCE = 10
_FEW = 4
_REQUESTS = 60
# A picker that takes no notice of a subset of one or two among three is missed once in 10,000 runs.
_PINNED = 24
# Two pools at 70 to 30; by the tolerance of the original, a fair split fails once in 100,000 runs.
_WEIGHTED = 200
_SHARE = 0.7
_STREAMS = 40
_EVENTS = 40


async def crowd(count: int, one: Callable[[int], Awaitable[Got]], *, at_once: int = _AT_ONCE) -> list[Got]:
    """`count` requests, `at_once` of them in flight."""
    limit = asyncio.Semaphore(at_once)

    async def limited(number: int) -> Got:
        async with limit:
            return await one(number)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(limited(number)) for number in range(count)]
    return [task.result() for task in tasks]


def unserved(answers: Sequence[Got]) -> str | None:
    bad = [got for got in answers if not got.ok]
    return f"{len(bad)} of {len(answers)} requests failed: {bad[0].said()}" if bad else None


async def obeyed(rig: Rig) -> Finding:
    """Joined by mark: what the frames named against who answered."""
    marks = [rig.mark() for _ in range(_REQUESTS)]
    answers = await crowd(_REQUESTS, lambda number: rig.post(mark=marks[number]))
    if violation := unserved(answers):
        return failed(violation)
    for mark, got in zip(marks, answers, strict=True):
        named = rig.relay.of(mark)[-1].heard.in_header
        if named is None or named.partition(",")[0] != got.pod:
            return failed(f"the picker named {named}, {got.pod} answered")
    return passed(f"{_REQUESTS} requests went where the picker said")


async def bodyless(rig: Rig) -> Finding:
    for _ in range(6):
        mark = rig.mark()
        got = await rig.get(mark=mark)
        named = rig.relay.of(mark)[-1].heard.first
        if not got.ok or got.pod != named:
            return failed(f"the picker named {named}: {got.said()}")
    return passed()


async def pinned(rig: Rig) -> Finding:
    """To one, two and three endpoints, told apart by their ports alone."""
    for size in range(1, len(rig.pods.all) + 1):
        allowed = rig.pods.addresses[:size]
        # Few at once: one endpoint has to take them all, and a picker may shed what is too much for one.
        answers = await crowd(_PINNED, lambda _, allowed=allowed: rig.post(subset=allowed), at_once=_FEW)  # type: ignore[misc]
        if violation := unserved(answers):
            return failed(f"with {size} allowed, {violation}")
        if outside := {got.pod for got in answers} - set(allowed):
            return failed(f"with {allowed} allowed, {outside.pop()} answered")
    return passed()


async def by_path(rig: Rig) -> Finding:
    return await _by(rig, lambda first: {"listener": "routes", "path": "/first" if first else "/second"})


async def by_listener(rig: Rig) -> Finding:
    return await _by(rig, lambda first: {"listener": "close" if first else "second"})


async def _by(rig: Rig, where: Callable[[bool], dict[str, str]]) -> Finding:
    """Each of two pools gets what is meant for it, and from its own picker."""
    for first in (True, False):
        for _ in range(6):
            host = {"host": "pool.check"}
            got = await rig.post(headers=host, **where(first))  # type: ignore[arg-type]
            pool = rig.pods if first else rig.second
            if not got.ok or got.pod not in pool.addresses:
                return failed(f"meant for the {'first' if first else 'second'} pool: {got.said()}")
    return passed()


async def no_route(rig: Rig) -> Finding:
    got = await rig.post(listener="routes", path="/first", headers={"host": "nobody.check"})
    return held(None if got.status == 404 else f"a host without a route: {got.said()}")


async def no_picker(rig: Rig) -> Finding:
    mark = rig.mark()
    got = await rig.post(listener="routes", path="/no-picker", headers={"host": "pool.check"}, mark=mark)
    if not 500 <= got.status < 600:
        return failed(f"a pool whose picker is not there: {got.said()}")
    return held("the request reached an endpoint all the same" if rig.arrived(mark) else None)


async def weighted(rig: Rig) -> Finding:
    """Both pools' endpoints are offered to whichever picker is asked."""
    offered = [*rig.second.addresses, *rig.pods.addresses]
    host = {"host": "pool.check"}
    answers = await crowd(
        _WEIGHTED, lambda _: rig.post(listener="routes", path="/weighted", headers=host, subset=offered), at_once=5
    )
    if violation := unserved(answers):
        return failed(violation)
    if violation := _misplaced(rig):
        return failed(violation)
    share = sum(got.pod in rig.pods.addresses for got in answers) / _WEIGHTED
    allowed = max(0.10, 4.5 * math.sqrt(_SHARE * (1 - _SHARE) / _WEIGHTED))
    said = f"{share:.0%} of {_WEIGHTED} requests went to the pool of weight {_SHARE:.0%} (+/- {allowed:.0%})"
    return passed(said) if abs(share - _SHARE) <= allowed else failed(said)


def _misplaced(rig: Rig) -> str | None:
    """A request that the gateway gave to one pool must not end at an endpoint of the other."""
    for pool, second in ((rig.pods, False), (rig.second, True)):
        for pod in pool.all:
            for seen in pod.seen:
                if seen.path == "/weighted" and (seen.headers.get("x-check-pool") == "second") != second:
                    return f"{pod.address} got a request that was the other pool's"
    return None


async def fallback(rig: Rig) -> Finding:
    """The endpoint named first has just died, and nobody has told the picker."""
    tried = 0
    for _ in range(4):
        mark, body = rig.mark(), rig.prompts.body(rig.prompts.fresh(4_000))
        first = (await rig.post(body)).pod
        if first is None:
            return failed("an ordinary request was not answered")
        await rig.pods[first].stop()
        try:
            got = await rig.post(body, mark=mark)
            named = rig.relay.of(mark)[-1].heard.named
        finally:
            await rig.pods[first].start()
            await _whole(rig)
        if named[:1] != [first]:
            continue
        tried += 1
        if len(named) < 2:
            return skipped("the picker names one endpoint only")
        if not got.ok or got.pod != named[1]:
            return failed(f"of the list {','.join(named)} the first is dead: {got.said()}")
    return passed(f"{tried} times the second of the list answered") if tried else skipped("the dead one was not named")


async def _whole(rig: Rig) -> None:
    """Until every endpoint is taken for one again."""
    for address in rig.pods.addresses:
        await rig.until(lambda got: got.ok, subset=[address], seconds=rig.settle)


async def served(rig: Rig) -> Finding:
    mark = rig.mark()
    got = await rig.post(mark=mark)
    told = rig.relay.of(mark)[-1].served
    return held(None if told == got.pod else f"{got.pod} answered, the picker is told {told}")


async def bytes_arrive(rig: Rig) -> Finding:
    for size in (130, 61_999, 62_001, 300_000):
        mark, body = rig.mark(), rig.prompts.body_of(size)
        got = await rig.post(body, mark=mark)
        arrived = [seen for _, seen in rig.arrived(mark)]
        if not got.ok or len(arrived) != 1:
            return failed(f"a body of {size} bytes: {got.said()}, {len(arrived)} arrivals")
        if arrived[0].digest != hashlib.sha256(body).hexdigest():
            return failed(f"of a body of {size} bytes {arrived[0].size} arrived, or others")
    return passed()


async def events(rig: Rig) -> Finding:
    """The endpoint sends an event when the client has the one before: nobody on the way may wait for more."""
    count, mark = 4, rig.mark()
    headers = {pods.EVENTS_HEADER: str(count), pods.GATE_HEADER: "1"}
    body, got = rig.prompts.body(stream=True), b""
    url = rig.url("close", "/v1/completions")
    rig.trace.send(f"POST stream of {count} events, each sent when the one before has arrived")
    try:
        async with (
            asyncio.timeout(3.0),
            rig.client.post(url, data=body, headers=rig.headers(mark, headers, None)) as response,
        ):
            pod = rig.pods[response.headers[pods.POD_HEADER]]
            for number in range(count):
                pod.step()
                while pods.event(mark, number) not in got and not response.content.at_eof():
                    got += await response.content.readany()
            got += await response.content.read()
    except TimeoutError:
        return failed(f"an event did not arrive before the next was sent; {len(got)} bytes had")
    except (aiohttp.ClientError, KeyError) as error:
        return failed(f"the stream broke off: {type(error).__name__}")
    rig.trace.receive(f"{len(got)} bytes")
    return held(None if got == stream_of(mark, count) else "the stream is not what was sent")


def stream_of(mark: str, count: int) -> bytes:
    return b"".join(pods.event(mark, number) for number in range(count)) + pods.DONE


async def streams_under_load(rig: Rig) -> Finding:
    """Straight to the picker: nothing of the checker's between Envoy and it."""
    marks = [rig.mark() for _ in range(_STREAMS)]
    headers = {pods.EVENTS_HEADER: str(_EVENTS)}
    body = [rig.prompts.body_of(3_000)[:-1] + b', "stream": true}' for _ in marks]
    answers = await crowd(
        _STREAMS,
        lambda number: rig.post(body[number], mark=marks[number], listener="direct", headers=headers),
        at_once=16,
    )
    if violation := unserved(answers):
        return failed(violation)
    wrong = [got for mark, got in zip(marks, answers, strict=True) if got.body != stream_of(mark, _EVENTS)]
    return held(f"{len(wrong)} of {_STREAMS} streams arrived different" if wrong else None)


async def spread_over_all(rig: Rig) -> Finding:
    """Every port of a host is an endpoint of its own (data parallelism); one that failed before may rest first."""
    deadline, chosen = time.monotonic() + rig.settle, Counter[str | None]()
    while set(rig.pods.addresses) - set(chosen):
        if time.monotonic() > deadline:
            missing = set(rig.pods.addresses) - set(chosen)
            return failed(f"{missing.pop()} got none of {chosen.total()} requests")
        answers = await crowd(_REQUESTS, lambda _: rig.post(rig.prompts.body(rig.prompts.fresh(4_000))))
        chosen.update(got.pod for got in answers)
    return passed()


def _check(
    name: str,
    requirement: str,
    run: Try,
    source: str,
    *,
    variants: tuple[str, ...] = BOTH,
    level: Level = Level.MUST,
) -> Check[Rig]:
    return Check(name, Tier.T2, requirement, source, run, level, variants)


CHECKS: Sequence[Check[Rig]] = (
    _check("ROUTE-2.obeyed", "Requests go where the picker says.", obeyed, "GIE GatewayFollowingEPPRouting"),
    _check("ROUTE-2.bodyless", "So do requests without a body.", bodyless, "GIE GatewayFollowingEPPRouting"),
    _check(
        "ROUTE-2.pinned",
        "With one, two or three endpoints allowed, nobody else answers; ports tell endpoints apart.",
        pinned,
        "GIE GatewayFollowingEPPRoutingWithDataParallelism",
    ),
    _check(
        "ROUTE-2.ports",
        "Every port of a host is an endpoint and gets its share.",
        spread_over_all,
        "GIE GatewayFollowingEPPRoutingWithDataParallelism",
        level=Level.SHOULD,
    ),
    _check("ROUTE-3.weights", "Two pools at 70 to 30, each by its own picker.", weighted, "GIE GatewayWeighted"),
    _check("ROUTE-5.paths", "The path chooses the pool.", by_path, "GIE HTTPRouteMultipleRulesDifferentPools"),
    _check(
        "ROUTE-5.listeners", "The gateway chooses the pool.", by_listener, "GIE HTTPRouteMultipleGatewaysDifferentPools"
    ),
    _check("ROUTE-5.none", "A host without a route is 404.", no_route, "GIE InferencePoolResolvedRefsCondition"),
    _check("ROUTE-5.no-picker", "A pool without its picker is 5xx.", no_picker, "GIE InferencePoolInvalidEPPService"),
    _check("ROUTE-6.served", "The picker is told who answered.", served, "GIE GatewayDestinationEndpointServed"),
    _check(
        "ROUTE-4.fallback",
        "When the first of the list is dead, the second answers.",
        fallback,
        "endpoint-picker protocol, clauses P9, D1",
        variants=MEMBERS,
    ),
    _check("EPP-12.bytes", "Bodies of all sizes arrive to the byte, once.", bytes_arrive, "Envoy ext_proc API"),
    _check("EPP-12.sse", "Each event reaches the client before the next is sent.", events, "protocol, clause P2"),
    _check("EPP-12.load", "Streams under load arrive to the byte.", streams_under_load, "protocol, clause P2"),
)
