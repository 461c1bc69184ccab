"""Workers give requests the models that their decider's rules say, as they are at any time."""

from __future__ import annotations

import json
from functools import partial

from picker.exchange import Forward, Limits, RequestBody, RequestHead
from picker.rewrites import Rewriting, build_rule
from picker.types import Request, Rewritten
from picker.workers import frames
from picker.workers.remote import RemoteGate
from workers.bus import Bus

ORIGINS = ("kubernetes", "configuration")


def rewriting() -> Rewriting:
    return Rewriting(lambda: 0.0, ORIGINS)


async def got(gate: RemoteGate) -> str:
    """The model that an endpoint is asked for."""
    exchange = gate.open()
    await gate.receive(exchange, RequestHead("POST", "/v1/completions", {}))
    body = json.dumps({"model": "chat", "prompt": "Once"}).encode()
    (forward,) = await gate.receive(exchange, RequestBody(body, end=True))
    assert isinstance(forward, Forward)
    gate.close(exchange)
    return str(json.loads(forward.body)["model"])


def knows(gate: RemoteGate, target: str) -> bool:
    assert gate.limits.rewriting is not None
    choice = gate.limits.rewriting.choose("chat", {})
    return choice is not None and choice.model == target


async def test_rules_reach_workers_that_are_there_and_those_that_come(bus: Bus) -> None:
    theirs = rewriting()
    async with bus.decider() as desk, bus.welcomed() as first:
        desk.follow(theirs)
        first.limits = Limits(rewriting=rewriting())
        assert await got(first) == "chat"
        theirs.put("kubernetes", [build_rule("canary", ("chat",), [("v1", 1)])])
        async with bus.worker(1) as second:
            second.limits = Limits(rewriting=rewriting())
            await bus.until(lambda: second._welcome is not None)
            assert await got(second) == "v1"
            for target in ("v1", "v2"):
                theirs.put("kubernetes", [build_rule("canary", ("chat",), [(target, 1)])])
                for gate in (first, second):
                    await bus.until(partial(knows, gate, target))
                    assert await got(gate) == target


async def test_what_comes_of_them_is_counted_by_the_decider(bus: Bus) -> None:
    theirs = rewriting()
    async with bus.decider() as desk, bus.worker() as gate:
        desk.follow(theirs)
        gate.limits = Limits(rewriting=rewriting())
        theirs.put("kubernetes", [build_rule("canary", ("chat",), [("v1", 1)])])
        await bus.until(lambda: gate._welcome is not None)
        assert await got(gate) == "v1"
        assert theirs.counts == {("canary", "chat", "v1"): 1}
        (record,) = desk.runtime.recent()
        assert record.request.rewritten == Rewritten("chat", "canary")


def test_both_models_cross_the_bus() -> None:
    request = Request(1, "v1", 0.0, rewritten=Rewritten(None, "canary"))
    (asked,) = frames.from_worker(frames.frame([frames.encode(frames.ask(request, None))])[4:])
    assert isinstance(asked, frames.Ask)
    assert frames.request_of(asked, 0.0, None).rewritten == Rewritten(None, "canary")
