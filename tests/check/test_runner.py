"""Running checks: bounded, one by one, whatever they do."""

from __future__ import annotations

import asyncio

import pytest

from picker.check import runner
from picker.check.verdict import Check, Finding, Outcome, Tier, Trace, failed, passed


def check(name: str, run: object, limit: float = 5.0) -> Check[None]:
    return Check(name, Tier.T1, "Be good.", "practice", run, limit=limit)  # type: ignore[arg-type]


async def good(_: None) -> Finding:
    return passed()


async def bad(_: None) -> Finding:
    return failed("bad")


async def broken(_: None) -> Finding:
    raise KeyError("x")


async def endless(_: None) -> Finding:
    await asyncio.Event().wait()
    return passed()


async def test_a_check_that_breaks_is_an_error_and_the_next_one_runs() -> None:
    checks = [check("A", broken), check("B", endless, limit=0.01), check("C", bad), check("D", good)]
    heard: list[str] = []
    verdicts = await runner.run(checks, None, Trace(), tell=lambda verdict: heard.append(verdict.id))
    outcomes = [Outcome.ERROR, Outcome.ERROR, Outcome.FAIL, Outcome.PASS]
    assert [verdict.outcome for verdict in verdicts] == outcomes
    assert heard == ["A", "B", "C", "D"]


async def test_evidence_belongs_to_one_check() -> None:
    trace = Trace()

    async def speaking(_: None) -> Finding:
        trace.send("hello")
        return passed()

    first, second = await runner.run([check("A", speaking), check("B", good)], None, trace)
    assert (first.sent, second.sent) == (("hello",), ())


def test_evidence_is_bounded_and_keeps_its_ends() -> None:
    trace = Trace(keep=4)
    for number in range(100):
        trace.send(str(number))
    assert len(trace.sent) == 4
    assert (trace.sent[0], trace.sent[-1]) == ("0", "99")


@pytest.mark.parametrize(
    ("only", "left"),
    [
        ([], ["EPP-1.a", "EPP-1.b", "EPP-10.a"]),
        (["EPP-1"], ["EPP-1.a", "EPP-1.b"]),
        (["epp-1.b"], ["EPP-1.b"]),
        (["EPP-1.a", "EPP-10"], ["EPP-1.a", "EPP-10.a"]),
    ],
)
def test_checks_are_chosen_by_id_or_family(only: list[str], left: list[str]) -> None:
    checks = [check(name, good) for name in ("EPP-1.a", "EPP-1.b", "EPP-10.a")]
    assert [one.id for one in runner.chosen(checks, only)] == left
