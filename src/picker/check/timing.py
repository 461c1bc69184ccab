"""EPP-7: a decision takes a bounded time whatever else the picker waits for.

Envoy's `message_timeout` does not apply in full-duplex mode: nobody bounds a picker that hangs but the picker itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from picker.check.pods import Metrics
from picker.check.subject import Subject, Try, unrouted
from picker.check.verdict import Check, Finding, Tier, failed, passed, skipped

_TRIES = 40
_SOURCE = "Envoy ext_proc API: message_timeout is ignored in FULL_DUPLEX_STREAMED"


async def quick(subject: Subject) -> Finding:
    return await _decides(subject, _TRIES)


async def without_metrics(subject: Subject) -> Finding:
    if subject.pods is None:
        return skipped("needs endpoints that the checker serves itself")
    subject.pods.set_metrics(Metrics.HANGING)
    try:
        return await _decides(subject, _TRIES // 2)
    finally:
        subject.pods.set_metrics(Metrics.IDLE)
        await subject.ready()


async def _decides(subject: Subject, tries: int) -> Finding:
    longest = 0.0
    for _ in range(tries):
        heard = await subject.decide()
        if heard.seconds > subject.bound or heard.silent:
            return failed(f"a decision took {heard.seconds:.2f} s; {subject.bound:g} s are allowed")
        if violation := unrouted(heard):
            return failed(violation)
        longest = max(longest, heard.seconds)
    return passed(f"the longest of {tries} decisions took {longest * 1e3:.1f} ms")


def _check(name: str, requirement: str, run: Try) -> Check[Subject]:
    return Check(f"EPP-7.{name}", Tier.T1, requirement, _SOURCE, run)


CHECKS: Sequence[Check[Subject]] = (
    _check("time", "No decision takes longer than the bound.", quick),
    _check("stall", "Nor does one while no endpoint's metrics can be read.", without_metrics),
)
