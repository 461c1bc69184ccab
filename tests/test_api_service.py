"""The API as a configuration asks for it."""

import asyncio
import logging
from pathlib import Path

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

import fakes
from fakes import ManualClock
from picker.api_service import serve_api
from picker.client import Client, Features
from picker.config import ApiConfig, Config, override, parse_config, to_values
from picker.errors import ConfigError
from picker.frontends.certificates import self_signed
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry


def runtime() -> Runtime:
    telemetry = Telemetry(CollectorRegistry())
    return Runtime(fakes.scheduler("a"), BlockHasher(b"a secret"), telemetry, clock=ManualClock())


async def port_of(caplog: pytest.LogCaptureFixture) -> int:
    while not (said := [record for record in caplog.records if "the gRPC API is on" in record.message]):  # noqa: ASYNC110
        await asyncio.sleep(0)
    return int(str(said[0].message).rpartition(":")[2].partition(",")[0])


async def test_without_a_port_it_is_off() -> None:
    made = runtime()
    await serve_api(Config(), made, asyncio.Event())
    assert b"picker_api_picks" not in made.telemetry.text()


async def test_it_serves_by_tls_and_key_on_loopback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "picker.api")
    certificate, key = self_signed(["localhost"])
    (tmp_path / "tls.crt").write_bytes(certificate)
    (tmp_path / "tls.key").write_bytes(key)
    api = ApiConfig(host="localhost", port=0, key="secret", cert_path=str(tmp_path))
    made, stop = runtime(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve_api(Config(api=api, drain_timeout_s=0.0), made, stop))
        port = await port_of(caplog)
        credentials = grpc.ssl_channel_credentials(root_certificates=certificate)
        client = Client(f"localhost:{port}", key="secret", credentials=credentials)
        async with client, client.pick(Features()) as picked:
            assert picked.endpoint.name == "a"
            assert b"picker_api_picks 1.0" in made.telemetry.text()
        stop.set()
    assert "by TLS" in caplog.text
    assert "everybody" not in caplog.text


async def test_open_to_everybody_is_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "picker.api")
    stop = asyncio.Event()
    stop.set()
    await serve_api(Config(api=ApiConfig(host="0.0.0.0", port=0), drain_timeout_s=0.0), runtime(), stop)
    assert "in clear text" in caplog.text
    assert "everybody who reaches 0.0.0.0" in caplog.text


async def test_a_certificate_that_cannot_be_used_is_an_error_of_usage(tmp_path: Path) -> None:
    config = Config(api=ApiConfig(port=0, cert_path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"tls\.crt"):
        await serve_api(config, runtime(), asyncio.Event())


@pytest.mark.parametrize(
    ("text", "secure"),
    [
        ("{}", False),
        ("{secure_serving: true}", True),
        ("{cert_path: /tls}", True),
        ("{cert_path: /tls, secure_serving: false}", False),
    ],
)
def test_tls_is_on_with_a_certificate_or_when_asked_for(text: str, secure: bool) -> None:
    assert parse_config(f"api: {text}").api.secure is secure


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{port: 70000}", "api.port"),
        ("{key: ''}", "api.key"),
        ("{client_ca_path: /ca.pem}", "api.client_ca_path"),
        ("{max_message_bytes: 0}", "api.max_message_bytes"),
        ("{prot: 1}", "did you mean 'port'"),
    ],
)
def test_what_cannot_be_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config(f"api: {text}")


def test_flags_win_and_the_key_is_not_shown() -> None:
    config = override(parse_config("api: {port: 1, key: secret}"), {"api.port": 9004})
    assert config.api.port == 9004
    assert to_values(config)["api"]["key"] == "***"
