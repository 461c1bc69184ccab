"""EPP-2 and SEC-1: how a picker names its choice, and that no client does it in its place."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from picker.check import frames
from picker.check.framing import PROTOCOL
from picker.check.gateway import Ask, Heard
from picker.check.subject import Subject, Try, unrouted
from picker.check.verdict import Check, Finding, Level, Tier, failed, held, passed, skipped

_TRIES = 6
# Nobody's: the block is for documentation.
FORGED = "192.0.2.66:4242"


async def _heard(subject: Subject) -> list[Heard]:
    """Verdicts on requests with and without a body."""
    return [await subject.decide(ask) for ask in (subject.completion(), Ask(path="/v1/models"))]


async def by_header(subject: Subject) -> Finding:
    without = [heard for heard in await _heard(subject) if heard.in_header is None]
    return held(f"no header {frames.DESTINATION}: {without[0].said()}" if without else None)


async def by_metadata(subject: Subject) -> Finding:
    without = [heard for heard in await _heard(subject) if heard.in_metadata is None]
    name = f"{frames.LB_NAMESPACE}/{frames.DESTINATION}"
    return held(f"no dynamic metadata {name}: {without[0].said()}" if without else None)


async def equal(subject: Subject) -> Finding:
    for heard in await _heard(subject):
        if None not in (heard.in_header, heard.in_metadata) and heard.in_header != heard.in_metadata:
            return failed(f"header {heard.in_header!r}, metadata {heard.in_metadata!r}")
    return passed()


async def syntax(subject: Subject) -> Finding:
    for heard in await _heard(subject):
        if violation := unrouted(heard):
            return failed(violation)
        if wrong := [name for name in heard.named if not is_address(name)]:
            return failed(f"{wrong[0]!r} is not ip:port (an IPv6 address in brackets)")
    return passed()


def is_address(text: str) -> bool:
    """ "ip:port", an IPv6 address in brackets: what Envoy parses."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        version = ipaddress.ip_address(host[1:-1] if bracketed else host).version
    except ValueError:
        return False
    return bracketed == (version == 6) and port.isdecimal() and 0 < int(port) < 65536


async def distinct(subject: Subject) -> Finding:
    for heard in await _heard(subject):
        if len(set(heard.named)) != len(heard.named):
            return failed(f"an endpoint twice in one list: {','.join(heard.named)}")
    return passed()


async def member(subject: Subject) -> Finding:
    if not subject.declared:
        return skipped("the pool is not known; name it with --endpoint")
    for _ in range(_TRIES):
        for heard in await _heard(subject):
            stranger = subject.stranger([name for name in heard.named if is_address(name)])
            if stranger is not None:
                return failed(f"{stranger} is no endpoint of the pool")
    return passed()


async def forged_destination(subject: Subject) -> Finding:
    for body in (None, subject.prompts.body()):
        heard = await subject.decide(Ask(body=body, headers={frames.DESTINATION: FORGED}))
        if FORGED in heard.named:
            return failed(f"the client's own {frames.DESTINATION} was followed")
    return passed()


async def forged_orders(subject: Subject) -> Finding:
    headers = dict.fromkeys(frames.ORDER_HEADERS, FORGED)
    heard = await subject.decide(Ask(body=subject.prompts.body(), headers=headers))
    if violation := unrouted(heard):
        return failed(violation)
    mutation = heard.of("request_headers")[0].request_headers.response.header_mutation
    handled = {name.lower() for name in mutation.remove_headers} | set(frames.set_headers(mutation))
    left = [name for name in frames.ORDER_HEADERS if name not in handled]
    resent = [name for name, value in frames.set_headers(mutation).items() if value == FORGED]
    return held(f"a client's {', '.join(left or resent)} would reach the endpoint" if left or resent else None)


def _check(name: str, requirement: str, run: Try, *, level: Level = Level.MUST) -> Check[Subject]:
    return Check(name, Tier.T1, requirement, PROTOCOL, run, level)


CHECKS: Sequence[Check[Subject]] = (
    _check("EPP-2.header", f"The choice stands in the header {frames.DESTINATION}.", by_header),
    _check("EPP-2.metadata", f"The choice stands in dynamic metadata {frames.LB_NAMESPACE} as well.", by_metadata),
    _check("EPP-2.equal", "Header and metadata are the same.", equal),
    _check("EPP-2.syntax", "The choice is a list of ip:port, IPv6 addresses in brackets.", syntax),
    _check("EPP-2.distinct", "No endpoint is twice in the list.", distinct),
    _check("SEC-2.member", "Every endpoint named is one of the pool.", member),
    _check("SEC-1.destination", "A client's own destination header is not followed.", forged_destination),
    _check(
        "SEC-1.orders",
        "Headers that order an engine or sidecar about are removed or overwritten when a client sends them.",
        forged_orders,
        level=Level.SHOULD,
    ),
)
