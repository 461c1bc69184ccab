"""TLS on both sides of the proxy, by real handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from picker.errors import ConfigError
from picker.frontends.certificates import Certificates, Pair, self_signed
from picker.frontends.limits import ConnectionLimits, Door
from picker.frontends.trust import Trust, TrustFiles
from picker.frontends.upstream import Upstream
from picker.frontends.upstream_connection import Reply
from picker.types import Endpoint, FailureReason
from security.gateway_rig import OK, gateway


def pair(folder: Path, name: str, *names: str) -> Pair:
    """A new certificate for these names, in files of this name."""
    certificate, key = self_signed(names or ("localhost", "127.0.0.1"))
    made = Pair(folder / f"{name}.crt", folder / f"{name}.key")
    for path, data in ((made.certificate, certificate), (made.key, key)):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(data)
        os.replace(fresh, path)
    return made


async def ask(port: int, context: ssl.SSLContext) -> tuple[bytes, str | None, bytes]:
    """Status line, protocol and certificate of a request by TLS."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    shown = writer.get_extra_info("ssl_object")
    writer.write(b"GET /x HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
    line = await reader.readline()
    writer.close()
    return line, shown.selected_alpn_protocol(), shown.getpeercert(binary_form=True)


def trusting(ca: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


# --- towards clients ---------------------------------------------------------------------------------------


def door(certificates: Certificates) -> Door:
    return Door(ConnectionLimits(), tls=certificates.context)


async def test_clients_are_served_by_tls_and_speak_http_1(tmp_path: Path) -> None:
    files = pair(tmp_path, "server")
    async with gateway(door=door(Certificates(None, pair=files, protocol="http/1.1"))) as proxy:
        line, protocol, _ = await ask(proxy.port, trusting(files.certificate))
        assert (line, protocol) == (b"HTTP/1.1 200 OK\r\n", "http/1.1")
        assert proxy.endpoint.values(b"x-forwarded-proto") == [b"https"]


async def test_a_new_certificate_is_shown_to_whoever_connects_next(tmp_path: Path) -> None:
    files = pair(tmp_path, "server")
    certificates = Certificates(None, pair=files, protocol="http/1.1")
    async with gateway(door=door(certificates)) as proxy:
        _, _, before = await ask(proxy.port, trusting(files.certificate))
        pair(tmp_path, "server")
        assert certificates.refresh()
        _, _, after = await ask(proxy.port, trusting(files.certificate))
        assert before != after
        files.certificate.write_text("half a cert")
        assert not certificates.refresh()
        assert (await ask(proxy.port, _blind()))[2] == after


async def test_who_shows_no_certificate_is_not_served_where_one_is_asked_for(tmp_path: Path) -> None:
    files, friend = pair(tmp_path, "server"), pair(tmp_path, "friend", "friend")
    certificates = Certificates(None, pair=files, client_ca=friend.certificate, protocol="http/1.1")
    async with gateway(door=door(certificates)) as proxy:
        assert await line_of(proxy.port, trusting(files.certificate)) == b""
        known = trusting(files.certificate)
        known.load_cert_chain(friend.certificate, friend.key)
        assert (await ask(proxy.port, known))[0] == b"HTTP/1.1 200 OK\r\n"
        assert len(proxy.endpoint.requests) == 1


async def line_of(port: int, context: ssl.SSLContext) -> bytes:
    """The status line, or nothing where there is none."""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        return (await ask(port, context))[0]
    return b""


async def test_who_speaks_plainly_is_not_served(tmp_path: Path) -> None:
    files = pair(tmp_path, "server")
    async with gateway(door=door(Certificates(None, pair=files, protocol="http/1.1"))) as proxy:
        assert b"HTTP" not in await proxy.say(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        assert proxy.endpoint.requests == []


def _blind() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


# --- towards endpoints -------------------------------------------------------------------------------------


async def fetch(files: TrustFiles, server: ssl.SSLContext) -> int | FailureReason:
    """The status that an https endpoint gives, or why there is none."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server) as listening:
        address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        upstream = Upstream(connect_timeout=5.0, trust=Trust(files))
        try:
            reply = await upstream.send(Endpoint("e", address, scheme="https"), "GET", b"/", [], None)
            return reply.status if isinstance(reply, Reply) else reply
        finally:
            await upstream.close()


def server_context(files: Pair, client_ca: Path | None = None) -> ssl.SSLContext:
    return Certificates(None, pair=files, client_ca=client_ca, protocol="http/1.1").context


async def test_an_endpoint_is_verified_unless_told_otherwise(tmp_path: Path) -> None:
    files, other = pair(tmp_path, "server"), pair(tmp_path, "other")
    server = server_context(files)
    assert await fetch(TrustFiles(ca=files.certificate), server) == 200
    assert await fetch(TrustFiles(ca=other.certificate), server) is FailureReason.CONNECT
    assert await fetch(TrustFiles(), server) is FailureReason.CONNECT
    assert await fetch(TrustFiles(insecure=True), server) == 200


async def test_the_name_that_an_endpoint_must_bear_can_be_said(tmp_path: Path) -> None:
    files = pair(tmp_path, "server", "engine.internal")
    server = server_context(files)
    assert await fetch(TrustFiles(ca=files.certificate), server) is FailureReason.CONNECT
    assert await fetch(TrustFiles(ca=files.certificate, server_name="engine.internal"), server) == 200
    assert await fetch(TrustFiles(ca=files.certificate, server_name="evil.internal"), server) is FailureReason.CONNECT


async def test_an_endpoint_is_shown_a_certificate(tmp_path: Path) -> None:
    files, own = pair(tmp_path, "server"), pair(tmp_path, "own", "picker")
    server = server_context(files, client_ca=own.certificate)
    assert await fetch(TrustFiles(ca=files.certificate), server) in (FailureReason.CONNECT, FailureReason.RESET)
    shown = TrustFiles(ca=files.certificate, certificate=own.certificate, key=own.key)
    assert await fetch(shown, server) == 200


def test_files_that_do_not_do_are_named_and_change_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        Trust(TrustFiles(ca=tmp_path / "missing.pem"))
    files = pair(tmp_path, "server")
    trust = Trust(TrustFiles(ca=files.certificate))
    before = trust.context
    with pytest.raises(ConfigError, match=r"server\.crt"):
        trust.change(TrustFiles(certificate=files.certificate, key=pair(tmp_path, "other").key))
    files.certificate.write_text("half a certificate")
    assert not trust.refresh()
    assert trust.context is before
    pair(tmp_path, "server")
    assert trust.refresh()
    assert trust.context is not before
