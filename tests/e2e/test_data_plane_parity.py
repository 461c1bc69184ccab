"""What `picker proxy` does by itself and does as well through its own Envoy."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from e2e.gateway import envoy_missing
from e2e.test_data_plane import BODY, CHAT, KEY, config, gateway
from e2e.test_data_plane_whole import altered, raw
from echo_upstream import EchoUpstream
from picker.config import KeysConfig, RetryConfig, ScrapeConfig

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing())]
GOOD = {"authorization": f"Bearer {KEY}"}


@asynccontextmanager
async def serving(*models: str, status: int = 200) -> AsyncIterator[tuple[str, list[str]]]:
    """An engine with these models that answers everything else with a status: its address, and what it was asked."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        if request.path == "/v1/models":
            entries = [{"id": name, "object": "model"} for name in models]
            return web.json_response({"object": "list", "data": entries})
        return web.Response(status=status)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"{host}:{port}", asked
    finally:
        await runner.cleanup()


async def test_the_models_of_all_endpoints_are_one_list(tmp_path: Path) -> None:
    async with serving("one", "both") as (a, _), serving("two", "both") as (b, _):  # noqa: SIM117
        async with gateway(tmp_path, config(a, b)) as world:
            async with world.client.get(f"{world.url}/v1/models") as response:
                found = await response.json()
                assert response.status == 200
            assert sorted(entry["id"] for entry in found["data"]) == ["both", "one", "two"]
            async with world.client.get(f"{world.url}/v1/models/two?x=1") as response:
                assert (await response.json())["id"] == "two"
            async with world.client.get(f"{world.url}/v1/models/none") as response:
                assert response.status == 404


async def test_models_are_for_those_with_a_key(tmp_path: Path) -> None:
    async with serving("one") as (a, _), gateway(tmp_path, config(a), key=KEY) as world:
        async with world.client.get(f"{world.url}/v1/models") as response:
            assert response.status == 401
        async with world.client.get(f"{world.url}/v1/models", headers=GOOD) as response:
            assert response.status == 200
        assert not world.doors.keys.running


async def test_a_key_has_its_own_limits_of_bodies_and_of_requests_at_once(tmp_path: Path) -> None:
    limits = KeysConfig(max_concurrent=1, max_body_bytes=1000)
    async with EchoUpstream("a").running() as a:
        async with gateway(tmp_path, altered(config(a.address), keys=limits), key=KEY) as world:
            big = b"x" * 1001
            assert (await world.ask("/echo", data=big, headers=GOOD))[0] == 413

            async def pieces() -> AsyncIterator[bytes]:
                yield big

            status, _, body = await world.ask("/echo", data=pieces(), headers=GOOD)
            assert (status, json.loads(body)["error"]["code"]) == (413, 413)
            assert (await world.ask("/echo", data=big[1:], headers=GOOD))[0] == 200
            async with asyncio.timeout(5.0):
                while world.doors.keys.running:  # noqa: ASYNC110 it is told by the log
                    await asyncio.sleep(0.01)
            async with world.client.post(world.url + CHAT, json=BODY | {"stream": True}, headers=GOOD) as response:
                assert response.status == 200
                status, headers, _ = await world.ask(headers=GOOD)
                assert (status, headers["retry-after"]) == (429, "1")
                a.step(10)
        assert [seen.path for seen in a.seen if seen.path == "/echo"] == ["/echo"]


async def test_an_outage_does_not_multiply_its_requests(tmp_path: Path) -> None:
    """Everybody refuses: three attempts each, until a few have been told of, and one from then on."""
    async with serving(status=503) as (a, asked), serving(status=503) as (b, also):
        settings = altered(config(a, b), retry=RetryConfig(ratio=0.0, floor=4.0), scrape=ScrapeConfig(interval_s=60.0))
        async with gateway(tmp_path, settings) as world:

            def attempts() -> int:
                return sum(path == CHAT for path in (*asked, *also))

            feedback = world.plane.extproc.feedback
            assert feedback is not None
            for _ in range(3):
                assert (await world.ask())[0] == 503
            async with asyncio.timeout(5.0):
                while len(feedback):  # noqa: ASYNC110 it is told by the log
                    await asyncio.sleep(0.01)
            before = attempts()
            assert before > 3
            for _ in range(3):
                assert (await world.ask())[0] == 503
            assert attempts() == before + 3
            status, _ = await raw(
                world, f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n", chunked()
            )
            assert status == 503
            assert attempts() == before + 4


def chunked() -> bytes:
    body = json.dumps(BODY).encode()
    return f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"


async def test_an_address_that_leads_back_here_is_told_apart_from_an_endpoint(tmp_path: Path) -> None:
    async with EchoUpstream("a").running() as a, gateway(tmp_path, config(a.address)) as world:
        assert (await world.ask())[0] == 200
        said = next(seen.headers["via"] for seen in a.seen if seen.path == CHAT)
        assert (await world.ask(headers={"via": "1.1 other"}))[0] == 200
        assert (await world.ask(headers={"via": said}))[0] == 508
        async with world.client.get(f"{world.url}/x", headers={"via": said}) as response:
            assert response.status == 508


def listing(address: str) -> str:
    """A file of endpoints with this one alone."""
    host, _, port = address.partition(":")
    return json.dumps({"endpoints": [{"name": address, "address": host, "port": int(port)}]})


async def test_endpoints_come_and_go_under_load_and_no_request_fails(tmp_path: Path) -> None:
    path = tmp_path / "endpoints"
    async with EchoUpstream("a").running() as a, EchoUpstream("b").running() as b:
        path.write_text(listing(a.address))
        settings = altered(config(a.address), endpoints=[], endpoints_file=str(path))
        async with gateway(tmp_path, settings) as world:
            over, statuses = asyncio.Event(), []
            running = await world.client.post(world.url + CHAT, json=BODY | {"stream": True})

            async def keep_asking() -> None:
                while not over.is_set():
                    statuses.append((await world.ask())[0])

            async with asyncio.timeout(20.0), asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(keep_asking())
                for address, server in ((b.address, b), (a.address, a), (b.address, b)):
                    beside = path.with_name("new")
                    beside.write_text(listing(address))
                    os.replace(beside, path)
                    seen = len(server.seen)
                    while sum(each.path == CHAT for each in server.seen[seen:]) < 20:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                over.set()
            a.step(10)
            assert (await running.read()).endswith(b"data: [DONE]\n\n")  # its endpoint has gone and come and gone
            assert len(statuses) > 60
            assert set(statuses) == {200}
