"""`picker epp` as a process of its own behind a real Envoy: how it goes, how it hangs, what it shows of itself."""

import asyncio
import contextlib
import json
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from echo_upstream import EchoUpstream
from picker.envoy import GATEWAY, Envoy, Json, bootstrap, find_envoy, running_envoy
from picker.errors import ConfigError
from picker.frontends.certificates import self_signed

try:
    find_envoy()
    missing = ""
except ConfigError as error:
    missing = str(error)

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing), reason=missing)]

PROMPT = {"model": "m", "prompt": "Once upon a time"}


@dataclass
class Picker:
    process: asyncio.subprocess.Process
    port: int
    admin: str


@contextlib.asynccontextmanager
async def picker(folder: Path, upstream: EchoUpstream, *flags: str) -> AsyncIterator[Picker]:
    """A process that knows its endpoint."""
    log = folder / "picker.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "picker", "epp", "--host", "127.0.0.1", "--grpc-port", "0"),
            *("--grpc-health-port", "0", "--metrics-port", "0", "--endpoint", f"http://{upstream.address}", *flags),
            stdout=output,
            stderr=output,
        )
    try:
        while not (port := re.search(r"ext-proc on \S*?:(\d+)", log.read_text())):
            assert process.returncode is None, log.read_text()
            await asyncio.sleep(0.02)
        admin = re.search(r"debug on (http://\S+)", log.read_text())
        assert admin is not None
        made = Picker(process, int(port[1]), admin[1])
        await _ready(made)
        yield made
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            await process.wait()


async def _ready(picker: Picker) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(60):
        while True:
            async with session.get(f"{picker.admin}/readyz") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.02)


async def ask(envoy: Envoy) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{envoy.ports[GATEWAY]}/v1/completions", json=PROMPT) as response,
    ):
        await response.read()
        return response.status


@pytest.mark.parametrize("mode", ["full", "lean"])
async def test_told_to_go_it_serves_until_gateways_know_and_lets_streams_end(tmp_path: Path, mode: str) -> None:
    flags = ("--secure-serving", "false", "--mode", mode, "--drain-delay", "2")
    async with EchoUpstream("a").running() as upstream, picker(tmp_path, upstream, *flags) as this:
        config = bootstrap([upstream.address], f"127.0.0.1:{this.port}", lean=mode == "lean")
        async with running_envoy(config) as envoy, aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{envoy.ports[GATEWAY]}/v1/completions"
            async with session.post(url, json=PROMPT | {"stream": True}) as response:
                this.process.terminate()
                loop = asyncio.get_running_loop()
                begun, statuses = loop.time(), []
                while loop.time() < begun + 0.6:
                    statuses.append((await ask(envoy), loop.time() < begun + 2.0))
                assert {status for status, in_time in statuses if in_time} == {200}
                upstream.step(3)
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
            async with asyncio.timeout(60):
                assert await this.process.wait() == 0


async def served(envoy: Envoy) -> None:
    """Wait until Envoy takes picker for alive."""
    async with asyncio.timeout(60):
        while await ask(envoy) != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def quick_keepalive(config: Json) -> None:
    (cluster,) = [each for each in config["static_resources"]["clusters"] if each["name"] == "ext-proc"]
    (options,) = cluster["typed_extension_protocol_options"].values()
    keepalive = options["explicit_http_config"]["http2_protocol_options"]["connection_keepalive"]
    keepalive |= {"interval": "0.2s", "timeout": "0.2s"}
    cluster["health_checks"][0] |= {"timeout": "0.2s", "interval": "0.2s", "no_traffic_interval": "0.2s"}


@pytest.mark.parametrize("allow", [False, True])
async def test_hanging_it_holds_nobody_up_for_long(tmp_path: Path, allow: bool) -> None:
    flags = ("--secure-serving", "false")
    async with EchoUpstream("a").running() as upstream, picker(tmp_path, upstream, *flags) as this:
        config = bootstrap([upstream.address], f"127.0.0.1:{this.port}", failure_mode_allow=allow)
        quick_keepalive(config)
        async with running_envoy(config) as envoy:
            await served(envoy)
            this.process.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(30):
                assert await ask(envoy) in (503, 200 if allow else 503)
                while "cluster.ext-proc.membership_healthy: 0" not in await envoy.admin("/stats"):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                assert await ask(envoy) == (200 if allow else 503)
            this.process.send_signal(signal.SIGCONT)
            await served(envoy)


async def test_it_serves_tls_of_its_own_making_unless_told_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    async with EchoUpstream("a").running() as upstream, picker(tmp_path, upstream) as this:
        config = bootstrap([upstream.address], f"127.0.0.1:{this.port}", tls=True)
        async with running_envoy(config) as envoy:
            assert await ask(envoy) == 200


async def test_it_follows_its_certificate_and_envoy_verifies_it(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    write(tmp_path)
    async with EchoUpstream("a").running() as upstream, picker(tmp_path, upstream, "--cert-path", str(tmp_path)) as it:
        config = bootstrap([upstream.address], f"127.0.0.1:{it.port}", tls=True, ca=tmp_path / "tls.crt")
        async with running_envoy(config) as envoy:
            assert await ask(envoy) == 200
        old = await shown(it.port)
        write(tmp_path)
        async with asyncio.timeout(60):
            while await shown(it.port) == old:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        async with running_envoy(config) as envoy:
            assert await ask(envoy) == 200


def write(folder: Path) -> None:
    certificate, key = self_signed(["localhost", "127.0.0.1"])
    (folder / "tls.crt").write_bytes(certificate)
    (folder / "tls.key").write_bytes(key)


async def shown(port: int) -> bytes:
    """The certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    certificate: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        await writer.wait_closed()
    return certificate


async def test_a_certificate_that_does_not_do_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    done = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "picker", "epp", "--endpoint", "http://127.0.0.1:1", "--cert-path", str(tmp_path)),
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await done.communicate()
    assert done.returncode == 2
    assert "tls.crt" in said.decode()
    assert "Traceback" not in said.decode()
    assert json.dumps(str(tmp_path))[1:-1] in said.decode()
