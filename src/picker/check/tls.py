"""SEC-3: the picker's port speaks modern TLS, shows who it is, and nothing in the clear."""

from __future__ import annotations

import asyncio
import socket
import ssl
import warnings
from collections.abc import Sequence
from contextlib import closing

from picker.check.gateway import Ask, Gateway, Target
from picker.check.subject import Subject, Try
from picker.check.verdict import Check, Finding, Level, Tier, failed, held, passed, skipped

_SOURCE = "transport security"
_NO_TLS = "no TLS port is known; name it with --tls"


async def modern(subject: Subject) -> Finding:
    if subject.secure is None:
        return skipped(_NO_TLS)
    said = await asyncio.to_thread(_shake, subject.secure, _permissive())
    subject.trace.receive(said)
    return held(None if said in ("TLSv1.2 h2", "TLSv1.3 h2") else f"the handshake ended with {said}")


async def outdated(subject: Subject) -> Finding:
    if subject.secure is None:
        return skipped(_NO_TLS)
    said = await asyncio.to_thread(_shake, subject.secure, _outdated())
    subject.trace.receive(said)
    return held(f"{said} is accepted" if said.startswith("TLS") else None)


async def identified(subject: Subject) -> Finding:
    if subject.secure is None:
        return skipped(_NO_TLS)
    if subject.secure.ca is None:
        return skipped("who signs its certificate is not known; name the file with --ca")
    context = ssl.create_default_context(cafile=str(subject.secure.ca))
    context.set_alpn_protocols(["h2"])
    said = await asyncio.to_thread(_shake, subject.secure, context)
    subject.trace.receive(said)
    return held(None if said.startswith("TLS") else f"its certificate is not accepted: {said}")


async def nothing_in_the_clear(subject: Subject) -> Finding:
    if subject.secure is None:
        return skipped(_NO_TLS)
    gateway = Gateway(Target(subject.secure.address), patience=subject.patience, trace=subject.trace)
    try:
        heard = await gateway.ask(Ask(body=subject.prompts.body()))
    finally:
        await gateway.close()
    answered = bool(heard.replies)
    return failed("plaintext gRPC is answered on the TLS port") if answered else passed()


def _permissive() -> ssl.SSLContext:
    """Takes any certificate: what is looked at is the protocol."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _outdated() -> ssl.SSLContext:
    context = _permissive()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    # OpenSSL's default level has no cipher left for it.
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def _shake(target: Target, context: ssl.SSLContext) -> str:
    """ "TLSv1.3 h2" as agreed, or the words of the failure."""
    host, _, port = target.address.rpartition(":")
    try:
        with closing(socket.create_connection((host.strip("[]"), int(port)), timeout=5.0)) as plain:
            name = target.name or host.strip("[]")
            with context.wrap_socket(plain, server_hostname=name) as secured:
                return f"{secured.version()} {secured.selected_alpn_protocol()}"
    except (ssl.SSLError, OSError) as error:
        return f"refused ({getattr(error, 'reason', None) or error})"


def _check(name: str, requirement: str, run: Try) -> Check[Subject]:
    return Check(f"SEC-3.{name}", Tier.T1, requirement, _SOURCE, run, Level.MUST)


CHECKS: Sequence[Check[Subject]] = (
    _check("tls", "The port speaks TLS 1.2 or 1.3 and offers HTTP/2.", modern),
    _check("outdated", "It refuses TLS 1.1.", outdated),
    _check("identity", "Its certificate is signed as expected and names the host.", identified),
    _check("cleartext", "It answers nothing in the clear.", nothing_in_the_clear),
)
