"""EPP-6: the gRPC health service, by the names that gateways and probes ask for (clause P12)."""

from __future__ import annotations

from collections.abc import Sequence

from picker.check import frames
from picker.check.framing import PROTOCOL
from picker.check.subject import Subject, Try
from picker.check.verdict import Check, Finding, Level, Tier, failed, held, passed

HEALTH = "gRPC health checking protocol"


async def liveness(subject: Subject) -> Finding:
    return await _serving(subject, "liveness")


async def readiness(subject: Subject) -> Finding:
    for name in ("readiness", frames.SERVICE):
        finding = await _serving(subject, name)
        if finding != passed():
            return finding
    return passed()


async def _serving(subject: Subject, name: str) -> Finding:
    said = await subject.health.health(name)
    return held(None if said == "SERVING" else f"{name!r} is {said}, not SERVING")


async def unknown(subject: Subject) -> Finding:
    said = await subject.health.health("picker.check.NoSuchService")
    return held(None if said in ("NOT_FOUND", "SERVICE_UNKNOWN") else f"a service that is not there is {said}")


async def watch(subject: Subject) -> Finding:
    said = await subject.health.watch("")
    if said in ("SERVING", "UNIMPLEMENTED"):
        return passed("UNIMPLEMENTED is allowed: clients then do without" if said == "UNIMPLEMENTED" else "")
    return failed(f"Watch says {said}, neither SERVING nor UNIMPLEMENTED")


def _check(name: str, requirement: str, run: Try, source: str, level: Level = Level.MUST) -> Check[Subject]:
    return Check(f"EPP-6.{name}", Tier.T1, requirement, source, run, level)


CHECKS: Sequence[Check[Subject]] = (
    _check("liveness", "The health service `liveness` is SERVING.", liveness, PROTOCOL),
    _check("readiness", f"`readiness` and `{frames.SERVICE}` are SERVING.", readiness, PROTOCOL),
    _check("unknown", "A name that is no service is NOT_FOUND.", unknown, HEALTH, Level.SHOULD),
    _check("watch", "Watch tells the status, or is UNIMPLEMENTED; it never stays silent.", watch, HEALTH, Level.SHOULD),
)
