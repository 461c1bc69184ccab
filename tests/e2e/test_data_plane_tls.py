"""`picker proxy --data-plane envoy` with TLS on both sides, certificates of our own making, and real requests."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from e2e.gateway import envoy_missing
from e2e.test_data_plane import BODY, CHAT, World, config, gateway
from e2e.test_data_plane_whole import altered
from picker.config import Config, ConnectionConfig, ScrapeConfig, UpstreamConfig
from picker.frontends.certificates import self_signed

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing())]


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate that is its own authority, and its key, in files."""

    cert: Path
    key: Path

    def shown(self, *, asked_of: "Identity | None" = None) -> ssl.SSLContext:
        """As a server shows it. asked_of: whose certificates clients must have."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        if asked_of is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(asked_of.cert)
        return context

    def trusted(self, *, showing: "Identity | None" = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.cert))
        if showing is not None:
            context.load_cert_chain(showing.cert, showing.key)
        return context


def identity(folder: Path, name: str, *names: str) -> Identity:
    made = Identity(folder / f"{name}.pem", folder / f"{name}.key")
    for path, content in zip((made.cert, made.key), self_signed(names or ("127.0.0.1",)), strict=True):
        beside = path.with_suffix(".new")
        beside.write_bytes(content)
        os.replace(beside, path)
    return made


@asynccontextmanager
async def engine(context: ssl.SSLContext) -> AsyncIterator[tuple[str, list[str]]]:
    """An https endpoint, and the names that it was called by."""
    called: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        if request.path == CHAT:
            called.append(request.host)
        return web.json_response({"choices": []})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"{host}:{port}", called
    finally:
        await runner.cleanup()


def settings(*addresses: str, front: Identity | None = None, **upstream: object) -> Config:
    serving = (
        ConnectionConfig() if front is None else ConnectionConfig(tls_cert=str(front.cert), tls_key=str(front.key))
    )
    return altered(
        config(*(f"https://{each}" for each in addresses)),
        scrape=ScrapeConfig(interval_s=60.0),
        connections=serving,
        upstream=UpstreamConfig(**upstream),  # type: ignore[arg-type]
    )


async def status(world: World, context: ssl.SSLContext | bool = True) -> int:
    url = world.url.replace("http:", "https:") if isinstance(context, ssl.SSLContext) else world.url
    connector = aiohttp.TCPConnector(force_close=True)
    session = aiohttp.ClientSession(connector=connector)
    async with session as client, client.post(url + CHAT, json=BODY, ssl=context) as response:
        return response.status


async def test_clients_and_endpoints_are_spoken_to_by_tls_and_a_renewed_certificate_is_shown(tmp_path: Path) -> None:
    front, back, other = identity(tmp_path, "front"), identity(tmp_path, "back"), identity(tmp_path, "other")
    async with engine(back.shown()) as (good, called), engine(other.shown()) as (stranger, never):
        told = settings(good, stranger, front=front, ca=str(back.cert))
        async with gateway(tmp_path, told) as world:
            for _ in range(6):
                assert await status(world, front.trusted()) == 200
            # Whose certificate is not of the authority is no endpoint: its requests go to the other one.
            assert (len(called), len(never)) == (6, 0)
            before = front.trusted()
            renewed = identity(tmp_path, "front")
            for refresh in world.doors.refreshers.values():
                refresh()
            async with asyncio.timeout(10.0):
                while await _refused(world, renewed.trusted()):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert await _refused(world, before)


async def _refused(world: World, context: ssl.SSLContext) -> bool:
    try:
        return await status(world, context) != 200
    except aiohttp.ClientConnectorCertificateError:
        return True


async def test_without_verification_any_endpoint_will_do_and_one_asks_for_our_certificate(tmp_path: Path) -> None:
    back, ours = identity(tmp_path, "back", "elsewhere.example"), identity(tmp_path, "ours")
    async with engine(back.shown(asked_of=ours)) as (address, called):
        told = settings(address, insecure=True, cert=str(ours.cert), key=str(ours.key))
        async with gateway(tmp_path, told) as world:
            assert await status(world) == 200
            assert len(called) == 1


@pytest.mark.parametrize(("name", "found"), [("elsewhere.example", 200), ("another.example", 503)])
async def test_endpoints_have_the_name_they_are_to_have(tmp_path: Path, name: str, found: int) -> None:
    back = identity(tmp_path, "back", "elsewhere.example")
    async with engine(back.shown()) as (address, _):
        told = settings(address, ca=str(back.cert), server_name=name)
        async with gateway(tmp_path, told) as world:
            assert await status(world) == found


async def test_only_clients_with_a_certificate_are_served_where_one_is_asked_for(tmp_path: Path) -> None:
    front, back, ours = identity(tmp_path, "front"), identity(tmp_path, "back"), identity(tmp_path, "ours")
    async with engine(back.shown()) as (address, _):
        told = settings(address, front=front, ca=str(back.cert))
        asking = ConnectionConfig(tls_cert=str(front.cert), tls_key=str(front.key), tls_client_ca=str(ours.cert))
        async with gateway(tmp_path, altered(told, connections=asking)) as world:
            assert await status(world, front.trusted(showing=ours)) == 200
            with pytest.raises(aiohttp.ClientError):
                await status(world, front.trusted())
