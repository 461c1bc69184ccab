"""EPP-3: the gateway's subset hint, in the forms in which it occurs. Clauses P3, P4 of the endpoint-picker protocol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from picker.check.destination import FORGED
from picker.check.frames import Subset
from picker.check.framing import PROTOCOL
from picker.check.gateway import Ask, Heard
from picker.check.subject import Subject, Try
from picker.check.verdict import Check, Finding, Level, Tier, failed, held, passed, skipped

_NO_POOL = "needs a pool of two endpoints"
# Tries at each endpoint: a picker that ignores the hint is right by chance once in 2**6 or less with two of them.
_TRIES = 3


async def _obeyed(subject: Subject, hints: Iterable[tuple[Subset, str]], *, bodyless: bool = False) -> Finding:
    """hints: (what the gateway says, the one endpoint that is then allowed)."""
    if len(subject.pool) < 2:
        return skipped(_NO_POOL)
    for hint, allowed in hints:
        for _ in range(_TRIES):
            heard = await subject.decide(Ask(body=None if bodyless else subject.prompts.body(), subset=hint))
            outside = [name for name in heard.named if name != allowed]
            if outside or not heard.named:
                return failed(f"with the subset {hint!r}: {heard.said()}")
    return passed()


async def as_list(subject: Subject) -> Finding:
    return await _obeyed(subject, [([one], one) for one in subject.pool])


async def as_string(subject: Subject) -> Finding:
    return await _obeyed(subject, [(f"{one},{FORGED}", one) for one in subject.pool])


async def without_body(subject: Subject) -> Finding:
    return await _obeyed(subject, [([one], one) for one in subject.pool], bodyless=True)


async def with_strangers(subject: Subject) -> Finding:
    return await _obeyed(subject, [([FORGED, one], one) for one in subject.pool])


async def bare_address(subject: Subject) -> Finding:
    """An entry without a port means every port of that address."""
    hosts = {name.rpartition(":")[0].strip("[]") for name in subject.pool}
    for host in sorted(hosts):
        heard = await subject.decide(Ask(body=subject.prompts.body(), subset=[host]))
        if not heard.named or any(name.rpartition(":")[0].strip("[]") != host for name in heard.named):
            return failed(f"with the subset [{host!r}]: {heard.said()}")
    return passed() if hosts else skipped(_NO_POOL)


async def disjoint(subject: Subject) -> Finding:
    return held(_not_503(await subject.decide(Ask(body=subject.prompts.body(), subset=[FORGED]))))


async def disjoint_without_body(subject: Subject) -> Finding:
    return held(_not_503(await subject.decide(Ask(path="/v1/models", subset=[FORGED]))))


async def empty(subject: Subject) -> Finding:
    return held(_not_503(await subject.decide(Ask(body=subject.prompts.body(), subset=[]))))


def _not_503(heard: Heard) -> str | None:
    return None if heard.immediate == 503 else f"not an immediate response 503: {heard.said()}"


def _check(name: str, requirement: str, run: Try, *, level: Level = Level.MUST) -> Check[Subject]:
    return Check(f"EPP-3.{name}", Tier.T1, requirement, PROTOCOL, run, level)


CHECKS: Sequence[Check[Subject]] = (
    _check("list", "A subset given as a list is obeyed, fallbacks included.", as_list),
    _check("string", "A subset given as one string with commas is obeyed.", as_string, level=Level.SHOULD),
    _check("bodyless", "The subset is obeyed for requests without a body too.", without_body),
    _check("strangers", "Endpoints of the subset that are not in the pool are left out.", with_strangers),
    _check("ip", "An entry without a port allows every port of its address.", bare_address),
    _check("disjoint", "A subset with no endpoint of the pool is answered 503, by an immediate response.", disjoint),
    _check("disjoint-bodyless", "So it is for requests without a body.", disjoint_without_body),
    _check("empty", "An empty subset is answered 503, by an immediate response.", empty),
)
