"""The checks of the picker's TLS port, each on a port that is wrong in one way."""

from __future__ import annotations

import asyncio
import ssl
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from check.stage import subject
from picker.check import certificate, registry, runner
from picker.check.gateway import Target
from picker.check.subject import Subject
from picker.check.verdict import Outcome

pytestmark = pytest.mark.skipif(not certificate.available(), reason="there is no openssl program here")


def context(folder: Path, *, alpn: bool = True, oldest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2) -> ssl.SSLContext:
    certificate.write(folder)
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    if alpn:
        made.set_alpn_protocols(["h2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made.minimum_version = oldest
    if oldest < ssl.TLSVersion.TLSv1_2:
        made.set_ciphers("ALL:@SECLEVEL=0")
    return made


@asynccontextmanager
async def listening(made: ssl.SSLContext, ca: Path) -> AsyncIterator[Target]:
    """A port that shakes hands and hangs up."""
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=made)
    async with server:
        yield Target(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", tls=True, ca=ca)


async def failures(this: Subject) -> set[str]:
    verdicts = await runner.run(runner.chosen(registry.T1, ["SEC-3"]), this, this.trace)
    return {verdict.id for verdict in verdicts if verdict.outcome is not Outcome.PASS}


async def test_a_port_without_http2_is_caught(tmp_path: Path) -> None:
    made = context(tmp_path, alpn=False)
    async with subject(tls=False) as this, listening(made, tmp_path / "tls.crt") as this.secure:
        assert await failures(this) == {"SEC-3.tls"}


async def test_a_port_that_takes_old_tls_is_caught(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        oldest = ssl.TLSVersion.TLSv1_1
    made = context(tmp_path, oldest=oldest)
    async with subject(tls=False) as this, listening(made, tmp_path / "tls.crt") as this.secure:
        assert await failures(this) == {"SEC-3.outdated"}


async def test_a_certificate_of_somebody_else_is_caught(tmp_path: Path) -> None:
    made = context(tmp_path / "his")
    other = certificate.write(tmp_path / "other")
    async with subject(tls=False) as this, listening(made, other) as this.secure:
        assert await failures(this) == {"SEC-3.identity"}


async def test_a_certificate_for_another_host_is_caught(tmp_path: Path) -> None:
    certificate.write(tmp_path, address="192.0.2.7")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.set_alpn_protocols(["h2"])
    made.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    async with subject(tls=False) as this, listening(made, tmp_path / "tls.crt") as this.secure:
        assert await failures(this) == {"SEC-3.identity"}


async def test_a_port_that_answers_in_the_clear_is_caught(tmp_path: Path) -> None:
    ca = certificate.write(tmp_path)
    async with subject(tls=False) as this:
        this.secure = Target(this.gateway.target.address, tls=True, ca=ca)
        assert "SEC-3.cleartext" in await failures(this)
