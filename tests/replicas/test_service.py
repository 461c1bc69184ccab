"""What a configuration says about other replicas: a secret that all have, and who they are."""

import socket
from pathlib import Path

import pytest

from fakes import endpoint, request
from picker.app import App
from picker.config import Config, ReplicasConfig, from_values, to_values
from picker.errors import ConfigError
from picker.replicas.service import SECRET, Replicas, parse_peer, read_secret
from picker.runtime import Runtime
from picker.types import Booked, EndpointAdded

LONG = "0123456789abcdef"


def configured(**replicas: object) -> Config:
    return from_values({"endpoints": ["http://10.0.0.1:8000"], "replicas": {"peers": ["peers:9005"], **replicas}})


def nowhere(host: str, port: int) -> socket.socket:
    raise AssertionError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("picker-peers", ("picker-peers", 9005)),
        ("picker-peers.llm.svc:1234", ("picker-peers.llm.svc", 1234)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[fd00::1]:9006", ("fd00::1", 9006)),
        ("[fd00::1]", ("fd00::1", 9005)),
    ],
)
def test_a_peer_is_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert parse_peer(text, 9005) == address


@pytest.mark.parametrize("text", ["", ":9005", "host:", "host:0", "host:70000", "host:http"])
def test_what_is_none_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"replicas\.peers"):
        parse_peer(text, 9005)


def test_the_secret_is_in_the_configuration_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{LONG}1\n")
    monkeypatch.setenv(SECRET, f"{LONG}2")
    assert read_secret(ReplicasConfig(secret=f"{LONG}0", secret_file=str(file))) == f"{LONG}0".encode()
    assert read_secret(ReplicasConfig(secret_file=str(file))) == f"{LONG}1".encode()
    assert read_secret(ReplicasConfig()) == f"{LONG}2".encode()


def test_without_a_secret_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    with pytest.raises(ConfigError, match="they need a secret in common"):
        App(configured())
    with pytest.raises(ConfigError, match="can be guessed"):
        App(configured(secret="short"))
    with pytest.raises(ConfigError, match="secret_file"):
        App(configured(secret_file="/nowhere/at/all"))


def test_who_is_alone_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    app = App(from_values({"endpoints": ["http://10.0.0.1:8000"]}))
    assert app.replicas is None
    assert app.informed


def test_all_with_one_secret_hash_alike_whoever_started_them() -> None:
    one, other = App(configured(secret=LONG), secret=b"of its parent"), App(configured(secret=LONG))
    assert one.secret == other.secret != App(configured(secret=LONG + "else")).secret
    assert LONG.encode() not in one.secret


def test_what_it_knows_of_others_is_in_readyz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_NAME", "picker-7")
    app = App(configured(secret=LONG))
    runtime: Runtime = app.runtime
    assert runtime.reports["replicas"]()["name"] == "picker-7"
    assert not app.informed


def test_other_replicas_requests_are_not_counted_as_in_flight_here() -> None:
    app = App(configured(secret=LONG))
    app.runtime.learn([EndpointAdded(endpoint("a")), Booked("a", request(-1), 10, 10)])
    registry = app.telemetry.registry
    assert len(app.runtime.scheduler.charges) == 1
    assert registry.get_sample_value("picker_inflight_requests") == 0


def test_secrets_are_masked() -> None:
    shown = to_values(configured(secret=LONG, redis="rediss://user:word@redis:6379/0"))["replicas"]
    assert shown["secret"] == "***"
    assert shown["redis"] == "rediss://***@redis:6379/0"


def test_a_redis_that_is_no_url_is_named() -> None:
    pytest.importorskip("redis", reason="the library `redis` is not installed")
    from picker.replicas.redis_bus import _client

    with pytest.raises(ConfigError, match=r"replicas\.redis"):
        _client("redis.example:6379")


def test_replicas_are_not_joined_before_somebody_asks() -> None:
    assert Replicas(ReplicasConfig(peers=["a"], secret=LONG), listen=nowhere).circle is None
