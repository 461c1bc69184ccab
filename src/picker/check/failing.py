"""FAIL, VERDICT, SEC, CHURN at tier T2: what clients and endpoints get while something is wrong.

The picker goes away, hangs, dies or refuses; a client forges headers; endpoints come and go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from picker.check import frames, pods
from picker.check.relay import Mode
from picker.check.rig import IDLE, Got, Rig
from picker.check.routing import BOTH, MEMBERS, Try, crowd, unserved
from picker.check.verdict import Check, Finding, Tier, failed, held, passed, skipped
from picker.envoy import Topology

_TRIES = 4
# Seconds for Envoy's workers to learn what its health checker knows.
_SOON = 2.0
# Beyond Envoy's idle timer.
_MARGIN = 2.0
_STRANGER = "192.0.2.66:4242"
_CHURN_CLIENTS = 6
# Seconds without any endpoint, and requests that fail meanwhile at least.
_OUTAGE = 1.5
_FAILURES = 30
_PAUSE = 0.1


# --- refusals ----------------------------------------------------------------------------------------------


async def refused_503(rig: Rig) -> Finding:
    """A verdict, not a failure: it holds where the gateway fails open, too."""
    for listener in ("close", "open"):
        mark = rig.mark()
        got = await rig.post(listener=listener, subset=[_STRANGER], mark=mark)
        if got.status != 503 or rig.arrived(mark):
            return failed(f"no endpoint allowed, listener {listener}: {got.said()}")
        if not rig.relay.of(mark)[-1].heard.immediate:
            return failed("the 503 is the gateway's, not the picker's")
    return passed()


async def refused_429(rig: Rig) -> Finding:
    if rig.overload is None:
        return skipped("how much is too much is not known; name it with --overload")
    rig.trace.send(f"{rig.overload} streams at once that do not end")
    stream, headers = rig.prompts.body(stream=True), {pods.GATE_HEADER: "1", pods.EVENTS_HEADER: "1"}
    marks = [rig.mark() for _ in range(rig.overload)]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(rig.post(stream, listener="open", mark=m, headers=headers)) for m in marks]
            await _all_decided(rig, dict(zip(marks, tasks, strict=True)))
            for pod in rig.pods.all:
                pod.step(rig.overload)
    finally:
        _forget_steps(rig)
    answers = [task.result() for task in tasks]
    shed = [(mark, got) for mark, got in zip(marks, answers, strict=True) if not got.ok]
    wrong = [got for mark, got in shed if got.status != 429 or rig.arrived(mark)]
    if wrong:
        return failed(f"{len(wrong)} of {len(shed)} were not shed by 429: {wrong[0].said()}")
    return passed(f"{len(shed)} of {rig.overload} were shed") if shed else failed(f"none of {rig.overload} was shed")


async def _all_decided(rig: Rig, asked: Mapping[str, asyncio.Task[Got]]) -> None:
    """Every one has a verdict, has arrived unscheduled or is answered."""
    async with asyncio.timeout(10.0):
        while not all(task.done() or _decided(rig, mark) for mark, task in asked.items()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def _decided(rig: Rig, mark: str) -> bool:
    heard = [stream.heard for stream in rig.relay.of(mark)]
    return bool(rig.arrived(mark)) or any(one.named or one.immediate for one in heard)


def _forget_steps(rig: Rig) -> None:
    for pod in rig.pods.all:
        pod.rest()


# --- a picker that fails -----------------------------------------------------------------------------------


async def down_closed(rig: Rig) -> Finding:
    async with rig.without_picker():
        for _ in range(_TRIES):
            mark = rig.mark()
            got = await rig.post(mark=mark)
            if got.status != 503 or rig.arrived(mark):
                return failed(f"picker down, fail-close: {got.said()}, {len(rig.arrived(mark))} arrivals")
    return passed()


async def down_open(rig: Rig) -> Finding:
    async with rig.without_picker():
        started = time.monotonic()
        await rig.until(lambda got: got.ok, listener="open", seconds=_SOON)
        after = time.monotonic() - started
        answers = await crowd(16, lambda _: rig.post(listener="open"))
    if violation := unserved(answers):
        return failed(f"picker down, fail-open: {violation}")
    if len({got.pod for got in answers}) < 2:
        return failed("all went to one endpoint")
    return passed(f"served {after * 1e3:.0f} ms after Envoy had noticed")


async def down_spoofed(rig: Rig) -> Finding:
    """Nobody decides: then a client's own wish must not."""
    forged = {frames.DESTINATION: rig.canary.address}
    async with rig.without_picker():
        for listener in ("open", "close"):
            await rig.post(listener=listener, headers=forged)
    return held("a forged destination was reached while the picker was down" if rig.canary.seen else None)


async def hangs(rig: Rig) -> Finding:
    """message_timeout does not apply in full-duplex mode; the idle timer must."""
    async with _mode(rig, Mode.HANG):
        got = await rig.post(listener="short", timeout=IDLE + _MARGIN + 0.5)
    if got.seconds > IDLE + _MARGIN:
        return failed(f"a picker that hangs held the client for {got.seconds:.1f} s")
    return held(None if got.status >= 500 else f"a picker that hangs: {got.said()}")


async def dies_early(rig: Rig) -> Finding:
    async with _mode(rig, Mode.DIE_EARLY):
        for listener in ("close", "open"):
            mark = rig.mark()
            got = await rig.post(listener=listener, mark=mark)
            if (wrong := _mutilated(rig, mark)) or len(rig.arrived(mark)) > 1:
                return failed(wrong or f"listener {listener}: one request arrived {len(rig.arrived(mark))} times")
            if listener == "close" and got.status != 503:
                return failed(f"picker died before its verdict, fail-close: {got.said()}")
    return passed()


async def dies_late(rig: Rig) -> Finding:
    """With half of the response gone: the client must see that it is broken, and nobody may generate it twice."""
    mark, body = rig.mark(), rig.prompts.body(stream=True)
    async with _mode(rig, Mode.DIE_LATE):
        got = await rig.post(body, mark=mark, headers={pods.EVENTS_HEADER: "400"})
    arrivals = len(rig.arrived(mark))
    if arrivals != 1:
        return failed(f"one request arrived {arrivals} times")
    whole = got.body == b"".join(pods.event(mark, number) for number in range(400)) + pods.DONE
    return held(None if got.error or whole else f"a cut response looks complete to the client: {got.said()}")


async def closes(rig: Rig) -> Finding:
    """Envoy takes a clean end for leave to go on alone, fail-close or not, and what it has handed over is lost."""
    alone = 0
    async with _mode(rig, Mode.CLOSE):
        for _ in range(_TRIES):
            mark = rig.mark()
            await rig.post(mark=mark, headers={frames.DESTINATION: rig.canary.address})
            arrivals = rig.arrived(mark)
            if len(arrivals) > 1 or any(address not in rig.pods.addresses for address, _ in arrivals):
                return failed(f"the request arrived {len(arrivals)} times, or outside of the pool")
            alone += bool(_mutilated(rig, mark))
    return passed(f"Envoy sent {alone} of {_TRIES} on by itself, without their bodies" if alone else "")


def _mutilated(rig: Rig, mark: str) -> str | None:
    """A request of the usual kind that arrived without all of its body."""
    short = [seen for _, seen in rig.arrived(mark) if seen.size < 100]
    return f"a request arrived with {short[0].size} bytes of its body" if short else None


@asynccontextmanager
async def _mode(rig: Rig, mode: Mode) -> AsyncIterator[None]:
    rig.relay.mode = mode
    try:
        yield
    finally:
        rig.relay.mode = Mode.FORWARD


# --- forged headers ----------------------------------------------------------------------------------------


async def forged_destination(rig: Rig) -> Finding:
    forged = {frames.DESTINATION: rig.canary.address, frames.SUBSET: rig.canary.address}
    for body in (None, rig.prompts.body_of(70_000)):
        got = await rig.post(body, headers=forged)
        if not got.ok:
            return failed(f"a forged destination: {got.said()}")
    return held("a forged destination was reached" if rig.canary.seen else None)


async def forged_orders(rig: Rig) -> Finding:
    mark = rig.mark()
    got = await rig.post(mark=mark, headers=dict.fromkeys(frames.ORDER_HEADERS, _STRANGER))
    if not got.ok:
        return failed(f"forged orders: {got.said()}")
    (arrived,) = [seen for _, seen in rig.arrived(mark)]
    through = [name for name in frames.ORDER_HEADERS if arrived.headers.get(name) == _STRANGER]
    return held(f"a client's {', '.join(through)} reached the endpoint" if through else None)


# --- TLS ---------------------------------------------------------------------------------------------------


async def verified(rig: Rig) -> Finding:
    if not rig.secure:
        return skipped("no TLS port is known; name it with --tls")
    got = await rig.until(lambda got: got.ok, listener="verified", seconds=2.0)
    return held(None if got.ok else f"with the right authority: {got.said()}")


async def mistrusted(rig: Rig) -> Finding:
    if not rig.secure or "mistrusted" not in rig.envoy.ports:
        return skipped("no TLS port is known; name it with --tls")
    mark = rig.mark()
    got = await rig.post(listener="mistrusted", mark=mark)
    return held(None if got.status == 503 and not rig.arrived(mark) else f"with another authority: {got.said()}")


# --- churn -------------------------------------------------------------------------------------------------


async def churn(rig: Rig) -> Finding:
    """An endpoint goes and comes back under load. What Envoy can retry elsewhere must not fail at all."""
    answers: list[tuple[float, Got]] = []
    stop = asyncio.Event()
    leaver = rig.pods.all[0]

    async def client() -> None:
        while not stop.is_set():
            started = time.monotonic()
            answers.append((started, await rig.post()))

    async with asyncio.TaskGroup() as group:
        for _ in range(_CHURN_CLIENTS):
            group.create_task(client())
        await _picked(rig, leaver.address, since=0.0, answers=answers)
        await leaver.stop()
        gone_at = time.monotonic()
        quiet = await _unpicked(rig, leaver.address)
        await leaver.start()
        back = await _picked(rig, leaver.address, since=time.monotonic(), answers=answers)
        stop.set()
    return _judged(rig, answers, gone_at, quiet=quiet, back=back)


async def outage(rig: Rig) -> Finding:
    """All endpoints go at once, requests fail meanwhile, and all are back: none may be shunned for what was before."""
    for pod in rig.pods.all:
        await pod.stop()
    try:
        until, failures = time.monotonic() + _OUTAGE, 0
        while time.monotonic() < until or failures < _FAILURES:
            answers = await crowd(_CHURN_CLIENTS, lambda _: rig.post(), at_once=_CHURN_CLIENTS)
            if served := [got for got in answers if got.ok]:
                return failed(f"without any endpoint: {served[0].said()}")
            failures += len(answers)
            await asyncio.sleep(_PAUSE)
    finally:
        for pod in rig.pods.all:
            await pod.start()
    back, started = time.monotonic() + rig.settle, time.monotonic()
    answered: set[str | None] = set()
    while not answered.issuperset(rig.pods.addresses) and time.monotonic() < back:
        prompts = [rig.prompts.body(rig.prompts.fresh(4_000)) for _ in range(_CHURN_CLIENTS)]
        answers = await crowd(len(prompts), lambda number, prompts=prompts: rig.post(prompts[number]))  # type: ignore[misc]
        answered.update(got.pod for got in answers if got.ok)
        await asyncio.sleep(_PAUSE)
    if missing := set(rig.pods.addresses) - answered:
        return failed(f"{rig.settle:g} s after all were back {len(missing)} of {len(rig.pods.all)} get nothing")
    return passed(f"{failures} requests failed, {time.monotonic() - started:.1f} s later all endpoints answered")


def _judged(rig: Rig, answers: list[tuple[float, Got]], gone_at: float, *, quiet: bool, back: bool) -> Finding:
    if not quiet:
        return failed(f"{rig.settle:g} s after it was gone the endpoint is still named first")
    if not back:
        return failed(f"{rig.settle:g} s after it was back the endpoint gets nothing")
    bad = [(at, got) for at, got in answers if not got.ok]
    excused = rig.topology is Topology.ORIGINAL_DST  # Envoy has nowhere else to go
    late = [got for at, got in bad if not excused or at + got.seconds < gone_at or at > gone_at + rig.settle]
    if late:
        return failed(f"{len(late)} of {len(answers)} requests failed: {late[0].said()}")
    return passed(f"{len(answers)} requests, {len(bad)} failed" + (" before the picker noticed" if bad else ""))


async def _picked(rig: Rig, address: str, *, since: float, answers: list[tuple[float, Got]]) -> bool:
    return await _happens(rig, lambda: any(at >= since and got.pod == address for at, got in answers))


async def _unpicked(rig: Rig, address: str) -> bool:
    """Not named first by any of the latest verdicts."""

    def gone() -> bool:
        latest = [one.heard.first for one in list(rig.relay.streams)[-40:] if one.down]
        return len(latest) >= 10 and address not in latest

    return await _happens(rig, gone)


async def _happens(rig: Rig, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + rig.settle
    while time.monotonic() < deadline:
        if condition():
            return True
        await asyncio.sleep(0.02)
    return False


def _check(name: str, requirement: str, run: Try, source: str, variants: tuple[str, ...] = BOTH) -> Check[Rig]:
    return Check(name, Tier.T2, requirement, source, run, variants=variants)


_FAILURE_MODE = "InferencePool failureMode, clause D4"
_BOUND = "Envoy ext_proc API: message_timeout is ignored in FULL_DUPLEX_STREAMED"

CHECKS: Sequence[Check[Rig]] = (
    _check("SEC-2.canary", "A forged destination is never reached.", forged_destination, "SSRF"),
    _check("SEC-1.forwarded", "Forged orders to an engine do not arrive.", forged_orders, "header spoofing"),
    _check("SEC-3.verified", "The gateway accepts the picker's own certificate.", verified, "transport security"),
    _check("SEC-3.mistrusted", "It accepts no other.", mistrusted, "transport security"),
    _check("VERDICT-1.503", "The picker's 503 holds, fail-open or not.", refused_503, "clauses P4, P10"),
    _check("VERDICT-2.429", "The picker's 429 holds, fail-open or not.", refused_429, "clause P11"),
    _check("FAIL-1.close", "Picker down, fail-close: 503, and nothing arrives.", down_closed, _FAILURE_MODE),
    _check("FAIL-2.open", "Picker down, fail-open: served by the pool.", down_open, _FAILURE_MODE, MEMBERS),
    _check("FAIL-3.spoofed", "Picker down: no client decides instead.", down_spoofed, "SSRF"),
    _check("FAIL-4.hang", "A picker that hangs holds no client longer than the idle timer.", hangs, _BOUND),
    _check("FAIL-5.early", "A picker that dies before its verdict: nothing cut, nothing twice.", dies_early, _BOUND),
    _check("FAIL-5.late", "A picker that dies amid the response: broken off, not done twice.", dies_late, _BOUND),
    _check(
        "FAIL-6.clean",
        "A picker that ends a stream with OK too early sends nothing astray, and nothing twice.",
        closes,
        "Envoy ext_proc API",
    ),
    _check("CHURN-1.leave", "An endpoint goes and comes back under load.", churn, "practice"),
    _check("CHURN-2.outage", "All endpoints go and come back, and all are used again soon.", outage, "practice"),
)
