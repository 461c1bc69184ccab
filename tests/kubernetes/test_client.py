from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
import yaml

from kubernetes.answers import status
from kubernetes.api_server import serving
from kubernetes.certificate import encoded, pair
from kubernetes.manifests import PODS, pod
from kubernetes.stage import access_to
from picker.sources.kubernetes.client import ApiError, Client
from picker.sources.kubernetes.credentials import Access, FixedTokens, from_kubeconfig
from picker.sources.kubernetes.objects import read_page
from virtual_time import in_virtual_time

PATH = "/api/v1/namespaces/default/pods"


async def refusal(client: Client, path: str = PATH) -> ApiError:
    with pytest.raises(ApiError) as refused:
        await client.get(path, {})
    assert "\n" not in str(refused.value)
    return refused.value


@in_virtual_time
async def test_a_list_is_read_whole() -> None:
    async with serving() as server:
        server.apply(*PODS, pod("a"))
        async with Client(access_to(server)) as client:
            page = read_page(await client.get(PATH, {"labelSelector": "app in (vllm, x)"}))
            assert len(page.items or ()) == 1
            assert server.asked == [(PATH, {"labelSelector": "app in (vllm, x)"})]


@in_virtual_time
async def test_refusals_are_the_api_servers_words_with_its_status() -> None:
    async with serving() as server, Client(access_to(server)) as client:
        server.forbidden.add("pods")
        error = await refusal(client)
        assert (error.status, error.expired) == (403, False)
        assert str(error).startswith("the API server says: pods is forbidden: User")
        server.failing = [status(410, "Expired", "too old")]
        assert (await refusal(client)).expired
        server.failing = [status(429, "TooManyRequests", "slow down", {"Retry-After": "7"})]
        assert (await refusal(client)).retry_after == 7.0


@in_virtual_time
async def test_a_token_is_sent_and_asked_for_once_more_when_it_is_refused() -> None:
    class Renewed:
        async def token(self, *, renew: bool = False) -> str:
            return "good" if renew else "stale"

    async with serving() as server:
        server.token = "good"
        async with Client(Access(server.url, Renewed())) as client:
            await client.get(PATH, {})
            assert len(server.asked) == 2
        async with Client(Access(server.url, FixedTokens("bad"))) as client:
            assert (await refusal(client)).status == 401


@in_virtual_time
async def test_a_server_that_is_not_there_is_named_without_a_status() -> None:
    async with serving() as server:
        access = access_to(server)
        await server.down()
        async with Client(access) as client:
            error = await refusal(client)
            assert error.status is None
            assert "the API server cannot be reached" in str(error)


@in_virtual_time
async def test_a_way_that_breaks_off_before_tls_is_said_so() -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with await asyncio.start_server(broken, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        async with Client(Access(f"https://127.0.0.1:{port}", FixedTokens())) as client:
            error = await refusal(client)
            assert error.status is None
            assert str(error).rpartition(": ")[2] in ("it breaks connections off", "Connection reset by peer")


@in_virtual_time
async def test_a_list_that_does_not_come_is_given_up() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        ended.set()

    ended = asyncio.Event()
    listener = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        async with Client(Access(f"http://127.0.0.1:{port}", FixedTokens()), timeout=30.0) as client:
            assert str(await refusal(client)) == "the API server does not answer in time"
        await ended.wait()


@in_virtual_time
async def test_a_token_that_cannot_be_read_is_told_as_the_way_to_the_server() -> None:
    class Gone:
        async def token(self, *, renew: bool = False) -> str:
            raise FileNotFoundError(2, "No such file or directory", "/secret/token")

    async with Client(Access("http://127.0.0.1:1", Gone())) as client:
        assert str(await refusal(client)) == "the API server cannot be asked: No such file or directory"


@in_virtual_time
async def test_the_server_is_verified_and_a_client_certificate_is_shown(tmp_path: Path) -> None:
    certificate, key = pair()
    (tmp_path / "pair.pem").write_bytes(certificate + key)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tmp_path / "pair.pem"))
    tls.load_cert_chain(tmp_path / "pair.pem")
    tls.verify_mode = ssl.CERT_REQUIRED
    async with serving(tls) as server:
        own = {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}
        async with Client(_access(tmp_path, server.url, encoded(certificate), own)) as client:
            await client.get(PATH, {})
        async with Client(_access(tmp_path, server.url, encoded(pair()[0]), own)) as client:
            assert "not signed by the authority" in str(await refusal(client))
        async with Client(_access(tmp_path, server.url, encoded(certificate), {})) as client:
            assert (await refusal(client)).status is None


def _access(folder: Path, url: str, authority: str, user: dict[str, str]) -> Access:
    content = {
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "clusters": [{"name": "x", "cluster": {"server": url, "certificate-authority-data": authority}}],
        "users": [{"name": "x", "user": user}],
    }
    (folder / "config").write_text(yaml.safe_dump(content))
    return from_kubeconfig(folder / "config")
