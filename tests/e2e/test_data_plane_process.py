"""`picker proxy --data-plane envoy` as a process: how it ends, and what it leaves behind."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from e2e.gateway import envoy_missing
from e2e.test_data_plane import BODY, CHAT
from echo_upstream import EchoUpstream
from picker.bench.cputime import family, table

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing()),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's children are read from /proc"),
]
_SAYS = re.compile(rb"proxy on (http://\S+)/v1, by Envoy")


@dataclass(slots=True)
class Gateway:
    process: asyncio.subprocess.Process
    url: str

    @property
    def envoy(self) -> int:
        _, child = family(table(), self.process.pid)
        return child.pid


@asynccontextmanager
async def picker(folder: Path, *endpoints: str) -> AsyncIterator[Gateway]:
    """folder: for its temporary files."""
    flags = [flag for each in endpoints for flag in ("--endpoint", f"http://{each}")]
    command = ("proxy", "--data-plane", "envoy", "--envoy-threads", "2", "--port", "0", "--admin-port", "0", *flags)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "picker", *command),
        env=os.environ | {"TMPDIR": str(folder)},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30.0):
            said = b""
            while (found := _SAYS.search(said)) is None:
                line = await process.stderr.readline()
                assert line, said
                said += line
        yield Gateway(process, found[1].decode())
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def folders(parent: Path) -> list[str]:
    return [each.name for each in parent.iterdir()]


async def test_told_to_go_under_load_it_loses_no_request(tmp_path: Path) -> None:
    """Every request that a connection took is answered, and connections end with an answer that says so."""
    statuses: list[int] = []
    async with EchoUpstream("a").running() as a, picker(tmp_path, a.address) as gateway:

        async def keep_asking(number: int) -> None:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as client:
                # Every other one begins a new connection for each request.
                headers = {"connection": "close"} if number % 2 else {}
                # No port any more; or the system had taken the connection and Envoy not yet, and it ends with the port.
                refused = aiohttp.ClientOSError if number % 2 else aiohttp.ClientConnectorError
                with contextlib.suppress(refused):
                    while True:
                        async with client.post(gateway.url + CHAT, json=BODY, headers=headers) as response:
                            await response.read()
                            statuses.append(response.status)

        async with asyncio.timeout(30.0), asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(keep_asking(number))
            while len(statuses) < 100:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            before = len(statuses)
            gateway.process.terminate()
        assert await gateway.process.wait() == 0
        assert len(statuses) >= before
        assert set(statuses) == {200}
        assert sum(seen.path == CHAT for seen in a.seen) == len(statuses)
    assert not folders(tmp_path)


async def test_killed_it_takes_envoy_along_and_the_next_clears_up_and_brings_a_killed_envoy_back(
    tmp_path: Path,
) -> None:
    async with EchoUpstream("a").running() as a, asyncio.timeout(60.0):
        async with picker(tmp_path, a.address) as gateway:
            envoy = gateway.envoy
            gateway.process.kill()
            await gateway.process.wait()
        while envoy in table():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        (left,) = folders(tmp_path)
        async with picker(tmp_path, a.address) as gateway:
            (own,) = folders(tmp_path)
            assert own != left
            assert gateway.process.stderr is not None
            os.kill(gateway.envoy, signal.SIGKILL)
            while b"Envoy ended by itself; it is started again" not in await gateway.process.stderr.readline():
                pass
            assert await answered(gateway) == 200


async def answered(gateway: Gateway) -> int:
    """The first answer of a gateway that is about to serve."""
    async with aiohttp.ClientSession() as client:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with client.post(gateway.url + CHAT, json=BODY) as response:
                    return response.status
